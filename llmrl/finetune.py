"""`llmrl finetune`: one fine-tuning job, steered by a policy or by a usual schedule, alone or under accelerate.

Writes config.yaml, schedule.jsonl (a row a decision, as it happens), checkpoints/, schedule.png, summary.json and
model/. A job that is killed at any moment and resumed ends with the same files, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from llmrl_envs.errors import UserError
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import Job, JobLibrary, resolve_device
from llmrl_envs.jobs.models import save_model
from llmrl_envs.jobs.parallel import ParallelContext
from llmrl_envs.jobs.task import FineTuningTask

from llmrl.config import FinetuneConfig
from llmrl.config_loading import config_to_yaml, load_config
from llmrl.decisions import DecisionRecord, decision_row
from llmrl.failures import print_message
from llmrl.hosts.accelerate import AcceleratorContext, found_by_first, parallel_context
from llmrl.hosts.checkpoints import JobCheckpoints, differences
from llmrl.hosts.job import named_schedule, run_job
from llmrl.hosts.job_state import JobState
from llmrl.hosts.result import JobResult
from llmrl.hosts.sharded import can_checkpoint, check_sharded_task, run_sharded_job
from llmrl.policy import HOLD, SchedulePolicy, hold_policy
from llmrl.progress import job_progress
from llmrl.run_directory import JsonlWriter, atomic_write_json, atomic_write_text, create_run_directory
from llmrl.tracking import DecisionLog, Tracker, ending, make_tracker


def finetune(
    *,
    config: FinetuneConfig,
    output: Path,
    policy: str | None = None,
    schedule: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs the job and returns what `summary.json` holds.

    Args:
        config: The job.
        output: Run directory, new or empty unless `resume`.
        policy: Folder, Hub id, "default" or "hold".
        schedule: Name of a usual schedule; exactly one of the two.
        resume: Go on from the newest checkpoint in the run directory, if there is one.

    Raises:
        UserError: Bad input, or a run directory or a checkpoint of another job; nothing has been trained then.
    """
    chosen, settings = choose_policy(config, policy, schedule)
    context = parallel_context()
    _check_shared(config.task, context)
    is_first = context.rank == 0
    found_by_first(context, lambda: _prepare(config, output, resume=resume))
    checkpoints = _make_checkpoints(config, chosen, context, output, resume=resume)
    saved = checkpoints.load() if resume and checkpoints is not None else None
    if is_first:
        atomic_write_text(output / "config.yaml", config_to_yaml(config))
    if is_first and resume:
        told = (
            f"after {saved.num_decisions} decisions" if saved is not None else "no checkpoint yet: from the beginning"
        )
        print_message("resumed", told, style="green")
    job = _load_job(config, context)
    with ending(make_tracker(config.tracking, "finetune", output, config.model_dump(mode="json"))) as tracker:
        recorder = _Recorder(output, chosen, job, tracker) if is_first else None
        guarded = schedule is None
        result = _run(config, job, chosen, settings, context, recorder, checkpoints, saved, guarded=guarded)
        summary = summarise(config, chosen, _given_rate(config), result, _gather_digests(result, context))
        _save(config, job, output, context, is_first=is_first)
        if recorder is not None:
            recorder.finish(summary)
    if isinstance(context, AcceleratorContext):
        context.barrier()
    return summary


def _prepare(config: FinetuneConfig, output: Path, *, resume: bool) -> str:
    """Makes the run directory, and returns it; one that is there already must be of the same job."""
    create_run_directory(output, resume=resume)
    path = output / "config.yaml"
    if path.exists():
        changed = differences(_what_is_trained(load_config("finetune", path, [])), _what_is_trained(config))
        if changed:
            raise UserError(
                "the run directory belongs to another job",
                where=str(path),
                expected="the configuration that it was begun with, or another --output",
                got="; ".join(changed),
            )
    return str(output)


def _what_is_trained(config: FinetuneConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include={"seed", "task", "learning_rate", "schedule", "keeps_best"})


def _make_checkpoints(
    config: FinetuneConfig, policy: SchedulePolicy, context: ParallelContext, output: Path, *, resume: bool
) -> JobCheckpoints | None:
    """The job's checkpoints; None where its state cannot be written.

    Raises:
        UserError: It is to be resumed all the same.
    """
    if _is_sharded(context) and not can_checkpoint(context):
        if resume:
            raise UserError(
                "a job under DeepSpeed cannot be resumed: its state is DeepSpeed's",
                where="--resume",
                expected="DDP or FSDP2, or the job from its beginning with another --output",
                got="DeepSpeed",
            )
        print_message("note", "no checkpoints are written under DeepSpeed", style="yellow")
        return None
    device = context.device if isinstance(context, AcceleratorContext) else resolve_device(config.device)
    identity = {
        **_what_is_trained(config),
        "steered_by": {"name": policy.name, "digest": policy.digest},
        "device": device.type,
    }
    return JobCheckpoints(output, identity, context, config.checkpoint_period_decisions)


def _check_shared(task: FineTuningTask, context: ParallelContext) -> None:
    """Refuses a job that these processes cannot share."""
    if task.batch_size < context.world_size:
        raise UserError(
            "the batch is smaller than the number of processes",
            expected=f"at least {context.world_size} examples",
            got=task.batch_size,
            where="task.batch_size",
        )
    if _is_sharded(context):
        check_sharded_task(task, context)


def _given_rate(config: FinetuneConfig) -> float:
    return config.task.learning_rate if config.learning_rate is None else config.learning_rate


