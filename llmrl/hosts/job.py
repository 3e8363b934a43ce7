"""Runs one fine-tuning job to its end in the house's own loop, steered by a policy or by a usual schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.interface.base_schedule import BASE_NAMES, BaseName
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.parallel import ParallelContext, SingleProcess
from llmrl_envs.jobs.session import FineTuningSession

from llmrl.compare.names import SCHEDULE_NAMES
from llmrl.decisions import DecisionLoop, DecisionRecord, Validations, interval_record
from llmrl.hosts.accelerate import AcceleratorContext
from llmrl.hosts.checkpoints import JobCheckpoints
from llmrl.hosts.job_state import JobState, records_state, restore_session, restored_records, session_state
from llmrl.hosts.result import JobMeter, JobResult, count_events
from llmrl.policy import SchedulePolicy


def named_schedule(name: str, warmup_fraction: float) -> SchedulePolicy:
    """A usual schedule as a policy: the base shape over the given rate, held.

    Args:
        name: One of `SCHEDULE_NAMES`.
        warmup_fraction: Share of the budget; "constant" alone has none, and "constant_warmup" is constant with one.

    Raises:
        UserError: There is no such schedule.
    """
    if name not in SCHEDULE_NAMES:
        raise UserError(
            "unknown schedule", expected=f"one of {', '.join(SCHEDULE_NAMES)}", got=repr(name), where="--schedule"
        )
    base: BaseName = next((known for known in BASE_NAMES if known == name), "constant")
    warmup_fraction = 0.0 if name == "constant" else warmup_fraction
    table = action_table("factors")
    settings = ScheduleSettings(base=base, warmup_fraction=warmup_fraction, rollbacks=0, cooldown_progress=1.0)
    return SchedulePolicy(table, ObservationSpec(table), settings, None, {"name": name})


def run_job(
    job: Job,
    policy: SchedulePolicy,
    *,
    learning_rate: float,
    seed: int,
    settings: ScheduleSettings | None = None,
    parallel: ParallelContext | None = None,
    guarded: bool = True,
    validate: Validations = "never",
    keeps_best: bool = True,
    curve_points: int = 0,
    on_decision: Callable[[DecisionRecord], None] | None = None,
    checkpoints: JobCheckpoints | None = None,
    saved: JobState | None = None,
) -> JobResult:
    """Fine-tunes to the end of the budget.

    Args:
        job: The job, loaded.
        policy: Decides; see `named_schedule` for the usual ones.
        learning_rate: The rate that the job is given.
        seed: Data order and dropout.
        settings: Schedule settings; None takes the policy's.
        parallel: The processes that share the job.
        guarded: Fall back when the job loses too much, or its validation loss turns; off for the usual schedules.
        validate: When to measure the validation loss: "decisions" after every interval, "guard" where the guard wants
            it, about twelve times; both before the first step too, for the guard. No policy sees it.
        keeps_best: Keep the best state, which rollbacks and the guard return to; without, there are no rollbacks.
        curve_points: Points of a learning curve on the validation subset, for the record only; 0 measures none.
        on_decision: Called after every interval; for those that `saved` knows at once.
        checkpoints: Written now and then; not beside a curve, which they would not hold.
        saved: Of a checkpoint of the same job, which then goes on from there.
    """
    if curve_points and checkpoints is not None:
        raise ValueError(f"curve_points: expected 0 in a job with checkpoints, got {curve_points}")
    context = parallel or SingleProcess()
    session = FineTuningSession(job, seed=seed, parallel=context)
    meter = JobMeter(session, curve_points, None if saved is None else saved.values["meter"])
    loop = DecisionLoop(
        policy.for_model(job.loaded.model, job.loaded.num_parameters),
        total_steps=session.total_steps,
        given_rate=learning_rate,
        settings=settings,
        capabilities=session.capabilities - (frozenset() if keeps_best else {UpdateChoice.ROLLBACK}),
        agree=context.agree if isinstance(context, AcceleratorContext) else None,
        guarded=guarded,
    )
    loop.begin(session.initial_statistics(), *session.initial_norms(), job.label_nats, job.loaded.num_parameters)
    tell = on_decision or (lambda _: None)
    records = [] if saved is None else _resume(session, loop, saved, tell)
    if saved is None and loop.validates_first(validate):
        _validate(session, loop, meter, keeps_best=keeps_best)
    while loop.decisions_left:
        record = _run_decision(session, loop, meter, validate=validate, keeps_best=keeps_best)
        records.append(record)
        tell(record)
        if checkpoints is not None and checkpoints.due(len(records)):
            checkpoints.save(len(records), _state(session, loop, meter, records))
    return meter.finish(count_events(records), records)


def _state(session: FineTuningSession, loop: DecisionLoop, meter: JobMeter, records: list[DecisionRecord]) -> JobState:
    """A job between two intervals."""
    state = session_state(session)
    parts = {"loop": loop.state_dict(), "meter": meter.state_dict(), "records": records_state(records)}
    return replace(state, values=state.values | parts)


def _resume(
    session: FineTuningSession, loop: DecisionLoop, saved: JobState, tell: Callable[[DecisionRecord], None]
) -> list[DecisionRecord]:
    """Takes a job to where its checkpoint was written; tells and returns the records until then."""
    restore_session(session, saved)
    loop.load_state_dict(saved.values["loop"])
    records = restored_records(saved.values["records"])
    for record in records:
        tell(record)
    return records


def _validate(
    session: FineTuningSession, loop: DecisionLoop, meter: JobMeter, *, keeps_best: bool
) -> tuple[float, bool]:
    """The validation loss, and whether the guard says that it has turned."""
    found = meter.evaluate()
    verdict = loop.validated(found.loss, found.num_targets)
    if verdict.at_best[0] and keeps_best:
        _mark_best(session, loop)
    return found.loss, bool(verdict.turned[0])


def _mark_best(session: FineTuningSession, loop: DecisionLoop) -> None:
    session.mark_best()
    loop.schedule.has_snapshot[:] = True


def _run_decision(
    session: FineTuningSession, loop: DecisionLoop, meter: JobMeter, *, validate: Validations, keeps_best: bool
) -> DecisionRecord:
    """One decision and its interval."""
    decision = loop.decide()
    if decision.rollback:
        session.roll_back()
    statistics = session.run_interval(loop.interval, loop.schedule)
    rate = loop.learning_rate(session.step - 1)
    update = loop.observe(statistics)
    loss, turned = math.nan, False
    if update.at_best[0] and keeps_best:
        _mark_best(session, loop)
    if loop.validation_due(validate):
        loss, turned = _validate(session, loop, meter, keeps_best=keeps_best)
    rescued = (bool(update.fell_back[0]) or turned) and bool(loop.schedule.has_snapshot[0])
    if rescued:
        session.roll_back()
    record = interval_record(
        loop,
        decision,
        statistics,
        update,
        learning_rate=rate,
        validation_loss=loss,
        turned=turned,
        rescued=rescued,
    )
    meter.add(statistics, rate)
    return record
