"""Gymnasium environments whose episodes are fine-tuning jobs.

Importing the package registers the environments, so `gymnasium.make("llmrl_envs:llmrl/FineTuning-v0")` needs no
import of its own. Nothing here imports torch until an environment is made.

    llmrl/GridWorld-v0        the 3x3 grid of the classic example, optimal action values known
    llmrl/NoisyQuadratic-v0   training on a noisy quadratic, expected loss in closed form, best schedule known
    llmrl/FineTuning-v0       fine-tuning a real model on real data
"""

from __future__ import annotations

import gymnasium

GRID_WORLD_STEPS = 100
"""Steps after which an episode of GridWorld is truncated: the longest shortest path is two steps, a random walk's mean
episode is a dozen."""


def register_environments() -> None:
    """Register the package's environments with Gymnasium; calling it again changes nothing."""
    entries: dict[str, dict[str, object]] = {
        "llmrl/GridWorld-v0": {
            "entry_point": "llmrl_envs.grid_world:GridWorldEnv",
            "max_episode_steps": GRID_WORLD_STEPS,
        },
        "llmrl/NoisyQuadratic-v0": {
            "entry_point": "llmrl_envs.noisy_quadratic:NoisyQuadraticEnv",
            "vector_entry_point": "llmrl_envs.noisy_quadratic:NoisyQuadraticVectorEnv",
        },
        "llmrl/FineTuning-v0": {
            "entry_point": "llmrl_envs.fine_tuning:FineTuningEnv",
            "vector_entry_point": "llmrl_envs.vector_fine_tuning:FineTuningVectorEnv",
        },
    }
    for environment_id, arguments in entries.items():
        # A second registration of the same id is a warning in Gymnasium.
        if environment_id not in gymnasium.registry:
            gymnasium.register(id=environment_id, **arguments)  # type: ignore[arg-type]


register_environments()
