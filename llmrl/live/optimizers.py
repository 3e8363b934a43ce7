"""The optimizer of somebody else's job: whether it can be steered, its groups' rates, and steps that are not taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.updates import UpdateSource
from torch import Tensor
from torch.nn import Parameter

_OWN_RATES = ("prodigy", "dadapt", "schedulefree", "schedule_free")
_SIGN_LIKE = ("lion", "adafactor")
"""Optimizers without Adam's moments whose update at rate one is at most one in every coordinate."""
_ADAM = ("adam", "adamw", "fusedadam", "deepspeedcpuadam")
"""Classes whose update is Adam's, read from its moments; its relatives are measured by what they change."""
_QUANTISED = ("bitsandbytes", "torchao")


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


def check_optimizer(optimizer: torch.optim.Optimizer) -> UpdateSource:
    """How the optimizer's update is measured.

    Args:
        optimizer: The innermost one.

    Raises:
        UserError: It sets its own rates, or its update cannot be measured.
    """
    _refuse_own_rates(optimizer)
    _refuse_unknown_updates(optimizer)
    name, groups = type(optimizer).__name__.lower(), optimizer.param_groups
    largest = any(group.get("amsgrad") for group in groups)
    is_adam = isinstance(optimizer, torch.optim.Adam) or name in _ADAM
    return "moments" if is_adam and not largest else "difference"


def _refuse_own_rates(optimizer: torch.optim.Optimizer) -> None:
    told, groups = _full_name(optimizer), optimizer.param_groups
    if any(part in told.lower() for part in _OWN_RATES) or any(_is_schedule_free(group) for group in groups):
        raise UserError(
            "the optimizer chooses its own learning rates, which a schedule would fight",
            where="the optimizer",
            expected="AdamW, Adam, Lion, or Adafactor without relative steps",
            got=told,
        )
    if any(group.get("relative_step") for group in groups):
        raise UserError(
            "Adafactor with relative steps chooses its own learning rates, which a schedule would fight",
            where="the optimizer",
            expected="Adafactor(..., relative_step=False, scale_parameter=False)",
            got="relative_step=True",
        )
    if any(group.get("scale_parameter") for group in groups):
        raise UserError(
            "Adafactor with scaled parameters does not take the rate that it is given",
            where="the optimizer",
            expected="Adafactor(..., relative_step=False, scale_parameter=False)",
            got="scale_parameter=True",
        )


def _refuse_unknown_updates(optimizer: torch.optim.Optimizer) -> None:
    told, groups = _full_name(optimizer), optimizer.param_groups
    if any("rank" in group and "update_proj_gap" in group for group in groups):
        raise UserError(
            "the optimizer keeps its moments in a projection of the weights, where its update cannot be measured",
            where="the optimizer",
            expected="AdamW, Adam, Lion, or Adafactor without relative steps",
            got=told,
        )
    sign_like = any(part in type(optimizer).__name__.lower() for part in _SIGN_LIKE)
    adam_like = all("betas" in group and "eps" in group for group in groups)
    if not sign_like and (not adam_like or told.startswith(_QUANTISED)):
        raise UserError(
            "levels are not defined for this optimizer: the size of its update is not known before it steps",
            where="the optimizer",
            expected="AdamW, Adam, Lion, or Adafactor without relative steps, with states that are not quantised",
            got=told,
        )


def _full_name(optimizer: torch.optim.Optimizer) -> str:
    kind = type(optimizer)
    return f"{kind.__module__}.{kind.__name__}"


def _is_schedule_free(group: dict[str, Any]) -> bool:
    return "weight_lr_power" in group or "d_coef" in group


def check_measurable(source: UpdateSource, *, steps_inside_backward: bool) -> None:
    """Refuses an optimizer whose update is the change of the weights, where that change is over when it is asked for.

    Raises:
        UserError: It cannot be measured.
    """
    if source == "difference" and steps_inside_backward:
        raise UserError(
            "under DeepSpeed only the update of Adam and AdamW can be measured",
            where="the optimizer",
            expected="AdamW or Adam; or this optimizer under DDP or FSDP2",
            got="an optimizer without their moments",
        )


class RateSetter:
    """Writes a common rate into an optimizer's groups, keeping the ratio of their own rates.

    Args:
        optimizer: The innermost one.
        base_rates: The groups' own rates; None reads them.

    Raises:
        UserError: No group has a positive rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, base_rates: Sequence[float] | None = None) -> None:
        self._optimizer = optimizer
        rates = [float(group["lr"]) for group in optimizer.param_groups] if base_rates is None else list(base_rates)
        self.given_rate = max((rate for rate, g in zip(rates, optimizer.param_groups, strict=True) if g["params"]),
                              default=0.0)  # fmt: skip
        if not self.given_rate > 0.0:
            raise UserError(
                "no parameter group has a learning rate to steer",
                where="the optimizer",
                expected="a positive learning rate in at least one group with parameters",
                got=rates,
            )
        self.multipliers = tuple(rate / self.given_rate for rate in rates)

    def rates(self, rate: float) -> list[float]:
        """What the groups get at a common rate."""
        return [rate * multiplier for multiplier in self.multipliers]

    def set(self, rate: float) -> None:
        """Writes the rates."""
        for group, value in zip(self._optimizer.param_groups, self.rates(rate), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def skip_unless(
    allowed: Tensor | bool, optimizer: torch.optim.Optimizer, parameters: Iterable[Parameter], *, scaled: bool
) -> None:
    """Makes the next step of the optimizer do nothing where `allowed` is false.

    With a fused optimizer the device decides and nothing waits for it; otherwise the gradients are dropped.

    Args:
        allowed: Whether the step may be taken; a tensor is not waited for where the optimizer is fused.
        optimizer: The innermost one.
        parameters: Those that the step would change.
        scaled: A loss scaler takes the step, and sets its own flags.
    """
    if allowed is True:
        take_steps_again(optimizer)
    elif not scaled and all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~torch.as_tensor(allowed)).to(torch.float32)  # type: ignore[attr-defined]
    elif not bool(allowed):
        for parameter in parameters:
            parameter.grad = None


def take_steps_again(optimizer: torch.optim.Optimizer) -> None:
    """Takes back what `skip_unless` told a fused optimizer, which would go on skipping when the job is over."""
    vars(optimizer).pop("found_inf", None)
