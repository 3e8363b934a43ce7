"""A policy folder: saved, loaded, and refused when anything in it is not as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import ActionTable, action_table
from llmrl_envs.interface.job_scale import LARGEST_LANGUAGE_MODEL
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from llmrl.cli import main
from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy, hold_policy

TABLE = action_table("moves")
SPEC = ObservationSpec(TABLE)


def make_policy(**network: object) -> SchedulePolicy:
    config = NetworkConfig(obs_shape=(SPEC.size,), num_actions=TABLE.num_actions, hidden_sizes=(8,), **network)
    q_network = QNetwork(config, torch.Generator().manual_seed(0)).eval()
    return SchedulePolicy(TABLE, SPEC, ScheduleSettings(rollbacks=1), q_network, {"name": "test", "seed": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_policy().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_a_loaded_policy_acts_as_the_saved_one(folder: Path) -> None:
    observation = np.random.default_rng(0).normal(size=(5, SPEC.size)).astype(np.float32)
    mask = np.ones((5, TABLE.num_actions), np.bool_)
    before, after = make_policy().act(observation, mask), SchedulePolicy.from_pretrained(folder).act(observation, mask)
    np.testing.assert_array_equal(before.actions, after.actions)
    np.testing.assert_array_equal(before.q_values, after.q_values)
    assert SchedulePolicy.from_pretrained(folder).settings == ScheduleSettings(rollbacks=1)


def test_saving_the_same_policy_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_policy().save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_digest_tells_policies_of_one_name_apart(folder: Path) -> None:
    saved, loaded, other = make_policy(), SchedulePolicy.from_pretrained(folder), make_policy()
    assert loaded.digest == saved.digest == other.digest
    assert other.network is not None
    with torch.no_grad():
        next(other.network.parameters())[0] += 1e-3
    assert other.digest != saved.digest
    later = SchedulePolicy(TABLE, SPEC, ScheduleSettings(rollbacks=2), saved.network, saved.provenance)
    assert later.digest != saved.digest


def test_masked_actions_are_never_taken() -> None:
    observation = np.random.default_rng(1).normal(size=(64, SPEC.size)).astype(np.float32)
    mask = np.zeros((64, TABLE.num_actions), np.bool_)
    mask[:, [0, TABLE.hold]] = True
    assert set(make_policy().act(observation, mask).actions.tolist()) <= {0, TABLE.hold}


def test_hold_holds_and_has_no_values() -> None:
    decision = SchedulePolicy.from_pretrained("hold").act(
        np.zeros((2, SPEC.size), np.float32), np.ones((2, 9), np.bool_)
    )
    assert decision.actions.tolist() == [TABLE.hold] * 2
    assert np.isnan(decision.q_values).all()


def test_hold_can_be_saved_and_loaded(tmp_path: Path) -> None:
    hold_policy().save_pretrained(tmp_path)
    assert SchedulePolicy.from_pretrained(tmp_path).network is None


def test_the_card_says_what_it_does_and_knows(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "two_down" in card
    assert '"seed": 3' in card
    assert SPEC.hash in card


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema_version": 99}, "another version"),
        ({"surprise": 1}, "surprise"),
        ({"observation_hash": "0" * 16}, "another observation"),
        ({"observation": {"stack": 0}}, "another observation"),
        ({"action_table_hash": "0" * 16}, "action table was changed"),
        ({"action_table": {}}, "action table cannot be read"),
        ({"schedule": {"no_such": 1}}, "schedule settings"),
    ],
)
def test_a_changed_config_is_refused(folder: Path, changes: dict[str, object], told: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=told):
        SchedulePolicy.from_pretrained(folder)


def test_a_missing_key_is_named(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["kind"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="kind"):
        SchedulePolicy.from_pretrained(folder)


def test_a_policy_for_other_actions_than_its_network_is_refused(folder: Path, tmp_path: Path) -> None:
    table = action_table("factors")
    other = SchedulePolicy(table, ObservationSpec(table), ScheduleSettings(), None)
    other.save_pretrained(tmp_path / "other")
    values = json.loads((tmp_path / "other" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "kind": "network"}))
    with pytest.raises(UserError, match="does not fit"):
        SchedulePolicy.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"not a tensor file"])
def test_damaged_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.from_pretrained(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.from_pretrained(folder)


def test_broken_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        SchedulePolicy.from_pretrained(folder)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/policy", "nowhere"])
def test_a_missing_folder_is_told(source: str) -> None:
    with pytest.raises(UserError, match="no policy folder"):
        SchedulePolicy.from_pretrained(source)


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        SchedulePolicy.from_pretrained(tmp_path)


def test_what_is_missing_from_the_config_is_not_filled_in(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    schedule = {name: value for name, value in values["schedule"].items() if name != "rollbacks"}
    edit(folder, schedule=schedule)
    with pytest.raises(UserError, match="schedule settings cannot be read"):
        SchedulePolicy.from_pretrained(folder)
    edit(folder, schedule={**schedule, "rollbacks": "2"})
    with pytest.raises(UserError, match="rollbacks"):
        SchedulePolicy.from_pretrained(folder)


def test_a_policy_of_a_version_without_a_setting_has_its_default(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    before = SchedulePolicy.from_pretrained(folder)
    edit(folder, schedule={name: v for name, v in values["schedule"].items() if name != "earliest_cooldown"})
    older = SchedulePolicy.from_pretrained(folder)
    assert older.settings == before.settings
    assert older.digest == before.digest


@pytest.mark.parametrize("section", ["action_table", "observation"])
def test_an_extra_key_anywhere_is_refused(folder: Path, section: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit(folder, **{section: {**values[section], "surprise": 1}})
    with pytest.raises(UserError, match=r"config\.json"):
        SchedulePolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"schema_version": 1, "schema_version": 1}', "stands twice"),
        ("[" * 100_000, "nested"),
        ("[1]", "another version"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_a_config_that_is_no_config_is_refused(folder: Path, text: str, told: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        SchedulePolicy.from_pretrained(folder)


def test_a_config_of_many_megabytes_is_not_read(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"schema_version": 1, "provenance": "x" * 5_000_000}))
    with pytest.raises(UserError, match="too large"):
        SchedulePolicy.from_pretrained(folder)


def test_weights_beside_a_policy_that_holds_are_refused(folder: Path, tmp_path: Path) -> None:
    hold_policy().save_pretrained(tmp_path / "hold")
    (tmp_path / "hold" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="do not fit its kind"):
        SchedulePolicy.from_pretrained(tmp_path / "hold")


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        SchedulePolicy.from_pretrained(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the weights with the same metadata."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update({"torso.layers.0.weight": torch.zeros(8, 3)}), r"expected \[8, \d+\].*got \[8, 3\]"),
        (lambda t: t.update({"head.layer.bias": t["head.layer.bias"].to(torch.float16)}), "got .* torch.float16"),
        (lambda t: t.pop("head.layer.bias"), "head.layer.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t["head.layer.bias"].fill_(float("nan")), "not finite"),
    ],
    ids=["shape", "dtype", "missing", "extra", "nan"],
)
def test_wrong_tensors_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    change_tensors(folder, change)
    with pytest.raises(UserError, match=told) as caught:
        SchedulePolicy.from_pretrained(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


class Bomb:
    """Leaves a trace if anything unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "pytorch_model.bin", "data.pkl", "notes"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_refused_and_never_run(folder: Path, tmp_path: Path, name: str, how: str) -> None:
    trace = tmp_path / "trace"
    if how == "pickle":
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save(Bomb(trace), folder / name)
    with pytest.raises(UserError, match="pickle") as caught:
        SchedulePolicy.from_pretrained(folder)
    assert name in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "anything"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../outside")
    with pytest.raises(UserError, match="outside of its folder"):
        SchedulePolicy.from_pretrained(folder)


