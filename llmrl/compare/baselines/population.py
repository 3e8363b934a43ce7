"""Population-based training of the learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.snapshot import SessionSnapshot

from llmrl.compare.baselines.rates import FixedRates
from llmrl.compare.baselines.running import EventCounter
from llmrl.hosts.curve import CurvePoint
from llmrl.hosts.memory import PeakMemory
from llmrl.hosts.result import JobResult

NUM_ROUNDS = 10
PERTURBATIONS = (0.8, 1.2)
START_RANGE = 30.0


@dataclass(frozen=True)
class Member:
    """One job of the population.

    Attributes:
        rate: Its peak rate.
        state: Its weights, moments, place in the data and random numbers.
        loss: Its validation loss.
        loss_train: Mean train loss of its last round.
    """

    rate: float
    state: SessionSnapshot
    loss: float = math.inf
    loss_train: float = math.nan


def starting_rates(given: float, num_members: int, rng: np.random.Generator) -> list[float]:
    """The given rate and others, one drawn log-uniformly from each equal part of a factor of 30 around it."""
    parts = num_members - 1
    places = (np.arange(parts) + rng.random(parts)) / parts
    return [given, *(given * START_RANGE ** (2.0 * places - 1.0)).tolist()]


def exploit_and_explore(members: Sequence[Member], rng: np.random.Generator) -> list[Member]:
    """The worst quarter takes over the state of the best, and its rate x 0.8 or x 1.2."""
    order = sorted(range(len(members)), key=lambda index: members[index].loss)
    count = max(1, len(members) // 4)
    changed = list(members)
    for good, bad in zip(order[:count], order[-count:], strict=True):
        if members[bad].loss > members[good].loss:
            changed[bad] = replace(members[good], rate=members[good].rate * float(rng.choice(PERTURBATIONS)))
    return changed


def run_population(
    job: Job,
    *,
    num_members: int,
    learning_rate: float,
    seed: int,
    warmup_fraction: float,
    on_step: Callable[[int], None] | None = None,
) -> JobResult:
    """Fine-tunes a population; at the end the member of the lowest validation loss is deployed.

    Each member follows linear decay at its own peak rate. Ten times in the budget all are evaluated, and the worst
    quarter copies the best. All share initial weights, data order and dropout, as every method here does. Tokens and
    seconds are those of all members.

    Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846

    Args:
        job: The job, loaded.
        num_members: Jobs.
        learning_rate: The given rate.
        seed: Data order and dropout, and the population's random numbers.
        warmup_fraction: Share of the budget.
        on_step: Told the steps done by all members together.
    """
    session, rng = FineTuningSession(job, seed=seed), np.random.default_rng([seed, num_members])
    population = _Population(session, warmup_fraction, on_step)
    memory, initial = PeakMemory(job.device), session.evaluate("test")
    began = time.perf_counter()
    start, total = session.snapshot(), session.total_steps
    first = session.evaluate("validation")
    members = [Member(rate, start) for rate in starting_rates(learning_rate, num_members, rng)]
    curve = [CurvePoint(0, first.loss)]
    ends = sorted({round(total * (index + 1) / NUM_ROUNDS) for index in range(NUM_ROUNDS)} - {0})
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        members = [population.train(member, end - begin) for member in members]
        curve.append(population.point(members))
        if end < total:
            members = exploit_and_explore(members, rng)
    seconds = time.perf_counter() - began
    session.restore(min(members, key=lambda member: member.loss).state)
    return JobResult(
        initial=initial,
        final=session.evaluate("test"),
        seconds=seconds,
        tokens_trained=population.tokens_trained,
        tokens_evaluated=population.tokens_evaluated,
        curve=tuple(curve),
        tokens_measured=first.num_tokens,
        peak_memory_bytes=memory.read_bytes(),
        events=population.events.counts(),
    )


class _Population:
    """Trains members one after the other in one session and counts what they take."""

    def __init__(
        self, session: FineTuningSession, warmup_fraction: float, on_step: Callable[[int], None] | None
    ) -> None:
        self._session, self._on_step = session, on_step
        self._warmup_steps = round(warmup_fraction * session.total_steps)
        self._steps = 0
        self.tokens_trained = self.tokens_evaluated = 0
        self.events = EventCounter()

    def train(self, member: Member, num_steps: int) -> Member:
        """One round of a member."""
        session = self._session
        session.restore(member.state)
        before = session.tokens_trained
        rates = FixedRates("linear", member.rate, session.total_steps, self._warmup_steps)
        statistics = session.run_interval(num_steps, rates)
        found = session.evaluate("validation")
        self.tokens_trained += session.tokens_trained - before
        self.tokens_evaluated += found.num_tokens
        self.events.skipped_steps += int(statistics.skipped.sum())
        self._steps += num_steps
        if self._on_step is not None:
            self._on_step(self._steps)
        finite = statistics.loss[np.isfinite(statistics.loss)]
        loss = found.loss if math.isfinite(found.loss) else math.inf
        return Member(member.rate, session.snapshot(), loss, float(finite.mean()) if len(finite) else math.nan)

    def point(self, members: Sequence[Member]) -> CurvePoint:
        """The curve's next point: the best member at this time."""
        best, step = min(members, key=lambda member: member.loss), self._session.step
        rates = FixedRates("linear", best.rate, self._session.total_steps, self._warmup_steps)
        rate = float(rates.learning_rate(np.array([step - 1]))[0])
        loss = best.loss if math.isfinite(best.loss) else None
        return CurvePoint(step, loss, best.loss_train if math.isfinite(best.loss_train) else None, rate)
