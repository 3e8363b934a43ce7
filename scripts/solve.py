"""Trains the DQN agent on a small problem with several seeds and writes what it reaches.

    python scripts/solve.py CartPole-v1 --steps 50000 --seeds 10 --output cartpole.json

The settings of each problem are below; they were chosen on seeds from 100 on, and reported seeds start at 0. A return
is the mean of 100 greedy episodes (200 for NoisyQuadratic) after the last step. The output holds {env, steps, returns
(one per seed), iqm, ci_low, ci_high, env_steps_per_second} and what else the problem has to tell; the interval is the
95 % bootstrap over seeds of the interquartile mean (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from catch import NUM_FRAMES, make_catch
from numpy.typing import NDArray

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.collector import Collector
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.tabular import TabularAgent

EVALUATION_SEED = 1_000_000  # evaluation episodes never share a seed with training


@dataclass(frozen=True)
class Problem:
    """An environment and the settings that solve it; `settings` takes the number of environment steps."""

    make: Callable[[], gymnasium.Env[Any, Any]]
    settings: Callable[[int], dict[str, Any]]
    details: Callable[[Any, int], dict[str, Any]] = field(default=lambda agent, steps: {})
    num_episodes: int = 100
    make_training: Callable[[], Any] | None = None  # a vector environment to train in; without, what `make` makes


class AnyStart(gymnasium.Wrapper[Any, Any, Any, Any]):
    """GridWorld from a random state: one of its states can be reached from no other."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draws the start from a generator that `seed` starts."""
        if seed is not None:
            self.unwrapped.np_random = np.random.default_rng(seed)
        state = self.unwrapped.np_random.choice([1, 2, 3, 4, 5, 7, 9])
        return self.env.reset(options={"state": int(state)})


def make_grid_world() -> gymnasium.Env[Any, Any]:
    """The 3x3 grid with exploring starts."""
    return AnyStart(gymnasium.make("llmrl_envs:llmrl/GridWorld-v0"))


def gym(name: str) -> Callable[[], gymnasium.Env[Any, Any]]:
    """A registered environment, made when called."""
    return lambda: gymnasium.make(name)


def decaying(steps: int, learning_rate: float, replay_ratio: float = 1.0) -> dict[str, Any]:
    """Learning rate that falls linearly to zero over the run, so that the last policy is not one in passing."""
    updates = max(int(steps * replay_ratio), 1)
    return {
        "learning_rate": learning_rate,
        "learning_rate_end": 0.0,
        "learning_rate_decay_steps": updates,
        "replay_ratio": replay_ratio,
    }


def grid_world(steps: int) -> dict[str, Any]:
    """Every action keeps being tried, since the values of all of them are compared."""
    return {
        **decaying(steps, 2e-3),
        "gamma": 0.9,
        "n_step": 1,
        "hidden_sizes": (64,),
        "batch_size": 32,
        "learning_starts": 100,
        "epsilon_end": 1.0,
        "target_ema": 0.02,
    }


