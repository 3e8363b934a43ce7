"""The steering of jobs: statistics in, observation out, action applied. Environments and real jobs share it.

observation = steering.begin(statistics before the first step, norms)
repeat:  steering.apply(action)   ->  train one interval at steering.schedule's rates
         update = steering.observe(statistics of the interval)
         verdict = steering.validated(loss), where the host has measured one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.guards import FallBehindGuard, OverfitGuard
from llmrl_envs.interface.job_scale import NOT_A_CLASSIFIER
from llmrl_envs.interface.observation import ObservationEncoder, ObservationSpec
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.statistics import Booleans, Floats, Integers, TrainingStatistics


@dataclass(frozen=True)
class SteeringUpdate:
    """What an interval changed.

    Attributes:
        observation: float32[E, O].
        at_best: bool[E], lanes whose smoothed train loss is the lowest so far and that may still roll back: worth a
            snapshot. None that has shown a validation loss: that one then says which state is best. None whose last
            step was skipped: its loss may have stood out because the weights are broken.
        fell_back: bool[E], lanes that the guard has just taken out of the policy's hands.
    """

    observation: NDArray[np.float32]
    at_best: Booleans
    fell_back: Booleans


@dataclass(frozen=True)
class Verdict:
    """What a validation loss says.

    Attributes:
        at_best: bool[E], lanes whose loss is the lowest so far: worth a snapshot.
        turned: bool[E], lanes that have turned and are out of the policy's hands: to be taken back to their snapshots.
    """

    at_best: Booleans
    turned: Booleans


class Steering:
    """Schedule, observation encoder and guards of E jobs, kept in step.

    Args:
        spec: Layout of the observation.
        schedule: The jobs' schedules, fresh.
        guarded: Fall back to linear decay when a job loses too much, or its validation loss turns.
    """

    def __init__(self, spec: ObservationSpec, schedule: Schedule, *, guarded: bool = True) -> None:
        self.spec = spec
        self.schedule = schedule
        self.encoder = ObservationEncoder(spec, schedule.num_lanes)
        self._guarded = guarded
        self.guard = FallBehindGuard(schedule.num_lanes)
        self.overfit = OverfitGuard(schedule.num_lanes)

    def begin(
        self,
        statistics: TrainingStatistics,
        update_norm: Floats,
        weight_norm: Floats,
        hidden: Booleans | None = None,
        label_nats: Floats | float = NOT_A_CLASSIFIER,
        num_parameters: Floats | float = 0.0,
    ) -> NDArray[np.float32]:
        """The first observation, float32[E, O].

        Args:
            statistics: Those before the first step.
            update_norm: float64[E], ||u|| as far as it is known before the first step.
            weight_norm: float64[E], ||theta||.
            hidden: bool[E, G], feature groups to withhold.
            label_nats: float64[E], nats in the label of a classifier's example; see `job_scale`.
            num_parameters: float64[E], of the whole model; likewise.
        """
        lanes = np.arange(self.schedule.num_lanes)
        self.encoder.reset(lanes, hidden)
        self.guard.reset(lanes)
        self.overfit.reset(lanes)
        self.schedule.observe_job(statistics.mode, label_nats, num_parameters)
        self.schedule.observe_norms(update_norm, weight_norm)
        return self.encoder.encode(statistics, self.schedule)

    def begin_lanes(
        self,
        lanes: Integers,
        fresh: Schedule,
        statistics: TrainingStatistics,
        update_norm: Floats,
        weight_norm: Floats,
        hidden: Booleans | None = None,
        label_nats: Floats | float = NOT_A_CLASSIFIER,
        num_parameters: Floats | float = 0.0,
    ) -> NDArray[np.float32]:
        """Starts new jobs in some lanes while the others go on; their first observations, float32[len(lanes), O].

        Args:
            lanes: int64, where the jobs start.
            fresh: Schedules of the new jobs, one for each entry of `lanes`; their state is taken over.
            statistics: Of the new jobs, like the following ones; see `begin`.
            update_norm: ||u||.
            weight_norm: ||theta||.
            hidden: Feature groups to withhold.
            label_nats: Nats in the label of an example.
            num_parameters: Of the whole model.
        """
        newcomers = Steering(self.spec, fresh, guarded=self._guarded)
        observation = newcomers.begin(statistics, update_norm, weight_norm, hidden, label_nats, num_parameters)
        state = self.state_dict()
        for name, value in newcomers.state_dict().items():
            state[name][lanes] = value
        self.load_state_dict(state)
        return observation

    def apply(self, actions: Integers) -> tuple[Integers, Booleans]:
        """Carries out actions; see `Schedule.apply`."""
        return self.schedule.apply(actions)

    def observe(self, statistics: TrainingStatistics) -> SteeringUpdate:
        """Takes in the statistics of the interval that followed the last actions."""
        self.schedule.advance(statistics.step)
        self.schedule.observe_norms(statistics.update_norm, statistics.weight_norm)
        observation = self.encoder.encode(statistics, self.schedule)
        at_best, behind = self.guard.update(self.encoder.losses, statistics.stuck)
        behind &= self._guarded
        fell_back = behind & ~self.schedule.fallen_back
        self.schedule.fall_back(behind)
        at_best &= self.schedule.may_roll_back & ~self.overfit.knows & ~statistics.ends_skipped
        return SteeringUpdate(observation, at_best, fell_back)

    @property
    def wants_validation(self) -> Booleans:
        """Lanes whose validation loss would count now, bool[E]."""
        return self._guarded & self.overfit.due(self.schedule.step, self.schedule.total_steps)

    def validated(self, losses: Floats, num_targets: Floats | float = np.inf) -> Verdict:
        """Takes in validation losses.

        A lane that has turned goes on from its best state, a level lower, in linear decay; and may turn again: then it
        goes down by two levels, and so on until its loss is lower than ever. No policy sees these losses: what a
        policy observes comes with the statistics.

        Args:
            losses: float64[E], nats per target; NaN where none was measured.
            num_targets: float64[E], targets that each is the mean over; infinite where it is not known.
        """
        measured = np.where(self._guarded, np.asarray(losses, np.float64), np.nan)
        verdict = Verdict(*self.overfit.update(measured, self.schedule.step, self.schedule.total_steps, num_targets))
        self.schedule.step_down(np.where(verdict.turned, self.overfit.turns, 0))
        return verdict

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        parts = (
            ("schedule", self.schedule.state_dict()),
            ("encoder", self.encoder.state_dict()),
            ("guard", self.guard.state_dict()),
            ("overfit", self.overfit.state_dict()),
        )
        return {f"{part}.{name}": value for part, state in parts for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave."""
        self.schedule.load_state_dict(_part(state, "schedule."))
        self.encoder.load_state_dict(_part(state, "encoder."))
        self.guard.load_state_dict(_part(state, "guard."))
        self.overfit.load_state_dict(_part(state, "overfit."))


def _part(state: Mapping[str, NDArray[np.generic]], prefix: str) -> dict[str, NDArray[np.generic]]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
