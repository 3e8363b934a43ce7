"""Rotary embeddings in fewer operations, in place of a model's own where they have the same formula.

The usual function multiplies in the shape [B, H, L, D], where the innermost loops are as short as a head, and copies
halves of heads to negate and join them. Here the heads of a position lie next to each other, as the projections wrote
them, and nothing but the result is written.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FUNCTION_NAME = "apply_rotary_pos_emb"
"""What the modules of transformers call it: a function of q, k, cos, sin and, at times, unsqueeze_dim."""

_PROBE_SHAPE = (2, 3, 5, 8)
_TOLERANCE = 1e-5

Halves = tuple[Tensor, Tensor]
Table = tuple[Tensor, Halves, Halves]


class Rotation(torch.autograd.Function):
    """y = x * cos + rotate_half(x) * sin for every head of x [B, H, L, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Table) -> Tensor:
        """The rotated x."""
        cos, forth, back = table
        ctx.table = cos, back
        return _rotated(x, cos, forth)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x, rotated back."""
        return _rotated(gradients[0], *ctx.table), None


def _rotated(x: Tensor, cos: Tensor, sin: Halves) -> Tensor:
    """x * cos, plus each half of a head times what `sin` has for the other one: x [B, H, L, D]; see `Rotary`.

    Products are rounded before they are added up, as in the usual function, so that the numbers are the same.
    """
    batch, heads, length, width = x.shape
    flat = x.transpose(1, 2).reshape(batch, length, heads * width)
    crossed = torch.empty_like(flat)
    lower, upper = flat.view(batch, length * heads, 2, width // 2).unbind(2)
    crossed_lower, crossed_upper = crossed.view(batch, length * heads, 2, width // 2).unbind(2)
    torch.mul(upper, sin[0], out=crossed_lower)
    torch.mul(lower, sin[1], out=crossed_upper)
    return crossed.add_(flat * cos).view(batch, length, heads, width).transpose(1, 2)


class Rotary:
    """Turns queries and keys by the angles of their positions; keeps the tables of a pass for all its layers.

    Args:
        own: The model's function, which takes what is not in the usual form.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own = own
        self._angles: tuple[Tensor, Tensor] | None = None
        self._tables: dict[int, Table] = {}

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        """Queries and keys, turned: q and k [B, H, L, D], cos and sin [B or 1, L, D] in the same number format."""
        shape, dtype = (*q.shape[2:],), q.dtype
        if others or named or cos.ndim != 3 or cos.shape[1:] != shape or cos.dtype != dtype or sin.dtype != dtype:
            return self._own(q, k, cos, sin, *others, **named)
        if self._angles is None or self._angles[0] is not cos or self._angles[1] is not sin:
            self._angles, self._tables = (cos, sin), {}
        return self._turned(q, cos, sin), self._turned(k, cos, sin)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.shape[1]
        if heads not in self._tables:
            self._tables[heads] = _table(cos, sin, heads)
        table = self._tables[heads]
        if not torch.is_grad_enabled():
            return _rotated(x, *table[:2])
        y: Tensor = Rotation.apply(x, table)  # type: ignore[no-untyped-call]
        return y


def _table(cos: Tensor, sin: Tensor, heads: int) -> Table:
    """cos [B or 1, L, H x D]; what the halves are multiplied by forth and back, each [B or 1, L x H, D / 2]."""
    lower, upper = (half.repeat_interleave(heads, dim=1) for half in sin.chunk(2, dim=-1))
    return cos.repeat(1, 1, heads), (-lower, upper), (upper, -lower)


def replace_rotations(model: nn.Module) -> int:
    """Lets a model's attention use `Rotary` where its own function computes the same; how many modules now do.

    Only the modules of this model change: each gets its class's forward pass with another function under the name.
    torch.compile, which joins such operations by itself, goes on with the model's own.
    """
    rotaries: dict[Any, Rotary] = {}
    replaced = 0
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or _FUNCTION_NAME not in forward.__code__.co_names:
            continue
        own = forward.__globals__.get(_FUNCTION_NAME)
        if own is not None and "forward" not in vars(module) and _is_same(own):
            other = _with_global(forward, _FUNCTION_NAME, rotaries.setdefault(own, Rotary(own)))
            module.forward = types.MethodType(_unless_compiling(other, forward), module)
            replaced += 1
    return replaced


def _with_global(function: types.FunctionType, name: str, value: Any) -> types.FunctionType:
    """The function with another value of a global name."""
    names = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _unless_compiling(function: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return forward


@torch.no_grad()
def _is_same(own: Callable[..., Any]) -> bool:
    """Whether a function turns queries and keys as `Rotary` does, angles that differ between the halves too."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, length, width = _PROBE_SHAPE
    q = torch.randn(batch, heads, length, width, generator=generator)
    k = torch.randn(batch, 1, length, width, generator=generator)
    cos, sin = torch.randn(2, 1, length, width, generator=generator)
    try:
        found = own(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = Rotary(own)(q, k, cos, sin)
    return len(found) == 2 and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in zip(found, expected, strict=True)
    )
