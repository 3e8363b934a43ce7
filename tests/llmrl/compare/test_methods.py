from pathlib import Path

import numpy as np
import pytest
from llmrl_envs.errors import UserError

from llmrl.cli import main
from llmrl.compare.methods import resolve_methods, sweep_method
from llmrl.compare.names import METHOD_NAMES
from llmrl.policy import SchedulePolicy


def test_methods_stand_in_the_order_of_the_configuration(make_config, make_policy, tmp_path: Path) -> None:
    folder = str(make_policy(tmp_path / "other"))
    config = make_config(methods=["wsd", "policy", folder, "hold"])
    methods = resolve_methods(config, "hold")
    assert list(methods) == ["wsd", "policy", folder, "hold"]
    assert methods["policy"].digest == methods["hold"].digest
    assert [method.guarded for method in methods.values()] == [False, True, True, True]


def test_the_policy_of_the_command_line_is_always_compared(make_config) -> None:
    assert list(resolve_methods(make_config(methods=["linear", "cosine"]), "hold")) == ["policy", "linear", "cosine"]


def test_unknown_names_are_mistakes_of_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("tasks: [{data: 'builtin:json'}]\nmethods: [policy, liner, cosin, linear]\n")
    assert main(["config", "validate", str(path)]) == 2
    told = capsys.readouterr().err
    assert "line 2, methods" in told
    assert "did you mean 'linear'?" in told
    assert "did you mean 'cosine'?" in told


def test_a_policy_that_is_not_there_is_told(make_config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no policy folder there"):
        resolve_methods(make_config(methods=["policy", str(tmp_path / "nothing")]), "hold")
    with pytest.raises(UserError, match="no policy folder there"):
        resolve_methods(make_config(), str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("actions", "start", "expected"),
    [("moves", "default", False), ("moves", "given", True), ("factors", "default", True)],
)
def test_only_a_default_level_makes_the_given_rate_irrelevant(
    make_config, make_policy, tmp_path: Path, actions: str, start: str, expected: bool
) -> None:
    folder = make_policy(tmp_path / "policy", actions=actions, start=start)
    assert resolve_methods(make_config(), str(folder))["policy"].depends_on_rate is expected


def test_hold_lean_is_hold_with_steps_that_lean_from_the_start(make_config) -> None:
    methods = resolve_methods(make_config(methods=["hold", "hold_lean"]), "hold")
    hold, leaning = methods["hold"], methods["hold_lean"]
    assert leaning.digest != hold.digest
    assert leaning.settings == hold.settings
    assert not leaning.depends_on_rate
    table = leaning.policy.table
    mask = np.ones((2, table.num_actions), np.bool_)
    mask[1, table.names.index("lean")] = False
    actions = leaning.policy.act(np.zeros((2, leaning.policy.spec.size), np.float32), mask).actions
    assert [table.names[action] for action in actions] == ["lean", "hold"]


def test_a_guard_without_validation_is_another_method_and_asks_for_none(make_config) -> None:
    usual, cheap = (
        resolve_methods(make_config(methods=["hold", "linear"], guard_validates=validates), "hold")
        for validates in (True, False)
    )
    assert [usual["hold"].validations, cheap["hold"].validations] == ["guard", "never"]
    assert usual["hold"].digest != cheap["hold"].digest
    assert usual["linear"].digest == cheap["linear"].digest
    assert cheap["linear"].validations == "never"
    assert cheap["hold"].description["guard_validates"] is False


def test_guards_can_be_told_to_take_steps_whose_loss_stands_out(make_config):
    skipping, taking = (
        resolve_methods(make_config(methods=["hold", "best_constant", "linear"], guard_skips=skips), "hold")
        for skips in (True, False)
    )
    for name in ("hold", "best_constant"):
        assert skipping[name].digest != taking[name].digest
    levels = taking["best_constant"].levels
    assert not any(method.settings.skip_outliers for method in (taking["hold"], *levels))
    assert skipping["hold"].settings.skip_outliers
    assert skipping["linear"].digest == taking["linear"].digest


def test_settings_of_the_comparison_replace_those_of_the_policy(make_config, make_policy, tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "policy")
    methods = resolve_methods(make_config(methods=["policy", "hold"], schedule={"start": "given"}), str(folder))
    assert all(method.depends_on_rate for method in methods.values())
    assert resolve_methods(make_config(), str(folder))["policy"].settings.start == "default"


def test_equal_policies_have_equal_digests_wherever_they_lie(make_config, make_policy, tmp_path: Path) -> None:
    def digest(folder: str, **changes: object) -> str:
        return resolve_methods(make_config(), str(make_policy(tmp_path / folder, **changes)))["policy"].digest

    first = digest("first")
    assert digest("second", name="another name") == first
    others = {digest("third", seed=1), digest("fourth", start="given"), digest("fifth", actions="moves_only")}
    assert len(others | {first}) == 4


def test_where_a_policy_holds_is_part_of_its_digest(make_config, make_policy, tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "policy")
    everywhere = resolve_methods(make_config(), str(folder))["policy"].digest
    policy = SchedulePolicy.from_pretrained(folder)
    policy.holds_on = ("classification",)
    policy.save_pretrained(folder)
    assert resolve_methods(make_config(), str(folder))["policy"].digest != everywhere


def test_a_policys_own_settings_are_not_forced_on_a_job_that_it_holds_on(make_config, make_policy, tmp_path) -> None:
    folder = str(make_policy(tmp_path / "policy", base="wsd_40"))
    own = resolve_methods(make_config(), folder)["policy"]
    assert own.settings.base == "wsd_40"
    assert own.replaced_settings is None
    asked = resolve_methods(make_config(schedule={"base": "cosine"}), folder)["policy"]
    assert asked.replaced_settings == asked.settings
    assert asked.settings.base == "cosine"


def test_the_sweep_is_the_method_linear(make_config) -> None:
    config = make_config(schedule={"warmup_fraction": 0.2})
    sweep = sweep_method(config)
    assert sweep.digest == resolve_methods(config, "hold")["linear"].digest
    assert sweep.settings.warmup_fraction == 0.2
    assert sweep.digest != sweep_method(make_config()).digest


def test_the_page_tells_of_every_method() -> None:
    page = (Path(__file__).parents[3] / "docs" / "compare.md").read_text(encoding="utf-8")
    assert [name for name in METHOD_NAMES if f"`{name}`" not in page] == []


def test_constant_has_no_warm_up_and_constant_warmup_has(make_config) -> None:
    methods = resolve_methods(make_config(methods=["constant", "constant_warmup"]), "hold")
    shapes = [(method.settings.base, method.settings.warmup_fraction) for method in methods.values()][1:]
    assert shapes == [("constant", 0.0), ("constant", 0.05)]
