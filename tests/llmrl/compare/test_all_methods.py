"""Every method in one comparison of a tiny job: shared runs, resuming, workers, and what each is said to cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrl.compare import execution
from llmrl.compare.baselines.search import validation_loss
from llmrl.compare.cache import RunResult, RunStore
from llmrl.compare.execution import Setting, execute
from llmrl.compare.level_choice import LevelChoice
from llmrl.compare.methods import BestLevelMethod, resolve_methods, sweep_method
from llmrl.compare.names import METHOD_NAMES, NUM_JOBS, NUM_LEVELS
from llmrl.compare.page import make_html
from llmrl.compare.plan import Plan, Run, make_plan
from llmrl.compare.results import ComparisonShape, make_results
from llmrl.compare.runner import _describe
from llmrl.compare.units import make_units
from llmrl.config import CompareConfig
from llmrl.hosts.job import run_job
from llmrl.policy_reference import DEFAULT
from llmrl.run_directory import to_json_value

METHODS = [name for name in METHOD_NAMES if name != DEFAULT]


def plan_of(config: CompareConfig) -> Plan:
    return make_plan(config, resolve_methods(config, "hold"), sweep_method(config), "cpu")


def train(config: CompareConfig, store: Path, runs: list[Run] | None = None) -> dict[str, RunResult]:
    """Trains what is missing as the runner does; results by key."""
    plan, kept, found = plan_of(config), RunStore(store), {}
    missing = [run for run in (runs or plan.runs.values()) if kept.read(run.key) is None]
    execute(Setting(config, "hold", store), missing, lambda run, result: found.update({run.key: result}))
    return {key: result for key in plan.runs if (result := kept.read(key)) is not None}


def losses(results: dict[str, RunResult]) -> dict[str, tuple[Any, ...]]:
    return {key: (result.loss_test, result.curve, result.tokens_trained) for key, result in results.items()}


@pytest.fixture(scope="module")
def config(make_config) -> CompareConfig:
    tasks = [make_config().tasks[0].model_dump(mode="json")]
    return make_config(tasks=tasks, methods=METHODS, learning_rate_factors=[1], seeds=[0], oracle_factors=[1])


@pytest.fixture(scope="module")
def finished(config: CompareConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, RunResult]]:
    store = tmp_path_factory.mktemp("all") / "runs"
    return store, train(config, store)


def by_method(config: CompareConfig, results: dict[str, RunResult]) -> dict[str, RunResult]:
    return {cell.method: results[cell.key] for cell in plan_of(config).rows}


def test_every_method_has_a_result_a_curve_and_its_cost(config, finished) -> None:
    results = by_method(config, finished[1])
    assert list(results) == METHODS
    one = results["linear"].tokens_trained
    for name, result in results.items():
        assert result.loss_test is not None, name
        assert result.num_trials == NUM_JOBS.get(name, 1), name
        assert result.tokens_trained == one * result.num_trials, name
        assert [result.curve[0].step, result.curve[-1].step] == [0, 8], name
        assert result.curve[0] == results["linear"].curve[0], name
        assert result.loss_initial == results["linear"].loss_initial, name
        assert set(result.events) == {"skipped_steps", "spikes", "rollbacks", "fallbacks"}, name
    assert len({result.loss_test for result in results.values()}) > 15


def test_the_report_tells_the_settings_of_every_method(config, finished) -> None:
    described = _describe(resolve_methods(config, "hold"), "hold")
    made = make_results(ComparisonShape.of(config), plan_of(config), finished[1], described)
    page = make_html(to_json_value(made), title="all")
    assert [name for name in METHODS if f"\n{name}:\n" not in page and f">{name}:\n" not in page] == []


def test_searches_share_their_trials_and_never_choose_worse_than_the_given_rate(config, finished) -> None:
    results = by_method(config, finished[1])
    on_validation = [validation_loss(results[name]) for name in ("linear", "search_2", "search_5", "search_10")]
    assert on_validation == sorted(on_validation, reverse=True)
    # Of all methods one run each, of the searches ten trials, the first of which is linear decay; and the levels, one
    # of which is hold, which stands for the policy of the command line as well.
    assert len(list(finished[0].glob("*.json"))) == (len(METHODS) - 1) + (10 - 1) + (NUM_LEVELS - 1)


def test_the_best_level_is_no_worse_than_hold_on_validation(config, finished) -> None:
    results = by_method(config, finished[1])
    assert validation_loss(results["best_constant"]) <= validation_loss(results["hold"])


def test_a_search_that_was_killed_repeats_no_trial(
    config, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run for run in plan_of(config).runs.values() if run.method.startswith("search")]
    calls: list[float] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["learning_rate"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run_job(*args, **kwargs)

    monkeypatch.setattr(execution, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, runs)
    assert len(list(tmp_path.glob("*.json"))) == 3
    found = train(config, tmp_path, runs)
    assert len(calls) == 4 + 7
    assert calls[3] == calls[4]
    assert losses(found) == {key: value for key, value in losses(finished[1]).items() if key in found}
    assert {run.key for run in runs} <= set(found)


def test_workers_find_the_same(config, finished, tmp_path: Path) -> None:
    names = {"search_2", "search_5", "pbt_4", "random", "schedule_free", "hold"}
    runs = [run for run in plan_of(config).runs.values() if run.method in names or run.method == "policy"]
    found = train(config.model_copy(update={"workers": 2}), tmp_path, runs)
    wanted = losses(finished[1])
    for key, value in losses(found).items():
        assert value[0] == pytest.approx(wanted[key][0], rel=1e-5)


def test_the_searches_of_a_job_go_to_one_worker_last(config) -> None:
    units = make_units(list(plan_of(config).runs.values()), resolve_methods(config, "hold"))
    assert [run.method for run in units[-1].runs] == ["search_10", "search_5", "search_2"]
    assert units[-1].num_jobs == 10
    assert [len(unit.runs) for unit in units[:-1]] == [1] * (len(units) - 1)


def test_the_level_is_chosen_over_all_tasks_and_seeds(make_config, tmp_path: Path) -> None:
    config = make_config(methods=["hold", "best_constant"], seeds=[0, 1])
    methods = resolve_methods(config, "hold")
    choice = LevelChoice(Setting(config, "hold", tmp_path), methods)
    assert len(choice.runs()) == 2 * 2 * NUM_LEVELS
    other = resolve_methods(make_config(methods=["hold", "best_constant"], seeds=[0]), "hold")
    assert isinstance(methods["best_constant"], BestLevelMethod)
    assert methods["best_constant"].digest != other["best_constant"].digest
    assert {level.digest for level in methods["best_constant"].levels} >= {methods["hold"].digest}


def test_random_moves_follow_from_the_seed_and_are_those_of_the_policy(make_config, make_policy, tmp_path) -> None:
    folder = make_policy(tmp_path / "policy", actions="moves_only")
    method = resolve_methods(make_config(methods=["policy", "random"]), str(folder))["random"]
    assert method.policy.table.name == "moves_only"
    obs, mask = method.policy.spec, [[True, False, True, True, False]]

    def actions(seed: int) -> list[int]:
        policy = method.policy_for(seed)
        observation = np.zeros((1, obs.size), np.float32)
        return [int(policy.act(observation, np.array(mask)).actions[0]) for _ in range(50)]

    assert actions(0) == actions(0) != actions(1)
    assert set(actions(0)) == {0, 2, 3}


def test_it_is_written_which_level_was_chosen(finished) -> None:
    files = [json.loads(path.read_text()) for path in finished[0].glob("*.json")]
    chosen = [values["level"] for values in files if values["method"] == "best_constant"]
    assert len(chosen) == 1
    assert 1e-4 < chosen[0] < 1e-1
