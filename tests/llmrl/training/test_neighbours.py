"""Members of a group go to neighbouring levels, and what is stored are contrasts between what they gained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.config import TrainConfig
from llmrl.policy import SchedulePolicy
from llmrl.run_directory import read_jsonl
from llmrl.training.contrasts import SMALLEST_UNIT, with_one_peak
from llmrl.training.loop import train
from llmrl.training.neighbours import GROUP_SIZE, PLACES, NeighbourLevels

TABLE = action_table("moves_only")
SPEC = ObservationSpec(TABLE)
PROGRESS = SPEC.names.index("progress")
LATEST = 0.5
MOVES = np.array([action.move for action in TABLE.actions])


class Listener:
    """An agent that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.ended = 0

    def observe(self, *columns: Any, valid: NDArray[np.bool_]) -> None:
        assert valid.sum() == 1
        lane = int(np.flatnonzero(valid)[0])
        self.rows.append((lane, *(column[lane] for column in columns)))

    def end_episodes(self) -> None:
        self.ended += 1


def make(agent: Listener, num_envs: int = GROUP_SIZE) -> NeighbourLevels:
    return NeighbourLevels(agent, TABLE, SPEC, num_envs, LATEST, np.random.default_rng(0))  # type: ignore[arg-type]


def play(script: NeighbourLevels, gains: NDArray[np.float64], mask: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """Grid places from the start at each of 20 decisions before its move, and at the end, [21, E]; paid at the end.

    The observation holds the place in its last entry, and the lane in the one before.
    """
    num_envs = len(gains)
    if mask is None:
        mask = np.ones((num_envs, TABLE.num_actions), np.bool_)
        mask[::GROUP_SIZE] = np.arange(TABLE.num_actions) == TABLE.hold  # as the environment has it
    found, now, none = [np.zeros(num_envs, np.int64)], np.zeros(num_envs, np.int64), np.zeros(num_envs, np.bool_)
    for decision, progress in enumerate(np.linspace(0.0, 0.95, 20)):
        obs = np.zeros((num_envs, SPEC.size), np.float32)
        obs[:, PROGRESS], obs[:, -1], obs[:, -2] = progress, now, np.arange(num_envs)
        actions = script.act(obs, mask, explore=True)
        last = np.full(num_envs, decision == 19)
        script.observe(obs, actions, np.where(last, gains, 0.0), last, none, obs, mask, mask)
        now = now + MOVES[actions]
        found.append(now)
    return np.array(found)


def test_members_part_at_one_decision_and_stay_at_their_levels() -> None:
    script, parted = make(Listener()), []
    for _ in range(30):
        found = play(script, np.zeros(GROUP_SIZE))
        assert found[-1].tolist() == list(PLACES)
        first = int(np.flatnonzero(found.any(axis=1))[0])
        assert found[first].tolist() == np.clip(PLACES, -2, 2).tolist()
        assert (found[first + 1 :] == PLACES).all()
        parted.append((first - 1) / 20)
    assert max(parted) <= LATEST / 2 + 0.05
    assert np.median(parted) < LATEST / 2 - 0.05


def test_what_is_stored_are_contrasts_at_early_decisions_at_each_level() -> None:
    agent, gains = Listener(), np.array([1.0, -3.0, 0.5, 0.9, 2.0, 1.5, -7.0])
    found = play(make(agent), gains)
    by_place = dict(zip(PLACES, np.maximum(gains, -2.0), strict=True))  # no return below the unit's negative counts
    expected = set()
    for decision in range(10):  # progress below LATEST
        for lane, place in enumerate(PLACES):
            if found[decision, lane] == place:
                for action, move in enumerate(MOVES):
                    if place + move in by_place:
                        gain = (by_place[place + int(move)] - by_place[place]) / 2.0
                        expected.add((lane, decision, action, round(gain, 6)))
    got = [(lane, round(float(obs[PROGRESS]) * 20), int(a), round(float(r), 6)) for lane, obs, a, r, *_ in agent.rows]
    assert sorted(got) == sorted(expected)
    assert all(row[4] and not row[5] for row in agent.rows)
    assert all(row[1][-1] == PLACES[row[0]] and row[1][-2] == row[0] for row in agent.rows)


def test_gains_too_small_to_be_a_unit_are_not_blown_up() -> None:
    agent = Listener()
    play(make(agent), np.array([0.0, 0.01, 0.02, 0.0, 0.0, 0.0, 0.0]))
    assert max(abs(row[3]) for row in agent.rows) == pytest.approx(0.02 / SMALLEST_UNIT)


def test_returns_that_fall_and_rise_again_are_fitted_with_one_peak() -> None:
    agent = Listener()
    play(make(agent), np.array([1.0, 0.2, 0.6, 0.4, 0.8, 0.0, 0.4]))  # from the lowest level: .2 .6 .4 1 .8 0 .4
    stored = {(PLACES[row[0]], int(MOVES[row[2]])): row[3] for row in agent.rows}
    assert {move: stored[move] for move in ((-2, 1), (2, 1), (0, 2), (-3, 1))} == pytest.approx(
        {(-2, 1): 0.0, (2, 1): 0.0, (0, 2): 0.2 - 1.0, (-3, 1): 0.3}
    )


@pytest.mark.parametrize("seed", range(5))
def test_one_peak_is_the_nearest_by_least_squares(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, 5).astype(np.float64)
    means = {float(values[i:j].mean()) for i, j in itertools.combinations(range(6), 2)}
    grid = np.array(list(itertools.product(means, repeat=5)))
    rises, falls = np.diff(grid, axis=1) >= 0, np.diff(grid, axis=1) <= 0
    has_peak = np.any([rises[:, :peak].all(axis=1) & falls[:, peak:].all(axis=1) for peak in range(5)], axis=0)
    nearest = float(np.square(grid[has_peak] - values).sum(axis=1).min())
    assert float(np.square(with_one_peak(values) - values).sum()) == pytest.approx(nearest)


def test_groups_are_told_of_when_all_their_members_have_ended() -> None:
    agent = Listener()
    script = make(agent, 2 * GROUP_SIZE)
    play(script, np.arange(2.0 * GROUP_SIZE))
    assert {row[0] for row in agent.rows} == set(range(2 * GROUP_SIZE))
    script.end_episodes()
    assert agent.ended == 1


def test_a_level_that_is_not_reached_stands_in_no_contrast() -> None:
    agent = Listener()
    mask = np.ones((GROUP_SIZE, TABLE.num_actions), np.bool_)
    mask[:, MOVES > 0] = False
    found = play(make(agent), np.zeros(GROUP_SIZE), mask)
    assert found[-1].tolist() == [min(place, 0) for place in PLACES]
    assert {row[0] for row in agent.rows} == {lane for lane, place in enumerate(PLACES) if place <= 0}
    assert all(MOVES[row[2]] <= 0 for row in agent.rows)


def test_a_table_without_moves_and_half_a_group_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="plain moves"):
        NeighbourLevels(Listener(), action_table("levels"), SPEC, GROUP_SIZE, LATEST, rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 7"):
        make(Listener(), 4)


def test_holding_is_a_baseline_for_groups_alone() -> None:
    env = {"tasks": {"tasks": [{"data": "builtin:json"}]}, "reward": {"baseline": "hold", "measured": "end"}}
    with pytest.raises(ValueError, match=r"env\.groups"):
        TrainConfig.model_validate({"env": env})
    assert TrainConfig.model_validate({"env": {**env, "population": 4, "groups": 2}}).env.groups == 2


def test_neighbours_need_one_group_of_seven() -> None:
    env = {"tasks": {"tasks": [{"data": "builtin:json"}]}, "population": 14, "groups": 7}
    with pytest.raises(ValueError, match="population 7"):
        TrainConfig.model_validate({"env": env, "training": {"demonstrator": "neighbours"}})


TINY = {"data": {"train": "builtin:json", "max_examples": 80}, "steps": 12, "max_length": 16, "batch_size": 2}


def make_config(**agent: Any) -> TrainConfig:
    """A run that collects, or with `agent` one that learns from what another has collected."""
    groups = {} if agent else {"population": GROUP_SIZE, "groups": GROUP_SIZE, "reward": {"measured": "end"}}
    return TrainConfig.model_validate(
        {
            "env": {
                "tasks": {"tasks": [{**TINY, "validation_examples": 4}]},
                **groups,
                "actions": "moves_only",
                "schedule": {"cooldown_progress": 0.5},
            },
            "agent": {"hidden_sizes": [8], "learning_starts": 10_000, "gamma": 1.0, "n_step": 1, **agent},
            "training": {
                "decisions": 0 if agent else 70,
                "demonstrations": 1000,
                "demonstrator": "schedules" if agent else "neighbours",
                "checkpoint_period_episodes": GROUP_SIZE,
                "evaluation_period_episodes": 0,
                "evaluation_episodes": 1,
            },
            "tracking": {"wandb": "disabled"},
        }
    )


def test_a_run_collects_contrasts_and_another_learns_from_them(tmp_path: Path) -> None:
    train(config=make_config(), output=tmp_path / "experience")
    rows = read_jsonl(tmp_path / "experience" / "metrics.jsonl")
    episodes = [row for row in rows if row["kind"] == "episode"]
    assert len(episodes) >= GROUP_SIZE
    assert len(episodes) % GROUP_SIZE == 0
    blind = {"normalize_obs": True, "ignored_features": ["mode_*", "last_hold"]}
    learned = make_config(experience=[str(tmp_path / "experience")], pretrain_updates=20, batch_size=16, **blind)
    train(config=learned, output=tmp_path / "policy")
    told = read_jsonl(tmp_path / "policy" / "metrics.jsonl")
    assert all(row["transitions"] > len(episodes) for row in told if row["kind"] == "experience")
    policy = SchedulePolicy.from_pretrained(str(tmp_path / "policy" / "policy"))
    (collected,) = policy.provenance["experience"]
    assert (collected["run"], collected["decisions"]) == ("experience", 70)
    assert [task["data"] for task in collected["tasks"]] == ["builtin:json"]
    assert "tasks" not in policy.provenance
    obs, mask = np.zeros((1, SPEC.size), np.float32), np.ones((1, TABLE.num_actions), np.bool_)
    other = obs.copy()
    other[0, [SPEC.names.index(name) for name in ("mode_full", "last_hold", "last_hold@2")]] = 1.0
    np.testing.assert_array_equal(policy.act(obs, mask).q_values, policy.act(other, mask).q_values)


def test_a_feature_that_is_not_there_cannot_be_ignored(tmp_path: Path) -> None:
    config = make_config(experience=["nowhere"], pretrain_updates=1, normalize_obs=True, ignored_features=["mood_*"])
    with pytest.raises(UserError, match="mood_"):
        train(config=config, output=tmp_path)
    with pytest.raises(ValueError, match="normalize_obs"):
        make_config(ignored_features=["mode_*"])
