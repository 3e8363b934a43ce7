"""The directory that a command writes to: made once, never overwritten by accident, readable after any crash.

config.yaml       the configuration with every default filled in
metrics.jsonl     one JSON object per line, only ever appended to
wandb/            files of Weights & Biases
...               what the command makes: policy/, checkpoints/, schedule.jsonl, results.json, plots
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from llmrl_envs.errors import UserError


def create_run_directory(path: Path | str, *, resume: bool = False) -> Path:
    """Makes the directory, or finds it fit for use.

    Args:
        path: The directory; parents are made.
        resume: Accept a directory with files in it. One that is new or empty is accepted either way, so that a run
            killed at any moment, even before its first file, is continued by the same command.

    Raises:
        UserError: It holds files already, it is a file, or it cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError("the output is a file", where=str(path), expected="a new or empty directory") from None
    except OSError as error:
        raise _no_access(path, error) from None
    if not resume and any(path.iterdir()):
        raise UserError(
            "the run directory exists and is not empty",
            where=str(path),
            expected="another --output; --resume goes on with an unfinished training",
        )
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """Writes and removes a small file.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        raise _no_access(path, error) from None


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader finds the old content or the new, and nothing in between.

    The text is on the disk before the name points to it. A failed write leaves the old file and no other.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any) -> None:
    """Writes a value as strict JSON, atomically; see `to_json_value`."""
    atomic_write_text(path, json.dumps(to_json_value(value), indent=2, allow_nan=False) + "\n")


def to_json_value(value: Any) -> Any:
    """What strict JSON can hold: NumPy values become plain ones, paths text, and NaN and infinities null.

    >>> to_json_value({"loss": float("nan"), "levels": (np.float32(0.5), 2)})
    {'loss': None, 'levels': [0.5, 2]}
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # str: text of a class of its own, as torch's version is, is more than YAML can write.
    return str(value) if isinstance(value, Path | str) else value


class JsonlWriter:
    """Appends rows to a JSON Lines file; each row is handed to the system before the call returns.

    `offset` counts the bytes that are written. A checkpoint stores it, and `truncate_to` takes the file back to it, so
    that a resumed run repeats no row.

    Args:
        path: The file; made if it is missing, continued if not. A last line torn by a crash is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by close()
        self.truncate_to(self._file.tell())

    @property
    def offset(self) -> int:
        """Length of the file in bytes; always the end of a line."""
        return self._file.tell()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row as strict JSON; see `to_json_value`."""
        line = json.dumps(to_json_value(row), allow_nan=False, ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    def truncate_to(self, offset: int) -> None:
        """Removes what stands behind `offset` (bytes), and the part of a line that may end there."""
        self._file.flush()
        with open(self.path, "r+b") as file:
            kept = file.read(offset)
            end = kept.rfind(b"\n") + 1
            file.truncate(end)
        self._file.seek(end)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSON Lines file; a last line that a crash tore is left out.

    Raises:
        UserError: Another line is not JSON; says which.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError("not JSON", where=f"{path}, line {number}", got=error.msg) from None
    return rows


def _no_access(path: Path, error: OSError) -> UserError:
    return UserError("cannot write to the run directory", where=str(path), got=error.strerror)
