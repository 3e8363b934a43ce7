"""Number formats: float32, bfloat16 autocast, or float16 autocast with a loss scale; and steps that may be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from llmrl_envs.interface.momentum import LeaningStep

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """What "auto" means on a device: bf16 on a CUDA device that has it, otherwise fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class Precision:
    """Runs forward passes in a number format and takes optimizer steps that skip non-finite gradients.

    Weights and moments stay float32. With fused AdamW the skip is decided on the device, without waiting for it.

    Args:
        name: auto, fp32, bf16 or fp16.
        device: Where the job runs.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = resolve_precision(name, device)
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=_DTYPES[self.name])

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the loss scale out of the gradients."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(optimizer)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_norm: Tensor,
        momentum_share: float = 1.0,
        *,
        allowed: Tensor | bool = True,
    ) -> None:
        """One optimizer step, not taken where the norm of all gradients is not finite.

        Args:
            optimizer: Steps.
            gradient_norm: Of all gradients together, a scalar.
            momentum_share: See `lean_on_gradient`.
            allowed: Whether it may be taken at all; a scalar on the device is not waited for with a fused optimizer.
        """
        leaning = LeaningStep(optimizer)
        leaning.begin(momentum_share)
        try:
            self._take_step(optimizer, gradient_norm, allowed)
        finally:
            leaning.end()

    def _take_step(self, optimizer: torch.optim.Optimizer, gradient_norm: Tensor, allowed: Tensor | bool) -> None:
        finite = torch.isfinite(gradient_norm) & allowed
        if self._scaler.is_enabled():
            if not bool(allowed):  # the scaler knows of what is not finite, and of nothing else
                optimizer.zero_grad(set_to_none=True)
            self._scaler.step(optimizer)
            self._scaler.update()
        elif all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(finite):
            optimizer.step()

    def state_dict(self) -> dict[str, float]:
        """The loss scale's state; empty where there is none."""
        if not self._scaler.is_enabled():
            return {}
        state = self._scaler.state_dict()
        return {"loss_scale": float(state["scale"]), "loss_scale_growth": float(state["_growth_tracker"])}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what `state_dict` gave."""
        if self._scaler.is_enabled() and "loss_scale" in state:
            current = self._scaler.state_dict()
            current |= {"scale": state["loss_scale"], "_growth_tracker": int(state["loss_scale_growth"])}
            self._scaler.load_state_dict(current)
