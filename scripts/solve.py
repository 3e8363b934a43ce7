"""Trains the DQN agent on a small problem with several seeds and writes what it reaches.

    python scripts/solve.py CartPole-v1 --steps 50000 --seeds 10 --output cartpole.json

Problems and settings are those of `problems.py`; they were chosen on seeds from 100 on, and reported seeds start at 0.
A return is the mean of 100 greedy episodes (200 for NoisyQuadratic) after the last step. The output holds {env, steps,
returns (one per seed), iqm, ci_low, ci_high, env_steps_per_second} and what else the problem has to tell; the interval
is the 95 % bootstrap over seeds of the interquartile mean (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from playing import evaluate, train
from problems import PROBLEMS, Problem, problem_of, settings_of

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.config import DQNConfig


def interquartile_mean(values: NDArray[np.float64]) -> float:
    """Mean of the middle half; values on its border count in part."""
    ordered, num = np.sort(values), len(values)
    edges = np.arange(num + 1) / num
    weight = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return float(ordered @ weight / weight.sum())


def interval(values: NDArray[np.float64], num_draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of the interquartile mean over seeds."""
    rng = np.random.default_rng(0)
    draws = [interquartile_mean(rng.choice(values, size=len(values))) for _ in range(num_draws)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def new_agent(problem: Problem, steps: int, seed: int, changes: dict[str, Any]) -> tuple[DQNAgent, Any]:
    """The agent that a problem asks for, and the environment in which it trains."""
    training = (problem.make_training or problem.make)()
    env = problem.make()
    space = env.observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    agent = DQNAgent(
        DQNConfig(**{**settings_of(problem, steps, changes), "seed": seed}),
        num_envs=getattr(training, "num_envs", 1),
        obs_shape=space.shape,
        num_actions=int(env.action_space.n),  # type: ignore[attr-defined]
        obs_dtype=np.uint8 if space.dtype == np.uint8 else np.float32,
    )
    return agent, training


def solve(name: str, steps: int, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One seed: training, then greedy episodes."""
    problem = problem_of(name)
    agent, training = new_agent(problem, steps, seed, changes)
    speed = train(agent, training, steps, seed)
    returns = evaluate(agent, problem.make, problem.num_episodes, seed)
    return {
        "seed": seed,
        "return": float(returns.mean()),
        "lowest_episode": float(returns.min()),
        "env_steps_per_second": speed,
        "skipped_updates": agent.learner.num_skipped,
        **problem.details(agent, steps),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help=f"one of {', '.join(sorted(PROBLEMS))}, or an Atari game: ALE/Pong-v5")
    parser.add_argument("--steps", type=int, required=True, help="environment steps of training")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds count from here")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings, as JSON")
    arguments = parser.parse_args()
    try:
        problem_of(arguments.env)
    except ValueError as error:
        parser.error(str(error))
    if arguments.steps < 1 or arguments.seeds < 1:
        parser.error(f"expected positive --steps and --seeds, got {arguments.steps} and {arguments.seeds}")
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    torch.set_num_threads(1)
    results = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        results.append(solve(arguments.env, arguments.steps, seed, changes))
        print(json.dumps(results[-1]), flush=True)
        arguments.output.write_text(json.dumps(summary(arguments.env, arguments.steps, results, changes), indent=1))


def summary(name: str, steps: int, results: list[dict[str, Any]], changes: dict[str, Any]) -> dict[str, Any]:
    """What goes into the output file."""
    returns = np.array([result["return"] for result in results])
    low, high = interval(returns)
    return {
        "env": name,
        "steps": steps,
        "returns": returns.tolist(),
        "iqm": interquartile_mean(returns),
        "ci_low": low,
        "ci_high": high,
        "env_steps_per_second": float(np.median([result["env_steps_per_second"] for result in results])),
        "settings": settings_of(problem_of(name), steps, changes),
        "seeds": results,
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
