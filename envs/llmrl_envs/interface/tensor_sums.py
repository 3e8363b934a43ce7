"""Sums over a job's tensors: weights, gradients, moments.

Tensors may be shards (DTensors of FSDP2): elementwise results stay shards, and only sums travel between processes.
On a device torch adds up. In a CPU's memory NumPy does, on one thread, in pieces that stay in the cache: torch would
share out each operation among its threads, and to wake them takes longer than most of these operations do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

Array = NDArray[np.floating[Any]]
Part = float | Tensor
"""A sum: a number where NumPy added up, else a scalar on the tensor's device."""

PIECE = 2**17
"""Numbers that are measured together on a CPU: half a megabyte of each tensor."""
_ROW = 2**13
"""Numbers of one dot product; NumPy's BLAS shares out longer ones among threads of its own."""
_PLAIN = (Tensor, Parameter)
_HALVES = (torch.float16, torch.bfloat16)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    if type(tensor) in _PLAIN:  # the usual ones; looking for what they have not takes longer
        return tensor
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, the same on every process; any other tensor as it is."""
    if type(tensor) in _PLAIN:
        return tensor
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def wide(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32, in which their squares can be added up; others as they are."""
    return tensor.float() if tensor.dtype in _HALVES else tensor


def flat_shard(tensor: Tensor) -> Tensor:
    """This process's part, flat and in numbers whose squares can be added up."""
    return wide(local_shard(tensor.detach()).reshape(-1))


def flat_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The same; on a CPU in pieces, so that no copy of a whole tensor is made."""
    flat = local_shard(tensor.detach()).reshape(-1)
    return map(wide, torch.split(flat, PIECE) if flat.is_cpu else (flat,))


def cpu_array(tensor: Tensor) -> Array | None:
    """This process's part, flat and not to be written to; None where NumPy cannot read it."""
    shard = local_shard(tensor)
    if not shard.is_cpu or type(shard) not in _PLAIN or shard.dtype in _HALVES:
        return None
    return cast(Array, shard.detach().numpy().reshape(-1))


def cpu_dot(x: Array, y: Array) -> float:
    """Product of two vectors of one length; rows of it in their own precision, the rest in Python's."""
    whole = len(x) // _ROW * _ROW
    with np.errstate(over="ignore", invalid="ignore"):  # a job that flies apart gets infinity, as on a device
        rest = float(np.dot(x[whole:], y[whole:]))
        if not whole:
            return rest
        rows = np.matmul(x[:whole].reshape(-1, 1, _ROW), y[:whole].reshape(-1, _ROW, 1))
    return sum(rows.ravel().tolist(), rest)


def total(parts: Sequence[Part]) -> Tensor:
    """Sum of parts, a float32 scalar where they are."""
    number = sum(part for part in parts if not isinstance(part, Tensor))
    tensors = [part.float() for part in parts if isinstance(part, Tensor)]
    return torch.stack(tensors).sum() + number if tensors else torch.tensor(number, dtype=torch.float32)


def square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of squares of this process's parts, a scalar."""
    parts: list[Part] = []
    for tensor in tensors:
        array = cpu_array(tensor)
        parts += [torch.dot(p, p) for p in flat_pieces(tensor)] if array is None else [cpu_dot(array, array)]
    return total(parts)


def dot_products(
    pairs: Iterable[tuple[Tensor, Tensor]],  # of one shape each
) -> Tensor:  # [3]
    """Sums over pairs (x, y) of x . y, x . x and y . y, over this process's parts."""
    found: list[tuple[Part, Part, Part]] = [(0.0, 0.0, 0.0)]
    for x, y in pairs:
        first, second = cpu_array(x), cpu_array(y)
        found += _device_products(x, y) if first is None or second is None else _cpu_products(first, second)
    return torch.stack([total(parts) for parts in zip(*found, strict=True)])


def _cpu_products(x: Array, y: Array) -> Iterator[tuple[Part, Part, Part]]:
    for start in range(0, len(x), PIECE):
        p, q = x[start : start + PIECE], y[start : start + PIECE]
        yield cpu_dot(p, q), cpu_dot(p, p), cpu_dot(q, q)


def _device_products(x: Tensor, y: Tensor) -> Iterator[tuple[Part, Part, Part]]:
    for p, q in zip(flat_pieces(x), flat_pieces(y), strict=True):
        p = p.to(q.dtype)
        yield torch.dot(p, q), torch.dot(p, p), torch.dot(q, q)
