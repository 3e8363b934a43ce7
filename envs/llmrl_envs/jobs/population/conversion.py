"""Replaces the layers of a model by stacked ones, or says which layer cannot be stacked and what to do instead."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.population.layers import (
    StackedEmbedding,
    StackedLayer,
    StackedLayerNorm,
    StackedLinear,
    StackedLowRank,
    StackedRMSNorm,
    StackedScale,
)
from llmrl_envs.jobs.population.rotary import replace_rotations

REMEDY = "mode lora, or the one-by-one vector environment: env.vectorization sync, make_vec(vectorization_mode='sync')"
_LLAMA_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


@dataclass(frozen=True)
class AdapterPair:
    """A low-rank adapter: names of its two factors, scaling, and the norm of the weight that it adapts."""

    a: str
    b: str
    scaling: float
    weight_norm: float


@dataclass
class Conversion:
    """A model's stacked form.

    Attributes:
        model: Shares everything that is not trained with the model that it was made of.
        layers: Its stacked layers.
        pairs: Its adapters.
        rows: One entry, the number of sequences of the pass under way, which embeddings of positions need.
    """

    model: nn.Module
    layers: list[StackedLayer] = field(default_factory=list)
    pairs: list[AdapterPair] = field(default_factory=list)
    rows: list[int] = field(default_factory=lambda: [1])


def convert_model(model: nn.Module, trained: Mapping[str, Tensor], where: str) -> Conversion:
    """The stacked form of a model; the model itself stays as it is.

    Args:
        model: A Hugging Face model, plain or with peft's LoRA adapters.
        trained: Its trained parameters by name.
        where: The model's name, for errors.

    Raises:
        UserError: A trained layer is of a kind that cannot be stacked.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    # Everything is shared with the copy, whose trained layers are then replaced: no weight is copied.
    conversion = Conversion(copy.deepcopy(model, shared))
    names = {id(parameter): name for name, parameter in trained.items()}
    conversion.model = _Converter(conversion, names, where).convert(conversion.model, "")
    replace_rotations(conversion.model)
    inner = getattr(conversion.model, "get_base_model", None)
    conversion.model = conversion.model if inner is None else inner()
    return conversion


class _Converter:
    """Walks through a model and replaces what is trained."""

    def __init__(self, conversion: Conversion, names: Mapping[int, str], where: str) -> None:
        self._found = conversion
        self._names = names
        self._where = where

    def convert(self, module: Any, path: str) -> nn.Module:
        """The stacked form of a module, or the module with its children converted."""
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            (adapter,) = module.modules_to_save
            return self.convert(module.modules_to_save[adapter], path)
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            return self._adapted(module, path)
        own = {name: self._names[id(p)] for name, p in module._parameters.items() if p is not None and self._is(p)}
        if own:
            return self._stacked(module, own, path)
        for name, child in list(module.named_children()):
            setattr(module, name, self.convert(child, f"{path}.{name}" if path else name))
        converted: nn.Module = module
        return converted

    def _is(self, parameter: Tensor) -> bool:
        return id(parameter) in self._names

    def _add(self, layer: StackedLayer) -> StackedLayer:
        self._found.layers.append(layer)
        return layer

    def _stacked(self, module: Any, own: dict[str, str], path: str) -> StackedLayer:
        complete = len(own) == sum(parameter is not None for parameter in module._parameters.values())
        layer = self._layer(module, own) if complete and not list(module.children()) else None
        if layer is None:
            raise self._refusal(module, path)
        return self._add(layer)

    def _layer(self, module: Any, own: dict[str, str]) -> StackedLayer | None:
        kind = type(module)
        if kind is nn.Linear:
            return StackedLinear(own)
        if kind is Conv1D:
            return StackedLinear(own, is_transposed=True)
        if kind is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None):
            return StackedEmbedding(own, module.padding_idx, self._found.rows)
        if kind is nn.LayerNorm and len(module.normalized_shape) == 1:
            return StackedLayerNorm(own, module.eps)
        if kind.__name__ in _LLAMA_NORMS and hasattr(module, "variance_epsilon"):
            return StackedRMSNorm(own, module.variance_epsilon)
        if kind.__name__.endswith("RMSNorm") and list(own) == ["weight"] and module.weight.ndim == 1:
            if kind is nn.RMSNorm:  # wants a weight of the normalised shape
                return StackedRMSNorm(own, module.eps if module.eps is not None else 1.1920929e-07)
            return StackedScale(own, module)
        return None

    def _adapted(self, module: Any, path: str) -> nn.Module:
        adapters = list(module.lora_A)
        base = module.base_layer
        plain = (
            len(adapters) == 1
            and type(base) in (nn.Linear, Conv1D)
            and type(module.lora_A[adapters[0]]) is nn.Linear
            and not getattr(module, "use_dora", {}).get(adapters[0], False)
            and not getattr(module, "lora_bias", {}).get(adapters[0], False)
        )
        if not plain:
            raise self._refusal(module, path)
        a, b = module.lora_A[adapters[0]].weight, module.lora_B[adapters[0]].weight
        names = {"a": self._names[id(a)], "b": self._names[id(b)]}
        scaling = float(module.scaling[adapters[0]])
        weight_norm = float(base.weight.detach().double().square().sum()) ** 0.5
        self._found.pairs.append(AdapterPair(names["a"], names["b"], scaling, weight_norm))
        return self._add(StackedLowRank(names, base, module.lora_dropout[adapters[0]], scaling))

    def _refusal(self, module: nn.Module, path: str) -> UserError:
        return UserError(
            "a layer of the model cannot be stacked for a population",
            where=f"{self._where}: {path or 'the model itself'}",
            expected=f"linear, Conv1D, embedding, LayerNorm and RMSNorm layers; otherwise {REMEDY}",
            got=type(module).__name__,
        )
