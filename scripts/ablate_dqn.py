#!/usr/bin/env python
"""One change of the DQN at a time: what each flag is worth on a small problem.

    python scripts/ablate_dqn.py CartPole-v1 --steps 10000 --seeds 3 --output ablation.json
    python scripts/ablate_dqn.py GridWorld --steps 3000 --seeds 3 --only double munchausen --output ablation.json

The base is the problem's setting in `problems.py` with everything off that a row turns on. Each row changes one thing
and trains, as `solve.py` does, from the same seeds; the difference to the base is taken seed by seed. Rows whose name
begins with "logs" learn from the replay of the base's run alone, with no step in the environment. The output holds
{env, steps, seeds, rows: [{name, changes, returns, mean, difference, ci_low, ci_high, details}]}; the interval is the
95 % bootstrap of the mean difference over seeds. With few seeds it is wide: rows whose interval holds 0 are not told
apart by this problem. `--table` prints the rows of a finished file for a page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from playing import evaluate, train
from problems import PROBLEMS, problem_of
from solve import new_agent

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.config import DQNConfig

RETURN_RANGE = {"GridWorld": (-1.0, 1.0), "CartPole-v1": (0.0, 100.0)}  # of discounted returns, for the fixed atoms
NUM_DRAWS = 2000


def base_changes() -> dict[str, Any]:
    """What every row starts from: no flag of a row is on."""
    return {"munchausen": False, "normalize_obs": False, "loss": "huber"}


def rows(env: str, steps: int, num_actions: int, settings: DQNConfig) -> dict[str, dict[str, Any]]:
    """Name of a row to what it changes of the base; without those that the problem's setting holds already."""
    updates = max(int(steps * settings.replay_ratio), 4)
    low, high = RETURN_RANGE.get(env, (-10.0, 10.0))
    quarter = {"reset_period": updates // 4, "reset_until_learner_steps": updates * 3 // 4}
    schedule = {"horizon_learner_steps": updates // 2}
    end = min(settings.gamma, 0.999)
    found: dict[str, dict[str, Any]] = {
        "base": {},
        "no double": {"double": False},
        "no dueling": {"dueling": False},
        "n_step 1": {"n_step": 1},
        "n_step 10": {"n_step": 10},
        "n_step 10 to base": {"n_step": 10, "n_step_end": settings.n_step, **schedule},
        "a third of the horizon to base": {"gamma": round(1 - 3 * (1 - end), 6), "gamma_end": end, **schedule},
        "squared loss": {"loss": "squared"},
        "copied target, every 200": {"target_ema": 1.0, "target_update_period": 200},
        "no gradient clipping": {"max_grad_norm": None},
        "munchausen": {"munchausen": True},
        "categorical head": {"head": "categorical", "value_min": low, "value_max": high},
        "quantile head": {"head": "quantile"},
        "quantile head, cvar_level 0.25": {"head": "quantile", "cvar_level": 0.25},
        "noisy, no epsilon": {"noisy": True, "epsilon_start": 0.0, "epsilon_end": 0.0},
        "layer_norm flipped": {"layer_norm": not settings.layer_norm},
        "weight_decay 0.01": {"weight_decay": 0.01},
        "normalize_obs": {"normalize_obs": True},
        "rmsprop": {"optimizer": "rmsprop"},
        "reward_shift -0.1": {"reward_shift": -0.1},
        "reward_clip 0.5": {"reward_clip": 0.5},
        "replay_ratio doubled": {"replay_ratio": 2 * settings.replay_ratio},
        "resets of the head": quarter,
        "resets of half of everything": {**quarter, "reset_scope": "all", "reset_keep": 0.5},
        "prioritized": {"sampling": "prioritized", "importance_learner_steps": updates},
        "lap": {"sampling": "lap"},
        "exponential epsilon": {"epsilon_schedule": "exponential", "epsilon_end": max(settings.epsilon_end, 0.01)},
        "epsilon ladder": {"epsilon_schedule": "ladder"},
        "exploration_max_repeat 8": {"exploration_max_repeat": 8},
        "logs": {"n_step": 1},
        "logs, conservative": {"n_step": 1, "conservative_weight": 0.1},
    }
    if num_actions == 4:
        found["branches"] = {"branches": (2, 2)}
    given = settings.model_dump()
    return {
        name: changes
        for name, changes in found.items()
        if name == "base" or name.startswith("logs") or any(given[flag] != value for flag, value in changes.items())
    }


def play(env: str, steps: int, seed: int, changes: dict[str, Any], *, from_logs: bool) -> dict[str, Any]:
    """One run: its mean greedy return, and what else the problem tells."""
    problem = problem_of(env)
    logged = base_changes() if from_logs else changes
    agent, training = new_agent(problem, steps, seed, logged)
    train(agent, training, steps, seed)
    if from_logs:
        agent = learn_from_replay(agent, new_agent(problem, steps, seed, changes)[0])
    returns = evaluate(agent, problem.make, problem.num_episodes, seed)
    details = {} if env == "GridWorld" and from_logs else problem.details(agent, steps)
    return {"return": float(returns.mean()), **details}


def learn_from_replay(logged: DQNAgent, agent: DQNAgent) -> DQNAgent:
    """As many updates as the logged agent had, on what it stored."""
    agent.replay.merge(logged.replay)
    for _ in agent.learn_from_log(logged.learner_steps):
        pass
    return agent


def summary(name: str, changes: dict[str, Any], runs: list[dict[str, Any]], base: list[float]) -> dict[str, Any]:
    """A row of the output."""
    returns = np.array([run["return"] for run in runs])
    difference = returns - np.array(base)
    draws = np.random.default_rng(0).integers(len(difference), size=(NUM_DRAWS, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    return {
        "name": name,
        "changes": changes,
        "returns": returns.tolist(),
        "mean": float(returns.mean()),
        "difference": float(difference.mean()),
        "ci_low": float(low),
        "ci_high": float(high),
        "details": {key: [run[key] for run in runs] for key in runs[0] if key != "return"},
    }


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown, the best first behind the base; further columns are means over seeds."""
    more = list(report["rows"][0]["details"])
    head = ["change", "return", "difference to the base", "lowest seed", *(name.replace("_", " ") for name in more)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(report["rows"], key=lambda row: (row["name"] != "base", -row["mean"])):
        spread = f"{row['difference']:+.3g} [{row['ci_low']:+.3g}, {row['ci_high']:+.3g}]"
        cells = [
            row["name"],
            f"{row['mean']:.4g}",
            "" if row["name"] == "base" else spread,
            f"{min(row['returns']):.4g}",
        ]
        cells += [f"{np.mean(row['details'][name]):.2g}" if name in row["details"] else "" for name in more]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", choices=sorted(PROBLEMS))
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps of training")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these rows, and the base")
    parser.add_argument("--table", action="store_true", help="print the table of a finished output and end")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.output.read_text())))
        return
    torch.set_num_threads(1)
    agent, _ = new_agent(problem_of(options.env), options.steps, 0, base_changes())
    chosen = rows(options.env, options.steps, agent.num_actions, agent.config)
    unknown = sorted(set(options.only or ()) - chosen.keys())
    if unknown or options.seeds < 1 or options.steps < 1:
        parser.error(f"expected positive counts and rows among {sorted(chosen)}, got {unknown or vars(options)}")
    report: dict[str, Any] = {"env": options.env, "steps": options.steps, "seeds": options.seeds, "rows": []}
    for name, changes in chosen.items():
        if options.only and name not in ("base", *options.only):
            continue
        run = [
            play(options.env, options.steps, seed, base_changes() | changes, from_logs=name.startswith("logs"))
            for seed in range(options.seeds)
        ]
        base = report["rows"][0]["returns"] if report["rows"] else [each["return"] for each in run]
        report["rows"].append(summary(name, changes, run, base))
        print(json.dumps(report["rows"][-1]), flush=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
