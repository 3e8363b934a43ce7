"""Members of a group begin to decay at different times, and what is stored is what waiting gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.config import TrainConfig
from llmrl.policy import SchedulePolicy
from llmrl.run_directory import read_jsonl
from llmrl.training.decay_times import GROUP_SIZE, DecayTimes
from llmrl.training.loop import train

TABLE = action_table("decay")
SPEC = ObservationSpec(TABLE)
PROGRESS = SPEC.names.index("progress")
HOLD, COOLDOWN = TABLE.names.index("hold"), TABLE.names.index("cooldown")
DECISIONS = np.linspace(0.0, 0.95, 20)
FIRST = 2
"""Decision from which a cooldown is available."""


class Listener:
    """An agent that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, int, float]] = []
        self.ended = 0

    def observe(self, obs: Any, action: Any, reward: Any, terminated: Any, *_: Any, valid: NDArray[np.bool_]) -> None:
        (lane,) = np.flatnonzero(valid)
        assert terminated[lane]
        progress = round(float(obs[lane, PROGRESS]), 6)
        self.rows.append((int(lane), progress, int(action[lane]), float(reward[lane])))

    def end_episodes(self) -> None:
        self.ended += 1


def make(agent: Listener, num_envs: int = GROUP_SIZE, base: Any = "wsd_40") -> DecayTimes:
    return DecayTimes(agent, TABLE, SPEC, num_envs, base)  # type: ignore[arg-type]


def play(script: DecayTimes, gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Progress at which each lane began its cooldown, NaN where it never did, [E]; gains are paid at the end."""
    num_envs = len(gains)
    began, none = np.full(num_envs, np.nan), np.zeros(num_envs, np.bool_)
    for decision, progress in enumerate(DECISIONS):
        obs = np.zeros((num_envs, SPEC.size), np.float32)
        obs[:, PROGRESS] = progress
        mask = np.zeros((num_envs, 2), np.bool_)
        mask[:, HOLD] = True
        mask[:, COOLDOWN] = (decision >= FIRST) & np.isnan(began)
        mask[::GROUP_SIZE, COOLDOWN] = False  # as the environment has it
        actions = script.act(obs, mask, explore=True)
        began = np.where(actions == COOLDOWN, progress, began)
        last = np.full(num_envs, decision == len(DECISIONS) - 1)
        script.observe(obs, actions, np.where(last, gains, 0.0), last, none, obs, mask, mask)
    return began


def test_each_member_begins_at_its_time_and_the_first_never() -> None:
    began = play(make(Listener()), np.zeros(GROUP_SIZE))
    assert np.isnan(began[0])
    expected = [0.1, 0.15, 0.2, 0.3, 0.45]
    assert began[1:] == pytest.approx(np.array(expected))


def test_waiting_is_worth_the_best_time_to_come_less_now() -> None:
    agent, gains = Listener(), np.array([0.9, 1.0, 1.2, 1.6, 2.0, 1.4])
    began = play(make(agent), gains)
    times, returns = [*began[1:], 0.6], [*gains[1:], gains[0]]

    def gain(progress: float) -> float:
        return float(np.interp(progress, times, returns)) / 2.0

    seen = [float(p) for p in DECISIONS if began[1] <= p < 0.6]
    later = {p: [q for q in [*seen, 0.6] if q > p] for p in seen}
    expected = {(round(p, 6), HOLD): max(gain(q) for q in later[p]) - gain(p) for p in seen}
    expected |= {(round(p, 6), COOLDOWN): 0.0 for p in seen}
    assert {row[0] for row in agent.rows} == {0}
    assert {(p, action): reward for _, p, action, reward in agent.rows} == pytest.approx(expected)
    assert len(agent.rows) == 2 * len(seen)


def test_where_there_is_nothing_to_wait_for_waiting_costs_one_interval() -> None:
    agent = Listener()
    play(make(agent), np.array([0.0, 1.0, 0.8, 0.6, 0.4, 0.2]))
    waiting = [reward for _, _, action, reward in agent.rows if action == HOLD]
    assert max(waiting) < 0.0
    assert min(waiting) > -0.21


def test_a_constant_base_lets_the_first_member_wait_to_the_end() -> None:
    agent = Listener()
    play(make(agent, base="constant"), np.zeros(GROUP_SIZE))
    assert max(row[1] for row in agent.rows) == pytest.approx(DECISIONS[-1])


def test_several_groups_are_told_of_in_their_own_lanes() -> None:
    agent = Listener()
    script = make(agent, 2 * GROUP_SIZE)
    play(script, np.arange(2.0 * GROUP_SIZE))
    assert {row[0] for row in agent.rows} == {0, GROUP_SIZE}
    script.end_episodes()
    assert agent.ended == 1


def test_what_cannot_be_played_is_refused() -> None:
    agent: Any = Listener()
    with pytest.raises(ValueError, match="a cooldown among the actions"):
        DecayTimes(agent, action_table("moves_only"), SPEC, GROUP_SIZE, "wsd_40")
    with pytest.raises(ValueError, match="constant, wsd or wsd_40"):
        make(agent, base="linear")
    with pytest.raises(ValueError, match="multiple of 6"):
        make(agent, 4)


def make_config(env: dict[str, Any] | None = None, **agent: Any) -> TrainConfig:
    """A run that collects, or with `agent` one that learns from what another has collected; `env` changes it."""
    groups = {} if agent else {"population": GROUP_SIZE, "groups": GROUP_SIZE, "reward": {"measured": "end"}}
    data = {"train": "builtin:json", "max_examples": 80}
    task = {"data": data, "steps": 24, "max_length": 16, "batch_size": 2, "validation_examples": 4}
    return TrainConfig.model_validate(
        {
            "env": {
                "tasks": {"tasks": [task]},
                **groups,
                "actions": "decay",
                "schedule": {"base": "wsd_40", "earliest_cooldown": 0.05, "cooldown_progress": 0.6},
                **(env or {}),
            },
            "agent": {"hidden_sizes": [8], "learning_starts": 10_000, "gamma": 1.0, "n_step": 1, **agent},
            "training": {
                "decisions": 0 if agent else 60,
                "demonstrations": 1000,
                "demonstrator": "schedules" if agent else "decay_times",
                "checkpoint_period_episodes": GROUP_SIZE,
                "evaluation_period_episodes": 0,
                "evaluation_episodes": 1,
            },
            "tracking": {"wandb": "disabled"},
        }
    )


def test_a_run_collects_contrasts_and_another_learns_from_them(tmp_path: Path) -> None:
    train(config=make_config(), output=tmp_path / "experience")
    learned = make_config(experience=[str(tmp_path / "experience")], pretrain_updates=20, batch_size=16)
    train(config=learned, output=tmp_path / "policy")
    told = read_jsonl(tmp_path / "policy" / "metrics.jsonl")
    assert all(row["transitions"] > 0 for row in told if row["kind"] == "experience")
    policy = SchedulePolicy.from_pretrained(tmp_path / "policy" / "policy")
    assert policy.table == TABLE
    assert policy.settings.earliest_cooldown == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 12}, "population 6"),
        ({"actions": "moves_only"}, r"env\.actions with a cooldown"),
        ({"schedule": {"base": "linear"}}, "stays at its peak"),
    ],
)
def test_a_configuration_that_cannot_be_played_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(changes)
