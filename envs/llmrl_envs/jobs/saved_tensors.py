"""Counts the bytes that a step keeps between its forward and its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Saved:
    """A tensor that the backward pass will need; counts its storage while it is kept."""

    def __init__(self, tensor: Tensor, kept: dict[int, int], total: list[int]) -> None:
        self.tensor = tensor
        self._storage = tensor.untyped_storage()
        self._kept, self._total = kept, total
        pointer = self._storage.data_ptr()
        kept[pointer] = kept.get(pointer, 0) + 1
        if kept[pointer] == 1:
            total[0] += self._storage.nbytes()

    def __del__(self) -> None:
        pointer = self._storage.data_ptr()
        self._kept[pointer] -= 1
        if not self._kept[pointer]:
            self._total[0] -= self._storage.nbytes()


@contextmanager
def counted_saved_tensors(ignored: set[int]) -> Iterator[list[int]]:
    """Counts the bytes that autograd keeps; yields a list whose only entry is the most at any time.

    Args:
        ignored: Addresses of storages that do not count, such as the parameters'.
    """
    kept: dict[int, int] = {}
    total, peak = [0], [0]

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in ignored:
            return tensor
        saved = _Saved(tensor, kept, total)
        peak[0] = max(peak[0], total[0])
        return saved

    def unpack(saved: Any) -> Tensor:
        tensor: Tensor = saved.tensor if isinstance(saved, _Saved) else saved
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield peak
