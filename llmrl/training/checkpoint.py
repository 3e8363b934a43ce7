"""Checkpoints that survive being killed while they are written.

A checkpoint is a folder with a manifest of its files' sizes and digests, written last. It is made under a temporary
name and renamed, so a torn one is never taken for a good one; the newest that agrees with its manifest is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from safetensors.numpy import load_file, save_file

from llmrl.run_directory import atomic_write_json
from llmrl.training.state_arrays import join_arrays, split_arrays

CHECKPOINTS = "checkpoints"  # in the run directory
AGENT = "agent"  # in a checkpoint; agent.1, agent.2 .. of the other processes
MANIFEST = "manifest.json"
STATE = "state.json"
ARRAYS = "arrays.safetensors"
FORMAT_VERSION = 1


def save_checkpoint(
    directory: Path, number: int, state: dict[str, Any], write_files: Callable[[Path], None], *, keep: int = 2
) -> Path:
    """Writes checkpoint `number` and removes all but the newest `keep`.

    Args:
        directory: Where checkpoints live.
        number: Grows with every checkpoint of a run.
        state: State of the run: JSON values, and NumPy arrays, which go to a file of their own.
        write_files: Writes everything else into the folder that it is given.
        keep: Checkpoints to keep.

    Raises:
        OSError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"{number:09d}"
    part = _unfinished(directory, number)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_files(part)
        values, arrays = split_arrays(state)
        atomic_write_json(part / STATE, values)
        if arrays:
            save_file(arrays, part / ARRAYS)
        files = {str(path.relative_to(part)): _fingerprint(path) for path in sorted(part.rglob("*")) if path.is_file()}
        atomic_write_json(part / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_directory(directory)
    for old in _numbered(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_together(
    directory: Path,
    number: int,
    state: dict[str, Any],
    write_files: Callable[[Path], None],
    *,
    rank: int,
    meet: Callable[[], object],
) -> None:
    """Writes checkpoint `number` together with other processes, each its own files, and the first one the state.

    Args:
        directory: Where checkpoints live, the same for all processes.
        number: Grows with every checkpoint of a run.
        state: As for `save_checkpoint`; only that of the first process counts.
        write_files: Writes this process's files into the folder that it is given.
        rank: Of this process.
        meet: Waits for all processes; raises where another one has failed.

    Raises:
        UserError: A process does not see the folder of the first: the directory is not shared.
        OSError: The disk is full or not writable; earlier checkpoints are untouched.
    """

    def write(folder: Path) -> None:
        meet()  # the folder is there
        if not folder.is_dir():
            raise UserError(
                "the run directory is not the same one for all processes",
                where=str(folder),
                expected="a directory that all machines share",
            )
        write_files(folder)
        meet()  # every file is written

    if rank == 0:
        save_checkpoint(directory, number, state, write)
    else:
        write(_unfinished(directory, number))
    meet()


def _unfinished(directory: Path, number: int) -> Path:
    """Where checkpoint `number` is made."""
    return directory / f".{number:09d}.part"


def agent_folder(checkpoint: Path, rank: int = 0) -> Path:
    """Where the agent of a process is in a checkpoint."""
    return checkpoint / (AGENT if rank == 0 else f"{AGENT}.{rank}")


def latest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None when there is none."""
    for path in reversed(_numbered(directory)):
        if is_whole(path):
            return path, read_state(path)
    return None


def newest_whole_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint; None when there is none.

    Raises:
        UserError: It is damaged. One that a kill interrupted does not count, so somebody or the disk changed it.
    """
    numbered = _numbered(directory)
    if not numbered:
        return None
    if damage := find_damage(numbered[-1]):
        before = [path for path in numbered[:-1] if is_whole(path)]
        way_out = f"without this folder, --resume goes on from {before[-1].name}" if before else "another --output"
        raise UserError("the checkpoint is damaged", where=str(numbered[-1]), got=damage, expected=way_out)
    return numbered[-1]


def read_state(path: Path) -> dict[str, Any]:
    """The state that a whole checkpoint holds."""
    values: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    arrays = load_file(path / ARRAYS) if (path / ARRAYS).exists() else {}
    state: dict[str, Any] = join_arrays(values, arrays)
    return state


def is_whole(path: Path) -> bool:
    """Whether every file of a checkpoint is as its manifest says."""
    return find_damage(path) is None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            return f"{MANIFEST} of format {manifest['format_version']}, not {FORMAT_VERSION}"
        files = {STATE: None} | manifest["files"]
        return next((told for name, kept in files.items() if (told := _damage(path / name, kept))), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"


def _damage(file: Path, kept: dict[str, Any] | None) -> str | None:
    if not file.is_file():
        return f"no {file.name}"
    found = _fingerprint(file)
    if found == kept:
        return None
    told = f"{found['bytes']} bytes" if kept is None or found["bytes"] != kept["bytes"] else "other bytes"
    return f"{file.name} with {told}, not as it was written"


def _numbered(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and path.name.isdigit())


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
