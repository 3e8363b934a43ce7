"""Steers a job in transformers' `Trainer`, TRL's `SFTTrainer`, or any other subclass:

    trainer = Trainer(..., callbacks=[ScheduleCallback("path | hub-id | default | hold")])
    trainer.train()

Hooks receive neither the trainer nor the loss nor the gradient norm before clipping. So the callback looks for the
trainer that is being made when it is told that one was, and wraps four of its methods, on that instance alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrl.controller import ScheduleController, known_length
from llmrl.decisions import DecisionRecord
from llmrl.hosts.reporting import TrainerReport
from llmrl.hosts.schedule_lr import ScheduleLR
from llmrl.live.capabilities import check_deepspeed_config
from llmrl.live.labels import model_label_nats
from llmrl.live.optimizers import check_optimizer, innermost
from llmrl.live.snapshots import SnapshotPlace
from llmrl.policy import SchedulePolicy

_OWN_METHODS = ("create_scheduler", "training_step", "_clip_grad_norm", "_get_grad_norm")
_DEEPEST_CALL = 12


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Lets a policy steer a Trainer's learning rates and updates.

    Args:
        policy: A reference (see `SchedulePolicy.from_pretrained`) or a policy. "hold" keeps the default level.
        settings: Base schedule, warm-up and start of the level; None takes those that the policy was trained with.
        guarded: Fall back to linear decay, from the best snapshot if there is one, when the job loses too much, or when
            the `eval_loss` of the Trainer's evaluations has turned; and take no step whose loss stands out.
        snapshots: "auto", "memory", "disk" (below the Trainer's output directory) or "off"; see `ScheduleController`.
        on_decision: Called with each decision and the interval that followed it, on every process.

    Raises:
        UserError: There is no such policy, or it is damaged.
    """

    def __init__(
        self,
        policy: str | Path | SchedulePolicy,
        *,
        settings: ScheduleSettings | None = None,
        guarded: bool = True,
        snapshots: SnapshotPlace = "auto",
        on_decision: Callable[[DecisionRecord], None] | None = None,
    ) -> None:
        if not isinstance(policy, SchedulePolicy):
            policy = SchedulePolicy.from_pretrained(policy, where="ScheduleCallback")
        self.policy = policy
        self._settings = settings
        self._guarded = guarded
        self._snapshots: SnapshotPlace = snapshots
        self._on_decision = on_decision
        self._trainer: Any = None
        self._controller: ScheduleController | None = None
        self._loss: Tensor | None = None
        self._norm: Tensor | float | None = None
        self._max_grad_norm = 0.0
        self._tightened: float | None = None
        self._told_to: TrainerReport

    @property
    def controller(self) -> ScheduleController:
        """The controller of the present or latest job.

        Raises:
            ValueError: There was none.
        """
        if self._controller is None:
            raise ValueError("controller: expected training to have begun, got no job")
        return self._controller

    # -- taking hold of the trainer -------------------------------------------------------------------------------

    def attach(self, trainer: Trainer) -> None:
        """Takes hold of a trainer that was made without this callback; otherwise this happens by itself.

        Raises:
            UserError: The trainer has a schedule already, or is of a version that cannot be steered.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self._trainer is trainer:
            return
        if self._trainer is not None:
            raise UserError(
                "the callback steers another Trainer already",
                where="ScheduleCallback",
                expected="one callback for each Trainer",
                got="the same one twice",
            )
        _check_trainer(trainer)
        self._trainer = trainer
        wrapped = {name: getattr(trainer, name) for name in _OWN_METHODS}
        trainer.create_scheduler = self._create_scheduler
        trainer.training_step = self._watch_loss(wrapped["training_step"])
        trainer._clip_grad_norm = self._freeze_before(wrapped["_clip_grad_norm"])
        trainer._get_grad_norm = self._watch_norm(wrapped["_get_grad_norm"])

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes hold of the trainer that is being made."""
        self.attach(_trainer_being_made(self))

    def _create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> ScheduleLR:
        trainer = self._trainer
        if trainer.lr_scheduler is not None:
            raise UserError(
                "the Trainer was given a scheduler, which would set the learning rates too",
                where="Trainer(optimizers=(optimizer, scheduler))",
                expected="optimizers=(optimizer, None)",
                got=type(trainer.lr_scheduler).__name__,
            )
        known_length(num_training_steps, "TrainingArguments(max_steps=...)")
        optimizer = trainer.optimizer if optimizer is None else optimizer
        check_optimizer(innermost(optimizer))
        self._controller = ScheduleController(
            self.policy,
            settings=self._settings,
            guarded=self._guarded,
            snapshots=self._snapshots,
            snapshot_folder=Path(trainer.args.output_dir) if self._snapshots == "disk" else None,
            on_decision=self._report,
        )
        scheduler = ScheduleLR(optimizer, self._controller)
        trainer.lr_scheduler = scheduler
        trainer._created_lr_scheduler = True  # so that the next call of train() makes a new one
        return scheduler

    def _watch_loss(self, training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            loss = training_step(*args, **kwargs)
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
            return loss

        return watched

    def _freeze_before(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        def clipped(*args: Any, **kwargs: Any) -> Any:
            self.controller.job.freeze()
            return clip(*args, **kwargs)

        return clipped

    def _watch_norm(self, get_norm: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.controller.job.freeze()
            self._norm = get_norm(*args, **kwargs)
            return self._norm

        return watched

    # -- the job --------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches the controller, when the model is ready and a checkpoint has been loaded."""
        if self._trainer is None:
            raise UserError(
                "the callback was added to a Trainer that was made already",
                where="trainer.add_callback(ScheduleCallback(...))",
                expected="Trainer(..., callbacks=[ScheduleCallback(...)]), or callback.attach(trainer)",
                got="add_callback",
            )
        scheduler = kwargs["lr_scheduler"]
        if not isinstance(scheduler, ScheduleLR):
            raise UserError(
                "the Trainer made a scheduler of its own, which would set the learning rates too",
                where="the Trainer's create_scheduler",
                expected="ScheduleLR",
                got=type(scheduler).__name__,
            )
        if args.max_grad_norm != self._tightened:  # else what an interrupted job left behind
            self._max_grad_norm = float(args.max_grad_norm or 0.0)
        self._loss = self._norm = None
        self._told_to = TrainerReport(self._trainer, self.policy, state.max_steps)
        restored = scheduler.restored
        self.controller.attach(
            kwargs["model"],
            kwargs["optimizer"],
            self._trainer.accelerator,
            total_steps=state.max_steps,
            max_grad_norm=self._max_grad_norm,
            first_step=state.global_step if restored is None else 0,
            base_rates=tuple(float(rate) for rate in scheduler.base_lrs),
        )
        if restored is not None:
            self.controller.load_state_dict(restored)
        scheduler.restored = None
        self._prepare_step(args, scheduler)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the step before."""
        self._loss = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the step."""
        assert self._loss is not None
        self.controller.job.before_step(self._loss, self._norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the update while gradients and moments are there."""
        self.controller.job.measure_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decides at an interval's end, and sets the next step's rates."""
        self.controller.after_step()
        self._prepare_step(args, kwargs["lr_scheduler"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tells the guard the validation loss; one of several evaluation sets, which have names, counts for nothing."""
        loss = (kwargs.get("metrics") or {}).get("eval_loss")
        if loss is not None and self._trainer.is_in_train:
            events = self.controller.validated(float(loss), self._num_labels())
            if events:
                self._trainer.log({f"llmrl/event_{name}": 1.0 for name in events})
            self._prepare_step(args, kwargs["lr_scheduler"])

    def _num_labels(self) -> int | None:
        """Labels that a classifier's evaluation loss is the mean over; None for other models, whose tokens are many."""
        if not math.isfinite(model_label_nats(self._trainer.model)):
            return None
        data = self._trainer.eval_dataset
        return len(data) if isinstance(data, Sized) else None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the clipping norm back, and the whole schedule to where tables and pictures go."""
        args.max_grad_norm, self._tightened = self._max_grad_norm, None
        self._told_to.finish()

    def _prepare_step(self, args: TrainingArguments, scheduler: ScheduleLR) -> None:
        job = self.controller.job
        scheduler.show(job.rates())
        if math.isfinite(job.clipping_norm):
            args.max_grad_norm = self._tightened = job.clipping_norm

    def _report(self, record: DecisionRecord) -> None:
        self._told_to.add(record)
        if self._on_decision is not None:
            self._on_decision(record)


def _trainer_being_made(callback: ScheduleCallback) -> Trainer:
    """The trainer in whose constructor this is called."""
    for depth in range(1, _DEEPEST_CALL):
        candidate = sys._getframe(depth).f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
    raise ValueError("on_init_end: expected to be called by a Trainer's constructor, got another caller")


def _check_trainer(trainer: Trainer) -> None:
    others = [c for c in trainer.callback_handler.callbacks if isinstance(c, ScheduleCallback)]
    if len(others) > 1:
        raise UserError(
            "two callbacks want to steer the same job",
            where="Trainer(callbacks=...)",
            expected="one ScheduleCallback",
            got=f"{len(others)} of them",
        )
    missing = [name for name in _OWN_METHODS if not hasattr(trainer, name)]
    if missing:
        raise UserError(
            "this version of transformers does not show a job's gradient norms",
            where="transformers",
            expected="5.0 or newer",
            got=f"a Trainer without {', '.join(missing)}",
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        check_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