def cart_pole(steps: int) -> dict[str, Any]:
    """A cart that drifts away slowly shows in small differences of value: Munchausen widens them.

    Positions and angles differ in size tenfold, so they are standardised.
    """
    return {
        **decaying(steps, 5e-4),
        "n_step": 5,
        "batch_size": 64,
        "munchausen": True,
        "normalize_obs": True,
        "epsilon_decay_steps": min(max(steps // 5, 1), 4_000),
    }


def lunar_lander(steps: int) -> dict[str, Any]:
    """Rewards of +-100 scaled to the range that the Huber loss is made for."""
    return {
        **decaying(steps, 5e-4),
        "n_step": 3,
        "hidden_sizes": (256, 256),
        "batch_size": 128,
        "reward_scale": 0.1,
        "epsilon_decay_steps": max(steps // 8, 1),
    }


def acrobot(steps: int) -> dict[str, Any]:
    """Reward -1 a step until the goal."""
    return {
        **decaying(steps, 5e-4, 0.5),
        "n_step": 5,
        "batch_size": 64,
        "reward_scale": 0.1,
        "epsilon_decay_steps": max(steps // 8, 1),
    }


def mountain_car(steps: int) -> dict[str, Any]:
    """The goal is met by chance only if exploratory actions last: they repeat; velocities are tiny: standardised."""
    return {
        **decaying(steps, 1e-3, 0.5),
        "n_step": 5,
        "batch_size": 64,
        "reward_scale": 0.1,
        "normalize_obs": True,
        "exploration_max_repeat": 32,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def noisy_quadratic(steps: int) -> dict[str, Any]:
    """Decisions are cheap and what sets actions apart is small: few updates, large batches, returns to the end."""
    return {
        **decaying(steps, 2e-3, 0.01),
        "gamma": 1.0,
        "n_step": 30,
        "batch_size": 512,
        "reward_scale": 5.0,
        "target_ema": 0.01,
        "replay_capacity": 200_000,
        "learning_starts": min(20_000, max(steps // 10, 1)),
        "epsilon_start": 0.3,
        "epsilon_end": 0.01,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def catch(steps: int) -> dict[str, Any]:
    """The published convolutions on frames."""
    return {
        **decaying(steps, 5e-4, 0.25),
        "torso": "cnn",
        "hidden_sizes": (128,),
        "batch_size": 32,
        "n_step": 5,
        "gamma": 0.97,
        "replay_capacity": 20_000,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def make_atari(name: str, *, training: bool = False) -> gymnasium.Env[Any, Any]:
    """An Atari game as in Mnih et al. 2015: 84x84 grey frames, one in four, four stacked; needs the extra `games`.

    In training a lost life ends the episode, in evaluation the game's end does.
    """
    import ale_py
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    gymnasium.register_envs(ale_py)
    game = gymnasium.make(name, frameskip=1)
    return FrameStackObservation(AtariPreprocessing(game, terminal_on_life_loss=training), NUM_FRAMES)


def atari(steps: int) -> dict[str, Any]:
    """The published network, on a replay buffer that fits a small machine."""
    return {
        "torso": "cnn",
        "hidden_sizes": (512,),
        "batch_size": 32,
        "learning_rate": 1e-4,
        "replay_ratio": 0.25,
        "replay_capacity": 100_000,
        "learning_starts": min(2_000, max(steps // 10, 1)),
        "reward_clip": 1.0,
        "epsilon_end": 0.01,
        "epsilon_decay_steps": max(steps // 4, 1),
    }


def grid_world_details(agent: Any, steps: int) -> dict[str, Any]:
    """Distance from the optimal values, for DQN and for a table."""
    from llmrl_envs.grid_world import GOAL, NUM_STATES, TRAP, optimal_q

    states = np.array([state - 1 for state in range(1, NUM_STATES + 1) if state not in (TRAP, GOAL)])
    obs, best = np.eye(NUM_STATES, dtype=np.float32)[states], optimal_q()[states]
    table = TabularAgent(agent.config, num_envs=1, obs_shape=(NUM_STATES,), num_actions=best.shape[1])
    train(table, make_grid_world(), steps, agent.config.seed)
    q = agent.q_values(obs)
    return {
        "max_q_error": float(np.abs(q - best).max()),
        "greedy_optimal": bool((best[np.arange(len(best)), q.argmax(axis=1)] > best.max(axis=1) - 1e-9).all()),
        "max_q_error_tabular": float(np.abs(table.q_values(obs) - best).max()),
    }


def make_quadratic() -> gymnasium.Env[Any, Any]:
    """One noisy quadratic with the table of small moves."""
    return gymnasium.make("llmrl_envs:llmrl/NoisyQuadratic-v0", actions="moves")


def make_quadratics() -> Any:
    """Many of them at once."""
    from llmrl_envs.noisy_quadratic import NoisyQuadraticVectorEnv

    return NoisyQuadraticVectorEnv(1024, actions="moves")


def noisy_quadratic_details(agent: Any, steps: int) -> dict[str, Any]:
    """Final loss over that of the optimal schedule on 200 jobs, for the agent and for holding the level."""
    from llmrl_envs.noisy_quadratic import NoisyQuadraticVectorEnv, expected_losses, optimal_schedules

    env = NoisyQuadraticVectorEnv(200, actions="moves")
    ratios: dict[str, float] = {}
    best: NDArray[Any] | None = None
    for name in ("agent", "hold"):
        obs, info = env.reset(seed=EVALUATION_SEED)
        if best is None:
            best = expected_losses(env.quadratics, optimal_schedules(env.quadratics, tolerance=1e-6))[-1]
        final, running = np.zeros(200), np.ones(200, dtype=np.bool_)
        while running.any():
            mask = np.asarray(info["action_mask"]).astype(np.bool_)
            holding = np.full(200, env.table.hold)
            action = holding if name == "hold" else agent.act(obs, mask, explore=False)
            obs, _, terminated, _, info = env.step(action)
            ended = terminated & running
            if ended.any():
                final[ended] = info["final_info"]["expected_loss"][ended]
            running &= ~terminated
        ratios[f"loss_over_optimal_{name}"] = float((final / best).mean())
        ratios[f"loss_over_optimal_{name}_median"] = float(np.median(final / best))
    return ratios


PROBLEMS = {
    "GridWorld": Problem(make_grid_world, grid_world, grid_world_details),
    "CartPole-v1": Problem(gym("CartPole-v1"), cart_pole),
    "LunarLander-v3": Problem(gym("LunarLander-v3"), lunar_lander),
    "Acrobot-v1": Problem(gym("Acrobot-v1"), acrobot),
    "MountainCar-v0": Problem(gym("MountainCar-v0"), mountain_car),
    "NoisyQuadratic": Problem(
        make_quadratic, noisy_quadratic, noisy_quadratic_details, num_episodes=200, make_training=make_quadratics
    ),
    "Catch": Problem(make_catch, catch),
}


def problem_of(name: str) -> Problem:
    """A problem by name; `ALE/...` is any Atari game.

    Raises:
        ValueError: No problem has the name.
    """
    if name.startswith("ALE/"):
        return Problem(
            lambda: make_atari(name), atari, num_episodes=5, make_training=lambda: make_atari(name, training=True)
        )
    if name not in PROBLEMS:
        raise ValueError(f"env: expected one of {sorted(PROBLEMS)} or ALE/NAME, got {name!r}")
    return PROBLEMS[name]


def train(agent: Any, env: Any, steps: int, seed: int) -> float:
    """Collects and learns for so many environment steps; returns environment steps per second."""
    collector = Collector(env, agent, seed=seed)
    start = time.perf_counter()
    while collector.env_steps < steps:
        collector.step()
        agent.learn()
    return steps / (time.perf_counter() - start)


def evaluate(agent: Any, make: Callable[[], gymnasium.Env[Any, Any]], num_episodes: int, seed: int) -> NDArray[Any]:
    """Returns of greedy episodes, all played at once."""
    envs = [make() for _ in range(num_episodes)]
    first = [env.reset(seed=EVALUATION_SEED + seed * num_episodes + i) for i, env in enumerate(envs)]
    obs = [item[0] for item in first]
    masks = [item[1].get("action_mask") for item in first]
    returns, alive = np.zeros(num_episodes), list(range(num_episodes))
    while alive:
        full = np.ones(int(envs[0].action_space.n), dtype=np.bool_)  # type: ignore[attr-defined]
        mask = np.stack([full if masks[i] is None else np.asarray(masks[i], dtype=np.bool_) for i in alive])
        actions = agent.act(np.stack([np.asarray(obs[i]) for i in alive]), mask, explore=False)
        still = []
        for i, action in zip(alive, actions, strict=True):
            obs[i], reward, terminated, truncated, info = envs[i].step(int(action))
            masks[i] = info.get("action_mask")
            returns[i] += float(reward)
            if not (terminated or truncated):
                still.append(i)
        alive = still
    return returns


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


def settings_of(problem: Problem, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The problem's settings with changes; a rate that decays over the run does so for another replay ratio too."""
    settings = problem.settings(steps)
    if "replay_ratio" in changes and "learning_rate_decay_steps" in settings:
        settings["learning_rate_decay_steps"] = max(int(steps * changes["replay_ratio"]), 1)
    return {**settings, **changes}


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
