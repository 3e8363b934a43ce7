"""Members of a group branch at one decision, each by another move, and are stored as what that move gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.config import TrainConfig
from llmrl.run_directory import read_jsonl
from llmrl.training.deviations import MOVES, Deviator
from llmrl.training.loop import train

TABLE = action_table("moves_only")
SPEC = ObservationSpec(TABLE)


class Listener:
    """An agent that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.ended = 0

    def observe(self, *columns: Any, valid: NDArray[np.bool_]) -> None:
        for lane in np.flatnonzero(valid):
            self.rows.append((int(lane), *(column[lane] for column in columns)))

    def end_episodes(self) -> None:
        self.ended += 1


def play(deviator: Deviator, mask: NDArray[np.bool_], rewards: NDArray[np.float64]) -> NDArray[np.int64]:
    """Grid places from the start after each of 20 decisions, [20, 5]; rewards are paid at the end."""
    moves = np.array([action.move for action in TABLE.actions])
    found, now, none = [], np.zeros(5, np.int64), np.zeros(5, np.bool_)
    for decision, progress in enumerate(np.linspace(0.0, 0.95, 20)):
        obs = np.zeros((5, SPEC.size), np.float32)
        obs[:, SPEC.names.index("progress")] = progress
        actions = deviator.act(obs, mask, explore=True)
        last = np.full(5, decision == 19)
        deviator.observe(obs, actions, np.where(last, rewards, 0.0), last, none, obs, mask, mask)
        now = now + moves[actions]
        found.append(now)
    return np.array(found)


def test_members_of_a_group_branch_at_one_decision_and_that_alone_is_stored() -> None:
    agent = Listener()
    deviator = Deviator(agent, TABLE, SPEC, 5, 0.5, np.random.default_rng(0))  # type: ignore[arg-type]
    everything = np.ones((5, 5), np.bool_)
    branched = []
    for episode in range(30):
        found = play(deviator, everything, np.arange(5.0) + episode)
        assert found[-1].tolist() == [0, *MOVES]
        changes = (np.diff(found[:, 1:], axis=0, prepend=0) != 0).sum(axis=0)
        assert changes.tolist() == [1, 1, 1, 1]
        stored = agent.rows[-5:]
        assert len(agent.rows) == 5 * (episode + 1)
        assert [row[2] for row in stored] == [TABLE.hold, 0, 1, 3, 4]
        assert [row[3] for row in stored] == [episode + place for place in range(5)]
        assert all(row[4] and not row[5] for row in stored)
        progress = {round(float(row[1][SPEC.names.index("progress")]), 2) for row in stored}
        assert len(progress) == 1
        branched += progress
    assert max(branched) <= 0.55
    assert np.median(branched) < 0.3
    deviator.end_episodes()
    assert agent.ended == 1


def test_a_move_that_is_not_available_counts_as_holding() -> None:
    agent = Listener()
    deviator = Deviator(agent, TABLE, SPEC, 5, 0.5, np.random.default_rng(0))  # type: ignore[arg-type]
    only_hold = np.zeros((5, 5), np.bool_)
    only_hold[:, TABLE.hold] = True
    assert (play(deviator, only_hold, np.zeros(5)) == 0).all()
    assert [row[2] for row in agent.rows] == [TABLE.hold] * 5


def test_a_table_without_moves_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="plain moves"):
        Deviator(Listener(), action_table("levels"), SPEC, 5, 0.5, rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 5"):
        Deviator(Listener(), TABLE, SPEC, 4, 0.5, rng)  # type: ignore[arg-type]


def test_holding_is_a_baseline_for_groups_alone() -> None:
    env = {"tasks": {"tasks": [{"data": "builtin:json"}]}, "reward": {"baseline": "hold", "measured": "end"}}
    with pytest.raises(ValueError, match=r"env\.groups"):
        TrainConfig.model_validate({"env": env})
    assert TrainConfig.model_validate({"env": {**env, "population": 4, "groups": 2}}).env.groups == 2


def test_deviations_need_one_group_of_five() -> None:
    env = {"tasks": {"tasks": [{"data": "builtin:json"}]}, "population": 10, "groups": 5}
    with pytest.raises(ValueError, match="population 5"):
        TrainConfig.model_validate({"env": env, "training": {"demonstrator": "deviations"}})


TINY = {"data": {"train": "builtin:json", "max_examples": 80}, "steps": 12, "max_length": 16, "batch_size": 2}


def make_config(**agent: Any) -> TrainConfig:
    """A run that collects, or with `agent` one that learns from what another has collected."""
    groups = {} if agent else {"population": 5, "groups": 5, "reward": {"baseline": "hold", "measured": "end"}}
    return TrainConfig.model_validate(
        {
            "env": {
                "tasks": {"tasks": [{**TINY, "validation_examples": 4}], "start_moves": [0, 2]},
                **groups,
                "actions": "moves_only",
                "schedule": {"cooldown_progress": 0.5},
            },
            "agent": {"hidden_sizes": [8], "learning_starts": 10_000, "gamma": 1.0, "n_step": 1, **agent},
            "training": {
                "decisions": 0 if agent else 60,
                "demonstrations": 1000,
                "demonstrator": "schedules" if agent else "deviations",
                "checkpoint_period_episodes": 5,
                "evaluation_period_episodes": 0,
                "evaluation_episodes": 1,
            },
            "tracking": {"wandb": "disabled"},
        }
    )


def test_a_run_collects_a_branch_of_every_job_and_another_learns_from_them(tmp_path: Path) -> None:
    train(config=make_config(), output=tmp_path / "experience")
    rows = read_jsonl(tmp_path / "experience" / "metrics.jsonl")
    episodes = [row for row in rows if row["kind"] == "episode"]
    assert len(episodes) >= 5
    assert len(episodes) % 5 == 0
    learned = make_config(experience=[str(tmp_path / "experience")], pretrain_updates=20, batch_size=16)
    train(config=learned, output=tmp_path / "policy")
    told = read_jsonl(tmp_path / "policy" / "metrics.jsonl")
    assert [row["transitions"] for row in told if row["kind"] == "experience"] == [len(episodes)]
    assert (tmp_path / "policy" / "policy" / "model.safetensors").is_file()
