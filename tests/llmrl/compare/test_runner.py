import csv
import json
from pathlib import Path
from typing import Any

import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary

from llmrl.cli import main
from llmrl.compare import execution
from llmrl.compare.methods import resolve_methods
from llmrl.compare.runner import compare
from llmrl.config_loading import config_to_yaml
from llmrl.hosts.job import run_job

ROW_KEYS = {
    "task", "method", "regime", "seed", "learning_rate", "loss_initial", "loss_test", "score", "diverged", "seconds",
    "tokens_trained", "tokens_evaluated", "accuracy_test", "steps_to_target", "failures", "peak_memory_bytes",
    "num_trials", "events", "reused",
}  # fmt: skip


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read_results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(), parse_constant=refuse_constant)


MEASURED = ("seconds", "seconds_per_job", "peak_memory_bytes")


def without_measurements(value: Any) -> Any:
    """Without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: without_measurements(item) for key, item in value.items() if key not in MEASURED}
    return [without_measurements(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compare") / "run"
    returned = compare(config=make_config(), output=output, policy="hold")
    assert returned == read_results(output)
    return output


@pytest.fixture
def num_trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts jobs that are run."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return run_job(*args, **kwargs)

    monkeypatch.setattr(execution, "run_job", counted)
    return calls


def test_it_leaves_what_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "results.json", "results.csv", "report.html", "runs"}
    for name in ("comparison.png", "profiles.png", "curves.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    results = read_results(finished)
    assert set(results) >= {"rows", "aggregate", "oracle", "compute"}
    assert len(results["rows"]) == 36 + 12
    assert all(set(row) >= ROW_KEYS for row in results["rows"])
    with open(finished / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_test"]) for row in rows] == [row["loss_test"] for row in results["rows"]]


def test_its_losses_are_those_of_the_same_jobs_run_alone(finished: Path, make_config) -> None:
    config = make_config()
    for row in read_results(finished)["rows"]:
        if (row["task"], row["seed"], row["learning_rate_factor"]) != ("rhymes", 1, 10):
            continue
        method = resolve_methods(config, "hold")[row["method"]]
        alone = run_job(
            JobLibrary("cpu").job(config.tasks[1]), method.policy, learning_rate=row["learning_rate"], seed=1,
            guarded=method.guarded,
        )  # fmt: skip
        assert (row["loss_test"], row["loss_initial"]) == (alone.final.loss, alone.initial.loss)
        assert row["tokens_trained"] == alone.tokens_trained


def test_training_helps_and_scores_follow_from_the_losses(finished: Path) -> None:
    results = read_results(finished)
    for row in results["rows"]:
        if row["method"] == "linear" and row["regime"] == "default":
            assert row["loss_test"] < row["loss_initial"]
    assert all(entry["loss_test"] < 5.5 for entry in results["oracle"].values())


def test_a_finished_comparison_is_only_reported_again(
    finished: Path, make_config, num_trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_results(finished)
    again = compare(config=make_config(workers=3), output=finished, policy="hold")
    assert num_trained == []
    assert again == before
    printed = capsys.readouterr().out
    for expected in ("policy", "constant", "linear", "sweep", "results.json", "comparison.png"):
        assert expected in printed


def test_interrupted_and_resumed_equals_undisturbed(
    finished: Path, make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return run_job(*args, **kwargs)

    output = tmp_path / "run"
    monkeypatch.setattr(execution, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config=make_config(), output=output, policy="hold")
    kept = sorted((output / "runs").glob("*.json"))
    assert len(kept) == 8
    assert not (output / "results.json").exists()
    # A kill in the middle of a write leaves half a file at worst under another name; a disk may do worse.
    kept[0].write_text(kept[0].read_text()[:40])
    calls.clear()
    monkeypatch.setattr(execution, "run_job", lambda *args, **kwargs: (calls.append(2), run_job(*args, **kwargs))[1])
    compare(config=make_config(), output=output, policy="hold")
    assert len(calls) == len(list((output / "runs").iterdir())) - 7
    assert without_measurements(read_results(output)) == without_measurements(read_results(finished))


@pytest.fixture(scope="module")
def two_stages(make_config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A small comparison with a tuned start that no other row has, and a task of the regime of stress."""
    hard = make_config().tasks[0].model_copy(update={"name": "hard", "steps": 4})
    changes = {"methods": ["policy", "constant"], "learning_rate_factors": [1], "seeds": [0], "oracle_factors": [3]}
    config = make_config(**changes, stress_tasks=[hard.model_dump()])
    config = config.model_copy(update={"tasks": config.tasks[:1]})
    return config, compare(config=config, output=tmp_path_factory.mktemp("stages") / "run", policy="hold")


