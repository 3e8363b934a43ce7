"""Members of a group begin to decay at different times, and what is stored is what waiting gained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.config import TrainConfig
from llmrl.policy import SchedulePolicy
from llmrl.run_directory import read_jsonl
from llmrl.training.decay_times import PLAIN_PLANS, PLANS, RISING_PLANS, DecayTimes, plans_of
from llmrl.training.loop import train

HOLD, COOLDOWN, RISE, LEAN = range(4)
"""What the tables' first actions do, as `test_the_tables_share_their_first_actions` says."""
GROUP_SIZE = len(PLANS)
RISING_SIZE = len(PLANS) + len(RISING_PLANS)
LEANING_SIZE = len(PLAIN_PLANS) + RISING_SIZE
WINDOW = (0.1, 0.2)
"""Shares of the budget between which the level may rise."""

DECISIONS = np.linspace(0.0, 0.95, 20)
FIRST = 2
"""Decision from which a cooldown is available."""


class Listener:
    """An agent that keeps what it is told of decisions by a table."""

    def __init__(self, table: str = "decay") -> None:
        self.table = action_table(table)
        self.spec = ObservationSpec(self.table)
        self.rows: list[tuple[int, float, int, float]] = []
        self.ended = 0

    def observe(self, obs: Any, action: Any, reward: Any, terminated: Any, *_: Any, valid: NDArray[np.bool_]) -> None:
        (lane,) = np.flatnonzero(valid)
        assert terminated[lane]
        progress = round(float(obs[lane, self.spec.names.index("progress")]), 6)
        self.rows.append((int(lane), progress, int(action[lane]), float(reward[lane])))

    def end_episodes(self) -> None:
        self.ended += 1


def make(agent: Listener, num_envs: int = GROUP_SIZE, base: Any = "wsd_40") -> DecayTimes:
    return DecayTimes(agent, agent.table, agent.spec, num_envs, base)  # type: ignore[arg-type]


class Played(NamedTuple):
    """Progress at which each lane began its cooldown, rose, and leant, float64[E] each; NaN where it never did."""

    began: NDArray[np.float64]
    rose: NDArray[np.float64]
    leant: NDArray[np.float64]


def play(agent: Listener, gains: NDArray[np.float64], group_size: int, base: Any = "wsd_40") -> Played:
    """Plays groups whose jobs gain `gains`, float64[E], paid at their ends."""
    num_envs, table = len(gains), agent.table
    script = make(agent, num_envs, base)
    played = Played(*np.full((3, num_envs), np.nan))
    none = np.zeros(num_envs, np.bool_)
    for decision, progress in enumerate(DECISIONS):
        obs = np.zeros((num_envs, agent.spec.size), np.float32)
        obs[:, agent.spec.names.index("progress")] = progress
        mask = np.zeros((num_envs, table.num_actions), np.bool_)
        is_free = np.isnan(played.began)
        bears = ~np.isnan(played.leant) if table.lean is not None else np.full(num_envs, decision >= FIRST)
        in_window = WINDOW[0] <= round(progress, 9) <= WINDOW[1]
        mask[:, HOLD], mask[:, COOLDOWN] = True, is_free & (decision >= FIRST)
        if table.rise is not None:
            mask[:, RISE] = is_free & bears & np.isnan(played.rose) & in_window
        if table.lean is not None:
            mask[:, LEAN] = is_free & np.isnan(played.leant)
        mask[::group_size, COOLDOWN:] = False  # as the environment has it
        actions = script.act(obs, mask, explore=True)
        assert mask[np.arange(num_envs), actions].all()
        for done, action in zip(played, (COOLDOWN, RISE, LEAN), strict=True):
            done[actions == action] = progress
        last = np.full(num_envs, decision == len(DECISIONS) - 1)
        script.observe(obs, actions, np.where(last, gains, 0.0), last, none, obs, mask, mask)
    script.end_episodes()
    return played


