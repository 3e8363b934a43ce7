"""A comparison of runs that exist already: the same numbers as one that makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from llmrl_envs.errors import UserError

from llmrl.cli import main
from llmrl.compare.existing import compare_existing, read_runs
from llmrl.compare.runner import compare
from llmrl.config import FinetuneConfig
from llmrl.finetune import finetune
from llmrl.tracking.runs import RecordedRun, fetch_group

TASK = {"name": "job", "data": "builtin:json", "learning_rate": 1e-3, "steps": 100}


def recorded(method: str, loss: float | None, *, rate: float = 1e-3, seed: int = 0, **changes: Any) -> RecordedRun:
    summary = {
        "method": method, "policy": method, "seed": seed, "learning_rate": rate, "loss_initial": 3.0, "loss_test": loss,
        "accuracy_test": None, "diverged": loss is None, "seconds": 1.0, "tokens_trained": 100, "tokens_evaluated": 10,
    }  # fmt: skip
    task = {**TASK, **changes.pop("task", {})}
    label = changes.pop("label", f"{method}-{rate:g}-{seed}")
    state = changes.pop("state", "finished")
    return RecordedRun(label, state, {"task": task, "seed": seed}, {**summary, **changes})


LINEAR = [recorded("linear", loss, rate=rate, seed=seed)
          for seed in (0, 1) for rate, loss in ((3e-4, 2.5), (1e-3, 2.0), (3e-3, 2.2))]  # fmt: skip


def test_scores_are_against_the_best_linear_decay_among_the_runs() -> None:
    results = compare_existing([*LINEAR, recorded("hold", 1.5), recorded("hold", None, rate=3e-2, seed=1)])
    assert results["oracle"]["job"] == {"learning_rate": 1e-3, "loss_test": 2.0, "at_edge": False}
    scores = {(row["method"], row["learning_rate_factor"], row["seed"]): row["score"] for row in results["rows"]}
    assert scores["hold", 1.0, 0] == pytest.approx(1.5)
    assert scores["hold", 30.0, 1] == -1.0
    assert scores["linear", 0.3, 1] == pytest.approx(0.5)
    assert results["aggregate"]["hold"]["all"]["failures"] == 1
    assert results["aggregate"]["hold"]["default"]["probability_of_improvement"] == 1.0
    assert results["aggregate"]["hold"]["wrong"]["probability_of_improvement"] is None, "no linear run from there"


def test_runs_recorded_before_there_were_curves_are_compared_all_the_same() -> None:
    results = compare_existing([*LINEAR, recorded("hold", 1.5)])
    (row,) = (row for row in results["rows"] if row["method"] == "hold")
    assert (row["steps_to_target"], row["target_reached"], row["peak_memory_bytes"]) == (None, None, None)
    assert (row["num_trials"], row["events"], row["cost"]) == (1, {}, 1.0)
    assert results["curves"] == []
    assert results["paired"]["reference"] == "hold"
    assert results["paired"]["regimes"]["default"]["linear"]["mean"]["value"] == pytest.approx(0.5)


def test_a_rate_that_lacks_a_seed_is_no_yardstick() -> None:
    results = compare_existing([*LINEAR, recorded("linear", 0.5, rate=1e-2)])
    assert results["oracle"]["job"]["learning_rate"] == 1e-3


def test_without_linear_decay_there_are_losses_and_no_scores() -> None:
    results = compare_existing([recorded("hold", 1.5)])
    assert results["rows"][0]["loss_test"] == 1.5
    assert results["rows"][0]["score"] is None
    assert any("there are no scores" in warning for warning in results["warnings"])


def test_policies_of_one_name_are_told_apart_by_where_they_lie() -> None:
    runs = [*LINEAR, recorded("dqn", 1.5, policy="runs/a/policy"), recorded("dqn", 1.6, policy="runs/b/policy")]
    assert list(compare_existing(runs)["aggregate"]) == ["linear", "runs/a/policy", "runs/b/policy"]


def test_the_last_of_equal_runs_counts() -> None:
    results = compare_existing([*LINEAR, recorded("hold", 1.0, label="old"), recorded("hold", 1.5, label="new")])
    (row,) = (row for row in results["rows"] if row["method"] == "hold")
    assert row["loss_test"] == 1.5
    assert any(warning.startswith("old: left out") for warning in results["warnings"])


def test_what_cannot_be_used_is_left_out_and_told() -> None:
    strange = RecordedRun("strange", "finished", {"model": "x"}, {"loss": 1.0})
    results = compare_existing([*LINEAR, recorded("hold", 1.0, state="crashed", label="broken"), strange])
    assert "broken: left out: it did not finish (crashed)" in results["warnings"]
    assert any(warning.startswith("strange: left out: it is no run") for warning in results["warnings"])
    with pytest.raises(UserError, match="none of the runs"):
        compare_existing([strange])


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"other values of task\.steps") as caught:
        compare_existing([*LINEAR, recorded("hold", 1.0, task={"steps": 50})])
    assert "hold-0.001-0" in str(caught.value)


# -- directories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory of runs of `llmrl finetune`, and what a comparison that makes the same runs says."""
    folder = tmp_path_factory.mktemp("existing")
    config = make_config(methods=["policy", "linear"], learning_rate_factors=[0.3, 1, 3], seeds=[0])
    config = config.model_copy(update={"tasks": config.tasks[:1], "tuned": False})
    made = compare(config=config, output=folder / "made", policy="hold")
    (task,) = config.tasks
    for factor in config.learning_rate_factors:
        for name, how in (("hold", {"policy": "hold"}), ("linear", {"schedule": "linear"})):
            job = {"task": task, "learning_rate": factor * task.learning_rate, "save_model": False, "device": "cpu"}
            job_config = FinetuneConfig.model_validate({**job, "tracking": {"wandb": "disabled"}})
            finetune(config=job_config, output=folder / "runs" / f"{name}-{factor:g}", **how)
    return folder / "runs", made


