"""One job of `llmrl finetune` whose model is shared out among the processes: FSDP2, or DeepSpeed up to ZeRO-2.

A loop of the house's own under a `ScheduleController`, which measures, clips, skips, freezes, rolls back and decides as
in any loop; see docs/hosts.md for what each host can do. The order of the data, the weights of micro-batches and the
evaluations are those of `FineTuningSession`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.schedule import ScheduleSettings
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.optimizer import build_optimizer
from llmrl_envs.jobs.passes import JobPasses, nan_unless_finite
from llmrl_envs.jobs.precision import Precision
from llmrl_envs.jobs.session import current_random_state, own_random_state, seeded_random_state
from llmrl_envs.jobs.task import FineTuningTask
from torch import Tensor, nn

from llmrl.controller import ScheduleController
from llmrl.decisions import DecisionRecord
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
    validate: bool = False,
    on_decision: Callable[[DecisionRecord], None] | None = None,
    checkpoints: JobCheckpoints | None = None,
    saved: JobState | None = None,
) -> JobResult:
    """Fine-tunes to the end of the budget; arguments as for `run_job`.

    The job's model is shared out from here on, and its parameters are this process's shards.
    """
    job.restore_initial_weights()
    passes = JobPasses(job, seed, context, Precision(job.task.precision, job.device))
    model, optimizer = context.prepare_sharded(job, build_optimizer(job.loaded.trainable, job.task.optimizer))
    result = _result_so_far(saved) if saved is not None else _fresh_result(passes)

    def note(record: DecisionRecord) -> None:
        if validate:
            found = passes.evaluate("validation")
            record = replace(record, validation_loss=found.loss)
            result.tokens_evaluated += found.num_tokens
            model.train()
        result.records.append(record)
        if on_decision is not None:
            on_decision(record)

    controller = ScheduleController(
        policy, settings=settings, guarded=guarded, snapshots="memory" if guarded else "auto", on_decision=note
    )
    began = time.perf_counter() - result.seconds
    controller.attach(
        model,
        optimizer,
        context.accelerator,
        total_steps=job.task.steps,
        max_grad_norm=job.task.optimizer.max_grad_norm,
        base_rates=(learning_rate,) * len(optimizer.param_groups),
    )
    generators = seeded_random_state(seed + 7919 * context.rank, job.device)
    if saved is not None:
        generators = _resume(saved, controller, context.accelerator)
    if on_decision is not None:
        for record in result.records:
            on_decision(record)
    model.train()
    with own_random_state(generators, job.device):
        for step in range(controller.job.step, job.task.steps):
            num_decisions = len(result.records)
            result.tokens_trained += _train_step(step, passes, model, optimizer, controller, context.accelerator)
            if checkpoints is not None and num_decisions < len(result.records) and checkpoints.due(num_decisions + 1):
                result.seconds = time.perf_counter() - began
                checkpoints.save(num_decisions + 1, _state(result, controller, context.accelerator))
    result.seconds = time.perf_counter() - began
    result.final = passes.evaluate("test")
    return result


def _fresh_result(passes: JobPasses) -> JobResult:
    initial = passes.evaluate("test")
    return JobResult(initial, initial)


def _result_so_far(saved: JobState) -> JobResult:
    initial = restored_evaluation(saved.values["initial"])
    counts = {name: saved.values[name] for name in _COUNTS}
    return JobResult(initial, initial, restored_records(saved.values["records"]), **counts)


def _state(result: JobResult, controller: ScheduleController, accelerator: Any) -> JobState:
    """The job between two steps, as this process holds it."""
    generators = current_random_state(accelerator.device)
    values = {
        "controller": as_arrays(controller.state_dict()),
        "initial": evaluation_state(result.initial),
        "records": records_state(result.records),
        "loss_scale": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        **{name: getattr(result, name) for name in _COUNTS},
    }
    own = controller.job.share() | {_GENERATOR + name: state for name, state in generators.items()}
    return JobState(values, own=own)


def _resume(saved: JobState, controller: ScheduleController, accelerator: Any) -> dict[str, Tensor]:
    """Takes the job to where `_state` was taken; returns the generators' states."""
    controller.job.load_share(saved.own)
    controller.load_state_dict(as_tensors(saved.values["controller"]))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved.values["loss_scale"])
    return {name.removeprefix(_GENERATOR): t for name, t in saved.own.items() if name.startswith(_GENERATOR)}


def _train_step(
    step: int, passes: JobPasses, model: Any, optimizer: Any, controller: ScheduleController, accelerator: Any
) -> int:
    """One optimizer step; returns its tokens."""
    loss, tokens = torch.zeros((), device=accelerator.device), 0
    for batch in passes.micro_batches(step):
        with accelerator.accumulate(model):
            part = passes.training_loss(model, batch)
            loss += part.detach()
            tokens += batch.num_tokens
            # Whoever runs the backward pass divides by the number of micro-batches, whose weights add up already.
            accelerator.backward(nan_unless_finite(part) * accelerator.gradient_accumulation_steps)
            if batch.last:
                controller.before_step(loss)
            optimizer.step()
            if batch.last:
                controller.after_step()
            optimizer.zero_grad()
    return tokens
