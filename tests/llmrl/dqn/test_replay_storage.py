from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from llmrl.dqn import replay_storage
from llmrl.dqn.replay import ReplayBuffer

SAMPLINGS = ["uniform", "prioritized", "lap"]
IMAGE = (4, 6, 5)


def make(sampling="uniform", **changes):
    settings = {"capacity": 60, "num_envs": 3, "obs_shape": (2,), "num_actions": 4, "sampling": sampling}
    return ReplayBuffer(**{**settings, **changes})


def make_images(**changes):
    return make(obs_shape=IMAGE, obs_dtype=np.uint8, **changes)


def play(replay, num_steps, rng):
    """Random steps in random lanes; in images frames slide. The reward is the number of the step."""
    num_envs = replay.num_envs
    obs = observations(replay, rng)
    for _ in range(num_steps):
        fresh = observations(replay, rng)
        next_obs = np.concatenate([obs[:, 1:], fresh[:, :1]], axis=1)
        mask, next_mask = rng.random((2, num_envs, replay.spec.num_actions)) < 0.5
        mask[:, 1] = next_mask[:, 0] = True
        terminated, truncated = rng.random((2, num_envs)) < 0.1
        valid = rng.random(num_envs) < (0.8 if num_envs > 1 else 1.0)
        number = replay.rows.next_generation + valid.cumsum() - 1
        action = np.ones(num_envs, dtype=int)
        replay.add(obs, action, number, terminated, truncated, next_obs, mask, next_mask, valid=valid)
        if replay.sampling != "uniform" and len(replay):
            batch = replay.sample(4, rng, n_step=1, gamma=1.0)
            replay.update_priorities(batch.index, batch.generation, rng.random(4) * 5)
        ended = (terminated | truncated).reshape(-1, *[1] * len(replay.spec.obs_shape))
        obs = np.where(ended, observations(replay, rng), next_obs)


def observations(replay, rng):
    shape = (replay.num_envs, *replay.spec.obs_shape)
    if replay.spec.obs_dtype == np.uint8:
        return rng.integers(0, 255, shape, dtype=np.uint8)
    return rng.normal(size=shape).astype(np.float32)


def assert_draw_the_same(one, other):
    for seed in range(3):
        batches = [
            replay.sample(100, np.random.default_rng(seed), n_step=3, gamma=0.9, beta=0.5) for replay in (one, other)
        ]
        for name in batches[0].__dataclass_fields__:
            assert np.array_equal(getattr(batches[0], name), getattr(batches[1], name)), name


def stored_rewards(replay):
    """Rewards of all transitions, which name them."""
    batch = replay.sample(60 * len(replay), np.random.default_rng(0), n_step=1, gamma=1.0)
    return sorted(set(batch.reward.astype(int).tolist()))


# -- exact restart ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 5, 100])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("maker", [make, make_images])
def test_a_restored_buffer_goes_on_as_the_saved_one(tmp_path, maker, sampling, num_steps):
    saved, restored = maker(sampling=sampling), maker(sampling=sampling)
    play(saved, num_steps, np.random.default_rng(0))
    saved.save(tmp_path / "replay")
    report = restored.restore(tmp_path / "replay")
    assert (report.num_loaded, report.num_stored, report.damage) == (len(saved), len(saved), None)
    if num_steps:
        assert_draw_the_same(saved, restored)
    for replay in (saved, restored):
        play(replay, 40, np.random.default_rng(1))
    assert_draw_the_same(saved, restored)
    assert restored.rows.state_dict() == saved.rows.state_dict()
    assert restored.num_stale_updates == saved.num_stale_updates


@pytest.mark.parametrize("maker", [make, make_images])
@pytest.mark.parametrize("sampling", ["uniform", "prioritized"])
def test_appending_is_as_exact_as_saving(tmp_path, maker, sampling):
    rng = np.random.default_rng(0)
    replay = maker(sampling=sampling)
    play(replay, 10, rng)
    replay.save(tmp_path / "replay")
    for num_steps in (0, 1, 10, 200, 3):
        play(replay, num_steps, rng)
        replay.append(tmp_path / "replay")
        restored = maker(sampling=sampling)
        restored.restore(tmp_path / "replay")
        assert_draw_the_same(replay, restored)