def test_the_tables_share_their_first_actions() -> None:
    names = ("hold", "cooldown", "one_up", "lean")
    assert [action_table(name).names for name in ("decay", "rise", "lean")] == [names[:2], names[:3], names]


def test_each_member_begins_at_its_time_and_the_first_never() -> None:
    began = play(Listener(), np.zeros(GROUP_SIZE), GROUP_SIZE).began
    assert np.isnan(began[0])
    expected = [0.1, 0.15, 0.2, 0.3, 0.45]
    assert began[1:] == pytest.approx(np.array(expected))


def test_waiting_is_worth_the_best_time_to_come_less_now() -> None:
    agent, gains = Listener(), np.array([0.9, 1.0, 1.2, 1.6, 2.0, 1.4])
    began = play(agent, gains, GROUP_SIZE).began
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
    play(agent, np.array([0.0, 1.0, 0.8, 0.6, 0.4, 0.2]), GROUP_SIZE)
    waiting = [reward for _, _, action, reward in agent.rows if action == HOLD]
    assert max(waiting) < 0.0
    assert min(waiting) > -0.21


def test_a_constant_base_lets_the_first_member_wait_to_the_end() -> None:
    agent = Listener()
    play(agent, np.zeros(GROUP_SIZE), GROUP_SIZE, base="constant")
    assert max(row[1] for row in agent.rows) == pytest.approx(DECISIONS[-1])


def test_where_levels_can_rise_four_members_do_at_once_and_decay_at_their_times() -> None:
    began, rose, _ = play(Listener("rise"), np.ones(RISING_SIZE), RISING_SIZE)
    assert np.isnan(rose[: len(PLANS)]).all()
    assert rose[len(PLANS) :] == pytest.approx(np.full(4, 0.1))
    assert np.isnan(began[[0, len(PLANS)]]).all()
    assert began[len(PLANS) + 1 :] == pytest.approx(np.array([0.15, 0.2, 0.4]))


def test_rising_is_worth_the_best_time_to_come_up_there_less_beginning_now_down_here() -> None:
    told = Listener("rise")
    gains = np.array([0.9, 1.0, 1.2, 1.6, 2.0, 1.4, 1.0, 1.5, 2.2, 2.5])
    began = play(told, gains, RISING_SIZE).began
    times, returns = [*began[1:6], 0.6], [*gains[1:6], gains[0]]
    above = [*began[7:], 0.6], [*gains[7:], gains[6]]
    rows = {(lane, p, action): reward for lane, p, action, reward in told.rows}
    rises = {p: reward for (lane, p, action), reward in rows.items() if action == RISE}
    assert {lane for lane, _, action in rows if action == RISE} == {0}
    assert list(rises) == pytest.approx([p for p in DECISIONS if WINDOW[0] <= round(p, 9) <= WINDOW[1]])
    for p, reward in rises.items():
        assert reward == pytest.approx((2.5 - np.interp(p, times, returns)) / 2.5), p
    # The one that waits up there says what waiting is worth there.
    waits = {p: reward for (lane, p, action), reward in rows.items() if (lane, action) == (6, HOLD)}
    assert min(waits) == pytest.approx(0.15)
    assert waits[min(waits)] == pytest.approx((2.5 - 1.5) / 2.5)
    last = max(waits)
    assert waits[last] == pytest.approx((1.0 - np.interp(last, *above)) / 2.5)


def test_where_steps_can_lean_three_members_do_not_and_the_others_do_from_the_start() -> None:
    began, rose, leant = play(Listener("lean"), np.ones(LEANING_SIZE), LEANING_SIZE)
    plain, rising = len(PLAIN_PLANS), len(PLAIN_PLANS) + len(PLANS)
    assert np.isnan(leant[:plain]).all()
    assert leant[plain:] == pytest.approx(np.zeros(RISING_SIZE))
    assert np.isnan(rose[:rising]).all()
    assert rose[rising:] == pytest.approx(np.full(4, 0.1))
    assert np.isnan(began[[0, plain, rising]]).all()
    assert began[1:plain] == pytest.approx(np.array([0.1, 0.2]))
    assert began[plain + 1 : rising] == pytest.approx(np.array([0.1, 0.15, 0.2, 0.3, 0.45]))


