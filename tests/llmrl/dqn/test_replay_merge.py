"""Experience of other runs: added whole, never joined to what it does not belong to."""

from __future__ import annotations

import numpy as np
import pytest

from llmrl.dqn.replay import ReplayBuffer


@pytest.mark.parametrize("maker", ["make", "make_images"])
@pytest.mark.parametrize("num_envs", [1, 2, 5])
@pytest.mark.parametrize("through_files", [True, False])
def test_experience_of_another_run_is_added_whole(replays, tmp_path, maker, num_envs, through_files):
    make = getattr(replays, maker)
    old, new = make(), make(num_envs=num_envs, capacity=700)
    replays.play(old, 30, np.random.default_rng(0))
    replays.play(new, 3, np.random.default_rng(1))
    num_before = len(new)
    old.save(tmp_path / "replay")
    report = new.merge(tmp_path / "replay" if through_files else old)
    assert report.num_loaded == len(old)
    assert len(new) == num_before + len(old)
    assert set(replays.stored_rewards(old)) <= set(replays.stored_rewards(new))
    assert_windows_are_real(old, new, num_before)


def assert_windows_are_real(old, new, num_before):
    """Every merged window has the return and the end that the same start had in the other buffer."""
    want, got = ({}, {})
    for replay, found in ((old, want), (new, got)):
        first = replay.sample(60 * len(replay), np.random.default_rng(0), n_step=1, gamma=1.0)
        whole = replay.sample(60 * len(replay), np.random.default_rng(0), n_step=4, gamma=0.5)
        for b in range(len(whole.index)):
            if replay is old or first.generation[b] >= num_before:
                found[int(first.reward[b])] = (whole.reward[b], whole.discount[b], whole.next_obs[b].tobytes())
    assert want == got


def test_of_more_experience_than_fits_the_newest_is_kept(replays, tmp_path):
    old, new = replays.make(num_envs=1), replays.make(num_envs=1, capacity=7)
    replays.play(old, 60, np.random.default_rng(0))
    newest = replays.stored_rewards(old)[-7:]
    assert new.merge(old).num_loaded == 7
    assert replays.stored_rewards(new) == newest


def test_merged_experience_is_not_joined_to_the_episode_under_way():
    old, new = ReplayBuffer(10, 1, (1,), 1), ReplayBuffer(10, 1, (1,), 1)
    for t in range(2):
        old.add([[t]], [0], [10.0], [False], [False], [[t + 1]])
        new.add([[10 + t]], [0], [1.0], [False], [False], [[11 + t]])
    new.merge(old)
    new.add([[12]], [0], [1.0], [False], [False], [[13]])
    batch = new.sample(200, np.random.default_rng(0), n_step=5, gamma=1.0)
    assert dict(zip(batch.obs[:, 0].tolist(), batch.reward.tolist(), strict=True)) == {
        10: 2,
        11: 1,
        0: 20,
        1: 10,
        12: 1,
    }


@pytest.mark.parametrize("maker", ["make", "make_images"])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_divide_experience_without_loss_and_without_cutting(replays, tmp_path, maker, num_processes):
    make = getattr(replays, maker)
    old = make()
    replays.play(old, 30, np.random.default_rng(0))
    old.save(tmp_path / "replay")
    parts = [make(num_envs=1, capacity=700) for _ in range(num_processes)]
    for rank, part in enumerate(parts):
        part.merge(tmp_path / "replay", rank=rank, num_processes=num_processes)
    assert sum(map(len, parts)) == len(old)
    assert sorted(r for part in parts for r in replays.stored_rewards(part)) == replays.stored_rewards(old)
    want = windows(old)
    for part in parts:
        got = windows(part)
        assert got == {name: want[name] for name in got}
        assert len(part) > len(old) / num_processes / 2


def windows(replay):
    """Return, discount and end of the window that begins at each transition, which its reward names."""
    first = replay.sample(60 * len(replay), np.random.default_rng(0), n_step=1, gamma=1.0)
    whole = replay.sample(60 * len(replay), np.random.default_rng(0), n_step=4, gamma=0.5)
    return {
        int(first.reward[b]): (whole.reward[b], whole.discount[b], whole.next_obs[b].tobytes())
        for b in range(len(whole.index))
    }


def test_long_episodes_stay_whole():
    old, new = ReplayBuffer(3000, 1, (1,), 1), ReplayBuffer(6000, 2, (1,), 1)
    for t in range(2500):
        old.add([[t]], [0], [1.0], [False], [False], [[t + 1]])
    new.merge(old)
    batch = new.sample(100, np.random.default_rng(0), n_step=2500, gamma=1.0)
    assert np.array_equal(batch.reward, 2500 - batch.obs[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_shape": (3,)}, r"expected spec .*'obs_shape': \[3\].*, got .*'obs_shape': \[2\]"),
        ({"num_actions": 5}, "expected spec .*'num_actions': 5.*, got .*'num_actions': 4"),
        ({"metadata": {"observation": "b"}}, "expected metadata {'observation': 'b'}, got {'observation': 'a'}"),
        ({"metadata": {}}, "expected metadata {}, got {'observation': 'a'}"),
    ],
)
def test_experience_that_means_something_else_is_refused(replays, tmp_path, changes, message):
    old = replays.make(metadata={"observation": "a"})
    replays.play(old, 5, np.random.default_rng(0))
    old.save(tmp_path / "replay")
    new = replays.make(**{"metadata": {"observation": "a"}, **changes})
    with pytest.raises(ValueError, match=message):
        new.merge(tmp_path / "replay")
    with pytest.raises(ValueError, match=message):
        new.restore(tmp_path / "replay")


def test_metadata_with_tuples_agrees_with_itself(replays, tmp_path):
    replay = replays.make(metadata={"names": ("a", "b")})
    replay.save(tmp_path / "replay")
    assert replay.restore(tmp_path / "replay").damage is None


@pytest.mark.parametrize("changes", [{"capacity": 30}, {"num_envs": 2}])
def test_a_restart_needs_the_same_buffer(replays, tmp_path, changes):
    replays.make().save(tmp_path / "replay")
    key = next(iter(changes))
    with pytest.raises(ValueError, match=f"expected {key} {changes[key]}, got"):
        replays.make(**changes).restore(tmp_path / "replay")
