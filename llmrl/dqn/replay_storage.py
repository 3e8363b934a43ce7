"""Replay on disk: a folder with one `.npy` file per column and `manifest.json`.

The columns hold transitions in the order in which they were written; the manifest the format's version, dtypes and
shapes, what the buffer says about itself, and where every lane stood. `write_replay` fills a new folder and renames it.
`append_replay` makes the columns longer and then replaces the manifest. A process that dies in between leaves what was
there before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.column_files import CHUNK_ROWS, ColumnType, StoredTable, TableType, read_table, write_table
from llmrl.dqn.replay_checks import Transitions
from llmrl.dqn.replay_observations import FrameObservations
from llmrl.dqn.replay_rows import Rows

FORMAT = "llmrl replay"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Chunk = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LoadReport:
    """What was taken from a folder."""

    num_stored: int  # transitions that it should hold
    num_loaded: int  # transitions that were taken from it
    damage: str | None  # what is wrong with the folder; None = it is intact


def write_replay(path: Path, rows: Rows, about: dict[str, Any], priorities: NDArray[np.float64] | None) -> None:
    """Writes the transitions of a buffer to a new folder, which then takes the place of `path`.

    Args:
        path: Folder; an existing one is replaced.
        rows: The transitions.
        about: What the buffer says about itself, as JSON values.
        priorities: [K] of the transitions in the order in which they were written, or None.
    """
    new, old = _siblings(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _write_tables(new, rows, about, priorities, before=None)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def append_replay(path: Path, rows: Rows, about: dict[str, Any], priorities: NDArray[np.float64] | None) -> None:
    """Adds the transitions that `path` does not have yet; those that were overwritten in memory stay in it.

    Raises:
        ValueError: The folder was written by another buffer, or is damaged.
    """
    stored = StoredReplay(path)
    if stored.about["identity"] != about["identity"]:
        raise ValueError(f"{path}: expected a folder of this buffer to append to, got another one's")
    if stored.damage is not None:
        raise ValueError(f"{path}: expected an intact folder to append to, got one in which {stored.damage}")
    before = stored.manifest
    _write_manifest(path, {**before, "appending": True})
    _write_tables(path, rows, about, priorities, before)
    if "priorities" in before["tables"]:
        for name in _table_type(before["tables"]["priorities"]).files:
            (path / f"{name}.npy").unlink(missing_ok=True)


class StoredReplay:
    """A replay folder, memory-mapped; the transitions before the first damage, in the order of writing.

    Raises:
        ValueError: The folder or a file of it is missing, too long, of another version or type, or nothing is intact.
    """

    def __init__(self, path: Path) -> None:
        _finish_rename(path)
        self.path = path
        self.manifest = _read_manifest(path)
        try:
            self.about: dict[str, Any] = dict(self.manifest["about"])
            self._tables = {name: self._read(entry) for name, entry in self.manifest["tables"].items()}
            self.num_stored = int(self.manifest["tables"]["rows"]["num_rows"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / MANIFEST}: expected a manifest that is whole, got {error!r}") from error
        self._columns = self._tables["rows"].columns
        self.damage = next((table.damage for table in self._tables.values() if table.damage is not None), None)
        self.num_intact = self._count_intact()
        if self.num_stored and not self.num_intact:
            raise ValueError(f"{path}: expected at least one intact transition, got none: {self.damage}")
        self.environment = np.asarray(self._columns["environment"][: self.num_intact], dtype=np.int64)
        self.begins = np.asarray(self._columns["begins"][: self.num_intact])

    def transitions(self, which: NDArray[np.int64]) -> Transitions:
        """Some of the transitions, by place in [0, num_intact)."""
        column = {name: values[which] for name, values in self._columns.items()}
        if "frames" in self._tables:
            stacks = self._tables["frames"].columns["frames"][column["frame"] - self.manifest["first_frame"]]
            column["obs"], column["next_obs"] = stacks[:, 0], stacks[:, 1]
        names = ("obs", "action", "reward", "terminated", "truncated", "next_obs", "mask", "next_mask", "episode")
        return Transitions(column["environment"].astype(np.int64), *(column[name] for name in names))

    def fill(self, rows: Rows) -> None:
        """Puts every transition of an undamaged folder where it was when the folder was written.

        Raises:
            ValueError: The manifest counts more transitions in a lane than there are.
        """
        rows.load_state_dict(self.manifest["lanes"])
        for lane in range(rows.num_envs):
            slots = rows.lane_slots(lane)
            places = np.flatnonzero(self.environment == lane)[-len(slots) :] if len(slots) else slots
            if len(places) != len(slots):
                raise ValueError(f"{self.path}: expected {len(slots)} transitions in lane {lane}, got {len(places)}")
            for start in range(0, len(slots), CHUNK_ROWS):
                piece = slice(start, start + CHUNK_ROWS)
                for name, column in rows.columns.items():
                    column[slots[piece]] = self._columns[name][places[piece]]
            rows.stop[slots[:-1]] = self.begins[places[1:]]
        if isinstance(rows.observations, FrameObservations):
            rows.observations.restore(self._tables["frames"].columns["frames"], self.manifest["first_frame"])

    def priorities(self) -> NDArray[np.float64] | None:
        """Leaves of the sum tree for the transitions that the buffer held, in the order of writing."""
        table = self._tables.get("priorities")
        return None if table is None else np.array(next(iter(table.columns.values())))

    def _read(self, entry: dict[str, Any]) -> StoredTable:
        return read_table(self.path, _table_type(entry), entry["num_rows"], may_be_longer=self.manifest["appending"])

    def _count_intact(self) -> int:
        """Transitions before the first that is damaged itself or has a damaged frame."""
        num_intact = self._tables["rows"].num_intact
        if "frames" not in self._tables or not num_intact:
            return num_intact
        end = self.manifest["first_frame"] + self._tables["frames"].num_intact
        lost = self._columns["frame"][:num_intact].max(axis=(1, 2)) >= end
        return int(lost.argmax()) if lost.any() else num_intact


def check_agrees(where: str, got: dict[str, Any], expected: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Raises ValueError where what a stored buffer says about itself is not what is expected."""
    for key in keys:
        if got.get(key) != expected[key]:
            raise ValueError(f"{where}: expected {key} {expected[key]}, got {got.get(key)}")


