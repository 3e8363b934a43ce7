"""Settings of the small problems, and the ablation over them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmrl.dqn.config import DQNConfig

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts, importable as they are when one is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("solve", "problems", "known_optima", "playing", "catch", "ablate_dqn"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("steps", [1, 20_000, 500_000])
def test_every_problem_has_settings_for_any_number_of_steps(scripts, steps):
    from problems import PROBLEMS, settings_of

    for problem in PROBLEMS.values():
        DQNConfig(**settings_of(problem, steps, {}))


def test_the_rate_decays_over_the_run_for_another_replay_ratio_too(scripts):
    from problems import problem_of, settings_of

    problem = problem_of("CartPole-v1")
    assert settings_of(problem, 1_000, {"replay_ratio": 2.0})["learning_rate_decay_steps"] == 2_000
    given = {"replay_ratio": 2.0, "learning_rate_decay_steps": 7}
    assert settings_of(problem, 1_000, given)["learning_rate_decay_steps"] == 7
    car = settings_of(problem_of("MountainCar-v0"), 1_200, {"replay_ratio": 1.0})
    assert (car["learning_rate_decay_steps"], car["horizon_learner_steps"]) == (1_200, 1_000)


def test_seeds_count_from_the_first_one(scripts, tmp_path, monkeypatch):
    from solve import main

    output = tmp_path / "grid.json"
    arguments = ["GridWorld", "--steps", "120", "--seeds", "2", "--first-seed", "10", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["solve.py", *arguments])
    main()
    report = json.loads(output.read_text())
    assert [seed["seed"] for seed in report["seeds"]] == [10, 11]
    assert report["returns"] == [seed["return"] for seed in report["seeds"]]


def test_noisy_quadratics_are_compared_with_holding_the_default_level(scripts, monkeypatch):
    import known_optima
    from problems import problem_of
    from solve import new_agent

    monkeypatch.setattr(known_optima, "NUM_JOBS", 4)
    agent, _ = new_agent(problem_of("NoisyQuadratic"), 1_000, 0, {})
    details = known_optima.noisy_quadratic_details(agent, 1_000)
    assert 1.0 < details["loss_over_optimal_hold_median"] < 1.2
    assert details["loss_over_optimal_agent_median"] > 1.0


@pytest.mark.parametrize("env", ["GridWorld", "CartPole-v1", "NoisyQuadratic"])
def test_every_row_of_an_ablation_changes_the_agent(scripts, env):
    from ablate_dqn import base_changes, rows
    from problems import problem_of, settings_of

    problem = problem_of(env)
    base = DQNConfig(**settings_of(problem, 1_000, base_changes()))
    found = rows(env, 1_000, 4, base)
    for name, changes in found.items():
        config = DQNConfig(**settings_of(problem, 1_000, base_changes() | changes))
        assert (config == base) == (name == "base" or (name == "logs" and base.n_step == 1))
    flags = {flag for changes in found.values() for flag in changes}
    assert {"double", "dueling", "n_step", "munchausen", "head", "branches", "noisy", "sampling"} <= flags


def test_an_ablation_compares_with_the_base_and_learns_from_logs(scripts, tmp_path, capsys):
    from ablate_dqn import main

    output = tmp_path / "ablation.json"
    arguments = ["GridWorld", "--steps", "150", "--seeds", "2", "--output", str(output)]
    main([*arguments, "--only", "no double", "logs, conservative"])
    report = json.loads(output.read_text())
    assert [row["name"] for row in report["rows"]] == ["base", "no double", "logs, conservative"]
    base, other, _ = report["rows"]
    assert base["difference"] == 0.0
    assert other["difference"] == pytest.approx(other["mean"] - base["mean"])
    assert len(other["details"]["max_q_error"]) == 2
    capsys.readouterr()
    main([*arguments, "--table"])
    assert "| no double |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--only", "no such row"])
