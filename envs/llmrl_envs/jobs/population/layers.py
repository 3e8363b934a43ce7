"""Layers whose weights carry one entry for each job: inputs of P x B sequences, weights of leading dimension P.

Row p * B + b of a layer's input is sequence b of job p. Each layer folds its input to [P, B x L, features], works with
batched matrix products, and gives it back in the shape that the model knows, so the model's own forward pass runs
unchanged. Bound to one job without gradients, a layer is a plain one, with the plain one's kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from llmrl_envs.jobs.population.functions import (
    Collected,
    EmbeddingLookup,
    LinearProduct,
    LowRankProduct,
    RMSNormalisation,
    rms_normalised,
)


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
        self._alone: dict[str, Tensor] = {}
        for attribute in names:
            self.register_parameter(attribute, None)

    def bind(self, parameters: dict[str, Parameter]) -> None:
        """Takes the parameters of the jobs that the next pass is about, by trained name."""
        own = {attribute: parameters[name] for attribute, name in self.names.items()}
        self._parameters.update(own)
        # What a single job computes with, without its leading dimension; empty for several, and in training.
        self._alone.clear()
        if all(parameter.shape[0] == 1 and not parameter.requires_grad for parameter in own.values()):
            self._alone.update({attribute: parameter[0] for attribute, parameter in own.items()})

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
        collected: Tensor = Collected.apply(parameter, sink)  # type: ignore[no-untyped-call]
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
        if self._alone:
            weight, bias = self._alone["weight"], self._alone.get("bias")
            return functional.linear(x, weight.t() if self._is_transposed else weight, bias)
        dtype = _compute_dtype(x)
        folded = x.reshape(self._lanes(), -1, x.shape[-1]).to(dtype)
        y: Tensor = LinearProduct.apply(folded, self._parameters["weight"], self._sink("weight"), self._is_transposed)  # type: ignore[no-untyped-call]
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
        if self._alone:
            inner = functional.linear(functional.linear(self.dropout(x), self._alone["a"]), self._alone["b"])
            alone: Tensor = base + self.scaling * inner
            return alone
        folded = self.dropout(x).reshape(lanes, -1, x.shape[-1]).to(_compute_dtype(x))
        a, b = self._parameters["a"], self._parameters["b"]
        sinks = (self._sink("a"), self._sink("b"))
        y: Tensor = LowRankProduct.apply(base.view(lanes, -1, base.shape[-1]), folded, a, b, self.scaling, sinks)  # type: ignore[no-untyped-call]
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
        if self._alone:
            return functional.embedding(ids, self._alone["weight"])
        lanes, rows, weight = self._lanes(), self._rows[0], self._collected("weight")
        width = weight.shape[-1]
        if ids.shape[0] == 1 and rows != 1:
            shared = self._look_up(weight, ids.reshape(1, -1).expand(lanes, -1)).view(lanes, 1, *ids.shape[1:], width)
            every = shared.expand(lanes, rows // lanes, *ids.shape[1:], width)
            return every.reshape(rows, *ids.shape[1:], width)
        return self._look_up(weight, ids.reshape(lanes, -1)).view(*ids.shape, width)

    def _look_up(self, weight: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = EmbeddingLookup.apply(weight, ids, self.padding_idx)  # type: ignore[no-untyped-call]
        return found


class StackedLayerNorm(StackedLayer):
    """`nn.LayerNorm` over the last dimension for P jobs: weight and bias [P, d]."""

    def __init__(self, names: dict[str, str], eps: float) -> None:
        super().__init__(names)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [P x B, ..., d]."""
        if self._alone:
            return functional.layer_norm(x, x.shape[-1:], self._alone["weight"], self._alone.get("bias"), self.eps)
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
        """The normalised x [P x B, ..., d]; computed and scaled in the weight's number format."""
        if self._alone:
            own = self._alone["weight"]
            return rms_normalised(x.to(own.dtype), own, self.eps)[0]
        weight = self._parameters["weight"]
        assert weight is not None
        folded = x.reshape(self._lanes(), -1, x.shape[-1]).to(weight.dtype)
        y: Tensor = RMSNormalisation.apply(folded, weight, self.eps, self._sink("weight"))  # type: ignore[no-untyped-call]
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
