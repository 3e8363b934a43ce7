"""The most memory that what runs inside takes at once: on a GPU by its allocator, on a CPU by watching operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, until they are given back; views and results in place are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = [0]
        self._held = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._sizes:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self._held += storage.nbytes()
        self.peak[0] = max(self.peak[0], self._held)
        weakref.finalize(storage, self._give_back, storage._cdata)

    def _give_back(self, key: int) -> None:
        self._held -= self._sizes.pop(key)


@contextmanager
def peak_allocation(device: torch.device) -> Iterator[list[int]]:
    """Yields a list whose only entry is, at the end, the most bytes that tensors made inside held at once.

    Memory that one operation takes for itself is seen on a GPU alone.

    Args:
        device: Where the tensors are made.
    """
    if device.type == "cuda":
        before, peak = torch.cuda.memory_allocated(device), [0]
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        allocations = _Allocations()
        with allocations:
            yield allocations.peak
