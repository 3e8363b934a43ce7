"""The two problems whose optimum is known, and how far from it an agent is: the 3x3 grid and noisy quadratics."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from playing import train

from llmrl.dqn.tabular import TabularAgent

QUADRATIC: dict[str, Any] = {
    "actions": "careful",
    "schedule": {"warmup_fraction": 0.0, "cooldown_progress": 1.0},
    "reward": {"measured": "end"},
}
"""Small moves from a level that is safe. No warm-up, which costs the best constant level 0.7 % of the final loss; moves
until the end, because a linear decay ends too low. The return is paid at the end: it is then nearly the same for all
jobs, and a change of 1 % is not lost among drops of loss that differ from job to job."""
HELD: dict[str, Any] = {**QUADRATIC, "actions": "moves_only"}
"""What agents are compared with: holding, from the default level."""
NUM_JOBS = 200
FIRST_JOB = 2_000_000  # seed of the first quadratic that agents are judged by; training begins at the agent's seed


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
    """One noisy quadratic."""
    return gymnasium.make("llmrl_envs:llmrl/NoisyQuadratic-v0", **QUADRATIC)


def make_quadratics() -> Any:
    """Many of them at once."""
    from llmrl_envs.noisy_quadratic import NoisyQuadraticVectorEnv

    return NoisyQuadraticVectorEnv(1024, **QUADRATIC)


def noisy_quadratic_details(agent: Any, steps: int) -> dict[str, Any]:
    """Final loss over that of the optimal schedule on 200 jobs, for the agent and for holding the default level.

    Every seed has jobs of its own, so that settings chosen on some seeds meet new jobs on the others.
    """
    from llmrl_envs.noisy_quadratic import NoisyQuadraticVectorEnv, expected_losses, optimal_schedules

    ratios: dict[str, float] = {}
    best: NDArray[Any] | None = None
    for name, settings in (("agent", QUADRATIC), ("hold", HELD)):
        env = NoisyQuadraticVectorEnv(NUM_JOBS, **settings)
        obs, info = env.reset(seed=FIRST_JOB + NUM_JOBS * agent.config.seed)
        if best is None:
            best = expected_losses(env.quadratics, optimal_schedules(env.quadratics, tolerance=1e-6))[-1]
        final, running = np.zeros(NUM_JOBS), np.ones(NUM_JOBS, dtype=np.bool_)
        while running.any():
            mask = np.asarray(info["action_mask"]).astype(np.bool_)
            holding = np.full(NUM_JOBS, env.table.hold)
            action = holding if name == "hold" else agent.act(obs, mask, explore=False)
            obs, _, terminated, _, info = env.step(action)
            ended = terminated & running
            if ended.any():
                final[ended] = info["final_info"]["expected_loss"][ended]
            running &= ~terminated
        ratios[f"loss_over_optimal_{name}"] = float((final / best).mean())
        ratios[f"loss_over_optimal_{name}_median"] = float(np.median(final / best))
    return ratios
