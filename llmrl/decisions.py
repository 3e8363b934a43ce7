"""Steers one job with a policy: statistics become an observation, the observation an action, the action a schedule.

It knows no host. Whoever runs the job asks it for learning rates and tells it what each interval measured:

    loop = DecisionLoop(policy, total_steps=1000, given_rate=1e-4)
    loop.begin(statistics before the first step, update_norm, weight_norm)
    while loop.decisions_left:
        decision = loop.decide()          # host: roll back if decision.rollback
        ... train loop.interval steps at loop.schedule.learning_rate(step) ...
        update = loop.observe(statistics)  # host: keep a snapshot if update.at_best[0]
        verdict = loop.validated(loss)     # where the host validates: keep one, or go back to it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from llmrl_envs.interface.action import UpdateChoice
from llmrl_envs.interface.guards import SPIKE_MULTIPLE
from llmrl_envs.interface.job_scale import NOT_A_CLASSIFIER
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.interface.statistics import TrainingStatistics
from llmrl_envs.interface.steering import Steering, SteeringUpdate, Verdict
from numpy.typing import NDArray

from llmrl.policy import SchedulePolicy

Validations = Literal["never", "guard", "decisions"]
"""When a host measures the validation loss: after every interval, where the guard wants it, or never."""


@dataclass(frozen=True)
class Decision:
    """One decision.

    Attributes:
        index: Its number, from 0.
        step: Optimizer steps done when it was taken.
        observation: float32[O].
        q_values: float32[A]; NaN for a policy without values.
        mask: bool[A], what was available.
        action: The action carried out.
        action_name: Its name.
        rollback: The host must return to its best snapshot now.
    """

    index: int
    step: int
    observation: NDArray[np.float32]
    q_values: NDArray[np.float32]
    mask: NDArray[np.bool_]
    action: int
    action_name: str
    rollback: bool


@dataclass(frozen=True)
class DecisionRecord:
    """One decision and the interval that followed it.

    Attributes:
        decision: What was decided, on what.
        step: Optimizer steps done at the interval's end.
        learning_rate: Rate of the interval's last step.
        train_loss: Mean over the interval, nats per target; NaN where no step was taken.
        validation_loss: At the interval's end; NaN where it was not measured.
        events: Guard events: rollback, fallback, spike, skipped steps.
        level: The level that was held, in the unit of the policy's action table.
        step_size: Relative size of a step, `||dtheta|| / ||theta||`, mean over the interval; NaN where not known.
        gradient_norm: Mean over the interval, before clipping; NaN where not known.
    """

    decision: Decision
    step: int
    learning_rate: float
    train_loss: float
    validation_loss: float
    events: dict[str, Any]
    level: float = math.nan
    step_size: float = math.nan
    gradient_norm: float = math.nan


def decision_row(record: DecisionRecord, names: tuple[str, ...], actions: tuple[str, ...]) -> dict[str, Any]:
    """One row of `schedule.jsonl`."""
    decision = record.decision
    values = decision.q_values.tolist()
    return {
        "decision": decision.index,
        "step": decision.step,
        "action": decision.action_name,
        "learning_rate": record.learning_rate,
        "train_loss": record.train_loss,
        "validation_loss": record.validation_loss,
        "level": record.level,
        "step_size": record.step_size,
        "gradient_norm": record.gradient_norm,
        "events": record.events,
        "step_after": record.step,
        "q_values": dict(zip(actions, values, strict=True)) if math.isfinite(values[0]) else None,
        "mask": dict(zip(actions, decision.mask.tolist(), strict=True)),
        "observation": dict(zip(names, decision.observation.tolist(), strict=True)),
    }


def interval_record(
    loop: DecisionLoop,
    decision: Decision,
    statistics: TrainingStatistics,
    update: SteeringUpdate,
    *,
    learning_rate: float,
    validation_loss: float = math.nan,
    turned: bool = False,
    rescued: bool = False,
) -> DecisionRecord:
    """What a host writes down of an interval.

    Args:
        loop: After `observe`.
        decision: That opened the interval.
        statistics: Of the interval.
        update: What `observe` returned.
        learning_rate: Rate of the interval's last step.
        validation_loss: At its end, where it was measured.
        turned: That loss had turned, and the job fell back for it.
        rescued: The fall-back took the job to its best snapshot.
    """
    events: dict[str, Any] = {}
    if decision.rollback or rescued:
        events["rollback"] = True
    if update.fell_back[0] or turned:
        events["fallback"] = True
    spike = float(loop.steering.encoder.losses.spike[0])
    if spike > SPIKE_MULTIPLE:
        events["spike"] = round(spike, 2)
    if skipped := int(statistics.skipped.sum()):
        events["skipped_steps"] = skipped
    return DecisionRecord(
        decision=decision,
        step=int(statistics.step[0]),
        learning_rate=learning_rate,
        train_loss=_mean_finite(statistics.loss[0]),
        validation_loss=validation_loss,
        events=events,
        level=float(loop.schedule.level_value()[0]),
        step_size=float(statistics.step_size[0]),
        gradient_norm=_mean_finite(statistics.gradient_norm[0]),
    )


def _mean_finite(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


class DecisionLoop:
    """Steers one job.

    Args:
        policy: Chooses the actions.
        total_steps: The job's budget in optimizer steps.
        given_rate: The learning rate that the job came with.
        settings: Schedule settings; None takes those that the policy was trained with.
        capabilities: Update choices that the host can carry out.
        agree: Makes the processes of a job agree on the first one's action; None for a single process.
        guarded: Fall back to linear decay when the job loses too much, or its validation loss turns, and take no step
            whose loss stands out.
        intervals: Optimizer steps between decisions; None takes those that `settings` give for the steps left.
        first_step: Optimizer steps that the job has done already, without being steered.
    """

    def __init__(
        self,
        policy: SchedulePolicy,
        *,
        total_steps: int,
        given_rate: float,
        settings: ScheduleSettings | None = None,
        capabilities: frozenset[UpdateChoice] = frozenset(UpdateChoice),
        agree: Callable[[int], int] | None = None,
        guarded: bool = True,
        intervals: tuple[int, ...] | None = None,
        first_step: int = 0,
    ) -> None:
        self.policy = policy
        left = total_steps - first_step
        settings = settings or policy.settings
        self.intervals = settings.intervals(left) if intervals is None else intervals
        if sum(self.intervals) != left or min(self.intervals) < 1:
            raise ValueError(f"intervals: expected positive lengths that add up to {left}, got {self.intervals}")
        self.schedule = Schedule(
            policy.table,
            np.array([total_steps]),
            np.array([given_rate]),
            settings if guarded else replace(settings, skip_outliers=False),
            capabilities,
        )
        self.schedule.advance(np.array([first_step]))
        self.steering = Steering(policy.spec, self.schedule, guarded=guarded)
        self._agree = agree
        self._num_decisions = 0
        self._observation: NDArray[np.float32] | None = None

    def begin(
        self,
        statistics: TrainingStatistics,
        update_norm: float,
        weight_norm: float,
        label_nats: float = NOT_A_CLASSIFIER,
        num_parameters: int = 0,
    ) -> None:
        """Starts the job.

        Args:
            statistics: Those before the first step.
            update_norm: ||u|| as far as it is known.
            weight_norm: ||theta||.
            label_nats: Nats in the label of an example; infinity unless the job classifies.
            num_parameters: Of the whole model; zero where it is not known.
        """
        norms = np.array([update_norm]), np.array([weight_norm])
        self._observation = self.steering.begin(
            statistics, *norms, label_nats=label_nats, num_parameters=num_parameters
        )

    @property
    def interval(self) -> int:
        """Optimizer steps of the interval that the latest decision opened."""
        return self.intervals[self._num_decisions - 1]

    @property
    def decisions_left(self) -> int:
        """Decisions still to take."""
        return len(self.intervals) - self._num_decisions

    def decide(self) -> Decision:
        """Takes the next decision and changes the schedule.

        Raises:
            ValueError: `begin` was not called, or the budget is used up.
        """
        if self._observation is None or not self.decisions_left:
            raise ValueError("decide: expected a job that has begun and has decisions left, got neither")
        mask = self.schedule.mask()
        choice = self.policy.act(self._observation, mask)
        action = int(choice.actions[0])
        if self._agree is not None:
            action = self._agree(action)
        carried_out, rollback = self.steering.apply(np.array([action]))
        index = self._num_decisions
        self._num_decisions += 1
        return Decision(
            index=index,
            step=int(self.schedule.step[0]),
            observation=self._observation[0],
            q_values=choice.q_values[0],
            mask=mask[0],
            action=int(carried_out[0]),
            action_name=self.policy.table.names[int(carried_out[0])],
            rollback=bool(rollback[0]),
        )

    def observe(self, statistics: TrainingStatistics) -> SteeringUpdate:
        """Takes in what the interval measured."""
        update = self.steering.observe(statistics)
        self._observation = update.observation
        return update

    def validation_due(self, when: Validations) -> bool:
        """Whether a host that validates `when` is to measure the loss after this interval; see `OverfitGuard`."""
        return when == "decisions" or (when == "guard" and bool(self.steering.wants_validation[0]))

    def validates_first(self, when: Validations) -> bool:
        """Whether a host that validates `when` is to measure the loss before the first step as well: for the guard."""
        return when != "never" and bool(self.steering.wants_validation[0])

    def validated(self, loss: float, num_targets: int | None = None) -> Verdict:
        """Takes in a validation loss, nats per target, that the host has measured after `observe`; see `Steering`."""
        count = math.inf if num_targets is None else max(num_targets, 1)
        return self.steering.validated(np.array([loss if math.isfinite(loss) else math.inf]), count)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the optimizer step with index `step`."""
        return float(self.schedule.learning_rate(np.array([step]))[0])

    def learning_rates(self, step: int) -> list[float]:
        """Learning rates of the interval that the latest decision opened, whose first step has the index `step`."""
        rates: list[float] = self.schedule.learning_rate(np.arange(step, step + self.interval)).tolist()
        return rates

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays."""
        own: dict[str, NDArray[np.generic]] = {"num_decisions": np.array([self._num_decisions])}
        if self._observation is not None:
            own["observation"] = self._observation.copy()
        return own | self.steering.state_dict()

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave."""
        self._num_decisions = int(np.asarray(state["num_decisions"])[0])
        self._observation = np.array(state["observation"], np.float32) if "observation" in state else None
        self.steering.load_state_dict(state)