def test_a_snapshot_in_the_cache_of_the_hub_is_a_policy(folder: Path, tmp_path: Path) -> None:
    """The cache keeps files under blobs/ and links to them."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        (repository / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert SchedulePolicy.from_pretrained(snapshot).network is not None
    (snapshot / "extra").symlink_to("../../../outside")
    with pytest.raises(UserError, match="outside of its folder"):
        SchedulePolicy.from_pretrained(snapshot)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: shutil.rmtree(folder),
    "truncated config": lambda folder: (folder / "config.json").write_text('{"schema_version": 1, '),
    "truncated weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "another version": lambda folder: edit(folder, schema_version=2),
    "extra key": lambda folder: edit(folder, surprise=1),
    "pickle": lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({})),
    "link": lambda folder: (folder / "more").symlink_to("/etc/passwd"),
    "dtype": lambda folder: change_tensors(folder, lambda t: t.update({"head.layer.bias": torch.zeros(9).double()})),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_a_command_ends_with_code_2_before_anything_is_trained(
    folder: Path, tmp_path: Path, command: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](folder)
    config = tmp_path / "config.yaml"
    task = "{name: job, data: 'builtin:json', steps: 20}"
    config.write_text(f"task: {task}\n" if command == "finetune" else f"tasks: [{task}]\n")
    words = [command, "--config", str(config), "--policy", str(folder), "--output", str(tmp_path / "run")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert str(folder) in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_policy_holds_where_it_says_that_it_does_harm(tmp_path: Path, wrapped: bool) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    classifier: nn.Module = BertForSequenceClassification(BertConfig(vocab_size=16, **sizes))
    speaker: nn.Module = BertForMaskedLM(BertConfig(vocab_size=16, **sizes))
    if wrapped:
        classifier, speaker = nn.Sequential(classifier), nn.Sequential(speaker)
    everywhere = make_policy()
    careful = SchedulePolicy(
        everywhere.table,
        everywhere.spec,
        ScheduleSettings(base="wsd_40", cooldown_progress=0.2),
        everywhere.network,
        {"name": "careful"},
        ["classification"],
    )
    assert everywhere.for_model(classifier, 100) is everywhere
    assert careful.for_model(speaker, 100) is careful
    careful.save_pretrained(tmp_path)
    read = SchedulePolicy.from_pretrained(tmp_path)
    assert read.digest == careful.digest
    assert read.digest != everywhere.digest
    holding = read.for_model(classifier, 100)
    assert (holding.network, holding.settings, holding.name) == (None, ScheduleSettings(), "careful")
    assert "holds there" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_policy_holds_on_larger_models_where_it_says_so() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=16, **sizes))
    policy, largest = make_policy(), int(LARGEST_LANGUAGE_MODEL)
    careful = SchedulePolicy(policy.table, policy.spec, policy.settings, policy.network, None, ["larger_models"])
    assert careful.for_model(model, largest) is careful
    assert careful.for_model(model, largest + 1).network is None
    assert policy.for_model(model, largest + 1) is policy
    assert "harm on larger models" in careful.card()


def test_where_it_holds_a_guard_has_every_level_of_hold() -> None:
    """A table of few levels leaves a guard no place to come down to."""
    table = action_table("rise")
    narrow = SchedulePolicy(table, ObservationSpec(table), ScheduleSettings(), None, {"name": "n"}, ["larger_models"])
    holding = narrow.for_model(nn.Linear(2, 2), int(LARGEST_LANGUAGE_MODEL) + 1)
    assert (holding.table, holding.spec.hash) == (hold_policy().table, hold_policy().spec.hash)
    assert holding.reference == narrow.reference


def test_where_it_holds_it_may_still_lean_if_its_network_says_so() -> None:
    table = action_table("lean")
    spec = ObservationSpec(table)
    lean, hold = table.names.index("lean"), table.hold
    config = NetworkConfig(obs_shape=(spec.size,), num_actions=table.num_actions, hidden_sizes=(4,), default_action=1)
    settings = ScheduleSettings(base="wsd_40")
    model, seen = nn.Linear(2, 2), np.zeros((1, spec.size), np.float32)
    for wanted in (lean, hold):
        network = QNetwork(config, torch.Generator().manual_seed(0)).eval()
        with torch.no_grad():
            network.prefer(wanted, 1.0)
            network.head.layer.bias[1:3] = 3.0  # it would rather begin its cooldown, or rise
        policy = SchedulePolicy(table, spec, settings, network, {"name": "n"}, ["larger_models_but_lean"])
        holding = policy.for_model(model, int(LARGEST_LANGUAGE_MODEL) + 1)
        assert (holding.name, holding.settings.base, holding.table) == ("n", "linear", table)
        assert holding.act(seen, np.ones((1, table.num_actions), np.bool_)).actions.tolist() == [wanted]
        assert holding.digest != policy.digest
    assert "harm on larger models and holds there, but for leaning" in policy.card()
    both: list[Any] = ["larger_models_but_lean", "larger_models"]
    plain = SchedulePolicy(table, spec, settings, network, {"name": "n"}, both)
    assert plain.for_model(model, int(LARGEST_LANGUAGE_MODEL) + 1).network is None


# -- what a stranger could put into a folder --------------------------------------------------------------------------


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def a_circle(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def a_dead_end(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nothing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "anything"])
@pytest.mark.parametrize("put", [a_pipe, a_circle, a_dead_end])
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, name: str, put: Callable[[Path], None]) -> None:
    put(folder / name)
    with pytest.raises(UserError, match=r"not a file|cannot be read") as caught:
        SchedulePolicy.from_pretrained(folder)
    assert str(folder / name) in str(caught.value)


def test_a_folder_that_is_no_policy_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a whole disk."""
    monkeypatch.delattr(Path, "rglob")
    with pytest.raises(UserError, match="no readable config"):
        SchedulePolicy.from_pretrained(tmp_path)


