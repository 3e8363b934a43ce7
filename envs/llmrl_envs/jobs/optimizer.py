"""AdamW for a job's trainable parameters, and the LoRA pairs whose effective change is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter

from llmrl_envs.interface.tensor_sums import full_tensor
from llmrl_envs.interface.updates import LowRankPair

if TYPE_CHECKING:
    from llmrl_envs.jobs.task import OptimizerSettings

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_optimizer(parameters: Mapping[str, Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone (not on biases, norms or other vectors), fused where torch can.

    The learning rate is zero until the session sets it.
    """
    groups = parameter_groups(parameters, settings.weight_decay)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters.values())
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def parameter_groups(parameters: Mapping[str, Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay on matrices alone."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, weight_decay), (vectors, 0.0))
        if members
    ]


def low_rank_pairs(model: nn.Module) -> tuple[LowRankPair, ...]:
    """The trained LoRA pairs of a peft model; none where there are no adapters."""
    pairs: list[LowRankPair] = []
    module: Any
    for module in model.modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "base_layer")):
            continue
        for adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            if a.requires_grad and b.requires_grad:
                square = full_tensor(module.base_layer.weight.detach().double().square().sum())
                weight_norm = float(square) ** 0.5
                pairs.append(LowRankPair(a, b, float(module.scaling[adapter]), weight_norm))
    return tuple(pairs)
