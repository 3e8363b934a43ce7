"""Which tensors of somebody else's job are steered, by name, and what the job trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.statistics import TuningMode
from llmrl_envs.interface.updates import LowRankPair
from llmrl_envs.jobs.optimizer import low_rank_pairs
from torch import nn
from torch.nn import Parameter

from llmrl.live.capabilities import Distribution

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class SteeredParameters:
    """What an optimizer trains of a model.

    Attributes:
        by_name: The tensors that the optimizer holds. Under DeepSpeed these are its flat float32 partitions.
        mode: Full, LoRA, or a part of the weights.
        trainable_fraction: Trained parameters over all parameters.
        num_parameters: All parameters of the model.
        pairs: LoRA adapters.
        device: Where they are.
        flat_vectors: Trained vectors of the model that `by_name` holds within flat partitions.
    """

    by_name: Mapping[str, Parameter]
    mode: TuningMode
    trainable_fraction: float
    num_parameters: int
    pairs: tuple[LowRankPair, ...]
    device: torch.device
    flat_vectors: tuple[Parameter, ...] = ()


def find_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, distribution: Distribution
) -> SteeredParameters:
    """The parameters that an optimizer trains, in the order of the model.

    Args:
        model: The model as it is trained, after it was prepared.
        optimizer: The innermost one, after it was prepared.
        distribution: How the model is shared.

    Raises:
        UserError: The optimizer trains nothing of this model, or an adapter's change cannot be measured.
    """
    held = {id(p): f"group{i}.{j}" for i, g in enumerate(optimizer.param_groups) for j, p in enumerate(g["params"])}
    named = {plain_name(name): p for name, p in model.named_parameters()}
    mode, (trained, total) = _mode(model, distribution), _sizes(model)
    share = trained / max(total, 1)
    pairs = _checked_pairs(model, distribution)
    device = next(model.parameters()).device
    if distribution is Distribution.DEEPSPEED:
        flat = {held[id(p)]: p for g in optimizer.param_groups for p in g["params"]}
        vectors = tuple(p for p in model.parameters() if p.requires_grad and p.ndim < 2)
        return SteeredParameters(flat, mode, share, total, (), device, vectors)
    by_name = {name: p for name, p in named.items() if id(p) in held}
    if not by_name or (distribution is not Distribution.SINGLE and len(by_name) < len(held)):
        raise UserError(
            "the optimizer does not train the parameters of this model",
            where="attach(model, optimizer)",
            expected="the model and the optimizer that `accelerator.prepare` returned, or both unprepared",
            got=f"{len(held)} tensors in the optimizer, {len(by_name)} of them in the model",
        )
    known = {id(p) for p in by_name.values()}
    others = {held[id(p)]: p for g in optimizer.param_groups for p in g["params"] if id(p) not in known}
    return SteeredParameters(by_name | others, mode, share, total, pairs, device)


def reshard(model: nn.Module) -> None:
    """Lets go of the whole weights that FSDP2 keeps after a forward pass without a backward pass (an evaluation).

    Until then the model shows other tensors than the optimizer steps, and the next forward pass would not see what was
    written into the shards. Other models are left as they are.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # an FSDPModule, whose import takes longer than all of this
            module.reshard()


def plain_name(name: str) -> str:
    """A parameter's name without those of wrappers.

    >>> plain_name("module._orig_mod.model.layers.0.weight")
    'model.layers.0.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _mode(model: nn.Module, distribution: Distribution) -> TuningMode:
    if any(hasattr(module, "lora_A") for module in model.modules()):
        if distribution is Distribution.DEEPSPEED:
            raise UserError(
                "the size of LoRA's updates cannot be measured under DeepSpeed",
                where="the model",
                expected="LoRA under DDP or FSDP2, or full fine-tuning under DeepSpeed",
                got="LoRA under DeepSpeed",
            )
        return TuningMode.LORA
    return TuningMode.FULL if all(p.requires_grad for p in model.parameters()) else TuningMode.PARTIAL


def _checked_pairs(model: nn.Module, distribution: Distribution) -> tuple[LowRankPair, ...]:
    for name, module in model.named_modules():
        base = getattr(getattr(module, "base_layer", None), "weight", None)
        if hasattr(module, "lora_A") and base is not None and not base.is_floating_point():
            raise UserError(
                "the norm of a quantised weight cannot be measured",
                where=plain_name(name),
                expected="adapters over floating-point weights",
                got=str(base.dtype),
            )
    return () if distribution is Distribution.DEEPSPEED else low_rank_pairs(model)


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Trained parameters, and all; those that DeepSpeed has partitioned count whole."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