def test_an_appended_folder_keeps_what_was_overwritten_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    replay = make(num_envs=1)
    replay.save(tmp_path / "log")
    for _ in range(5):
        play(replay, 50, rng)
        replay.append(tmp_path / "log")
    everything = make(capacity=1000, num_envs=1)
    assert everything.merge(tmp_path / "log").num_loaded == replay.rows.next_generation > 150
    assert stored_rewards(everything) == list(range(replay.rows.next_generation))


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
def test_the_way_of_sampling_may_change(tmp_path, before, after):
    saved, restored = make(sampling=before), make(sampling=after)
    play(saved, 30, np.random.default_rng(0))
    saved.save(tmp_path / "replay")
    restored.restore(tmp_path / "replay")
    assert stored_rewards(restored) == stored_rewards(saved)


def test_columns_are_plain_files_that_numpy_opens(tmp_path):
    replay = make(num_envs=1)
    play(replay, 10, np.random.default_rng(0))
    replay.save(tmp_path / "replay")
    reward = np.load(tmp_path / "replay" / "reward.npy", mmap_mode="r", allow_pickle=False)
    assert reward.tolist() == list(range(len(replay)))
    replay_columns = {file.stem for file in (tmp_path / "replay").glob("*.npy")}
    assert {"obs", "next_obs", "action", "reward", "terminated", "truncated", "environment", "episode"} < replay_columns


def test_images_on_disk_are_stored_once(tmp_path):
    replay = make_images(capacity=1000, num_envs=1)
    play(replay, 1000, np.random.default_rng(0))
    replay.save(tmp_path / "replay")
    assert len(np.load(tmp_path / "replay" / "frames.npy")) < 2 * len(replay)  # episodes here are five steps long


# -- files from earlier versions --------------------------------------------------------------------------------------


def test_a_folder_of_version_1_written_by_hand_loads(tmp_path):
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
    replay = make(num_envs=1)
    assert replay.restore(tmp_path).damage is None
    batch = replay.sample(50, np.random.default_rng(0), n_step=3, gamma=0.5)
    first = int(np.flatnonzero(batch.obs[:, 0] == 1)[0])
    assert (batch.reward[first], batch.discount[first], batch.next_obs[first].tolist()) == (31.0, 0.0, [7.0, 8.0])


VERSION_1_CHECKSUMS = [830671789517945187, 15589881325014606756, 5544052000255459160]


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [make, make_images])
@pytest.mark.parametrize("num_envs", [1, 2, 5])
@pytest.mark.parametrize("through_files", [True, False])
def test_experience_of_another_run_is_added_whole(tmp_path, maker, num_envs, through_files):
    old, new = maker(), maker(num_envs=num_envs, capacity=700)
    play(old, 30, np.random.default_rng(0))
    play(new, 3, np.random.default_rng(1))
    num_before = len(new)
    old.save(tmp_path / "replay")
    report = new.merge(tmp_path / "replay" if through_files else old)
    assert report.num_loaded == len(old)
    assert len(new) == num_before + len(old)
    assert set(stored_rewards(old)) <= set(stored_rewards(new))
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


def test_of_more_experience_than_fits_the_newest_is_kept(tmp_path):
    old, new = make(num_envs=1), make(num_envs=1, capacity=7)
    play(old, 60, np.random.default_rng(0))
    newest = stored_rewards(old)[-7:]
    assert new.merge(old).num_loaded == 7
    assert stored_rewards(new) == newest


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
def test_experience_that_means_something_else_is_refused(tmp_path, changes, message):
    old = make(metadata={"observation": "a"})
    play(old, 5, np.random.default_rng(0))
    old.save(tmp_path / "replay")
    new = make(**{"metadata": {"observation": "a"}, **changes})
    with pytest.raises(ValueError, match=message):
        new.merge(tmp_path / "replay")
    with pytest.raises(ValueError, match=message):
        new.restore(tmp_path / "replay")


def test_metadata_with_tuples_agrees_with_itself(tmp_path):
    replay = make(metadata={"names": ("a", "b")})
    replay.save(tmp_path / "replay")
    assert replay.restore(tmp_path / "replay").damage is None


