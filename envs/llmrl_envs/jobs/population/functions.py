"""Batched products of P jobs with gradients that go straight to each job's row: what stacked layers are made of.

The gradients have the layout of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_product(sink: Tensor | None, left: Tensor, right: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient `left @ right` of a weight: added to where its job's row keeps it, or given back without a sink."""
    if sink is None:
        return torch.bmm(left, right).to(weight.dtype)
    if left.is_cuda and left.dtype == sink.dtype:
        sink.baddbmm_(left, right)  # on a CPU a product for each job, because the rows do not lie together
    else:
        sink.add_(torch.bmm(left, right))
    return None


class LinearProduct(torch.autograd.Function):
    """y = x w^T for every job: x [P, T, in], w [P, out, in]; or y = x w with w [P, in, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: Tensor | None, is_transposed: bool) -> Tensor:
        """The products."""
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.is_transposed = sink, is_transposed
        matrix = weight.to(x.dtype)
        return torch.bmm(x, matrix if is_transposed else matrix.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of inputs and weights."""
        gradient = gradients[0]
        x, weight = ctx.saved_tensors
        x_gradient = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(gradient.dtype)
            x_gradient = torch.bmm(gradient, matrix.transpose(1, 2) if ctx.is_transposed else matrix)
        left, right = (x, gradient) if ctx.is_transposed else (gradient, x)
        return x_gradient, add_product(ctx.sink, left.transpose(1, 2), right, weight), None, None


class LowRankProduct(torch.autograd.Function):
    """y = base + scaling * x a^T b^T for every job: base [P, T, out], x [P, T, in], a [P, r, in], b [P, out, r]."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, sinks: tuple[Tensor | None, ...]
    ) -> Tensor:
        """Base and adapters' products."""
        inner = torch.bmm(x, a.to(x.dtype).transpose(1, 2))
        ctx.save_for_backward(x, a, b, inner)
        ctx.scaling, ctx.sinks = scaling, sinks
        return torch.baddbmm(base, inner, b.to(x.dtype).transpose(1, 2), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of base, inputs and both factors."""
        x, a, b, inner = ctx.saved_tensors
        gradient = gradients[0]
        scaled = inner * ctx.scaling
        b_gradient = add_product(ctx.sinks[1], gradient.transpose(1, 2), scaled, b)
        inner_gradient = torch.bmm(gradient, b.to(gradient.dtype)).mul_(ctx.scaling)
        a_gradient = add_product(ctx.sinks[0], inner_gradient.transpose(1, 2), x, a)
        x_gradient = torch.bmm(inner_gradient, a.to(gradient.dtype)) if ctx.needs_input_grad[1] else None
        return gradient if ctx.needs_input_grad[0] else None, x_gradient, a_gradient, b_gradient, None, None


class EmbeddingLookup(torch.autograd.Function):
    """Rows of each job's table: weight [P, V, d], ids int64[P, T]; the entry `padding_idx` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """The rows of the ids."""
        lanes = torch.arange(len(weight), device=ids.device)[:, None]
        ctx.save_for_backward(ids)
        ctx.table, ctx.padding_idx = weight.shape, padding_idx
        return weight[lanes, ids]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the tables."""
        (ids,) = ctx.saved_tensors
        lanes, entries, width = ctx.table
        flat = (ids + entries * torch.arange(lanes, device=ids.device)[:, None]).reshape(-1)
        table: Tensor = torch.ops.aten.embedding_dense_backward(
            gradients[0].reshape(-1, width), flat, lanes * entries, -1, False
        )
        table = table.view(lanes, entries, width)
        if ctx.padding_idx is not None:
            table[:, ctx.padding_idx] = 0.0
        return table, None, None


def rms_normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w * x / rms(x) over the last dimension, and 1 / rms(x); in fewer passes over memory than torch's own on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.addcmul(norm.new_tensor(eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * inverse).mul_(weight), inverse


class RMSNormalisation(torch.autograd.Function):
    """y = w * x / rms(x) for every job: x float32[P, T, d], w [P, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, sink: Tensor | None) -> Tensor:
        """The normalised inputs."""
        y, inverse = rms_normalised(x, weight.unsqueeze(1), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.sink = sink
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Gradients of inputs and weights."""
        x, weight, inverse = ctx.saved_tensors
        gradient = gradients[0]
        product = gradient * x
        weight_gradient: Tensor | None = torch.bmm(inverse.transpose(1, 2), product).squeeze(1)
        if ctx.sink is not None:
            ctx.sink.add_(weight_gradient)
            weight_gradient = None
        scale = weight.unsqueeze(1)
        # d y_j / d x_i = inverse * w_j * (delta_ij - x_i x_j inverse^2 / d)
        along = product.mul_(scale).sum(dim=-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return (gradient * scale).mul_(inverse).addcmul_(x, along), weight_gradient, None, None


class Collected(torch.autograd.Function):
    """A weight as it is, whose gradient is added to its job's row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sink: Tensor) -> Tensor:
        """The weight."""
        ctx.sink = sink
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Adds the gradient to the sink."""
        ctx.sink.add_(gradients[0])
        return None, None
