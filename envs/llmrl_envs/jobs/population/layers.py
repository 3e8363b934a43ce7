"""Layers whose weights carry one entry for each job: inputs of P x B sequences, weights of leading dimension P.

Row p * B + b of a layer's input is sequence b of job p. Each layer folds its input to [P, B x L, features], works with
batched matrix products, and gives it back in the shape that the model knows, so the model's own forward pass runs
unchanged. The gradients have the layout of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional


def _add_product(sink: Tensor | None, left: Tensor, right: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient `left @ right` of a weight: added to where its job's row keeps it, or given back without a sink."""
    if sink is None:
        return torch.bmm(left, right).to(weight.dtype)
    if left.is_cuda and left.dtype == sink.dtype:
        sink.baddbmm_(left, right)  # on a CPU a product for each job, because the rows do not lie together
    else:
        sink.add_(torch.bmm(left, right))
    return None


class _Linear(torch.autograd.Function):
    """y = x w^T for every job: x [P, T, in], w [P, out, in]; or y = x w with w [P, in, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: Tensor | None, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.is_transposed = sink, is_transposed
        matrix = weight.to(x.dtype)
        return torch.bmm(x, matrix if is_transposed else matrix.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient = gradients[0]
        x, weight = ctx.saved_tensors
        x_gradient = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(gradient.dtype)
            x_gradient = torch.bmm(gradient, matrix.transpose(1, 2) if ctx.is_transposed else matrix)
        left, right = (x, gradient) if ctx.is_transposed else (gradient, x)
        return x_gradient, _add_product(ctx.sink, left.transpose(1, 2), right, weight), None, None


class _LowRank(torch.autograd.Function):
    """y = base + scaling * x a^T b^T for every job: base [P, T, out], x [P, T, in], a [P, r, in], b [P, out, r]."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, sinks: tuple[Tensor | None, ...]
    ) -> Tensor:
        inner = torch.bmm(x, a.to(x.dtype).transpose(1, 2))
        ctx.save_for_backward(x, a, b, inner)
        ctx.scaling, ctx.sinks = scaling, sinks
        return torch.baddbmm(base, inner, b.to(x.dtype).transpose(1, 2), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        gradient = gradients[0]
        scaled = inner * ctx.scaling
        b_gradient = _add_product(ctx.sinks[1], gradient.transpose(1, 2), scaled, b)
        inner_gradient = torch.bmm(gradient, b.to(gradient.dtype)).mul_(ctx.scaling)
        a_gradient = _add_product(ctx.sinks[0], inner_gradient.transpose(1, 2), x, a)
        x_gradient = torch.bmm(inner_gradient, a.to(gradient.dtype)) if ctx.needs_input_grad[1] else None
        return gradient if ctx.needs_input_grad[0] else None, x_gradient, a_gradient, b_gradient, None, None


class _Embedding(torch.autograd.Function):
    """Rows of each job's table: weight [P, V, d], ids int64[P, T]; the entry `padding_idx` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        lanes = torch.arange(len(weight), device=ids.device)[:, None]
        ctx.save_for_backward(ids)
        ctx.table, ctx.padding_idx = weight.shape, padding_idx
        return weight[lanes, ids]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
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


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x) for every job: x float32[P, T, d], w [P, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y: Tensor = x * inverse
        return y.mul_(weight.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        gradient = gradients[0]
        product = gradient * x
        weight_gradient = torch.bmm(inverse.transpose(1, 2), product).squeeze(1)
        # d y_j / d x_i = inverse * w_j * (delta_ij - x_i x_j inverse^2 / d)
        along = torch.bmm(product, weight.unsqueeze(2)).mul_(inverse.pow(3)).div_(-x.shape[-1])
        x_gradient = (gradient * weight.unsqueeze(1)).mul_(inverse).addcmul_(x, along)
        return x_gradient, weight_gradient, None


class _Collected(torch.autograd.Function):
    """A weight as it is, whose gradient is added to its job's row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sink: Tensor) -> Tensor:
        ctx.sink = sink
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.sink.add_(gradients[0])
        return None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The number format of a matrix product with `x`: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class StackedLayer(nn.Module):
    """A layer with one set of weights for each job, in place of one of the model's.

    Its parameters are set by `bind`; how many jobs there are is their leading dimension.

    Attributes:
        names: Name of the trained parameter behind each of the layer's own.
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names
        for attribute in names:
            self.register_parameter(attribute, None)

    def bind(self, parameters: dict[str, Parameter]) -> None:
        """Takes the parameters of the jobs that the next pass is about, by trained name."""
        for attribute, name in self.names.items():
            self._parameters[attribute] = parameters[name]

    def _lanes(self) -> int:
        for parameter in self._parameters.values():
            if parameter is not None:
                return len(parameter)
        raise ValueError(f"{type(self).__name__}: expected bind() before the forward pass")

    def _sink(self, attribute: str) -> Tensor | None:
        """Where the gradient of a parameter goes, without a detour over autograd's own accumulation.

        None where there is no gradient to keep, and under torch.compile, whose graphs change nothing on the side.
        """
        parameter = self._parameters[attribute]
        if parameter is None or torch.compiler.is_compiling():
            return None
        return parameter.grad

    def _collected(self, attribute: str) -> Tensor:
        """A parameter whose gradient goes to its sink."""
        parameter, sink = self._parameters[attribute], self._sink(attribute)
        assert parameter is not None
        if sink is None:
            return parameter
        collected: Tensor = _Collected.apply(parameter, sink)  # type: ignore[no-untyped-call]
        return collected


class StackedLinear(StackedLayer):
    """`nn.Linear` for P jobs: weight [P, out, in], bias [P, out]; or GPT-2's `Conv1D`, weight [P, in, out].

    Args:
        names: Trained names of `weight` and, where there is one, `bias`.
        is_transposed: The weight is that of a `Conv1D`.
    """

    def __init__(self, names: dict[str, str], *, is_transposed: bool = False) -> None:
        super().__init__(names)
        self._is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x [P x B, ..., in]."""
        dtype = _compute_dtype(x)
        folded = x.reshape(self._lanes(), -1, x.shape[-1]).to(dtype)
        y: Tensor = _Linear.apply(folded, self._parameters["weight"], self._sink("weight"), self._is_transposed)  # type: ignore[no-untyped-call]
        if "bias" in self.names:
            y = y + self._collected("bias").unsqueeze(1).to(dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class StackedLowRank(StackedLayer):
    """A frozen layer that all jobs share, with an adapter for each: a [P, r, in], b [P, out, r].

    Args:
        names: Trained names of `a` and `b`.
        base: The frozen linear layer or `Conv1D`.
        dropout: On the adapter's input.
        scaling: alpha / r.
    """

    def __init__(self, names: dict[str, str], base: nn.Module, dropout: nn.Module, scaling: float) -> None:
        super().__init__(names)
        self.base = base
        self.dropout = dropout
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x [P x B, ..., in]."""
        lanes, base = self._lanes(), self.base(x)
        folded = self.dropout(x).reshape(lanes, -1, x.shape[-1]).to(_compute_dtype(x))
        a, b = self._parameters["a"], self._parameters["b"]
        sinks = (self._sink("a"), self._sink("b"))
        y: Tensor = _LowRank.apply(base.view(lanes, -1, base.shape[-1]), folded, a, b, self.scaling, sinks)  # type: ignore[no-untyped-call]
        return y.view(base.shape)


class StackedEmbedding(StackedLayer):
    """`nn.Embedding` for P jobs: weight [P, V, d].

    Ids that come once for all sequences, [1, L] (positions), are looked up once for each job; the result has one row
    for each sequence, as the other layers expect.

    Args:
        names: Trained name of `weight`.
        padding_idx: Entry that gets no gradient from here.
        rows: Holds how many sequences the present pass has.
    """

    def __init__(self, names: dict[str, str], padding_idx: int | None, rows: list[int]) -> None:
        super().__init__(names)
        self.padding_idx = padding_idx
        self._rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of ids int64[P x B, L] or [1, L]: [P x B, L, d]."""
        lanes, rows, weight = self._lanes(), self._rows[0], self._collected("weight")
        width = weight.shape[-1]
        if ids.shape[0] == 1 and rows != 1:
            shared = self._look_up(weight, ids.reshape(1, -1).expand(lanes, -1)).view(lanes, 1, *ids.shape[1:], width)
            every = shared.expand(lanes, rows // lanes, *ids.shape[1:], width)
            return every.reshape(rows, *ids.shape[1:], width)
        return self._look_up(weight, ids.reshape(lanes, -1)).view(*ids.shape, width)

    def _look_up(self, weight: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = _Embedding.apply(weight, ids, self.padding_idx)  # type: ignore[no-untyped-call]
        return found


class StackedLayerNorm(StackedLayer):
    """`nn.LayerNorm` over the last dimension for P jobs: weight and bias [P, d]."""

    def __init__(self, names: dict[str, str], eps: float) -> None:
        super().__init__(names)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [P x B, ..., d]."""
        y = functional.layer_norm(x, x.shape[-1:], None, None, self.eps)
        folded = y.reshape(self._lanes(), -1, x.shape[-1])
        weight = self._collected("weight").unsqueeze(1)
        if "bias" not in self.names:
            return (folded * weight).view(x.shape)
        return torch.addcmul(self._collected("bias").unsqueeze(1), folded, weight).view(x.shape)


class StackedRMSNorm(StackedLayer):
    """Llama's root-mean-square norm for P jobs, in fewer passes over memory than its own: weight [P, d]."""

    def __init__(self, names: dict[str, str], eps: float) -> None:
        super().__init__(names)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [P x B, ..., d]; computed in float32 and scaled in it, as the weight is."""
        folded = x.reshape(self._lanes(), -1, x.shape[-1]).float()
        y: Tensor = _RMSNorm.apply(folded, self._collected("weight"), self.eps)  # type: ignore[no-untyped-call]
        return y.view(x.shape)


class StackedScale(StackedLayer):
    """A root-mean-square norm for P jobs, whatever its formula: the model's own module with a weight for each row.

    Such a module scales the last dimension by its weight and mixes nothing else, so its own forward pass works with
    the weight [P, 1, d] on an input folded to [P, B x L, d].

    Args:
        names: Trained name of the module's weight.
        module: The model's norm; its weight is replaced while it runs.
    """

    def __init__(self, names: dict[str, str], module: nn.Module) -> None:
        super().__init__(names)
        self._inner = [module]  # in a list, so that it is no submodule whose weight would count as this model's

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [P x B, ..., d]."""
        (attribute,) = self.names
        folded = x.reshape(self._lanes(), -1, x.shape[-1])
        weight = self._collected(attribute).unsqueeze(1)
        y: Tensor = torch.func.functional_call(self._inner[0], {attribute: weight}, (folded,))
        return y.view(x.shape)
