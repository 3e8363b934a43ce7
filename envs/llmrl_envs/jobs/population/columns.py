"""Where each trained parameter lies in a job's row: P jobs are the rows of one float32[P, N] buffer.

The order is: vectors of the lower half, matrices of the lower half, other matrices, other vectors. So the columns that
freezing leaves out are the first ones, and those that weight decay acts on lie together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Columns: every parameter begins at a multiple of 64 bytes; what lies between is zero and stays zero."""


@dataclass(frozen=True)
class Column:
    """A parameter's place in the row.

    Attributes:
        start: First column.
        shape: Shape of the parameter.
        is_lower: It belongs to the lower half, which freezing leaves alone.
    """

    start: int
    shape: tuple[int, ...]
    is_lower: bool

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())


class ColumnLayout:
    """The columns of every trained parameter.

    Args:
        parameters: The trained parameters by name, as loaded.
        lower_half: Names of those in the lower half.

    Attributes:
        columns: Place of each parameter, in the order of `parameters`.
        num_columns: N.
        lower_stop: End of the lower half's columns, which begin at 0.
        decayed: First column with weight decay, and the end.
    """

    def __init__(self, parameters: Mapping[str, Tensor], lower_half: Sequence[str]) -> None:
        lower = set(lower_half)
        by_block: list[list[str]] = [[], [], [], []]
        for name, parameter in parameters.items():
            by_block[_block(is_lower=name in lower, is_matrix=parameter.ndim >= 2)].append(name)
        found: dict[str, Column] = {}
        ends, position = [], 0
        for names in by_block:
            for name in names:
                found[name] = Column(position, tuple(parameters[name].shape), name in lower)
                position += -(-found[name].size // ALIGNMENT) * ALIGNMENT
            ends.append(position)
        self.columns: dict[str, Column] = {name: found[name] for name in parameters}
        self.num_columns = position
        self.lower_stop = ends[1]
        self.decayed = (ends[0], ends[2])

    def view(self, rows: Tensor, name: str) -> Tensor:
        """A parameter of every row of `rows` float[R, N], as a view [R, *shape]."""
        column = self.columns[name]
        return rows[:, column.start : column.start + column.size].view(len(rows), *column.shape)

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Parameters as one row, float32[N]."""
        first = next(iter(parameters.values()))
        row = torch.zeros(1, self.num_columns, device=first.device)
        for name in self.columns:
            self.view(row, name)[0].copy_(parameters[name].detach())
        return row[0]


def _block(*, is_lower: bool, is_matrix: bool) -> int:
    return {(True, False): 0, (True, True): 1, (False, True): 2, (False, False): 3}[is_lower, is_matrix]