def test_the_tuned_rate_is_that_of_the_sweep_and_stress_stands_apart(two_stages: tuple[Any, dict[str, Any]]) -> None:
    _, results = two_stages
    found = {(row["method"], row["regime"]): row for row in results["rows"]}
    assert set(found) == {(m, r) for m in ("policy", "constant") for r in ("default", "tuned", "stress")}
    tuned = found["constant", "tuned"]
    assert (tuned["learning_rate"], tuned["reused"]) == (pytest.approx(3e-2), False)
    assert tuned["learning_rate"] == results["oracle"]["squares"]["learning_rate"]
    assert found["policy", "tuned"]["reused"] is True
    assert {row["task"] for row in results["rows"] if row["regime"] == "stress"} == {"hard"}
    assert set(results["aggregate"]["policy"]) == {"default", "tuned", "stress", "all"}
    # The sweep of one rate costs as much as the start itself; hold does not need to know the rate, and validates.
    assert (tuned["cost"], found["policy", "tuned"]["cost"]) == (pytest.approx(2.0), pytest.approx(1.2, abs=0.1))


def test_a_kill_between_the_stages_is_made_good(
    two_stages: tuple[Any, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = two_stages
    stages = []

    def interrupted(setting: Any, runs: Any, on_result: Any) -> None:
        stages.append(len(runs))
        if len(stages) == 2:
            raise KeyboardInterrupt
        execution.execute(setting, runs, on_result)

    monkeypatch.setattr("llmrl.compare.runner.execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config=config, output=tmp_path / "run", policy="hold")
    resumed = compare(config=config, output=tmp_path / "run", policy="hold")
    # First stage: two methods on two tasks and their sweeps. Second stage: constant from the tuned rate.
    assert stages == [6, 1, 0, 1]
    assert without_measurements(resumed) == without_measurements(undisturbed)


def test_worker_processes_find_the_same(finished: Path, make_config, tmp_path: Path) -> None:
    changes = {"methods": ["policy", "linear"], "learning_rate_factors": [1, 10], "seeds": [0], "oracle_factors": [1]}
    output = tmp_path / "run"
    compare(config=make_config(workers=2, **changes), output=output, policy="hold")
    one = {
        (r["task"], r["method"], r["learning_rate"], r["seed"]): r["loss_test"] for r in read_results(finished)["rows"]
    }
    for row in read_results(output)["rows"]:
        assert row["loss_test"] == pytest.approx(one[row["task"], row["method"], row["learning_rate"], row["seed"]])


def test_a_policy_that_looks_at_the_given_rate_runs_from_each(
    make_config, make_policy, tmp_path: Path, num_trained: list[int]
) -> None:
    changes = {"methods": ["policy"], "seeds": [0], "oracle_factors": [1], "learning_rate_factors": [1, 10],
               "tuned": False}  # fmt: skip
    for start, expected in (("default", 2 * (1 + 1)), ("given", 2 * (2 + 1))):
        folder = make_policy(tmp_path / start, start=start)
        results = compare(config=make_config(**changes), output=tmp_path / f"run-{start}", policy=str(folder))
        assert len(num_trained) == expected
        assert [row["reused"] for row in results["rows"]] == [False, start == "default"] * 2
        num_trained.clear()


def test_a_lost_run_is_an_outcome(make_config, tmp_path: Path) -> None:
    changes = {"methods": ["policy", "constant"], "seeds": [0], "learning_rate_factors": [1, 1e30], "tuned": False}
    compare(config=make_config(**changes), output=tmp_path / "run", policy="hold")
    lost = [row for row in read_results(tmp_path / "run")["rows"] if row["method"] == "constant" and row["diverged"]]
    assert len(lost) == 2
    assert {row["score"] for row in lost} == {-1.0}


def test_results_go_to_the_tracker(finished: Path, make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.setdefault(name, []).append((args, kwargs))

    monkeypatch.setattr("llmrl.compare.runner.make_tracker", lambda *args: Recorder())
    compare(config=make_config(), output=finished, policy="hold")
    assert [args[0] for args, _ in calls["log_table"]] == ["compare/summary", "compare/rows"]
    pictures = [args[1].name for args, _ in calls["log_image"]]
    assert pictures == ["comparison.png", "profiles.png", "curves.png"]
    assert calls["log_html"] == [(("compare/report", finished / "report.html"), {})]
    assert [args[2].name for args, _ in calls["log_artifact"]] == ["results.json", "report.html"]
    assert "aggregate" in calls["set_summary"][0][0][0]
    assert calls["finish"] == [((), {})]


# -- bad input ----------------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_and_nothing_is_lost(finished: Path, make_config) -> None:
    before = (finished / "results.json").read_bytes()
    with pytest.raises(UserError, match="holds something else") as caught:
        compare(config=make_config(seeds=[0], oracle_factors=[1]), output=finished, policy="hold")
    assert "oracle_factors, seeds" in str(caught.value)
    assert (finished / "results.json").read_bytes() == before


def test_another_policy_is_refused(finished: Path, make_config, make_policy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other policies") as caught:
        compare(config=make_config(), output=finished, policy=str(make_policy(tmp_path / "policy")))
    assert "changed: policy" in str(caught.value)


def test_foreign_files_are_left_alone(make_config, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="not empty"):
        compare(config=make_config(), output=tmp_path, policy="hold")
    with pytest.raises(UserError, match="is a file"):
        compare(config=make_config(), output=tmp_path / "thesis.txt", policy="hold")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_rest_of_an_interrupted_first_write_does_no_harm(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / ".config.yaml.123.tmp").write_text("ta")
    monkeypatch.setattr("llmrl.compare.runner.execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config=make_config(), output=tmp_path, policy="hold")
    assert (tmp_path / "config.yaml").read_text() == config_to_yaml(make_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["policy", "no/such/folder"]}, "no policy folder there"),
        ({"device": "cuda:9"}, "the device cannot be used"),
    ],
)
def test_bad_names_are_refused_before_anything_is_made(
    make_config, tmp_path: Path, num_trained: list[int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        compare(config=make_config(**changes), output=tmp_path / "run", policy="hold")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_in_the_last_task_is_found_before_the_first_is_trained(
    make_config, tmp_path: Path, num_trained: list[int], workers: int
) -> None:
    config = make_config(workers=workers)
    missing = config.tasks[1].model_copy(update={"data": config.tasks[1].data.model_copy(update={"train": "no.jsonl"})})
    config = config.model_copy(update={"tasks": (config.tasks[0], missing)})
    with pytest.raises(UserError, match=r"no\.jsonl"):
        compare(config=config, output=tmp_path / "run", policy="hold")
    assert num_trained == []


def test_a_worker_that_dies_is_one_message(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DeadPool:
        def __init__(self, *args: object) -> None:
            pass

        def __enter__(self) -> "DeadPool":
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def submit(self, *args: object) -> Any:
            raise execution.BrokenProcessPool

    monkeypatch.setattr(execution, "ProcessPoolExecutor", DeadPool)
    with pytest.raises(UserError, match="a worker process died"):
        compare(config=make_config(workers=2), output=tmp_path / "run", policy="hold")


def test_the_command_ends_with_code_2(make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(config_to_yaml(make_config()))
    words = ["compare", "--config", str(path), "--policy", "hold", "--output", str(tmp_path / "run")]
    words.append("methods=[policy, consine]")
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "did you mean 'cosine'?" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