def _write_tables(
    folder: Path,
    rows: Rows,
    about: dict[str, Any],
    priorities: NDArray[np.float64] | None,
    before: dict[str, Any] | None,
) -> None:
    """Writes what the manifest `before` does not count yet, then the new manifest."""
    slots = rows.live_slots()
    tables: dict[str, Any] = {}
    first_frame = 0
    num_writes = 1 if before is None else before["num_writes"] + 1
    kept = 0 if before is None else before["tables"]["rows"]["num_rows"]
    new = slots if before is None else slots[rows.generation[slots] >= before["lanes"]["next_generation"]]
    tables["rows"] = _write(folder, _row_table(rows), _row_chunks(rows, new), kept)
    store = rows.observations
    if isinstance(store, FrameObservations):
        kept = 0 if before is None else before["tables"]["frames"]["num_rows"]
        first_frame = store.oldest if before is None else before["first_frame"]
        start = max(first_frame + kept, store.oldest)
        kind = {"frames": ColumnType(store.frames.dtype, store.frames.shape[1:])}
        skipped = start - first_frame - kept
        tables["frames"] = _write(folder, TableType("frames", kind), _frame_chunks(store, start), kept, skipped)
    if priorities is not None:
        name = f"priorities_{num_writes}"  # a new file each time, so that the old one lasts as long as its manifest
        table = TableType(name, {f"priority_{num_writes}": ColumnType(priorities.dtype, ())})
        tables["priorities"] = _write(folder, table, [{f"priority_{num_writes}": priorities}], 0)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "appending": False,
        "num_writes": num_writes,
        "about": about,
        "tables": tables,
        "first_frame": first_frame,
        "lanes": rows.state_dict(),
    }
    _write_manifest(folder, manifest)


def _write(
    folder: Path, table: TableType, chunks: Iterable[Chunk], num_kept: int, num_skipped: int = 0
) -> dict[str, Any]:
    """Writes a table and returns its entry in the manifest."""
    num_rows = write_table(folder, table, chunks, num_kept=num_kept, num_skipped=num_skipped)
    columns = {name: kind.to_dict() for name, kind in table.columns.items()}
    return {"name": table.name, "num_rows": num_rows, "columns": columns}


def _table_type(entry: dict[str, Any]) -> TableType:
    """The table of an entry in the manifest."""
    columns = {name: ColumnType.from_dict(kind) for name, kind in entry["columns"].items()}
    return TableType(entry["name"], columns)


def _row_table(rows: Rows) -> TableType:
    """The fields of the records, the lane, and whether a transition begins a run."""
    fields = {name: rows.records.dtype[name] for name in rows.records.dtype.names or ()}
    columns = {name: ColumnType(kind.base, kind.shape) for name, kind in fields.items()}
    columns |= {"environment": ColumnType(np.dtype(np.int32), ()), "begins": ColumnType(np.dtype(np.bool_), ())}
    return TableType("rows", columns)


def _row_chunks(rows: Rows, slots: NDArray[np.int64]) -> Iterator[Chunk]:
    for start in range(0, len(slots), CHUNK_ROWS):
        piece = slots[start : start + CHUNK_ROWS]
        chunk = {name: column[piece] for name, column in rows.columns.items()}
        environment = (piece % rows.num_envs).astype(np.int32)
        yield {**chunk, "environment": environment, "begins": rows.begins(piece)}


def _frame_chunks(store: FrameObservations, start: int) -> Iterator[Chunk]:
    for first in range(start, store.num_written, CHUNK_ROWS):
        numbers = np.arange(first, min(first + CHUNK_ROWS, store.num_written))
        yield {"frames": store.frames[numbers % len(store.frames)]}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    part = folder / f"{MANIFEST}.part"
    with part.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / MANIFEST)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected the manifest of a replay folder, got {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: expected the manifest of a {FORMAT!r} folder, got another JSON value")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file}: expected format_version {FORMAT_VERSION}, got {manifest.get('format_version')!r}")
    missing = {"appending", "num_writes", "about", "tables", "first_frame", "lanes"} - manifest.keys()
    if missing or "rows" not in manifest["tables"]:
        raise ValueError(f"{file}: expected the key {min(missing, default='rows')!r}, got {sorted(manifest)}")
    return manifest


def _siblings(path: Path) -> tuple[Path, Path]:
    """Where a folder is written, and where the one that it replaces waits for that."""
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _finish_rename(path: Path) -> None:
    """Puts the old folder back where a process died just before the new one took its place."""
    old = _siblings(path)[1]
    if not path.exists() and old.exists():
        os.rename(old, path)