def test_a_file_without_access_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests as root may read everything, so the system's answer is made up."""

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("llmrl.policy_files._is_pickle", refuse)
    with pytest.raises(UserError, match="cannot be read") as caught:
        SchedulePolicy.from_pretrained(folder)
    assert "Permission denied" in str(caught.value)


def edit_table(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the action table, and whatever is derived from it, as one would who knows the format."""
    values = json.loads((folder / "config.json").read_text())
    change(values["action_table"])
    table = ActionTable.from_dict(values["action_table"])
    spec = ObservationSpec(table)
    edit(
        folder,
        action_table=json.loads(json.dumps(table.to_dict())),
        action_table_hash=table.hash,
        observation=spec.to_dict(),
        observation_hash=spec.hash,
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table["levels"].__setitem__(0, -1.0), "levels above zero"),
        (lambda table: table["levels"].__setitem__(0, float("nan")), "levels above zero"),
        (lambda table: table["levels"].__setitem__(8, float("inf")), "levels above zero"),
        (lambda table: table["levels"].reverse(), "levels above zero"),
        (lambda table: table["levels"].clear(), "levels above zero"),
        (lambda table: table.update(default_level=-1), "default level on the grid"),
        (lambda table: table["actions"][0].update(move=10**30), "shorter than the grid"),
        (lambda table: table["actions"][0].update(level=9), "jumps to places"),
        (lambda table: table["actions"][0].update(level="3"), "jumps to places"),
        (lambda table: table["actions"][0].update(level=[1]), "jumps to places"),
        (lambda table: table["actions"][0].update(name=3), "printable"),
        (lambda table: table["actions"][0].update(name="\x1b[2J"), "printable"),
        (lambda table: table["actions"][0].update(name="hold"), "name of its own"),
        (lambda table: table["actions"][2].update(name="stay"), "'hold'"),
    ],
)
def test_an_action_table_that_cannot_steer_is_refused_though_its_digests_are_right(
    folder: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    edit_table(folder, change)
    with pytest.raises(UserError, match=told):
        SchedulePolicy.from_pretrained(folder)


def test_a_level_that_no_number_holds_is_refused(folder: Path) -> None:
    table = json.loads((folder / "config.json").read_text())["action_table"]
    table["levels"][0] = 10**400
    edit(folder, action_table=table)
    with pytest.raises(UserError, match="action table cannot be read"):
        SchedulePolicy.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, "", "a" * 201, "two\nlines", "\x1b[31mred", {"a": 1}])
def test_a_name_that_is_none_is_refused(folder: Path, name: object) -> None:
    edit(folder, provenance={"name": name})
    with pytest.raises(UserError, match="the policy's name is none"):
        SchedulePolicy.from_pretrained(folder)


def test_text_that_cannot_be_written_down_is_refused(folder: Path) -> None:
    edit(folder, provenance={"name": "mine", "note": "\ud800"})
    with pytest.raises(UserError, match=r"(?s)not JSON.*surrogates"):
        SchedulePolicy.from_pretrained(folder)


def test_a_number_of_rollbacks_that_no_array_holds_is_refused(folder: Path) -> None:
    schedule = json.loads((folder / "config.json").read_text())["schedule"]
    edit(folder, schedule={**schedule, "rollbacks": 10**30})
    with pytest.raises(UserError, match=r"(?s)schedule.*0 to 1000000"):
        SchedulePolicy.from_pretrained(folder)


def test_weights_whose_sums_overflow_are_refused(folder: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(3e38)

    change_tensors(folder, enlarge)
    with pytest.raises(UserError, match="values are not finite"):
        SchedulePolicy.from_pretrained(folder)


@pytest.mark.parametrize("key", ["value_min", "value_max", "default_action_margin", "noisy_scale"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_of_the_networks_configuration_are_finite(folder: Path, key: str, number: float) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["network_config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"network_config": json.dumps({**config, key: number})})
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.from_pretrained(folder)


def test_a_message_stays_readable_whatever_the_file_holds(folder: Path) -> None:
    edit(folder, **{f"key{index}": "x" * 1000 for index in range(1000)})
    with pytest.raises(UserError) as caught:
        SchedulePolicy.from_pretrained(folder)
    assert len(str(caught.value)) < 2000
