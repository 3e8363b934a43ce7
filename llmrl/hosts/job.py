"""Runs one fine-tuning job to its end in the house's own loop, steered by a policy or by a usual schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule import BASE_NAMES, BaseName, ScheduleSettings
from llmrl_envs.interface.statistics import TrainingStatistics
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.parallel import ParallelContext, SingleProcess
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.session import FineTuningSession

from llmrl.compare.names import SCHEDULE_NAMES
from llmrl.decisions import DecisionLoop, DecisionRecord, interval_record
from llmrl.hosts.accelerate import AcceleratorContext
from llmrl.hosts.curve import CurvePoint, CurveRecorder
from llmrl.hosts.memory import PeakMemory
from llmrl.policy import SchedulePolicy


@dataclass
class JobResult:
    """What a job came to.

    Attributes:
        initial: Test subset before training.
        final: Test subset with the deployed weights.
        records: One per decision.
        diverged: The final loss is not finite, or above the initial one.
        seconds: Wall time of training and of evaluations between decisions, those of the curve left out.
        tokens_trained: Tokens in training batches, padding not counted.
        tokens_evaluated: Tokens in evaluations, those of the curve and the two on the test subset left out.
        curve: The learning curve, if one was asked for.
        tokens_measured: Tokens that measuring the curve took.
        peak_memory_bytes: See `PeakMemory`; None where it is not known.
        events: How often each guard event happened.
    """

    initial: Evaluation
    final: Evaluation
    records: list[DecisionRecord] = field(default_factory=list)
    seconds: float = 0.0
    tokens_trained: int = 0
    tokens_evaluated: int = 0
    curve: tuple[CurvePoint, ...] = ()
    tokens_measured: int = 0
    peak_memory_bytes: int | None = None
    events: dict[str, int] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """The job ended worse than it began."""
        return not self.final.loss <= self.initial.loss


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
    validate: bool = False,
    curve_points: int = 0,
    on_decision: Callable[[DecisionRecord], None] | None = None,
) -> JobResult:
    """Fine-tunes to the end of the budget.

    Args:
        job: The job, loaded.
        policy: Decides; see `named_schedule` for the usual ones.
        learning_rate: The rate that the job is given.
        seed: Data order and dropout.
        settings: Schedule settings; None takes the policy's.
        parallel: The processes that share the job.
        guarded: Fall back to linear decay when the job loses too much; off for the usual schedules, which run as they
            are.
        validate: Measure the validation loss after every interval, for the record only: no policy sees it.
        curve_points: Points of a learning curve on the validation subset, for the record only; 0 measures none.
        on_decision: Called after every interval.
    """
    context = parallel or SingleProcess()
    session = FineTuningSession(job, seed=seed, parallel=context)
    memory = PeakMemory(job.device)
    result_initial = session.evaluate("test")
    curve = CurveRecorder(session, curve_points)
    began = time.perf_counter()
    curve.begin()
    loop = DecisionLoop(
        policy,
        total_steps=session.total_steps,
        given_rate=learning_rate,
        settings=settings,
        capabilities=session.capabilities,
        agree=context.agree if isinstance(context, AcceleratorContext) else None,
        guarded=guarded,
    )
    loop.begin(session.initial_statistics(), *session.initial_norms())
    records: list[DecisionRecord] = []
    tokens_evaluated = 0
    while loop.decisions_left:
        record, statistics, tokens = _run_decision(session, loop, validate=validate)
        tokens_evaluated += tokens
        records.append(record)
        curve.add(statistics, record.learning_rate)
        if on_decision is not None:
            on_decision(record)
    seconds = time.perf_counter() - began - curve.seconds
    return JobResult(
        initial=result_initial,
        final=session.evaluate("test"),
        records=records,
        seconds=seconds,
        tokens_trained=session.tokens_trained,
        tokens_evaluated=tokens_evaluated,
        curve=tuple(curve.points),
        tokens_measured=curve.tokens,
        peak_memory_bytes=memory.read_bytes(),
        events=count_events(records),
    )


def count_events(records: Sequence[DecisionRecord]) -> dict[str, int]:
    """How many steps were skipped, and in how many intervals the loss spiked, was rolled back or fell back."""
    return {
        "skipped_steps": sum(record.events.get("skipped_steps", 0) for record in records),
        "spikes": sum("spike" in record.events for record in records),
        "rollbacks": sum("rollback" in record.events for record in records),
        "fallbacks": sum("fallback" in record.events for record in records),
    }


def _run_decision(
    session: FineTuningSession, loop: DecisionLoop, *, validate: bool
) -> tuple[DecisionRecord, TrainingStatistics, int]:
    """One decision and its interval; returns the record, what it measured, and the tokens that evaluation took."""
    decision = loop.decide()
    if decision.rollback:
        session.roll_back()
    statistics = session.run_interval(loop.interval, loop.schedule)
    rate = loop.learning_rate(session.step - 1)
    update = loop.observe(statistics)
    if update.at_best[0]:
        session.mark_best()
        loop.schedule.has_snapshot[:] = True
    rescued = bool(update.fell_back[0] and loop.schedule.has_snapshot[0])
    if rescued:
        session.roll_back()
    validation = session.evaluate("validation") if validate else None
    record = interval_record(
        loop,
        decision,
        statistics,
        update,
        learning_rate=rate,
        validation_loss=validation.loss if validation else math.nan,
        rescued=rescued,
    )
    return record, statistics, validation.num_tokens if validation else 0
