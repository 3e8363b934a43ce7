"""From validation losses to rewards: scaled drops of the log-loss that add up to the job's final improvement.

    r_k = (l_{k-1} - l_k) / s - costs,     l = log validation cross-entropy on a fixed subset

With gamma = 1 the drops telescope: the return is (l_0 - l_K) / s less the costs, and with
s = max(l_0 - l_ref, minimum_scale), where l_ref ends the reference run, a return of 1 means "as good as the
reference". With `baseline="reference"` the drop of the reference over the same steps is subtracted, which removes
noise that every schedule shares (a control variate) and makes 0 mean "as good as the reference"; `baseline="hold"`
subtracts that of the group's member that holds, and 0 means "as good as holding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmrl_envs.errors import UserError


@dataclass(frozen=True)
class RewardSpec:
    """How the reward is made.

    Attributes:
        average_intervals: Time constant, in decision intervals, of the exponential average of the weights on which
            the loss is measured; 0 measures the deployed weights. Values above 1 lag too far behind to be of use.
        baseline: "none"; "reference" to subtract the reference run's drop over the same steps; "hold" to subtract that
            of the first member of the job's group, which holds: for populations with groups, with measured: end, so
            that all members of a group end together.
        measured: "decisions" pays every interval. "end" measures the validation loss at the end of a job alone and
            pays the whole return there: passes over the validation subset cost more than the training between two
            decisions, and with Monte-Carlo returns nothing is lost but that a divergence shows at the end.
        switch_cost: Subtracted when an action changes the level or a toggle.
        rollback_cost: Subtracted when a rollback is carried out.
        time_cost: Subtracted per decision in proportion to its share of the budgeted optimizer steps.
        minimum_scale: Lower bound of s, in nats of log-loss.
        divergence_margin: A job has diverged when its log-loss exceeds the initial one by more than
            max(2 s, divergence_margin), or is not finite.
    """

    average_intervals: float = 0.0
    baseline: Literal["none", "reference", "hold"] = "none"
    measured: Literal["decisions", "end"] = "decisions"
    switch_cost: float = 0.0
    rollback_cost: float = 0.0
    time_cost: float = 0.0
    minimum_scale: float = 0.02
    divergence_margin: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.average_intervals <= 1.0:
            raise UserError(
                "the averaging time constant is out of range",
                expected="0 (deployed weights) to 1 decision interval",
                got=self.average_intervals,
                where="reward.average_intervals",
            )
        for name, choices in (("baseline", ("none", "reference", "hold")), ("measured", ("decisions", "end"))):
            if getattr(self, name) not in choices:
                expected, got = f"one of {', '.join(choices)}", repr(getattr(self, name))
                raise UserError("unknown choice of the reward", expected=expected, got=got, where=f"reward.{name}")
        if self.baseline == "hold" and self.measured != "end":
            raise UserError(
                "the baseline 'hold' compares jobs at their end",
                expected="measured: end",
                got=repr(self.measured),
                where="reward.measured",
            )
        if self.measured == "end" and self.average_intervals > 0.0:
            raise UserError(
                "a job that is measured at its end alone has no use for averaged weights",
                expected="0 with measured: end",
                got=self.average_intervals,
                where="reward.average_intervals",
            )
        for name in ("switch_cost", "rollback_cost", "time_cost"):
            if getattr(self, name) < 0.0:
                raise UserError("a cost is negative", expected=">= 0", got=getattr(self, name), where=f"reward.{name}")
        for name in ("minimum_scale", "divergence_margin"):
            if not getattr(self, name) > 0.0:
                raise UserError(
                    "the reward's scale is not positive",
                    expected="> 0",
                    got=getattr(self, name),
                    where=f"reward.{name}",
                )

    def scale(self, initial: float, reference: float) -> float:
        """s = max(l_0 - l_ref, minimum_scale), in nats of log-loss."""
        return max(initial - reference, self.minimum_scale)

    def average_steps(self, intervals: Sequence[int]) -> float:
        """Time constant of the averaged weights in optimizer steps, 0 for none; the first few intervals are short."""
        return self.average_intervals * intervals[min(len(intervals) - 1, 7)]

    def divergence_rise(self, scale: float) -> float:
        """Rise of the log-loss above the initial one from which a job counts as diverged."""
        return max(2.0 * scale, self.divergence_margin)

    def floor(self, scale: float, num_decisions: int) -> float:
        """Return of a diverged episode: below every episode of this job that did not diverge.

        Such an episode loses at most the divergence rise, every cost at every decision, and, with a baseline, the
        reference's gain of at most 1 + divergence_rise / scale.
        """
        worst_costs = num_decisions * (self.switch_cost + self.rollback_cost) + self.time_cost
        worst_drop = self.divergence_rise(scale) / scale
        worst_baseline = 1.0 + worst_drop if self.baseline == "reference" else 0.0  # what hold gains is not bounded
        return -(worst_drop + worst_costs + worst_baseline + 1.0)


def interval_reward(
    spec: RewardSpec,
    *,
    before: float,
    after: float,
    scale: float,
    reference_drop: float = 0.0,
    switched: bool = False,
    rolled_back: bool = False,
    budget_share: float = 0.0,
) -> float:
    """Reward of one decision interval of a job that has not diverged.

    Args:
        spec: Costs and baseline.
        before: Log-loss at the start of the interval.
        after: Log-loss at its end.
        scale: s of `RewardSpec.scale`.
        reference_drop: l_{k-1} - l_k of the reference run, or of the member that holds, over the same steps; used with
            a `baseline`.
        switched: The action changed the level or a toggle.
        rolled_back: A rollback was carried out.
        budget_share: Optimizer steps of the interval over the job's total.

    >>> interval_reward(RewardSpec(), before=1.0, after=0.9, scale=0.2)
    0.4999999999999999
    """
    drop = before - after
    if spec.baseline != "none":
        drop -= reference_drop
    costs = spec.switch_cost * switched + spec.rollback_cost * rolled_back + spec.time_cost * budget_share
    return drop / scale - costs
