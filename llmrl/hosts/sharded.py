"""One job of `llmrl finetune` whose model is shared out among the processes: FSDP2, or DeepSpeed up to ZeRO-2.

A loop of the house's own under a `ScheduleController`, which measures, clips, skips, freezes, rolls back and decides as
in any loop; see docs/hosts.md for what each host can do. The order of the data, the weights of micro-batches and the
evaluations are those of `FineTuningSession`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.optimizer import build_optimizer
from llmrl_envs.jobs.passes import JobPasses, nan_unless_finite
from llmrl_envs.jobs.precision import Precision
from llmrl_envs.jobs.session import current_random_state, own_random_state, seeded_random_state
from llmrl_envs.jobs.task import FineTuningTask
from torch import nn

from llmrl.controller import ScheduleController
from llmrl.decisions import DecisionRecord, Validations
from llmrl.hosts.accelerate import AcceleratorContext
from llmrl.hosts.checkpoints import JobCheckpoints
from llmrl.hosts.job_state import (
    JobState,
    as_arrays,
    as_tensors,
    evaluation_state,
    records_state,
    restored_evaluation,
    restored_records,
)
from llmrl.hosts.result import JobResult
from llmrl.live.capabilities import Distribution, find_distribution
from llmrl.live.snapshots import SnapshotPlace
from llmrl.policy import SchedulePolicy

_COUNTS = ("seconds", "tokens_trained", "tokens_evaluated")
_GENERATOR = "generator."


def can_checkpoint(context: AcceleratorContext) -> bool:
    """Whether the state of a job that is shared out can be written: DeepSpeed keeps its own behind its own files."""
    return find_distribution(nn.Module(), context.accelerator, context.world_size) is not Distribution.DEEPSPEED


def check_sharded_task(task: FineTuningTask, context: AcceleratorContext) -> None:
    """Refuses what cannot be done with a model that is shared out.

    Raises:
        UserError: The task wants a loss scale of its own, or adapters under DeepSpeed.
    """
    if task.precision == "fp16":
        raise UserError(
            "a sharded job takes its loss scale from accelerate",
            where="task.precision",
            expected="auto, fp32 or bf16; for float16 `mixed_precision: fp16` in accelerate's configuration",
            got="fp16",
        )
    if task.mode == "lora" and find_distribution(nn.Module(), context.accelerator, context.world_size) == "deepspeed":
        raise UserError(
            "the size of LoRA's updates cannot be measured under DeepSpeed",
            where="task.mode",
            expected="full under DeepSpeed, or LoRA under DDP or FSDP2",
            got="lora",
        )


def run_sharded_job(
    job: Job,
    policy: SchedulePolicy,
    context: AcceleratorContext,
    *,
    learning_rate: float,
    seed: int,
    settings: ScheduleSettings | None = None,
    guarded: bool = True,
    validate: Validations = "never",
    keeps_best: bool = True,
    on_decision: Callable[[DecisionRecord], None] | None = None,
    checkpoints: JobCheckpoints | None = None,
    saved: JobState | None = None,
) -> JobResult:
    """Fine-tunes to the end of the budget; arguments as for `run_job`.

    The job's model is shared out from here on, and its parameters are this process's shards.
    """
    under_way = _SharedJob(job, context, seed=seed, saved=saved, validate=validate, on_decision=on_decision)
    under_way.steer(policy, learning_rate=learning_rate, settings=settings, guarded=guarded, keeps_best=keeps_best)
    if saved is None:
        under_way.validate_first()
    else:
        under_way.resume(saved)
    under_way.tell_again()
    under_way.train(checkpoints)
    return under_way.finish()


class _SharedJob:
    """A job under way.

    Args:
        job: Its model is shared out from here on.
        context: The processes that share it.
        seed: Data order and dropout.
        saved: The job's earlier part.
        validate: When to measure the validation loss; see `run_job`.
        on_decision: Called with every decision.
    """

    def __init__(
        self,
        job: Job,
        context: AcceleratorContext,
        *,
        seed: int,
        saved: JobState | None,
        validate: Validations,
        on_decision: Callable[[DecisionRecord], None] | None,
    ) -> None:
        job.restore_initial_weights()
        self._job = job
        self._accelerator = context.accelerator
        self._when, self._on_decision = validate, on_decision
        self._passes = JobPasses(job, seed, context, Precision(job.task.precision, job.device))
        optimizer = build_optimizer(job.loaded.trainable, job.task.optimizer)
        self._model, self._optimizer = context.prepare_sharded(job, optimizer)
        self._generators = seeded_random_state(seed + 7919 * context.rank, job.device)
        self._result = self._fresh_result() if saved is None else _result_so_far(saved)
        self._began = time.perf_counter() - self._result.seconds
        self._controller: ScheduleController

    def _fresh_result(self) -> JobResult:
        initial = self._passes.evaluate("test")
        return JobResult(initial, initial)

    def steer(
        self,
        policy: SchedulePolicy,
        *,
        learning_rate: float,
        settings: ScheduleSettings | None,
        guarded: bool,
        keeps_best: bool,
    ) -> None:
        """Puts the job under a policy."""
        snapshots: SnapshotPlace = "memory" if guarded and keeps_best else "off"
        self._controller = ScheduleController(
            policy, settings=settings, guarded=guarded, snapshots=snapshots, on_decision=self._note
        )
        self._controller.attach(
            self._model,
            self._optimizer,
            self._accelerator,
            total_steps=self._job.task.steps,
            max_grad_norm=self._job.task.optimizer.max_grad_norm,
            base_rates=(learning_rate,) * len(self._optimizer.param_groups),
        )

    def _note(self, record: DecisionRecord) -> None:
        if self._controller.job.loop.validation_due(self._when):
            self._validate()
            record = self._controller.records[-1]
        self._result.records.append(record)
        if self._on_decision is not None:
            self._on_decision(record)

    def validate_first(self) -> None:
        """Tells the guard the loss before the first step, where the job validates."""
        if self._controller.job.loop.validates_first(self._when):
            self._validate()

    def _validate(self) -> None:
        found = self._passes.evaluate("validation")
        self._controller.validated(found.loss, found.num_targets)
        self._result.tokens_evaluated += found.num_tokens
        self._model.train()

    def resume(self, saved: JobState) -> None:
        """Takes the job to where `_state` was taken."""
        self._controller.job.load_share(saved.own)
        self._controller.load_state_dict(as_tensors(saved.values["controller"]))
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(saved.values["loss_scale"])
        self._generators = {
            name.removeprefix(_GENERATOR): t for name, t in saved.own.items() if name.startswith(_GENERATOR)
        }

    def tell_again(self) -> None:
        """Tells of the decisions that were taken before the job was resumed."""
        if self._on_decision is not None:
            for record in self._result.records:
                self._on_decision(record)

    def train(self, checkpoints: JobCheckpoints | None) -> None:
        """Goes on to the end of the budget."""
        self._model.train()
        result = self._result
        with own_random_state(self._generators, self._job.device):
            for step in range(self._controller.job.step, self._job.task.steps):
                num_decisions = len(result.records)
                result.tokens_trained += self._train_step(step)
                if (
                    checkpoints is not None
                    and num_decisions < len(result.records)
                    and checkpoints.due(num_decisions + 1)
                ):
                    checkpoints.save(num_decisions + 1, self._state())

    def _train_step(self, step: int) -> int:
        """One optimizer step; returns its tokens."""
        accelerator, controller = self._accelerator, self._controller
        loss, tokens = torch.zeros((), device=accelerator.device), 0
        for batch in self._passes.micro_batches(step):
            with accelerator.accumulate(self._model):
                part = self._passes.training_loss(self._model, batch)
                loss += part.detach()
                tokens += batch.num_tokens
                # Whoever runs the backward pass divides by the number of micro-batches, whose weights add up already.
                accelerator.backward(nan_unless_finite(part) * accelerator.gradient_accumulation_steps)
                if batch.last:
                    controller.before_step(loss)
                self._optimizer.step()
                if batch.last:
                    controller.after_step()
                self._optimizer.zero_grad()
        return tokens

    def _state(self) -> JobState:
        """The job between two steps, as this process holds it."""
        self._result.seconds = time.perf_counter() - self._began
        generators = current_random_state(self._accelerator.device)
        scaler = self._accelerator.scaler
        values = {
            "controller": as_arrays(self._controller.state_dict()),
            "initial": evaluation_state(self._result.initial),
            "records": records_state(self._result.records),
            "loss_scale": None if scaler is None else scaler.state_dict(),
            **{name: getattr(self._result, name) for name in _COUNTS},
        }
        own = self._controller.job.share() | {_GENERATOR + name: state for name, state in generators.items()}
        return JobState(values, own=own)

    def finish(self) -> JobResult:
        """What came out."""
        self._result.seconds = time.perf_counter() - self._began
        self._result.final = self._passes.evaluate("test")
        return self._result


def _result_so_far(saved: JobState) -> JobResult:
    initial = restored_evaluation(saved.values["initial"])
    counts = {name: saved.values[name] for name in _COUNTS}
    return JobResult(initial, initial, restored_records(saved.values["records"]), **counts)
