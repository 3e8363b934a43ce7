"""Replay on disk: an exact restart, appending, and the format as it is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmrl.dqn.replay import ReplayBuffer


@pytest.mark.parametrize("num_steps", [0, 1, 5, 100])
@pytest.mark.parametrize("sampling", ["uniform", "prioritized", "lap"])
@pytest.mark.parametrize("maker", ["make", "make_images"])
def test_a_restored_buffer_goes_on_as_the_saved_one(replays, tmp_path, maker, sampling, num_steps):
    saved, restored = (getattr(replays, maker)(sampling=sampling) for _ in range(2))
    replays.play(saved, num_steps, np.random.default_rng(0))
    saved.save(tmp_path / "replay")
    report = restored.restore(tmp_path / "replay")
    assert (report.num_loaded, report.num_stored, report.damage) == (len(saved), len(saved), None)
    if num_steps:
        replays.assert_draw_the_same(saved, restored)
    for replay in (saved, restored):
        replays.play(replay, 40, np.random.default_rng(1))
    replays.assert_draw_the_same(saved, restored)
    assert restored.rows.state_dict() == saved.rows.state_dict()
    assert restored.num_stale_updates == saved.num_stale_updates


@pytest.mark.parametrize("maker", ["make", "make_images"])
@pytest.mark.parametrize("sampling", ["uniform", "prioritized"])
def test_appending_is_as_exact_as_saving(replays, tmp_path, maker, sampling):
    rng = np.random.default_rng(0)
    make = getattr(replays, maker)
    replay = make(sampling=sampling)
    replays.play(replay, 10, rng)
    replay.save(tmp_path / "replay")
    for num_steps in (0, 1, 10, 200, 3):
        replays.play(replay, num_steps, rng)
        replay.append(tmp_path / "replay")
        restored = make(sampling=sampling)
        restored.restore(tmp_path / "replay")
        replays.assert_draw_the_same(replay, restored)


def test_an_appended_folder_keeps_what_was_overwritten_in_memory(replays, tmp_path):
    rng = np.random.default_rng(0)
    replay = replays.make(num_envs=1)
    replay.save(tmp_path / "log")
    for _ in range(5):
        replays.play(replay, 50, rng)
        replay.append(tmp_path / "log")
    everything = replays.make(capacity=1000, num_envs=1)
    assert everything.merge(tmp_path / "log").num_loaded == replay.rows.next_generation > 150
    assert replays.stored_rewards(everything) == list(range(replay.rows.next_generation))


def test_appending_does_not_join_what_has_a_gap_in_between(tmp_path):
    replay, log = ReplayBuffer(3, 1, (1,), 1), ReplayBuffer(100, 1, (1,), 1)
    for t in range(10):
        replay.add([[t]], [0], [1.0], [False], [False], [[t + 1]])
        if t == 2:
            replay.save(tmp_path / "log")
    replay.append(tmp_path / "log")  # 3 to 6 are gone
    log.merge(tmp_path / "log")
    batch = log.sample(200, np.random.default_rng(0), n_step=5, gamma=1.0)
    length = dict(zip(batch.obs[:, 0].tolist(), batch.reward.tolist(), strict=True))
    assert length == {0: 3, 1: 2, 2: 1, 7: 3, 8: 2, 9: 1}


@pytest.mark.parametrize(("before", "after"), [("uniform", "prioritized"), ("prioritized", "uniform")])
def test_the_way_of_sampling_may_change(replays, tmp_path, before, after):
    saved, restored = replays.make(sampling=before), replays.make(sampling=after)
    replays.play(saved, 30, np.random.default_rng(0))
    saved.save(tmp_path / "replay")
    restored.restore(tmp_path / "replay")
    assert replays.stored_rewards(restored) == replays.stored_rewards(saved)


def test_columns_are_plain_files_that_numpy_opens(replays, tmp_path):
    replay = replays.make(num_envs=1)
    replays.play(replay, 10, np.random.default_rng(0))
    replay.save(tmp_path / "replay")
    reward = np.load(tmp_path / "replay" / "reward.npy", mmap_mode="r", allow_pickle=False)
    assert reward.tolist() == list(range(len(replay)))
    replay_columns = {file.stem for file in (tmp_path / "replay").glob("*.npy")}
    assert {"obs", "next_obs", "action", "reward", "terminated", "truncated", "environment", "episode"} < replay_columns


def test_images_on_disk_are_stored_once(replays, tmp_path):
    replay = replays.make_images(capacity=1000, num_envs=1)
    replays.play(replay, 1000, np.random.default_rng(0))
    replay.save(tmp_path / "replay")
    assert len(np.load(tmp_path / "replay" / "frames.npy")) < 2 * len(replay)  # episodes here are five steps long


# -- files from earlier versions --------------------------------------------------------------------------------------


def test_a_folder_of_version_1_written_by_hand_loads(replays, tmp_path):
    """The format as it is on disk; this test may only ever be joined by one for the next version."""
    columns = {
        "obs": np.array([[1, 2], [3, 4], [5, 6]], dtype="<f4"),
        "next_obs": np.array([[3, 4], [5, 6], [7, 8]], dtype="<f4"),
        "action": np.array([0, 3, 1], dtype="<i4"),
        "reward": np.array([1, 10, 100], dtype="<f4"),
        "terminated": np.array([False, False, True]),
        "truncated": np.array([False, False, False]),
        "mask": np.ones((3, 4), dtype=bool),
        "next_mask": np.ones((3, 4), dtype=bool),
        "episode": np.array([0, 0, 0], dtype="<i8"),
        "generation": np.array([0, 1, 2], dtype="<i8"),
        "environment": np.array([0, 0, 0], dtype="<i4"),
        "begins": np.array([True, False, False]),
        "rows_checksum": np.array(VERSION_1_CHECKSUMS, dtype="<u8"),
    }
    for name, column in columns.items():
        np.save(tmp_path / f"{name}.npy", column)
    kinds = {
        name: {"dtype": column.dtype.str, "shape": list(column.shape[1:])}
        for name, column in columns.items()
        if name != "rows_checksum"
    }
    manifest = {
        "format": "llmrl replay",
        "format_version": 1,
        "appending": False,
        "num_writes": 1,
        "about": {
            "identity": "0123",
            "spec": {"obs_shape": [2], "obs_dtype": "float32", "num_actions": 4},
            "metadata": {},
            "num_envs": 1,
            "capacity": 60,
            "sampling": "uniform",
            "alpha": 0.6,
            "max_priority": 1.0,
            "num_stale_updates": 0,
        },
        "tables": {"rows": {"name": "rows", "num_rows": 3, "columns": kinds}},
        "first_frame": 0,
        "lanes": {
            "head": [3],
            "count": [3],
            "open": [False],
            "episode": [0],
            "next_episode": 1,
            "next_generation": 3,
        },
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    replay = replays.make(num_envs=1)
    assert replay.restore(tmp_path).damage is None
    batch = replay.sample(50, np.random.default_rng(0), n_step=3, gamma=0.5)
    first = int(np.flatnonzero(batch.obs[:, 0] == 1)[0])
    assert (batch.reward[first], batch.discount[first], batch.next_obs[first].tolist()) == (31.0, 0.0, [7.0, 8.0])


VERSION_1_CHECKSUMS = [830671789517945187, 15589881325014606756, 5544052000255459160]
