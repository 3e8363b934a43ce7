"""Steers a job that you run yourself, in a loop of your own:

    controller = ScheduleController.from_pretrained("path | hub-id | default | hold")
    controller.attach(model, optimizer, accelerator=accelerator, total_steps=1000)
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                controller.before_step(loss)   # clips; do not clip yourself
            optimizer.step()
            if accelerator.sync_gradients:
                controller.after_step()
            optimizer.zero_grad()

There is no learning-rate scheduler beside it, and it is not passed through `accelerator.prepare`; it may be
registered with `accelerator.register_for_checkpointing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from torch import Tensor, nn

from llmrl.decisions import DecisionRecord, decision_row
from llmrl.live.capabilities import HostCapabilities
from llmrl.live.job import LiveJob
from llmrl.live.options import JobOptions
from llmrl.live.snapshots import SnapshotPlace
from llmrl.policy import SchedulePolicy
from llmrl.tracking.decisions import decision_series

_LONGEST_JOB_STEPS = 10**9
_SMALL_SHARE = 0.1
"""Of the model's weights: where no more is trained a snapshot costs little beside the model."""


class ScheduleController:
    """A policy, and the job that it is attached to.

    Args:
        policy: Decides.
        settings: Base schedule, warm-up and start of the level; None takes those that the policy was trained with.
        guarded: Fall back to linear decay, from the best snapshot if there is one, when the job loses too much, or when
            the validation loss that `validated` is told has turned; and take no step whose loss stands out.
        snapshots: Where the best state is kept: "memory" (three times the trained weights, on their device), "disk" (a
            safetensors file), "off", or "auto": in memory if the policy may roll back, or if little of the model is
            trained, as with adapters.
        snapshot_folder: Where a snapshot on disk is put.
        on_decision: Called with each decision and the interval that followed it, on every process;
            `metrics` makes one flat row of numbers for a log of it.
    """

    def __init__(
        self,
        policy: SchedulePolicy,
        *,
        settings: ScheduleSettings | None = None,
        guarded: bool = True,
        snapshots: SnapshotPlace = "auto",
        snapshot_folder: Path | str | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
    ) -> None:
        if snapshots not in ("auto", "memory", "disk", "off"):
            raise UserError(
                "unknown place for snapshots",
                expected="auto, memory, disk or off",
                got=repr(snapshots),
                where="snapshots",
            )
        if snapshots == "disk" and snapshot_folder is None:
            raise UserError(
                "a snapshot on disk needs a place", expected="a folder", got="nothing", where="snapshot_folder"
            )
        self.policy = policy
        self._settings = settings
        self._guarded = guarded
        self._snapshots = snapshots
        self._folder = Path(snapshot_folder) if snapshot_folder is not None else None
        self._on_decision = on_decision
        self._job: LiveJob | None = None
        self.records: list[DecisionRecord] = []

    @classmethod
    def from_pretrained(
        cls,
        reference: Path | str,
        *,
        settings: ScheduleSettings | None = None,
        guarded: bool = True,
        snapshots: SnapshotPlace = "auto",
        snapshot_folder: Path | str | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
    ) -> ScheduleController:
        """A controller for a policy by reference; see `SchedulePolicy.from_pretrained` for what may be given.

        Raises:
            UserError: There is no such policy, or it is damaged.
        """
        return cls(
            SchedulePolicy.from_pretrained(reference, where="policy"),
            settings=settings,
            guarded=guarded,
            snapshots=snapshots,
            snapshot_folder=snapshot_folder,
            on_decision=on_decision,
        )

    # -- the job --------------------------------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        optimizer: Any,
        accelerator: Any = None,
        *,
        total_steps: int | None = None,
        max_grad_norm: float | None = 1.0,
        first_step: int = 0,
        base_rates: tuple[float, ...] | None = None,
    ) -> HostCapabilities:
        """Takes a job in hand, before its first step; a job that was taken in hand before is let go.

        Args:
            model: As it is trained, after `accelerator.prepare`.
            optimizer: Likewise.
            accelerator: The job's accelerator; needed for mixed precision with a loss scale, and for DeepSpeed.
            total_steps: The job's length in optimizer steps.
            max_grad_norm: Norm that `before_step` clips to; None or 0 does not clip.
            first_step: Optimizer steps that the job has done already, without being steered.
            base_rates: The parameter groups' own rates, whose ratios are kept; None reads them from the optimizer.

        Returns:
            What the host allows.

        Raises:
            UserError: The job cannot be steered, or its length is not known.
        """
        limit = math.inf if not max_grad_norm else float(max_grad_norm)
        wanted = self._may_roll_back() or (self._guarded and _trained_share(model) <= _SMALL_SHARE)
        keeps = self._snapshots in ("memory", "disk") or (self._snapshots == "auto" and wanted)
        on_disk = self._folder / "llmrl-snapshot" if self._snapshots == "disk" and self._folder else None
        options = JobOptions(
            total_steps=known_length(total_steps, "attach(total_steps=...)"),
            first_step=first_step,
            max_grad_norm=limit,
            base_rates=base_rates,
            settings=self._settings,
            guarded=self._guarded,
            snapshots=keeps,
            snapshot_path=on_disk,
        )
        self.records = []
        self._job = LiveJob(self.policy, model, optimizer, options, accelerator=accelerator, on_record=self._note)
        self._job.set_rates()
        return self._job.capabilities

    def before_step(self, loss: Tensor | float) -> None:
        """Call when the gradients of an optimizer step are ready: clips and measures them.

        A step whose loss or gradient is not finite, or whose loss stands out (docs/hosts.md, Guards), will do nothing.

        Args:
            loss: The step's mean loss on this process, nats per target; of accumulated batches the last one's, or
                better their mean.
        """
        job = self.job
        job.before_step(loss, job.clip())

    def after_step(self) -> None:
        """Call when the optimizer has stepped; the next step's rates then stand in the optimizer."""
        self.job.after_step()

    def validated(self, loss: float, num_targets: int | None = None) -> dict[str, bool]:
        """Call, where your loop validates now and then, with what it found, after `after_step`.

        The loss is for the guard and the record: where it has turned, the job goes on from its best state at a lower
        rate, in linear decay. No policy sees it.

        Args:
            loss: Mean loss on validation data, nats per target, of this process's share.
            num_targets: Tokens or labels that all processes' losses are the mean over, if you know: of few the guard is
                less sure.

        Returns:
            What the guard did, as in a record's events; mostly nothing.
        """
        events = self.job.validated(loss, num_targets)
        if self.records:
            latest = self.records[-1]
            self.records[-1] = replace(latest, validation_loss=loss, events=latest.events | events)
        return events

    @property
    def job(self) -> LiveJob:
        """The job in hand.

        Raises:
            ValueError: There is none.
        """
        if self._job is None:
            raise ValueError("controller: expected attach(model, optimizer, ...) to have been called, got no job")
        return self._job

    def metrics(self, record: DecisionRecord) -> dict[str, float]:
        """A decision and the interval that followed it as one flat row of finite numbers, named `llmrl/*`."""
        return decision_series(decision_row(record, self.policy.spec.names, self.policy.table.names))

    def _may_roll_back(self) -> bool:
        choices = {action.choice for action in self.policy.table.actions}
        return self.policy.network is not None and UpdateChoice.ROLLBACK in choices

    def _note(self, record: DecisionRecord) -> None:
        self.records.append(record)
        if self._on_decision is not None:
            self._on_decision(record)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the job to go on as if it had not stopped: tensors and plain values."""
        return self.job.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; call after `attach`, and after the optimizer's state was loaded.

        Raises:
            UserError: It is the state of a job of another length, or under another policy.
        """
        self.job.load_state_dict(state)


def _trained_share(model: nn.Module) -> float:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained) / max(sum(size for size, _ in sizes), 1)


def known_length(total_steps: int | None, where: str) -> int:
    """A job's length in optimizer steps, checked.

    Raises:
        UserError: It is not known; a schedule needs to know where it ends.
    """
    if isinstance(total_steps, int) and 1 <= total_steps <= _LONGEST_JOB_STEPS:
        return total_steps
    raise UserError(
        "the job's length is not known, and a schedule needs to know where it ends",
        where=where,
        expected="the number of optimizer steps",
        got=total_steps,
    )
