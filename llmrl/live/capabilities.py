"""What a host allows: how the job is distributed, and which update choices can be carried out in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice
from torch import nn


class Distribution(StrEnum):
    """How a model is shared among processes."""

    SINGLE = "single"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    DEEPSPEED = "deepspeed"


_REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU",
               "MULTI_HPU", "MULTI_NEURON")  # fmt: skip
_STEPS_INSIDE_BACKWARD = "DeepSpeed takes its optimizer steps inside the backward pass"


@dataclass(frozen=True)
class HostCapabilities:
    """What was found when the controller was attached.

    Attributes:
        distribution: How the model is shared.
        compiled: Whether the model went through `torch.compile`; nothing is masked for that.
        masked: Update choices that cannot be carried out here, with the reason.
    """

    distribution: Distribution
    compiled: bool
    masked: Mapping[UpdateChoice, str]

    @property
    def choices(self) -> frozenset[UpdateChoice]:
        """Update choices that the host carries out."""
        return frozenset(UpdateChoice) - self.masked.keys()

    def describe(self) -> str:
        """One line for the log."""
        host = self.distribution.value + (", compiled" if self.compiled else "")
        missing = "; ".join(f"{choice.value} ({reason})" for choice, reason in self.masked.items())
        return f"steering a job ({host}); not available here: {missing or 'nothing'}"


def find_capabilities(
    distribution: Distribution,
    model: nn.Module,
    *,
    has_layers: bool,
    max_grad_norm: float,
    keeps_snapshots: bool,
    is_adam: bool,
) -> HostCapabilities:
    """What a job allows.

    Args:
        distribution: From `find_distribution`.
        model: The model as it is trained.
        has_layers: Whether it has a lower half that could be frozen.
        max_grad_norm: Norm that gradients are clipped to; infinity where they are not.
        keeps_snapshots: Whether there will be something to roll back to.
        is_adam: Whether the optimizer is torch's Adam or AdamW, without amsgrad.
    """
    masked: dict[UpdateChoice, str] = {}
    if not keeps_snapshots:
        masked[UpdateChoice.ROLLBACK] = "no snapshots are kept"
    if not has_layers:
        masked[UpdateChoice.FREEZE] = "the trained parameters have no lower half of layers"
    if not math.isfinite(max_grad_norm):
        masked[UpdateChoice.TIGHTEN] = "gradients are not clipped"
    if not is_adam:
        masked[UpdateChoice.QUASI_HYPERBOLIC] = "the optimizer is not torch's Adam or AdamW"
    if distribution is Distribution.DEEPSPEED:
        late = (UpdateChoice.ROLLBACK, UpdateChoice.FREEZE, UpdateChoice.TIGHTEN, UpdateChoice.QUASI_HYPERBOLIC)
        masked |= dict.fromkeys(late, _STEPS_INSIDE_BACKWARD)
    return HostCapabilities(distribution, is_compiled(model), masked)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or the one inside its wrappers, went through `torch.compile`."""
    return any(hasattr(module, "_orig_mod") for module in model.modules()) or (
        getattr(model, "_compiled_call_impl", None) is not None
    )


def find_distribution(model: nn.Module, accelerator: Any, world_size: int) -> Distribution:
    """How a model is shared.

    Args:
        model: The model as it is trained, after it was prepared.
        accelerator: The job's accelerator, if it has one.
        world_size: Number of processes.

    Raises:
        UserError: The job is distributed in a way in which it cannot be steered.
    """
    if accelerator is not None:
        return _distribution_of(accelerator)
    names = {type(module).__name__ for module in model.modules()}
    if "DeepSpeedEngine" in names:
        return Distribution.DEEPSPEED
    if "FullyShardedDataParallel" in names:
        raise _unsupported("FSDP, version 1")
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        return Distribution.FSDP2
    return Distribution.DDP if world_size > 1 else Distribution.SINGLE


def _distribution_of(accelerator: Any) -> Distribution:
    kind = str(accelerator.distributed_type.value)
    if kind in _REPLICATED:
        return Distribution.SINGLE if accelerator.num_processes == 1 else Distribution.DDP
    if kind == "FSDP":
        if accelerator.is_fsdp2:
            return Distribution.FSDP2
        raise _unsupported("FSDP, version 1")
    if kind == "DEEPSPEED":
        check_deepspeed_config(accelerator.state.deepspeed_plugin.deepspeed_config)
        return Distribution.DEEPSPEED
    raise _unsupported(kind)


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuses what would fight the controller, or could not be measured.

    Raises:
        UserError: The configuration has a scheduler, or shards parameters (ZeRO-3).
    """
    if "scheduler" in config:
        raise UserError(
            "the DeepSpeed configuration has a scheduler, which would set the learning rates too",
            where="the DeepSpeed configuration's key `scheduler`",
            expected="no scheduler",
            got=config["scheduler"],
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise UserError(
            "the size of updates cannot be measured under DeepSpeed ZeRO-3",
            where="the DeepSpeed configuration's key `zero_optimization.stage`",
            expected="0, 1 or 2; or FSDP2, which shards parameters and can be measured",
            got=stage,
        )


def _unsupported(got: str) -> UserError:
    return UserError(
        "the job is distributed in a way in which it cannot be steered",
        where="the accelerate configuration",
        expected="one process, DDP, FSDP with fsdp_version: 2, or DeepSpeed up to ZeRO-2",
        got=got,
    )
