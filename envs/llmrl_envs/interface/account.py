"""The books of one episode: which interval it is in, what its validation loss was and is, what it has been paid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl_envs.interface.reward import RewardSpec, interval_reward


class EpisodeAccount:
    """Rewards of one job.

    Args:
        spec: How rewards are made.
        reference: Log validation loss of the reference run before the first and after every interval. Its first entry
            is the job's too, because both began from the same weights.
        intervals: Lengths of the job's decision intervals, in optimizer steps; one less than `reference` has entries.

    Attributes:
        intervals: The same.
        decision: Intervals that are done.
        initial_log_loss: Before the first step.
        log_loss: After the latest interval.
        scale: Nats of log-loss that a reward of one stands for.
        episode_return: Rewards so far.
        diverged: The job has ended below every outcome that did not diverge.
        losses: `log_loss` before the first and after every interval so far.
    """

    def __init__(self, spec: RewardSpec, reference: Sequence[float], intervals: tuple[int, ...]) -> None:
        self._spec = spec
        self._reference = tuple(reference)
        self.intervals = intervals
        self._total_steps = sum(intervals)
        self.decision = 0
        self.initial_log_loss = self.log_loss = self._reference[0]
        self.scale = spec.scale(self.initial_log_loss, self._reference[-1])
        self.episode_return = 0.0
        self.diverged = False
        self.losses = [self.log_loss]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the interval that comes next."""
        return self.intervals[self.decision]

    @property
    def is_last(self) -> bool:
        """The interval that comes next is the last one."""
        return self.decision == len(self.intervals) - 1

    @property
    def is_over(self) -> bool:
        """The budget is used up, or the job has diverged."""
        return self.diverged or self.decision == len(self.intervals)

    @property
    def validation_loss(self) -> float:
        """The latest validation loss, nats per target; -1 where it is not finite."""
        return math.exp(min(self.log_loss, 50.0)) if math.isfinite(self.log_loss) else -1.0

    @property
    def score(self) -> float:
        """Improvement so far in units of the reference's; the return of a job that has diverged."""
        if self.diverged or not math.isfinite(self.log_loss):
            return self.episode_return
        return (self.initial_log_loss - self.log_loss) / self.scale

    def settle(
        self, log_loss: float, *, switched: bool, rolled_back: bool, baseline_drop: float | None = None
    ) -> float:
        """Closes an interval and returns its reward.

        Args:
            log_loss: Log validation loss after it.
            switched: The action changed the level or a toggle.
            rolled_back: A rollback was carried out.
            baseline_drop: Drop of the log-loss that a baseline subtracts; None takes the reference's. A diverged job
                is charged what the baseline has gained, too.
        """
        spec, place = self._spec, self.decision
        self.diverged = not log_loss <= self.initial_log_loss + spec.divergence_rise(self.scale)
        if self.diverged:
            reward = spec.floor(self.scale, len(self.intervals)) - self.episode_return
            if spec.baseline == "hold":
                reward -= max(baseline_drop or 0.0, 0.0) / self.scale
        else:
            of_reference = self._reference[place] - self._reference[place + 1]
            reward = interval_reward(
                spec,
                before=self.log_loss,
                after=log_loss,
                scale=self.scale,
                reference_drop=of_reference if baseline_drop is None else baseline_drop,
                switched=switched,
                rolled_back=rolled_back,
                budget_share=self.intervals[place] / self._total_steps,
            )
        self.log_loss = log_loss
        self.losses.append(log_loss)
        self.episode_return += reward
        self.decision += 1
        return float(reward)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as JSON values."""
        return {
            "reference": list(self._reference),
            "losses": list(self.losses),
            "episode_return": self.episode_return,
            "diverged": self.diverged,
        }

    @classmethod
    def from_state(cls, spec: RewardSpec, intervals: tuple[int, ...], state: Mapping[str, Any]) -> EpisodeAccount:
        """The account that `state_dict` told of."""
        account = cls(spec, state["reference"], intervals)
        account.losses = [float(value) for value in state["losses"]]
        account.log_loss = account.losses[-1]
        account.decision = len(account.losses) - 1
        account.episode_return, account.diverged = float(state["episode_return"]), bool(state["diverged"])
        return account
