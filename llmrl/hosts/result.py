"""What a job came to, and what it cost: the same measurements whoever chose its rates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrl_envs.interface.statistics import TrainingStatistics
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.session import FineTuningSession

from llmrl.decisions import DecisionRecord
from llmrl.hosts.curve import CurvePoint, CurveRecorder
from llmrl.hosts.job_state import evaluation_state, restored_evaluation
from llmrl.hosts.memory import PeakMemory


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


class JobMeter:
    """Measures a session from before its first step to its end; whoever runs it calls `add` after every interval.

    Args:
        session: The job, before its first step.
        curve_points: Points of a learning curve, for the record only; 0 measures none.
        measured: What `state_dict` gave before the job was interrupted.
    """

    def __init__(
        self, session: FineTuningSession, curve_points: int, measured: Mapping[str, Any] | None = None
    ) -> None:
        self._session = session
        self._memory = PeakMemory(session.job.device)
        self._initial = session.evaluate("test") if measured is None else restored_evaluation(measured["initial"])
        self._curve = CurveRecorder(session, curve_points)
        self._tokens_evaluated = 0 if measured is None else int(measured["tokens_evaluated"])
        self._began = time.perf_counter() - (0.0 if measured is None else float(measured["seconds"]))
        self._curve.begin()

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, without a curve: JSON values and arrays."""
        return {
            "initial": evaluation_state(self._initial),
            "tokens_evaluated": self._tokens_evaluated,
            "seconds": time.perf_counter() - self._began,
        }

    def evaluate(self) -> Evaluation:
        """What a pass over the validation subset finds, counted as a cost of the job."""
        found = self._session.evaluate("validation")
        self._tokens_evaluated += found.num_tokens
        return found

    def add(self, statistics: TrainingStatistics, learning_rate: float) -> None:
        """Takes in an interval; see `CurveRecorder.add`."""
        self._curve.add(statistics, learning_rate)

    def finish(self, events: Mapping[str, int], records: Sequence[DecisionRecord] = ()) -> JobResult:
        """The result, when the last step was taken."""
        seconds = time.perf_counter() - self._began - self._curve.seconds
        return JobResult(
            initial=self._initial,
            final=self._session.evaluate("test"),
            records=list(records),
            seconds=seconds,
            tokens_trained=self._session.tokens_trained,
            tokens_evaluated=self._tokens_evaluated,
            curve=tuple(self._curve.points),
            tokens_measured=self._curve.tokens,
            peak_memory_bytes=self._memory.read_bytes(),
            events=dict(events),
        )


def count_events(records: Sequence[DecisionRecord]) -> dict[str, int]:
    """How many steps were skipped, and in how many intervals the loss spiked, was rolled back or fell back."""
    return {
        "skipped_steps": sum(record.events.get("skipped_steps", 0) for record in records),
        "spikes": sum("spike" in record.events for record in records),
        "rollbacks": sum("rollback" in record.events for record in records),
        "fallbacks": sum("fallback" in record.events for record in records),
    }
