"""Reads one data file into a table of examples that remembers where each came from.

JSON (a list of objects), JSON lines, CSV, Parquet and plain text. Whatever is wrong with a file is told as a
`UserError` that names the file and the line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llmrl_envs.errors import UserError

LABELS_FILE = "labels.json"
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")


class Place(NamedTuple):
    """Where an example came from; prints as `file.jsonl:12`, or `org/name[train], row 12` where there are no lines."""

    source: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" if self.unit == "line" else f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Table:
    """The examples of one source.

    Attributes:
        rows: One mapping from column to value an example.
        source: What messages call the source.
        numbers: Line (or row) of each example, counted from 1.
        unit: What `numbers` counts.
        class_names: Column of integer labels to the names of its classes, where the source states them.
    """

    rows: Sequence[Mapping[str, object]]
    source: str
    numbers: Sequence[int]
    unit: str = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that any example has, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def place(self, index: int) -> Place:
        """Where example `index` came from."""
        return Place(self.source, self.numbers[index], self.unit)


def read_table(path: Path) -> Table:
    """Reads a data file by its extension; the classes of column `label` are named by a `labels.json` beside it.

    Raises:
        UserError: The file is missing, empty, malformed, not UTF-8, or of an unknown kind.
    """
    if not path.is_file():
        raise missing_path(path, "data file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise UserError("unknown kind of data file", where=str(path), expected=known, got=path.suffix or "no extension")
    table = reader(path)
    if not table.rows:
        raise UserError("data file holds no examples", where=str(path), expected="at least one example", got="none")
    names = _read_label_names(path.with_name(LABELS_FILE))
    return Table(table.rows, table.source, table.numbers, table.unit, {"label": names} if names else {})


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: A byte is not UTF-8; told with its offset and line.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            "file is not UTF-8 text",
            where=f"{path}:{line}",
            expected="UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8",
            got=f"byte 0x{raw[error.start]:02x} at offset {error.start}",
        ) from None


def missing_path(path: Path, kind: str) -> UserError:
    """The error for a path that is not there; names a neighbour that looks like it."""
    parent = path.parent
    if not parent.is_dir():
        return UserError(
            f"{kind} not found", where=str(path), expected="an existing path", got=f"no directory {parent}"
        )
    names = sorted(entry.name for entry in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else ""
    return UserError(f"{kind} not found", where=str(path), expected="an existing path", got=f"nothing there{hint}")


def _read_json_lines(path: Path) -> Table:
    rows, numbers = [], []
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed_json(path, number, line, error) from None
            rows.append(_check_object(value, path, number))
            numbers.append(number)
    return Table(rows, str(path), numbers)


def _read_json(path: Path) -> Table:
    text = read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        return _read_json_lines(path)  # many call JSON lines .json
    rows, numbers, lines, counted = [], [], 1, 0
    for position, value in _json_list_items(path, text, start):
        lines += text.count("\n", counted, position)
        counted = position
        rows.append(_check_object(value, path, lines))
        numbers.append(lines)
    return Table(rows, str(path), numbers)


def _json_list_items(path: Path, text: str, start: int) -> Iterable[tuple[int, object]]:
    """Yields the items of the JSON list at `start` with their positions, which `json.loads` would not tell."""
    decoder = json.JSONDecoder()
    skip = re.compile(r"\s*")
    position = skip.match(text, start + 1).end()  # type: ignore[union-attr]
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            value, end = decoder.raw_decode(text, position)
            yield position, value
            end = skip.match(text, end).end()  # type: ignore[union-attr]
            if text[end : end + 1] == "]":
                return
            if text[end : end + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        except json.JSONDecodeError as error:
            line = text.split("\n")[error.lineno - 1]
            raise _malformed_json(path, error.lineno, line, error) from None
        position = skip.match(text, end + 1).end()  # type: ignore[union-attr]


def _malformed_json(path: Path, number: int, line: str, error: json.JSONDecodeError) -> UserError:
    return UserError(
        f"malformed JSON: {error.msg} (column {error.colno})",
        where=f"{path}:{number}",
        expected="one JSON object a line, or a list of objects",
        got=shorten(line),
    )


def _check_object(value: object, path: Path, number: int) -> Mapping[str, object]:
    if isinstance(value, dict):
        return value
    raise UserError(
        "an example is not a JSON object",
        where=f"{path}:{number}",
        expected='an object such as {"text": "..."}',
        got=f"{type(value).__name__} {shorten(json.dumps(value, ensure_ascii=False))}",
    )


def _read_csv(path: Path) -> Table:
    # The limit on a cell's length is global to the csv module: lift it for this file only.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return _parse_csv(path)
    except csv.Error as error:
        raise UserError(f"malformed CSV: {error}", where=str(path)) from None
    finally:
        csv.field_size_limit(limit)


def _parse_csv(path: Path) -> Table:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header = next(reader, [])
    if len(set(header)) != len(header):
        raise UserError("CSV header names a column twice", where=f"{path}:1", got=", ".join(header))
    rows, numbers, first = [], [], reader.line_num + 1
    for cells in reader:
        if cells and len(cells) != len(header):
            expected = f"{len(header)} cells ({', '.join(header)})"
            raise UserError("CSV row of another length", where=f"{path}:{first}", expected=expected, got=len(cells))
        if cells:
            rows.append(dict(zip(header, cells, strict=True)))
            numbers.append(first)
        first = reader.line_num + 1
    return Table(rows, str(path), numbers)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("not a readable Parquet file", where=str(path), got=shorten(str(error))) from None
    return Table(rows, str(path), range(1, len(rows) + 1), unit="row")


def _read_plain_text(path: Path) -> Table:
    text = read_text(path)
    rows, numbers, line, counted = [], [], 1, 0
    starts = [0, *(match.end() for match in _BLANK_LINES.finditer(text))]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        line += text.count("\n", counted, start)
        counted = start
        document = text[start:end].strip()
        if document:
            rows.append({"text": document})
            numbers.append(line)
    return Table(rows, str(path), numbers)


def _read_label_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        names = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise _malformed_json(path, error.lineno, error.doc.split("\n")[error.lineno - 1], error) from None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError("label names are not a list of strings", where=str(path), expected='["negative", "positive"]')
    return tuple(names)


def shorten(text: str, limit: int = 80) -> str:
    """The beginning of a text, on one line, for a message."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


READERS: Mapping[str, Callable[[Path], Table]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_plain_text,
}
"""Extension to reader."""