def test_it_is_the_comparison_that_makes_the_runs(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = made
    words = ["compare", "--from-runs", str(folder), "--output", str(tmp_path / "run"), "--wandb", "disabled"]
    assert main(words) == 0
    assert "linear" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"comparison.png", "profiles.png", "curves.png"}
    assert names == {"results.json", "results.csv", "report.html", *pictures}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = {(row["method"], row["learning_rate_factor"]): row for row in results["rows"]}
    assert len(found) == len(expected["rows"])
    for row in expected["rows"]:
        method = "hold" if row["method"] == "policy" else row["method"]
        same = found[method, row["learning_rate_factor"]]
        for key in ("task", "regime", "seed", "loss_initial", "loss_test", "score", "diverged", "tokens_trained"):
            wanted = pytest.approx(row[key], rel=1e-6) if isinstance(row[key], float) else row[key]
            assert same[key] == wanted, key
    assert results["oracle"] == expected["oracle"]
    # The decisions of `llmrl finetune` tell curves as well, at other steps.
    (curve, *_) = results["curves"]
    assert curve["step"][-1] == 8
    assert curve["loss_validation"][-1] == pytest.approx(expected["curves"][0]["loss_validation"][-1], rel=1e-4)
    assert results["aggregate"]["hold"]["all"]["iqm"] == pytest.approx(expected["aggregate"]["policy"]["all"]["iqm"])


def test_directories_can_be_listed_one_by_one(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = made
    first, *others = sorted(map(str, folder.iterdir()))
    words = ["compare", "--output", str(tmp_path / "run"), "--wandb", "disabled", "--from-runs", first, *others]
    assert main(words) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["rows"]) == 1 + len(others)


def test_an_unfinished_run_is_left_out(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = made
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.yaml").write_bytes((folder / "hold-1" / "config.yaml").read_bytes())
    results = compare_existing(read_runs([folder, tmp_path / "killed"]))
    assert f"{tmp_path / 'killed'}: left out: it did not finish (not finished)" in results["warnings"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--from-runs DIR..."),
        (["--policy", "hold"], "--from-runs DIR..."),
        (["--from-runs", "nowhere"], "no such directory"),
        (["--from-runs", "."], "no run of `llmrl finetune` there"),
        (["--from-runs", ".", "--policy", "hold"], "are runs made, or taken?"),
        (["--from-runs", ".", "--from-wandb", "a/b", "--group", "g"], "one of --from-runs and --from-wandb"),
        (["--from-wandb", "a/b"], "no --group"),
        (["--group", "g"], "one of --from-runs and --from-wandb"),
        (["--from-wandb", "a/b", "--group", "g", "seeds=2"], "words that mean nothing here"),
        (["--from-wandb", "project", "--group", "g"], "entity/project"),
        (["--from-wandb", "a/b", "--group", "g"], "--from-runs with the run directories"),
    ],
)
def test_what_cannot_be_compared_is_told(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["compare", "--output", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- recorded runs ------------------------------------------------------------------------------------------------


class FakeApi:
    """Stands in for `wandb.Api`; its runs are W&B's own type, filled as the server would."""

    def __init__(self, runs: list[Any]) -> None:
        self.runs_there = runs
        self.asked: list[Any] = []

    def runs(self, path: str, filters: dict[str, Any], order: str, lazy: bool) -> list[Any]:
        self.asked.append((path, filters))
        return self.runs_there


def public_run(run: RecordedRun, index: int, *, nested: bool = False) -> Any:
    config = {"learning_rate": 5, "llmrl": run.config} if nested else run.config
    attributes = {
        "name": run.label,
        "displayName": run.label,
        "state": run.state,
        "config": json.dumps({key: {"value": value} for key, value in config.items()}),
        "summaryMetrics": json.dumps(run.summary),
        "systemMetrics": "{}",
        "group": "g",
        "user": {"name": "somebody", "username": "somebody"},
    }
    service: Any = SimpleNamespace()
    return wandb.apis.public.Run(service, "team", "project", f"id{index}", attrs=attributes, lazy=False)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    runs = [*LINEAR, recorded("hold", 1.5), recorded("hold", 1.0, seed=1, state="crashed")]
    fake = FakeApi([public_run(run, index, nested=index == 0) for index, run in enumerate(runs)])
    monkeypatch.setattr(wandb, "Api", lambda: fake)
    return fake


def test_a_group_of_recorded_runs_is_compared(api: FakeApi, tmp_path: Path) -> None:
    words = ["compare", "--from-wandb", "team/project", "--group", "g", "--output", str(tmp_path / "run")]
    assert main([*words, "--wandb", "disabled"]) == 0
    assert api.asked == [("team/project", {"group": "g"})]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = compare_existing([*LINEAR, recorded("hold", 1.5)])
    assert results["rows"] == expected["rows"]
    assert results["aggregate"] == expected["aggregate"]
    assert results["warnings"][0].startswith("hold-0.001-1 (id7): left out")


def test_an_empty_group_is_told(api: FakeApi) -> None:
    api.runs_there = []
    with pytest.raises(UserError, match="no run of that group"):
        fetch_group("team/project", "g")


def test_a_service_that_refuses_is_no_traceback(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(api, "runs", refuse)
    with pytest.raises(UserError, match="permission denied"):
        fetch_group("team/project", "g")
