"""Episodes on noisy quadratics, E side by side: steering, jobs and rewards kept in step. Resets no lane by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.interface.observation import GROUPS, FeatureGroup, ObservationSpec
from llmrl_envs.interface.reward import RewardSpec
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.interface.statistics import Booleans, Floats, Integers, TrainingStatistics
from llmrl_envs.interface.steering import Steering
from llmrl_envs.quadratic.jobs import QuadraticJobs
from llmrl_envs.quadratic.model import NoisyQuadratics, QuadraticDistribution

_CAPABILITIES = frozenset({UpdateChoice.NONE, UpdateChoice.ROLLBACK, UpdateChoice.COOLDOWN})
_LOSS, _VALIDATION = GROUPS.index(FeatureGroup.LOSS), GROUPS.index(FeatureGroup.VALIDATION)
_MOST_DECISIONS = 64
"""The usual number of decisions never gives more than 50."""
_HIGHEST_LOSS = 1e12
"""What a loss beyond every number is told as: `info` holds finite numbers only."""


@dataclass(frozen=True)
class StepResult:
    """What one decision brought.

    Attributes:
        obs: float32[E, O].
        reward: float64[E].
        terminated: bool[E].
        statistics: What the interval's mini-batches showed.
    """

    obs: NDArray[np.float32]
    reward: Floats
    terminated: Booleans
    statistics: TrainingStatistics


class QuadraticEpisodes:
    """E episodes.

    Args:
        num_envs: E.
        distribution: Gives the dimension.
        actions: Name of the action table.
        observation: `stack` of `ObservationSpec`; `feature_dropout`, the probability that a job withholds a feature
            group; and `validation_visible`, the probability that it shows its expected loss as a validation loss.
        reward: Arguments of `RewardSpec`.
        schedule: Arguments of `ScheduleSettings`.
    """

    def __init__(
        self,
        num_envs: int,
        distribution: QuadraticDistribution,
        actions: str,
        observation: Mapping[str, Any] | None,
        reward: Mapping[str, Any] | None,
        schedule: Mapping[str, Any] | None,
    ) -> None:
        self.num_envs = num_envs
        self.table = action_table(actions)
        shown = {"feature_dropout": 0.0, "validation_visible": 0.0, **(observation or {})}
        self._feature_dropout = float(shown.pop("feature_dropout"))
        self._validation_visible = float(shown.pop("validation_visible"))
        self.observation_spec = ObservationSpec(self.table, **shown)
        self.reward_spec = _without_noise(RewardSpec(**(reward or {})))
        self.schedule_settings = ScheduleSettings(**(schedule or {}))
        self._can_roll_back = any(action.choice is UpdateChoice.ROLLBACK for action in self.table.actions)
        self.jobs = QuadraticJobs(num_envs, distribution.dimension)
        self._steering = self._new_steering(np.arange(num_envs))
        # Rounding gives at most an eighth more decisions than were asked for, and there are some at the beginning.
        most = max(_MOST_DECISIONS, self.schedule_settings.decisions_per_job * 9 // 8 + 10)
        self._intervals: Integers = np.zeros((num_envs, most), np.int64)
        self._decision: Integers = np.zeros(num_envs, np.int64)
        self._action: Integers = np.full(num_envs, -1, np.int64)
        self._log_loss: Floats = np.zeros(num_envs)
        self._initial: Floats = np.zeros(num_envs)
        self._scale: Floats = np.ones(num_envs)
        self._limit: Floats = np.full(num_envs, np.inf)
        self._floor: Floats = np.zeros(num_envs)
        self._return: Floats = np.zeros(num_envs)
        self._diverged: Booleans = np.zeros(num_envs, np.bool_)

    # -- episodes -------------------------------------------------------------------------------------------------

    def begin(self, lanes: Integers, quadratics: NoisyQuadratics) -> NDArray[np.float32]:  # [len(lanes), O]
        """Starts one job in each of `lanes` and returns their first observations."""
        self.jobs.start(lanes, quadratics)
        every = [self.schedule_settings.intervals(int(steps)) for steps in quadratics.total_steps]
        self._intervals[lanes] = [own + (0,) * (self._intervals.shape[1] - len(own)) for own in every]
        self._decision[lanes], self._action[lanes], self._return[lanes] = 0, -1, 0.0
        self._diverged[lanes] = False
        self._begin_rewards(lanes, quadratics)
        facts = (self.jobs.initial_statistics(lanes), *self.jobs.norms(lanes), self._hidden(lanes))
        if len(lanes) == self.num_envs:
            self._steering = self._new_steering(lanes)
            return self._steering.begin(*facts)
        return self._steering.begin_lanes(lanes, self._new_schedule(lanes), *facts)

    def step(self, actions: Integers) -> StepResult:
        """Carries out one action in each lane and trains for one interval."""
        schedule = self._steering.schedule
        level = schedule.level
        self._action, rolled_back = self._steering.apply(actions)
        switched = schedule.level != level
        self.jobs.roll_back(rolled_back)
        num_steps = self._intervals[np.arange(self.num_envs), self._decision]
        places: Integers = np.arange(int(num_steps.max()))
        rates = schedule.learning_rate(schedule.step + places[:, None])
        statistics = self._with_validation(self.jobs.run_interval(num_steps, rates))
        update = self._steering.observe(statistics)
        if self._can_roll_back:
            self.jobs.mark_best(update.at_best)
            schedule.has_snapshot |= update.at_best
        share = num_steps / schedule.total_steps
        reward = self._reward(switched, rolled_back, share)
        self._decision += 1
        terminated = self._diverged | (self._intervals[np.arange(self.num_envs), self._decision] == 0)
        if self.reward_spec.measured == "end":
            reward = np.where(terminated, self._return, 0.0)
        return StepResult(update.observation, reward, terminated, statistics)

    def info(self) -> dict[str, NDArray[Any]]:
        """Facts of every lane, arrays of leading dimension E, all of them new."""
        schedule, quadratics = self._steering.schedule, self.jobs.quadratics
        improvement = (self._initial - self._log_loss) / self._scale
        return {
            "action_mask": schedule.mask().astype(np.int8),
            "action": self._action.copy(),
            "step": self.jobs.step.copy(),
            "total_steps": quadratics.total_steps.copy(),
            "given_rate": quadratics.given_rate.copy(),
            "learning_rate": schedule.learning_rate(schedule.step),
            "level": schedule.level_value(),
            "expected_loss": np.fmin(np.exp(np.fmin(self._log_loss, 50.0)), _HIGHEST_LOSS),
            "reference_loss": quadratics.reference_loss.copy(),
            "score": np.where(self._diverged, self._return, improvement),
            "diverged": self._diverged.copy(),
        }

    # -- what is shown --------------------------------------------------------------------------------------------

    def _hidden(self, lanes: Integers) -> Booleans:  # [len(lanes), G]
        """Feature groups that the jobs withhold; never the losses, and the validation loss unless it is to be seen."""
        draws = self.jobs.visibility(lanes)
        hidden = draws < self._feature_dropout
        hidden[:, _LOSS] = False
        hidden[:, _VALIDATION] = draws[:, _VALIDATION] >= self._validation_visible
        return np.asarray(hidden)

    def _with_validation(self, statistics: TrainingStatistics) -> TrainingStatistics:
        if self._validation_visible == 0.0:
            return statistics
        shown = self.jobs.visibility(np.arange(self.num_envs))[:, _VALIDATION] < self._validation_visible
        loss = np.fmin(self.jobs.expected_loss(), _HIGHEST_LOSS)
        return replace(statistics, validation_loss=np.where(shown, loss, np.nan))

    # -- rewards --------------------------------------------------------------------------------------------------

    def _begin_rewards(self, lanes: Integers, quadratics: NoisyQuadratics) -> None:
        spec = self.reward_spec
        self._initial[lanes] = self._log_loss[lanes] = np.log(quadratics.initial_loss)
        for lane, reference in zip(lanes, np.log(quadratics.reference_loss), strict=True):
            scale = spec.scale(float(self._initial[lane]), float(reference))
            self._scale[lane] = scale
            self._limit[lane] = self._initial[lane] + spec.divergence_rise(scale)
            self._floor[lane] = spec.floor(scale, int((self._intervals[lane] > 0).sum()))

    def _reward(self, switched: Booleans, rolled_back: Booleans, budget_share: Floats) -> Floats:
        """`interval_reward` for every lane, or what takes the return to the floor where the job has diverged."""
        spec = self.reward_spec
        with np.errstate(divide="ignore"):
            log_loss = np.log(self.jobs.expected_loss())
        self._diverged = ~(log_loss <= self._limit)
        costs = spec.switch_cost * switched + spec.rollback_cost * rolled_back + spec.time_cost * budget_share
        reward = np.where(self._diverged, self._floor - self._return, (self._log_loss - log_loss) / self._scale - costs)
        self._log_loss = log_loss
        self._return += reward
        return np.asarray(reward)

    # -- state ----------------------------------------------------------------------------------------------------

    def _new_steering(self, lanes: Integers) -> Steering:
        return Steering(self.observation_spec, self._new_schedule(lanes))

    def _new_schedule(self, lanes: Integers) -> Schedule:
        budgets, rates = self.jobs.quadratics.total_steps[lanes], self.jobs.quadratics.given_rate[lanes]
        return Schedule(self.table, budgets, rates, self.schedule_settings, _CAPABILITIES)

    _STATE = ("intervals", "decision", "action", "log_loss", "initial", "scale", "limit", "floor", "return", "diverged")

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that changes, as arrays of leading dimension E."""
        own = {f"episodes.{name}": getattr(self, f"_{name}").copy() for name in self._STATE}
        jobs = {f"jobs.{name}": value for name, value in self.jobs.state_dict().items()}
        return own | jobs | {f"steering.{name}": value for name, value in self._steering.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restores what `state_dict` gave."""
        parts: dict[str, dict[str, NDArray[Any]]] = {"episodes": {}, "jobs": {}, "steering": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.jobs.load_state_dict(parts["jobs"])
        self._steering = self._new_steering(np.arange(self.num_envs))
        self._steering.load_state_dict(parts["steering"])
        for name, value in parts["episodes"].items():
            setattr(self, f"_{name}", value.copy())


@lru_cache(maxsize=4096)
def _without_noise(spec: RewardSpec) -> RewardSpec:
    if spec.average_intervals != 0.0 or spec.baseline != "none":
        raise UserError(
            "the loss of a noisy quadratic is exact: there is nothing to average and no shared noise to subtract",
            expected="average_intervals 0 and baseline 'none'",
            got=f"average_intervals {spec.average_intervals} and baseline {spec.baseline!r}",
            where="reward",
        )
    return spec
