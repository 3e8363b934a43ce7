"""The small agents read the flags that `FLAGS_READ` names, all of them and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrl.dqn.config import FLAGS_READ, DQNConfig
from llmrl.dqn.reinforce import ReinforceAgent
from llmrl.dqn.tabular import TabularAgent

AGENTS: dict[str, Any] = {"tabular": TabularAgent, "reinforce": ReinforceAgent}


class Watched:
    """A configuration that notes which of its fields are read."""

    def __init__(self, config: DQNConfig, seen: set[str]) -> None:
        self._config, self._seen = config, seen

    def __getattr__(self, name: str) -> Any:
        self._seen.add(name)
        return getattr(self._config, name)


def live(kind: str, config: Any, folder: Path) -> None:
    """Everything that an agent does: acting, learning, saving, loading."""
    agent = AGENTS[kind](config, num_envs=2, obs_shape=(3,), num_actions=4)
    rng, mask = np.random.default_rng(0), np.ones((2, 4), dtype=np.bool_)
    obs = rng.normal(size=(2, 3)).astype(np.float32)
    for _ in range(40):
        action = agent.act(obs, mask, explore=True)
        terminated = rng.random(2) < 0.3
        next_obs = rng.normal(size=(2, 3)).astype(np.float32)
        agent.observe(obs, action, np.ones(2), terminated, ~terminated & (rng.random(2) < 0.1), next_obs, mask, mask)
        agent.learn()
        obs = next_obs
    agent.act(obs, mask, explore=False)
    agent.save(folder)
    agent.load(folder)


@pytest.mark.parametrize("kind", AGENTS)
def test_the_table_of_flags_is_what_the_agents_read(tmp_path: Path, kind: str) -> None:
    seen: set[str] = set()
    for schedule in ("linear", "exponential", "ladder"):
        config = DQNConfig(epsilon_schedule=schedule, batch_size=8, hidden_sizes=(8,))
        live(kind, Watched(config, seen), tmp_path / schedule)
    assert seen == FLAGS_READ[kind] | {"seed"}
    assert FLAGS_READ[kind] <= set(DQNConfig.model_fields)
