"""Tables as one `.npy` file per column: written in chunks, made longer in place, read through memory maps.

A column that was cut off still gives the rows before the cut, and a checksum of every row finds damage that keeps the
length. Nothing here knows what the columns mean.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 4_096


@dataclass(frozen=True)
class ColumnType:
    """Dtype and shape of one row of a column."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"dtype": self.dtype.str, "shape": list(self.shape)}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> ColumnType:
        """The type that `to_dict` described."""
        return ColumnType(np.dtype(value["dtype"]), tuple(value["shape"]))


CHECKSUM = ColumnType(np.dtype(np.uint64), ())


@dataclass(frozen=True)
class TableType:
    """Columns of a table; its checksums are in a column `NAME_checksum`."""

    name: str
    columns: Mapping[str, ColumnType]

    @property
    def files(self) -> dict[str, ColumnType]:
        """All columns, that of the checksums included."""
        return {**self.columns, f"{self.name}_checksum": CHECKSUM}


def write_table(
    folder: Path,
    table: TableType,
    chunks: Iterable[Mapping[str, NDArray[Any]]],
    *,
    num_kept: int = 0,
    num_skipped: int = 0,
) -> int:
    """Writes chunks of rows after the first `num_kept` rows, with `num_skipped` rows of zeros in between.

    Returns:
        Rows of the table afterwards.

    Raises:
        ValueError: `num_kept` is positive and a file is missing or has no header of its column's type.
    """
    writers = {name: _ColumnWriter(folder / f"{name}.npy", kind, num_kept) for name, kind in table.files.items()}
    try:
        for writer in writers.values():
            writer.skip(num_skipped)
        for chunk in chunks:
            checksum = np.zeros(len(next(iter(chunk.values()))), dtype=np.uint64)
            for name in table.columns:
                checksum += row_checksums(name, chunk[name])
                writers[name].write(chunk[name])
            writers[f"{table.name}_checksum"].write(checksum)
    finally:
        for writer in writers.values():
            writer.close()
    return writers[f"{table.name}_checksum"].num_rows


@dataclass(frozen=True)
class StoredTable:
    """Memory-mapped columns, of which the first `num_intact` rows are as they were written."""

    columns: dict[str, NDArray[Any]]
    num_intact: int
    damage: str | None


def read_table(folder: Path, table: TableType, num_rows: int, *, may_be_longer: bool) -> StoredTable:
    """Opens a table and finds out how much of it is intact.

    Raises:
        ValueError: A file is missing, longer than `num_rows` rows, or holds another dtype or shape.
    """
    columns = {
        name: _open_column(folder / f"{name}.npy", kind, num_rows, may_be_longer=may_be_longer)
        for name, kind in table.files.items()
    }
    shortest = min(columns, key=lambda name: len(columns[name]))
    num_intact = len(columns[shortest])
    damage = None if num_intact == num_rows else f"{shortest}.npy holds {num_intact} of {num_rows} rows"
    checksums = columns.pop(f"{table.name}_checksum")
    for start in range(0, num_intact, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, num_intact)
        total = np.zeros(stop - start, dtype=np.uint64)
        for name, column in columns.items():
            total += row_checksums(name, column[start:stop])
        wrong = np.flatnonzero(total != checksums[start:stop])
        if len(wrong):
            num_intact = start + int(wrong[0])
            damage = f"row {num_intact} of table '{table.name}' does not match its checksum"
            break
    return StoredTable(columns, num_intact, damage)


def row_checksums(name: str, rows: NDArray[Any]) -> NDArray[np.uint64]:  # [K, ...] -> [K]
    """A checksum of every row of one column: the sum of its eight-byte words times fixed odd numbers, modulo 2**64.

    A change of any single word changes the sum, because odd numbers are invertible modulo 2**64.
    """
    num_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    num_words = -(-num_bytes // 8)
    padded = np.zeros((len(rows), num_words * 8), dtype=np.uint8)
    content = np.frombuffer(np.ascontiguousarray(rows).tobytes(), dtype=np.uint8)
    padded[:, :num_bytes] = content.reshape(len(rows), num_bytes)
    place = np.arange(1, num_words + 1, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 24)
    return np.asarray((padded.view(np.uint64) * (_mixed(place) | np.uint64(1))).sum(axis=1, dtype=np.uint64))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers that look random, a fixed function of the values (splitmix64)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


class _ColumnWriter:
    """One open column; the header gets the count of rows when it is closed."""

    def __init__(self, path: Path, kind: ColumnType, num_kept: int) -> None:
        self.kind = kind
        self.num_rows = num_kept
        if num_kept:
            _read_header(path, kind)
        self._file: BinaryIO = path.open("r+b" if num_kept else "wb")
        header = _header(kind, num_kept)
        self._file.truncate(len(header) + num_kept * kind.row_bytes)  # what an interrupted append has left
        self._file.write(header)
        self._file.seek(0, os.SEEK_END)

    def skip(self, num_rows: int) -> None:
        self._file.seek(num_rows * self.kind.row_bytes, os.SEEK_CUR)
        self._file.truncate()
        self.num_rows += num_rows

    def write(self, rows: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self.kind.dtype).tobytes())
        self.num_rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self.kind, self.num_rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _open_column(path: Path, kind: ColumnType, num_rows: int, *, may_be_longer: bool) -> NDArray[Any]:
    """The rows that a file holds completely, at most `num_rows`."""
    start = _read_header(path, kind)
    size, expected = path.stat().st_size, start + num_rows * kind.row_bytes
    if size > expected and not may_be_longer:
        raise ValueError(f"{path}: expected {expected} bytes for {num_rows} rows, got {size}")
    complete = min((size - start) // kind.row_bytes, num_rows)
    if complete == 0:
        return np.zeros((0, *kind.shape), dtype=kind.dtype)
    return np.memmap(path, dtype=kind.dtype, mode="r", offset=start, shape=(complete, *kind.shape))


def _header(kind: ColumnType, num_rows: int) -> bytes:
    """A header in which numpy leaves room for the count of rows to grow: its length does not depend on the count."""
    buffer = io.BytesIO()
    fields = {"descr": kind.dtype.str, "fortran_order": False, "shape": (num_rows, *kind.shape)}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _read_header(path: Path, kind: ColumnType) -> int:
    """Where the data of a column begins.

    Raises:
        ValueError: The file is missing, its header cannot be read, or is of another dtype or shape.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a column, got no such file")
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise ValueError(f"{path}: expected a .npy file, got {error}") from error
        if fortran_order or dtype != kind.dtype or shape[1:] != kind.shape:
            raise ValueError(f"{path}: expected rows {kind.dtype}{list(kind.shape)}, got {dtype}{list(shape[1:])}")
        return file.tell()
