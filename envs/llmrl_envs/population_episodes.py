"""Episodes of a population of fine-tuning jobs: steering, jobs and rewards kept in step. Resets no lane by itself.

A lane whose episode is over rests until a job is begun in it: it trains nothing, is paid nothing and stays terminated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.errors import UserError
from llmrl_envs.fine_tuning_settings import DrawnJob, FineTuningSettings
from llmrl_envs.interface.account import EpisodeAccount
from llmrl_envs.interface.action import UpdateChoice
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.statistics import Booleans, Floats, Integers, TrainingStatistics
from llmrl_envs.interface.steering import Steering
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.population.members import IntervalPlan, IntervalResult, Member
from llmrl_envs.jobs.population.pool import PopulationPool
from llmrl_envs.jobs.population.references import run_references
from llmrl_envs.jobs.task import FineTuningTask


@dataclass(frozen=True)
class StepResult:
    """What one decision brought.

    Attributes:
        obs: float32[P, O].
        reward: float64[P].
        terminated: bool[P].
        events: Facts of the interval, arrays of leading dimension P.
    """

    obs: NDArray[np.float32]
    reward: Floats
    terminated: Booleans
    events: dict[str, NDArray[Any]]


_NOTHING = IntervalResult(np.zeros(0), np.zeros(0), math.nan, math.nan, math.nan, math.nan)
"""Of a lane that rests."""


@dataclass
class _Lane:
    """An episode under way."""

    drawn: DrawnJob
    member: Member
    account: EpisodeAccount
    capabilities: frozenset[UpdateChoice]


def _check_baseline(settings: FineTuningSettings, group_size: int) -> None:
    if settings.reward_spec.baseline == "hold" and group_size == 1:
        raise UserError(
            "the baseline needs a member of the group that holds",
            expected="reward.baseline hold with groups of two or more jobs",
            got="no groups",
            where="reward.baseline",
        )


class PopulationEpisodes:
    """P episodes.

    Args:
        num_envs: P.
        settings: What the environment was made with.
        library: Loads models and data.
        level_norm: As for `FineTuningSession`.
        group_size: Lanes of a group; the first one of each always holds, unless it is alone.
    """

    def __init__(
        self,
        num_envs: int,
        settings: FineTuningSettings,
        library: JobLibrary,
        *,
        level_norm: str = "effective",
        group_size: int = 1,
    ) -> None:
        _check_baseline(settings, group_size)
        self.num_envs = num_envs
        self._settings = settings
        self._library = library
        averaged = settings.reward_spec.average_intervals > 0
        self.pool = PopulationPool(library, level_norm=level_norm, averaged=averaged)
        self._lanes: list[_Lane | None] = [None] * num_envs
        self._action: Integers = np.full(num_envs, -1, np.int64)
        self._steering = Steering(settings.observation_spec, self._schedule_of([1] * num_envs, [1.0] * num_envs, None))
        members: Integers = np.arange(num_envs)
        self._group_size = group_size
        self._holds: Booleans = np.asarray((members % group_size == 0) & (group_size > 1))

    # -- beginning ------------------------------------------------------------------------------------------------

    def clear(self, seed: int) -> None:
        """Ends all episodes; dropout is seeded anew."""
        self.pool.clear(seed)
        self._lanes = [None] * self.num_envs

    def drawn(self, lane: int) -> DrawnJob:
        """What a lane's episode was begun with."""
        return self._lane(lane).drawn

    def parameters(self, lane: int) -> dict[str, Tensor]:
        """The trained parameters of a lane's job, as views."""
        return self.pool.parameters(self._lane(lane).member)

    def rehearse(self, task: FineTuningTask) -> int:
        """Runs one step of P jobs of a task, and forgets them and everything else that was under way."""
        self.clear(0)
        job = self._library.job(task)
        members = [self.pool.add(job, 0) for _ in range(self.num_envs)]
        try:
            self.pool.run_interval([IntervalPlan(member, np.zeros(1), 1.0) for member in members])
            return min(self.pool.session_of(members[0]).width.most, self.num_envs)
        finally:
            self.clear(0)

    def lacks_reference(self, drawn: Sequence[DrawnJob]) -> bool:
        """Whether a reference run of one of these jobs has not been made."""
        keys = [self._settings.reference_key(d) for d in drawn]
        return any(key not in self._library.curves for key in keys)

    def make_references(self, drawn: Sequence[DrawnJob]) -> None:
        """Makes the reference runs of jobs that lack them, at most P at a time."""
        jobs = [(self._library.job(d.sampled.task), d.sampled.seed) for d in drawn]
        for first in range(0, len(jobs), self.num_envs):
            measured = self._settings.reward_spec.measured
            run_references(
                self.pool, jobs[first : first + self.num_envs], measured=measured, settings=self._settings.schedule
            )

    def begin(self, lanes: Sequence[int], drawn: Sequence[DrawnJob]) -> NDArray[np.float32]:  # [len(lanes), O]
        """Starts one job in each of `lanes`, whose reference runs have been made; returns their first observations."""
        for lane in lanes:
            if (present := self._lanes[lane]) is not None:
                self.pool.remove(present.member)
        begun = [self._new_lane(job) for job in drawn]
        for lane, new in zip(lanes, begun, strict=True):
            self._lanes[lane] = new
        self._action[list(lanes)] = -1
        schedule = self._schedule_of(
            [new.drawn.sampled.task.steps for new in begun],
            [new.drawn.sampled.learning_rate for new in begun],
            [new.capabilities for new in begun],
        )
        schedule.start_at(np.array([new.drawn.sampled.start_move for new in begun]))
        sessions = [self.pool.session_of(new.member) for new in begun]
        norms = np.array([session.initial_norms() for session in sessions])
        parts = [session.initial_statistics(new.member) for session, new in zip(sessions, begun, strict=True)]
        statistics = TrainingStatistics(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
        )
        hidden = np.stack([new.drawn.hidden for new in begun])
        jobs = [new.member.job for new in begun]
        return self._steering.begin_lanes(
            np.array(lanes),
            schedule,
            statistics,
            norms[:, 0],
            norms[:, 1],
            hidden,
            label_nats=np.array([job.label_nats for job in jobs]),
            num_parameters=np.array([job.loaded.num_parameters for job in jobs]),
        )

    def _new_lane(self, drawn: DrawnJob) -> _Lane:
        sampled, spec = drawn.sampled, self._settings.reward_spec
        job = self._library.job(sampled.task)
        curve = self._library.curves[self._settings.reference_key(drawn)]
        account = EpisodeAccount(spec, curve, self._settings.schedule.intervals(sampled.task.steps))
        average_steps = spec.average_steps(account.intervals)
        member = self.pool.add(job, sampled.seed, average_steps=average_steps)
        return _Lane(drawn, member, account, self.pool.session_of(member).capabilities(member))

    def _schedule_of(
        self, steps: Sequence[int], rates: Sequence[float], capabilities: Sequence[frozenset[UpdateChoice]] | None
    ) -> Schedule:
        allowed = frozenset(UpdateChoice) if capabilities is None else capabilities
        table, settings = self._settings.table, self._settings.schedule
        return Schedule(table, np.array(steps), np.array(rates), settings, allowed)

    def _lane(self, lane: int) -> _Lane:
        found = self._lanes[lane]
        if found is None:
            raise ValueError("expected reset() before anything else, got neither")
        return found

    # -- stepping -------------------------------------------------------------------------------------------------

    def step(self, actions: Integers) -> StepResult:
        """Carries out one action in each lane that does not rest and trains it for one interval."""
        schedule, lanes = self._steering.schedule, [self._lane(lane) for lane in range(self.num_envs)]
        going = np.array([not lane.account.is_over for lane in lanes])
        if np.shape(actions) == self._holds.shape:
            actions = np.where(self._holds | ~going, self._settings.table.hold, actions)
        before = (schedule.level, schedule.frozen.copy(), schedule.tight.copy(), schedule.leaning.copy())
        self._action, rollback = self._steering.apply(actions)
        after = (schedule.level, schedule.frozen, schedule.tight, schedule.leaning)
        switched = np.any([old != new for old, new in zip(before, after, strict=True)], axis=0)
        self.pool.roll_back([lane.member for lane, back in zip(lanes, rollback, strict=True) if back])
        plans = self._plans(lanes)
        trained = iter(self.pool.run_interval([plan for plan, goes in zip(plans, going, strict=True) if goes]))
        results = [next(trained) if goes else _NOTHING for goes in going]
        log_losses = self._measure(lanes)
        statistics = self._statistics(lanes, plans, results, log_losses)
        update = self._steering.observe(statistics)
        at_best = update.at_best & going
        self.pool.mark_best([lane.member for lane, best in zip(lanes, at_best, strict=True) if best])
        schedule.has_snapshot |= at_best
        drops = self._baseline_drops(lanes, log_losses)
        reward = [
            lane.account.settle(
                loss, switched=bool(switched[index]), rolled_back=bool(rollback[index]), baseline_drop=drops[index]
            )
            if going[index]
            else 0.0
            for index, (lane, loss) in enumerate(zip(lanes, log_losses, strict=True))
        ]
        terminated = np.array([lane.account.is_over for lane in lanes])
        events = {
            "rollback": rollback.copy(),
            "fallback": update.fell_back.copy(),
            "skipped_steps": statistics.skipped.sum(axis=1).astype(np.int64),
        }
        return StepResult(update.observation, np.array(reward), terminated, events)

    def _plans(self, lanes: Sequence[_Lane]) -> list[IntervalPlan]:
        schedule = self._steering.schedule
        lengths = [1 if lane.account.is_over else lane.account.num_steps for lane in lanes]
        places: Integers = np.arange(max(lengths))
        rates = schedule.learning_rate(schedule.step + places[:, None])
        tightening, shares = schedule.clipping_factor(), schedule.momentum_share()
        return [
            IntervalPlan(
                lane.member,
                rates[: lengths[index], index].copy(),
                lane.drawn.sampled.task.optimizer.max_grad_norm * float(tightening[index]),
                bool(schedule.frozen[index]),
                momentum_share=float(shares[index]),
                skip_outliers=schedule.skips_outliers(),
            )
            for index, lane in enumerate(lanes)
        ]

    def _baseline_drops(self, lanes: Sequence[_Lane], log_losses: Sequence[float]) -> list[float | None]:
        """What the member that holds gained over each lane's interval; None where that is not the baseline."""
        if self._settings.reward_spec.baseline != "hold":
            return [None] * len(lanes)
        firsts = [index - index % self._group_size for index in range(len(lanes))]
        return [lanes[first].account.log_loss - log_losses[first] for first in firsts]

    def _measure(self, lanes: Sequence[_Lane]) -> list[float]:
        """Log validation losses that rewards are made of; the deployed weights count at the end of a job."""
        spec = self._settings.reward_spec
        going = [lane for lane in lanes if not lane.account.is_over]
        due = [lane for lane in going if spec.measured == "decisions" or lane.account.is_last]
        averaged = [spec.average_intervals > 0 and not lane.account.is_last for lane in due]
        found = self.pool.evaluate([lane.member for lane in due], "validation", averaged)
        losses = {lane.member: evaluation.loss for lane, evaluation in zip(due, found, strict=True)}
        log_losses = {m: math.log(max(loss, 1e-12)) if math.isfinite(loss) else math.inf for m, loss in losses.items()}
        return [log_losses.get(lane.member, lane.account.log_loss) for lane in lanes]

    def _statistics(
        self,
        lanes: Sequence[_Lane],
        plans: Sequence[IntervalPlan],
        results: Sequence[IntervalResult],
        log_losses: Sequence[float],
    ) -> TrainingStatistics:
        longest = max(len(plan.rates) for plan in plans)
        loss, norm = (np.full((self.num_envs, longest), np.nan) for _ in range(2))
        taken = np.zeros((self.num_envs, longest), np.bool_)
        for index, result in enumerate(results):
            count = len(result.loss)
            loss[index, :count], norm[index, :count], taken[index, :count] = result.loss, result.gradient_norm, True
        finite = np.isfinite(loss) & np.isfinite(norm)
        update = np.array([result.update_norm for result in results])
        weight = np.array([result.weight_norm for result in results])
        mean_rate = np.array([float(plan.rates.mean()) for plan in plans])
        with np.errstate(invalid="ignore", divide="ignore"):
            step_size = np.where(weight > 0, mean_rate * update / weight, np.nan)
        shown = [lane.drawn.shows_validation for lane in lanes]
        validation = [math.exp(min(log_loss, 50.0)) for log_loss in log_losses]
        sessions = [self.pool.session_of(lane.member) for lane in lanes]
        return TrainingStatistics(
            step=np.array([lane.member.step for lane in lanes], np.int64),
            total_steps=np.array([lane.member.job.task.steps for lane in lanes], np.int64),
            num_steps=np.array([len(plan.rates) for plan in plans], np.int64),
            loss=np.where(finite, loss, np.nan),
            gradient_norm=np.where(finite, norm, np.nan),
            clipped=finite & (norm > np.array([plan.limit for plan in plans])[:, None]),
            skipped=taken & ~finite,
            update_norm=update,
            weight_norm=weight,
            step_size=step_size,
            momentum_cosine=np.array([result.momentum_cosine for result in results]),
            signal_to_noise=np.array([result.signal_to_noise for result in results]),
            validation_loss=np.where(shown, validation, np.nan),
            mode=np.array([int(session.mode) for session in sessions], np.int64),
            trainable_fraction=np.array([session.trainable_fraction for session in sessions]),
        )

    def info(self) -> dict[str, NDArray[Any]]:
        """Facts of every lane, arrays of leading dimension P, all of them new."""
        schedule, lanes = self._steering.schedule, [self._lane(lane) for lane in range(self.num_envs)]
        mask = schedule.mask()
        mask[self._holds] = False
        mask[self._holds, self._settings.table.hold] = True
        return {
            "action_mask": mask.astype(np.int8),
            "action": self._action.copy(),
            "task": np.array([lane.drawn.sampled.task.name for lane in lanes], dtype=object),
            "step": schedule.step.copy(),
            "total_steps": schedule.total_steps.copy(),
            "seed": np.array([lane.drawn.sampled.seed for lane in lanes]),
            "given_rate": schedule.given_rate.copy(),
            "learning_rate": schedule.learning_rate(schedule.step),
            "level": schedule.level_value(),
            "validation_loss": np.array([lane.account.validation_loss for lane in lanes]),
            "score": np.array([lane.account.score for lane in lanes]),
            "diverged": np.array([lane.account.diverged for lane in lanes]),
        }

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where every episode stands: JSON values and NumPy arrays."""
        lanes = [self._lane(lane) for lane in range(self.num_envs)]
        return {
            "lanes": [{"drawn": lane.drawn.state(), "account": lane.account.state_dict()} for lane in lanes],
            "action": self._action.copy(),
            "steering": self._steering.state_dict(),
            "curves": {key: list(curve) for key, curve in self._library.curves.items()},
            "pool": self.pool.state_dict({lane.member: index for index, lane in enumerate(lanes)}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called."""
        self._library.curves.update({key: tuple(curve) for key, curve in state["curves"].items()})
        drawn = [DrawnJob.from_state(saved["drawn"]) for saved in state["lanes"]]
        tasks = {index: (job.sampled.task, job.sampled.seed) for index, job in enumerate(drawn)}
        members = self.pool.load_state_dict(state["pool"], tasks)
        spec = self._settings.reward_spec
        for index, (job, saved) in enumerate(zip(drawn, state["lanes"], strict=True)):
            intervals = self._settings.schedule.intervals(job.sampled.task.steps)
            account = EpisodeAccount.from_state(spec, intervals, saved["account"])
            member = members[index]
            self._lanes[index] = _Lane(job, member, account, self.pool.session_of(member).capabilities(member))
        self._action = np.array(state["action"], np.int64)
        self._steering.load_state_dict(state["steering"])