@pytest.mark.parametrize("changes", [{"capacity": 30}, {"num_envs": 2}])
def test_a_restart_needs_the_same_buffer(tmp_path, changes):
    make().save(tmp_path / "replay")
    key = next(iter(changes))
    with pytest.raises(ValueError, match=f"expected {key} {changes[key]}, got"):
        make(**changes).restore(tmp_path / "replay")


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder of 50 transitions of one lane."""
    return write_folder(tmp_path / "replay", make(num_envs=1))


def write_folder(path, replay):
    play(replay, 50, np.random.default_rng(0))
    replay.save(path)
    return path


def row_bytes(file):
    array = np.load(file, mmap_mode="r")
    return array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=int))


COLUMNS = [
    "obs",
    "next_obs",
    "action",
    "reward",
    "terminated",
    "truncated",
    "mask",
    "episode",
    "begins",
    "rows_checksum",
]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_that_was_cut_off_yields_every_complete_transition(folder, column):
    file = folder / f"{column}.npy"
    os.truncate(file, file.stat().st_size - 20 * row_bytes(file) - 1)
    replay = make(num_envs=1)
    with pytest.warns(UserWarning, match=f"{column}.npy holds 29 of 50 rows; took 29 transitions"):
        report = replay.restore(folder)
    assert (report.num_stored, report.num_loaded) == (50, 29)
    assert report.damage == f"{column}.npy holds 29 of 50 rows"
    assert stored_rewards(replay) == list(range(29))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", [1, 31, 49])
def test_overwritten_bytes_yield_every_transition_before_them(folder, column, row):
    file = folder / f"{column}.npy"
    data = bytearray(file.read_bytes())
    data[len(data) - (50 - row) * row_bytes(file)] ^= 1
    file.write_bytes(data)
    replay = make(num_envs=1)
    with pytest.warns(UserWarning, match=f"row {row} of table 'rows' does not match its checksum"):
        report = replay.merge(folder)
    assert report.num_loaded == row
    assert stored_rewards(replay) == list(range(row))


def test_a_damaged_frame_costs_the_transitions_from_the_first_that_shows_it(tmp_path):
    saved = make_images(num_envs=1, capacity=120)
    folder = write_folder(tmp_path / "replay", saved)
    file = folder / "frames.npy"
    os.truncate(file, file.stat().st_size - 25 * row_bytes(file))
    num_frames = len(np.load(folder / "frames_checksum.npy")) - 25
    frame = np.load(folder / "frame.npy")
    num_intact = int((frame.max(axis=(1, 2)) >= num_frames + frame.min()).argmax())
    replay = make_images(num_envs=1, capacity=120)
    with pytest.warns(UserWarning, match=r"frames.npy holds"):
        assert replay.restore(folder).num_loaded == num_intact
    assert 0 < num_intact < 50
    assert stored_rewards(replay) == stored_rewards(saved)[:num_intact]


def test_damaged_priorities_cost_no_transition(tmp_path):
    folder = write_folder(tmp_path / "replay", make(num_envs=1, sampling="prioritized"))
    file = next(folder.glob("priority_*.npy"))
    os.truncate(file, file.stat().st_size - 9)
    replay = make(num_envs=1, sampling="prioritized")
    with pytest.warns(UserWarning, match="priority_1.npy holds 48 of 50 rows"):
        assert replay.restore(folder).num_loaded == 50


def test_a_buffer_can_go_on_after_damage(folder):
    os.truncate(folder / "reward.npy", (folder / "reward.npy").stat().st_size - 40)
    replay = make(num_envs=1)
    with pytest.warns(UserWarning, match="took 40"):
        replay.restore(folder)
    play(replay, 100, np.random.default_rng(3))
    replay.save(folder)
    other = make(num_envs=1)
    assert other.restore(folder).damage is None
    assert_draw_the_same(replay, other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "manifest.json: expected the manifest of a replay folder, got"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: expected the manifest of a replay folder, got"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: expected the manifest of a replay folder"),
        (lambda f: (f / "manifest.json").write_text("[]"), "expected the manifest of a 'llmrl replay' folder, got"),
        (lambda f: edit_manifest(f, format_version=2), "expected format_version 1, got 2"),
        (lambda f: edit_manifest(f, lanes=None), "expected the key 'lanes'"),
        (lambda f: edit_manifest(f, tables={"rows": {}}), "expected a manifest that is whole, got KeyError"),
        (lambda f: edit_manifest(f, tables=["rows"]), "expected a manifest that is whole, got AttributeError"),
        (lambda f: edit_manifest(f, about=7), "expected a manifest that is whole, got TypeError"),
        (lambda f: (f / "obs.npy").rename(f / "observation.npy"), "obs.npy: expected a column, got no such file"),
        (
            lambda f: shutil.copy(f / "reward.npy", f / "obs.npy"),
            r"obs.npy: expected rows float32\[2\], got float32\[\]",
        ),
        (lambda f: shutil.copy(f / "next_obs.npy", f / "obs.npy"), "expected at least one intact transition, got none"),
        (lambda f: (f / "obs.npy").write_bytes(b""), "obs.npy: expected a .npy file, got"),
        (lambda f: (f / "obs.npy").write_bytes(b"PK\x03\x04" + bytes(99)), "obs.npy: expected a .npy file, got"),
        (lambda f: append_bytes(f / "obs.npy", 8), "obs.npy: expected 528 bytes for 50 rows, got 536"),
        (lambda f: os.truncate(f / "obs.npy", 130), "expected at least one intact transition, got none"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(folder, damage, message):
    damage(folder)
    for load in (make(num_envs=1).restore, make(num_envs=1).merge):
        with pytest.raises(ValueError, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": [51]}, "expected 51 transitions in lane 0, got 50"),
        ({"count": [61]}, "expected rows up to 60, got"),
        ({"head": [-1]}, "expected rows up to 60, got"),
        ({"count": [25, 25]}, "expected 1 values of each kind, got"),
    ],
)
def test_lanes_that_cannot_be_are_refused_and_leave_the_buffer_as_it_was(folder, changes, message):
    lanes = json.loads((folder / "manifest.json").read_text())["lanes"]
    edit_manifest(folder, lanes={**lanes, **changes})
    replay = make(num_envs=1)
    play(replay, 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        replay.restore(folder)
    assert len(replay) == 4


def edit_manifest(folder, **changes):
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    kept = {key: value for key, value in manifest.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(kept))


def append_bytes(file, num_bytes):
    with file.open("ab") as stream:
        stream.write(bytes(num_bytes))


def test_no_file_is_ever_unpickled(folder):
    np.save(folder / "obs.npy", np.array([{"a": 1}] * 50, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"obs.npy: expected rows float32\[2\], got object"):
        make(num_envs=1).merge(folder)


def test_a_folder_of_another_buffer_is_not_appended_to(folder):
    with pytest.raises(ValueError, match="expected a folder of this buffer to append to, got another one's"):
        make(num_envs=1).append(folder)


# -- a process that dies ----------------------------------------------------------------------------------------------


class Died(Exception):
    pass


def die(*args, **settings):
    raise Died


def test_dying_while_saving_leaves_what_was_there(folder, monkeypatch):
    replay = make(num_envs=1)
    replay.restore(folder)
    before = stored_rewards(replay)
    play(replay, 5, np.random.default_rng(1))
    monkeypatch.setattr(replay_storage, "_write_manifest", die)
    with pytest.raises(Died):
        replay.save(folder)
    other = make(num_envs=1)
    assert other.restore(folder).damage is None
    assert stored_rewards(other) == before


def test_dying_between_the_two_renames_of_saving_leaves_what_was_there(folder, monkeypatch):
    replay = make(num_envs=1)
    replay.restore(folder)
    before = stored_rewards(replay)
    rename = os.rename

    def rename_once(source, target):
        rename(source, target)
        raise Died

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(Died):
        replay.save(folder)
    monkeypatch.undo()
    other = make(num_envs=1)
    other.restore(folder)
    assert stored_rewards(other) == before


@pytest.mark.parametrize("sampling", ["uniform", "prioritized"])
@pytest.mark.parametrize("num_tables", [0, 1, 2])
def test_dying_while_appending_leaves_what_was_there(tmp_path, monkeypatch, sampling, num_tables):
    replay = make_images(sampling=sampling)
    play(replay, 10, np.random.default_rng(0))
    replay.save(tmp_path / "replay")
    saved = make_images(sampling=sampling)
    saved.restore(tmp_path / "replay")
    play(replay, 5, np.random.default_rng(1))
    write, written = replay_storage.write_table, []

    def write_some(*args, **settings):
        if len(written) == num_tables:
            raise Died
        written.append(args)
        return write(*args, **settings)

    monkeypatch.setattr(replay_storage, "write_table", write_some)
    if num_tables < (3 if sampling == "prioritized" else 2):
        with pytest.raises(Died):
            replay.append(tmp_path / "replay")
    monkeypatch.undo()
    other = make_images(sampling=sampling)
    assert other.restore(tmp_path / "replay").damage is None
    assert_draw_the_same(saved, other)
    replay.append(tmp_path / "replay")
    other.restore(tmp_path / "replay")
    assert_draw_the_same(replay, other)