def _run(
    config: FinetuneConfig,
    job: Job,
    policy: SchedulePolicy,
    settings: ScheduleSettings | None,
    context: ParallelContext,
    recorder: _Recorder | None,
    checkpoints: JobCheckpoints | None,
    saved: JobState | None,
    *,
    guarded: bool,
) -> JobResult:
    run = partial(run_sharded_job, context=context) if _is_sharded(context) else partial(run_job, parallel=context)
    with job_progress(config.task.steps, enabled=recorder is not None) as advance:
        return run(
            job,
            policy,
            learning_rate=_given_rate(config),
            seed=config.seed,
            settings=settings,
            guarded=guarded,
            validate="decisions",
            keeps_best=config.keeps_best,
            on_decision=_announce(recorder, advance),
            checkpoints=checkpoints,
            saved=saved,
        )


def _gather_digests(result: JobResult, context: ParallelContext) -> list[str]:
    """The schedules' digests of all processes."""
    digest = schedule_digest(result)
    return context.gather_texts(digest) if isinstance(context, AcceleratorContext) else [digest]


def _save(config: FinetuneConfig, job: Job, output: Path, context: ParallelContext, *, is_first: bool) -> None:
    """Writes the model, if it is wanted; every process must call it."""
    if not config.save_model:
        return
    state = context.whole_state() if _is_sharded(context) else None
    if is_first:
        save_model(job.loaded, output / "model", job.data.label_names, state)


def _is_sharded(context: ParallelContext) -> TypeGuard[AcceleratorContext]:
    return context.sharded


def _load_job(config: FinetuneConfig, context: ParallelContext) -> Job:
    """The job on its device; one whose model will be shared out waits on the CPU, which has room for the whole."""
    if _is_sharded(context):
        return replace(JobLibrary("cpu").job(config.task), device=context.device)
    device = str(context.device) if isinstance(context, AcceleratorContext) else config.device
    return JobLibrary(device).job(config.task)


def choose_policy(
    config: FinetuneConfig, policy: str | None, schedule: str | None
) -> tuple[SchedulePolicy, ScheduleSettings | None]:
    """The policy that a command line names, and the schedule settings that replace its own."""
    if (policy is None) == (schedule is None):
        got = "neither" if policy is None else "both"
        raise UserError("what steers the job?", expected="one of a policy and a schedule", got=got)
    if schedule is not None:
        warmup = (config.schedule or ScheduleSettings()).warmup_fraction
        return named_schedule(schedule, warmup), None
    if policy == HOLD:
        return hold_policy(config.schedule), None
    return SchedulePolicy.from_pretrained(str(policy)), config.schedule


def _announce(
    recorder: _Recorder | None, advance: Callable[[int, float, float], None]
) -> Callable[[DecisionRecord], None]:
    def on_decision(record: DecisionRecord) -> None:
        advance(record.step, record.train_loss, record.learning_rate)
        if recorder is not None:
            recorder.write(record)

    return on_decision


def summarise(
    config: FinetuneConfig, policy: SchedulePolicy, rate: float, result: JobResult, schedule_digests: list[str]
) -> dict[str, Any]:
    """What `summary.json` holds; `schedule_digests` are those of every process, and must not differ."""
    return {
        "task": config.task.name,
        "method": policy.name,
        "policy": policy.reference,
        "seed": config.seed,
        "learning_rate": rate,
        "steps": config.task.steps,
        "num_decisions": len(result.records),
        "num_processes": len(schedule_digests),
        "schedule_digests": schedule_digests,
        "loss_initial": result.initial.loss,
        "loss_test": result.final.loss,
        "accuracy_initial": result.initial.accuracy,
        "accuracy_test": result.final.accuracy,
        "loss_validation": result.records[-1].validation_loss,
        "diverged": result.diverged,
        "seconds": result.seconds,
        "tokens_trained": result.tokens_trained,
        "tokens_evaluated": result.tokens_evaluated,
        "rollbacks": sum("rollback" in record.events for record in result.records),
        "skipped_steps": sum(record.events.get("skipped_steps", 0) for record in result.records),
        "fell_back": any("fallback" in record.events for record in result.records),
    }


def schedule_digest(result: JobResult) -> str:
    """A digest of every action and learning rate of a job; equal schedules have equal digests."""
    rows = [[record.decision.action, record.step, record.learning_rate.hex()] for record in result.records]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class _Recorder:
    """Writes a job's rows, picture and summary, and tracks them."""

    def __init__(self, output: Path, policy: SchedulePolicy, job: Job, tracker: Tracker) -> None:
        self._output = output
        self._tracker = tracker
        self._names = policy.spec.names
        self._actions = policy.table.names
        self._rows = JsonlWriter(output / "schedule.jsonl")
        self._rows.truncate_to(0)  # the decisions of a checkpoint are told again
        self._log = DecisionLog(tracker, title=job.task.name, total_steps=job.task.steps)
        tracker.use_policy(policy.reference, policy.folder)

    def write(self, record: DecisionRecord) -> None:
        """Notes one decision."""
        row = decision_row(record, self._names, self._actions)
        self._rows.write(row)
        self._log.add(row, {"train/loss": record.train_loss, "validation/loss": record.validation_loss})

    def finish(self, summary: dict[str, Any]) -> None:
        """Draws the picture and writes the summary, last."""
        self._rows.close()
        self._log.finish(self._output / "schedule.png")
        self._tracker.set_summary(summary)
        atomic_write_json(self._output / "summary.json", summary)
