"""Replay folders that are damaged, and processes that die while they write one."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from llmrl.dqn import replay_storage


@pytest.fixture
def folder(replays, tmp_path):
    """A folder of 50 transitions of one lane."""
    return write_folder(replays, tmp_path / "replay", replays.make(num_envs=1))


def write_folder(replays, path, replay):
    replays.play(replay, 50, np.random.default_rng(0))
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
    "next_mask",
    "episode",
    "generation",
    "environment",
    "begins",
    "rows_checksum",
]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_that_was_cut_off_yields_every_complete_transition(replays, folder, column):
    file = folder / f"{column}.npy"
    os.truncate(file, file.stat().st_size - 20 * row_bytes(file) - 1)
    replay = replays.make(num_envs=1)
    with pytest.warns(UserWarning, match=f"{column}.npy holds 29 of 50 rows; took 29 transitions"):
        report = replay.restore(folder)
    assert (report.num_stored, report.num_loaded) == (50, 29)
    assert report.damage == f"{column}.npy holds 29 of 50 rows"
    assert replays.stored_rewards(replay) == list(range(29))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", [1, 31, 49])
def test_overwritten_bytes_yield_every_transition_before_them(replays, folder, column, row):
    file = folder / f"{column}.npy"
    data = bytearray(file.read_bytes())
    data[len(data) - (50 - row) * row_bytes(file)] ^= 1
    file.write_bytes(data)
    replay = replays.make(num_envs=1)
    with pytest.warns(UserWarning, match=f"row {row} of table 'rows' does not match its checksum"):
        report = replay.merge(folder)
    assert report.num_loaded == row
    assert replays.stored_rewards(replay) == list(range(row))


def test_a_damaged_frame_costs_the_transitions_from_the_first_that_shows_it(replays, tmp_path):
    saved = replays.make_images(num_envs=1, capacity=120)
    folder = write_folder(replays, tmp_path / "replay", saved)
    file = folder / "frames.npy"
    os.truncate(file, file.stat().st_size - 25 * row_bytes(file))
    num_frames = len(np.load(folder / "frames_checksum.npy")) - 25
    frame = np.load(folder / "frame.npy")
    num_intact = int((frame.max(axis=(1, 2)) >= num_frames + frame.min()).argmax())
    replay = replays.make_images(num_envs=1, capacity=120)
    with pytest.warns(UserWarning, match=r"frames.npy holds"):
        assert replay.restore(folder).num_loaded == num_intact
    assert 0 < num_intact < 50
    assert replays.stored_rewards(replay) == replays.stored_rewards(saved)[:num_intact]


def test_damaged_priorities_cost_no_transition(replays, tmp_path):
    folder = write_folder(replays, tmp_path / "replay", replays.make(num_envs=1, sampling="prioritized"))
    file = next(folder.glob("priority_*.npy"))
    os.truncate(file, file.stat().st_size - 9)
    replay = replays.make(num_envs=1, sampling="prioritized")
    with pytest.warns(UserWarning, match="priority_1.npy holds 48 of 50 rows"):
        assert replay.restore(folder).num_loaded == 50


def test_a_buffer_can_go_on_after_damage(replays, folder):
    os.truncate(folder / "reward.npy", (folder / "reward.npy").stat().st_size - 40)
    replay = replays.make(num_envs=1)
    with pytest.warns(UserWarning, match="took 40"):
        replay.restore(folder)
    replays.play(replay, 100, np.random.default_rng(3))
    replay.save(folder)
    other = replays.make(num_envs=1)
    assert other.restore(folder).damage is None
    replays.assert_draw_the_same(replay, other)


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
def test_files_that_are_not_what_they_should_be_are_refused(replays, folder, damage, message):
    damage(folder)
    for load in (replays.make(num_envs=1).restore, replays.make(num_envs=1).merge):
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
def test_lanes_that_cannot_be_are_refused_and_leave_the_buffer_as_it_was(replays, folder, changes, message):
    lanes = json.loads((folder / "manifest.json").read_text())["lanes"]
    edit_manifest(folder, lanes={**lanes, **changes})
    replay = replays.make(num_envs=1)
    replays.play(replay, 4, np.random.default_rng(0))
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


def test_no_file_is_ever_unpickled(replays, folder):
    np.save(folder / "obs.npy", np.array([{"a": 1}] * 50, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"obs.npy: expected rows float32\[2\], got object"):
        replays.make(num_envs=1).merge(folder)


def test_a_folder_of_another_buffer_is_not_appended_to(replays, folder):
    with pytest.raises(ValueError, match="expected a folder of this buffer to append to, got another one's"):
        replays.make(num_envs=1).append(folder)


# -- a process that dies ----------------------------------------------------------------------------------------------


class Died(Exception):
    pass


def die(*args, **settings):
    raise Died


def test_dying_while_saving_leaves_what_was_there(replays, folder, monkeypatch):
    replay = replays.make(num_envs=1)
    replay.restore(folder)
    before = replays.stored_rewards(replay)
    replays.play(replay, 5, np.random.default_rng(1))
    monkeypatch.setattr(replay_storage, "_write_manifest", die)
    with pytest.raises(Died):
        replay.save(folder)
    other = replays.make(num_envs=1)
    assert other.restore(folder).damage is None
    assert replays.stored_rewards(other) == before


def test_dying_between_the_two_renames_of_saving_leaves_what_was_there(replays, folder, monkeypatch):
    replay = replays.make(num_envs=1)
    replay.restore(folder)
    before = replays.stored_rewards(replay)
    rename = os.rename

    def rename_once(source, target):
        rename(source, target)
        raise Died

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(Died):
        replay.save(folder)
    monkeypatch.undo()
    other = replays.make(num_envs=1)
    other.restore(folder)
    assert replays.stored_rewards(other) == before


@pytest.mark.parametrize("sampling", ["uniform", "prioritized"])
@pytest.mark.parametrize("num_tables", [0, 1, 2])
def test_dying_while_appending_leaves_what_was_there(replays, tmp_path, monkeypatch, sampling, num_tables):
    replay = replays.make_images(sampling=sampling)
    replays.play(replay, 10, np.random.default_rng(0))
    replay.save(tmp_path / "replay")
    saved = replays.make_images(sampling=sampling)
    saved.restore(tmp_path / "replay")
    replays.play(replay, 5, np.random.default_rng(1))
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
    other = replays.make_images(sampling=sampling)
    assert other.restore(tmp_path / "replay").damage is None
    replays.assert_draw_the_same(saved, other)
    replay.append(tmp_path / "replay")
    other.restore(tmp_path / "replay")
    replays.assert_draw_the_same(replay, other)