def test_leaning_is_worth_the_best_time_to_come_less_beginning_now_without() -> None:
    told = Listener("lean")
    gains = np.array([0.8, 1.0, 1.2, 0.9, 1.0, 1.2, 1.6, 2.0, 1.4, 1.0, 1.5, 2.2, 2.5])
    play(told, gains, LEANING_SIZE)
    rows = {(lane, p, action): reward for lane, p, action, reward in told.rows}
    leans = {p: reward for (lane, p, action), reward in rows.items() if action == LEAN}
    assert {lane for lane, _, action in rows if action == LEAN} == {0}
    # As soon as the plain members have begun their decay nothing says any more what leaning would have gained.
    assert list(leans) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    for p, reward in leans.items():
        assert reward == pytest.approx((2.0 - np.interp(p, [0.1, 0.2, 0.6], gains[[1, 2, 0]])) / 2.5), p
    waits = {p: reward for (lane, p, action), reward in rows.items() if (lane, action) == (0, HOLD)}
    assert waits[0.0] == pytest.approx((1.2 - 1.0) / 2.5)
    assert (0, 0.0, COOLDOWN) not in rows
    assert rows[0, 0.1, COOLDOWN] == 0.0
    rises = {lane: reward for (lane, p, action), reward in rows.items() if action == RISE and p == 0.1}
    assert rises == {len(PLAIN_PLANS): pytest.approx((2.5 - 1.0) / 2.5)}


def test_several_groups_are_told_of_in_their_own_lanes() -> None:
    agent = Listener()
    play(agent, np.arange(2.0 * GROUP_SIZE), GROUP_SIZE)
    assert {row[0] for row in agent.rows} == {0, GROUP_SIZE}
    assert agent.ended == 1


def test_what_cannot_be_played_is_refused() -> None:
    agent = Listener("moves_only")
    with pytest.raises(ValueError, match="a cooldown among the actions"):
        make(agent)
    agent = Listener()
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
                "decisions": 0 if agent else 10 * (env or {}).get("groups", GROUP_SIZE),
                "demonstrations": 1000,
                "demonstrator": "schedules" if agent else "decay_times",
                "checkpoint_period_episodes": GROUP_SIZE,
                "evaluation_period_episodes": 0,
                "evaluation_episodes": 1,
            },
            "tracking": {"wandb": "disabled"},
        }
    )


@pytest.mark.parametrize("actions", ["decay", "rise", "moves", "lean"])
def test_a_run_collects_contrasts_and_another_learns_from_them(actions: str, tmp_path: Path) -> None:
    size = len(plans_of(action_table(actions)))
    train(config=make_config({"actions": actions, "population": size, "groups": size}), output=tmp_path / "experience")
    experience = [str(tmp_path / "experience")]
    learned = make_config({"actions": actions}, experience=experience, pretrain_updates=20, batch_size=16)
    train(config=learned, output=tmp_path / "policy")
    told = read_jsonl(tmp_path / "policy" / "metrics.jsonl")
    assert all(row["transitions"] > 0 for row in told if row["kind"] == "experience")
    policy = SchedulePolicy.from_pretrained(tmp_path / "policy" / "policy")
    assert policy.table == action_table(actions)
    assert policy.settings.earliest_cooldown == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 12}, "population 6"),
        ({"actions": "rise"}, "population 10"),
        ({"actions": "moves"}, "population 10"),
        ({"actions": "lean"}, "population 13"),
        ({"actions": "moves_only", "population": 10, "groups": 10}, r"env\.actions with a cooldown"),
        ({"schedule": {"base": "linear"}}, "stays at its peak"),
    ],
)
def test_a_configuration_that_cannot_be_played_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(changes)
