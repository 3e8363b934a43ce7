"""The schedule that a sequence of actions makes: from levels to learning rates, for E jobs side by side.

For a table in relative update sizes the learning rate of optimizer step t is

    eta_t = rho * base(t) * ||theta|| / ||u||

with rho the level, u the optimizer's update at learning rate one (measured as the job runs) and base a warm-up
followed by a decay. Holding the default level is a good schedule by itself; actions move the level on its grid. For
the table of factors the learning rate is factor * base(t) * given_rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.action import ActionTable, LevelUnit, UpdateChoice
from llmrl_envs.interface.base_schedule import base_factor
from llmrl_envs.interface.job_scale import NOT_A_CLASSIFIER, job_scale, leaning_scale
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.interface.statistics import Booleans, Floats, Integers

TIGHT_CLIPPING = 0.25
QUASI_HYPERBOLIC_SHARE = 0.7
"""Share of Adam's mean in the update of a step that leans on its own gradient: nu; see `lean_on_gradient`."""
NUM_PROMPT_MEASUREMENTS = 4

_SETTING_CHOICES: tuple[UpdateChoice, ...] = tuple(UpdateChoice)


class Schedule:
    """The schedules of E jobs: levels, toggles and cooldowns, changed by actions and read as learning rates.

    Args:
        table: What the action indices mean.
        total_steps: int64[E], budgets in optimizer steps.
        given_rate: float64[E], the learning rates that the jobs came with.
        settings: Base schedule, warm-up, start, limits.
        capabilities: Update choices that the host can carry out, the others are masked: the same for every job, or one
            set for each.
    """

    def __init__(
        self,
        table: ActionTable,
        total_steps: Integers,
        given_rate: Floats,
        settings: ScheduleSettings | None = None,
        capabilities: frozenset[UpdateChoice] | Sequence[frozenset[UpdateChoice]] = frozenset(UpdateChoice),
    ) -> None:
        self.table = table
        self.settings = settings or ScheduleSettings()
        self._moves: Integers = np.array([action.move for action in table.actions], np.int64)
        self._jumps: Integers = np.array(
            [-1 if action.level is None else action.level for action in table.actions], np.int64
        )
        self._choices: Integers = np.array([_SETTING_CHOICES.index(action.choice) for action in table.actions])
        self._grid: Floats = np.array(table.levels, np.float64)
        lanes = len(np.atleast_1d(total_steps))
        self._allocate(lanes)
        for_each = [capabilities] * lanes if isinstance(capabilities, Set) else capabilities
        self.capable[:] = [[choice in allowed for choice in _SETTING_CHOICES] for allowed in for_each]
        self.reset(np.arange(lanes), np.atleast_1d(total_steps), np.atleast_1d(given_rate))

    def _allocate(self, lanes: int) -> None:
        self.step: Integers = np.zeros(lanes, np.int64)
        self.total_steps: Integers = np.ones(lanes, np.int64)
        self.given_rate: Floats = np.zeros(lanes)
        self.level: Integers = np.zeros(lanes, np.int64)
        self.highest_level: Integers = np.zeros(lanes, np.int64)
        self.decisions_since_change: Integers = np.zeros(lanes, np.int64)
        self.last_action: Integers = np.full(lanes, -1, np.int64)
        self.frozen: Booleans = np.zeros(lanes, np.bool_)
        self.tight: Booleans = np.zeros(lanes, np.bool_)
        self.leaning: Booleans = np.zeros(lanes, np.bool_)
        self.cooldown_start: Integers = np.full(lanes, -1, np.int64)
        self.rollbacks_left: Integers = np.zeros(lanes, np.int64)
        self.has_snapshot: Booleans = np.zeros(lanes, np.bool_)
        self.fallen_back: Booleans = np.zeros(lanes, np.bool_)
        self.weight_to_update: Floats = np.full(lanes, np.nan)
        self.num_measurements: Integers = np.zeros(lanes, np.int64)
        self.grid_shift: Floats = np.ones(lanes)
        self.job_scale: Floats = np.ones(lanes)
        self.leaning_scale: Floats = np.ones(lanes)
        self.capable: Booleans = np.ones((lanes, len(_SETTING_CHOICES)), np.bool_)

    @property
    def num_lanes(self) -> int:
        """Number of jobs, E."""
        return len(self.level)

    def reset(self, lanes: Integers, total_steps: Integers, given_rate: Floats) -> None:
        """Starts new jobs in `lanes`; `total_steps` and `given_rate` have one entry per entry of `lanes`."""
        self.step[lanes] = 0
        self.total_steps[lanes] = total_steps
        self.given_rate[lanes] = given_rate
        self.level[lanes] = self.table.default_level
        self.highest_level[lanes] = self.table.default_level
        self.decisions_since_change[lanes] = 0
        self.last_action[lanes] = -1
        self.cooldown_start[lanes] = -1
        self.rollbacks_left[lanes] = self.settings.rollbacks
        self.weight_to_update[lanes] = np.nan
        self.num_measurements[lanes] = 0
        self.grid_shift[lanes] = 1.0
        self.job_scale[lanes] = 1.0
        self.leaning_scale[lanes] = 1.0
        for flag in (self.frozen, self.tight, self.leaning, self.has_snapshot, self.fallen_back):
            flag[lanes] = False

    def start_at(self, moves: Integers) -> None:
        """Starts the jobs so many grid places from the default level, int64[E]; places outside the grid are clipped."""
        self.level = np.clip(self.table.default_level + np.asarray(moves, np.int64), 0, len(self._grid) - 1)
        self.highest_level = self.level.copy()

    # -- measurements ---------------------------------------------------------------------------------------------

    def observe_job(
        self,
        mode: Integers,
        label_nats: Floats | float = NOT_A_CLASSIFIER,
        num_parameters: Floats | float = 0.0,
    ) -> None:
        """Takes in what says what a level means for the jobs; see `job_scale`.

        Args:
            mode: int64[E], a `TuningMode`.
            label_nats: float64[E], nats in the label of a classifier's example.
            num_parameters: float64[E], of the whole model.
        """
        nats = np.broadcast_to(np.asarray(label_nats, np.float64), np.shape(mode))
        self.job_scale = job_scale(mode, nats, num_parameters)
        self.leaning_scale = leaning_scale(nats)

    def observe_norms(self, update_norm: Floats, weight_norm: Floats) -> None:
        """Takes in ||u|| and ||theta||, float64[E]; values that are not finite and positive are passed over.

        The first few measurements replace the ratio at once (Adam's update changes quickly while its moments fill),
        later ones are smoothed in log space.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.asarray(weight_norm, np.float64) / np.asarray(update_norm, np.float64)
        usable = np.isfinite(ratio) & (ratio > 0.0)
        first = usable & np.isnan(self.weight_to_update)
        prompt = usable & (self.num_measurements <= NUM_PROMPT_MEASUREMENTS)
        rate = np.where(first, self.given_rate, self.peak_rate())
        weight = np.where(prompt, 1.0, self.settings.smoothing)
        with np.errstate(invalid="ignore", divide="ignore"):
            smoothed = self.weight_to_update ** (1.0 - weight) * np.where(usable, ratio, 1.0) ** weight
        self.weight_to_update = np.where(first, ratio, np.where(usable, smoothed, self.weight_to_update))
        self.num_measurements += usable
        if self.settings.start == "given" and self.table.unit is LevelUnit.RELATIVE_UPDATE:
            self._keep_rate(prompt, rate)

    def _keep_rate(self, lanes: Booleans, rate: Floats) -> None:
        """Moves the level to where the learning rate at the peak is `rate`, float64[E], exactly."""
        wanted = np.where(lanes, rate / (self.weight_to_update * self._scale()), 1.0)
        nearest = np.abs(np.log(self._grid)[None, :] - np.log(wanted)[:, None]).argmin(axis=1)
        highest = np.clip(self.highest_level + nearest - self.level, 0, len(self._grid) - 1)
        self.highest_level = np.where(lanes, highest, self.highest_level)
        self.level = np.where(lanes, nearest, self.level)
        self.grid_shift = np.where(lanes, wanted / self._grid[nearest], self.grid_shift)

    # -- learning rates -------------------------------------------------------------------------------------------

    def level_value(self) -> Floats:
        """Each lane's level in the table's unit, float64[E]."""
        return np.asarray(self._grid[self.level] * self.grid_shift)

    def peak_rate(self) -> Floats:
        """The learning rate that each lane's level means where the base schedule is 1, float64[E]."""
        relative = self.table.unit is LevelUnit.RELATIVE_UPDATE
        return self.level_value() * (self.weight_to_update * self._scale() if relative else self.given_rate)

    def _scale(self) -> Floats:
        """What a level means for the jobs as they step now, float64[E]."""
        return self.job_scale * np.where(self.leaning, self.leaning_scale, 1.0)

    def factor(self, step: Integers) -> Floats:
        """Base schedule and cooldown at the optimizer steps with indices `step`, float64[E]."""
        warmup = self.settings.warmup_steps(self.total_steps)
        base = base_factor(self.settings.base, step, self.total_steps, warmup)
        start = np.maximum(self.cooldown_start, 0)
        at_start = base_factor(self.settings.base, start, self.total_steps, warmup)
        left = np.clip((self.total_steps - np.asarray(step)) / np.maximum(self.total_steps - start, 1), 0.0, 1.0)
        return np.where(self.cooldown_start >= 0, at_start * left, base)

    def learning_rate(self, step: Integers) -> Floats:
        """Learning rate of the optimizer steps with indices `step` (from 0), float64[E].

        NaN until `observe_norms` has been called for a lane of a table in relative update sizes.
        """
        return self.peak_rate() * self.factor(step)

    def clipping_factor(self) -> Floats:
        """What the job's gradient-norm limit is multiplied with, float64[E]."""
        return np.where(self.tight, TIGHT_CLIPPING, 1.0)

    def momentum_share(self) -> Floats:
        """Share of Adam's mean in an update, the rest being the step's own gradient; float64[E], 1 for plain Adam."""
        return np.where(self.leaning, QUASI_HYPERBOLIC_SHARE, 1.0)

    def skips_outliers(self) -> bool:
        """Steps whose loss stands out are not taken; see `OutlierSteps`."""
        return self.settings.skip_outliers

    # -- actions --------------------------------------------------------------------------------------------------

    def target_levels(self) -> Integers:
        """Level that each action would lead to, before clipping to the grid, int64[E, A]."""
        moved = self.level[:, None] + self._moves[None, :]
        return np.asarray(np.where(self._jumps[None, :] >= 0, self._jumps[None, :], moved))

    def mask(self) -> Booleans:
        """Which actions are available, bool[E, A]; holding always is, and alone after a cooldown."""
        target = self.target_levels()
        available = (target >= 0) & (target < len(self._grid))
        warm = self.step >= self.settings.warmup_steps(self.total_steps)
        late = self.step >= self.settings.earliest_cooldown * self.total_steps
        settings, total = self.settings, self.total_steps
        kept = (self.step < settings.earliest_move * total) | (self.step > settings.latest_move * total)
        available &= ~(kept[:, None] & ((self._moves != 0) | (self._jumps >= 0))[None, :])
        if self.table.lean is not None:  # only such steps are known to bear a higher level
            available &= self.leaning[:, None] | (self._moves <= 0)[None, :]
        for choice, allowed in (
            (UpdateChoice.ROLLBACK, self.has_snapshot & (self.rollbacks_left > 0)),
            (UpdateChoice.FREEZE, np.ones(self.num_lanes, np.bool_)),
            (UpdateChoice.TIGHTEN, np.ones(self.num_lanes, np.bool_)),
            (UpdateChoice.COOLDOWN, warm & late),
            (UpdateChoice.QUASI_HYPERBOLIC, ~self.leaning),
        ):
            place = _SETTING_CHOICES.index(choice)
            available[:, self._choices == place] &= (allowed & self.capable[:, place])[:, None]
        available[self.is_final] = False
        available[:, self.table.hold] = True
        return np.asarray(available)

    @property
    def is_final(self) -> Booleans:
        """Lanes whose level no action moves any more, bool[E]."""
        late = self.step >= self.settings.cooldown_progress * self.total_steps
        return np.asarray((self.cooldown_start >= 0) | self.fallen_back | late)

    @property
    def may_roll_back(self) -> Booleans:
        """Lanes in which some action can still return to a snapshot, once there is one, bool[E]."""
        place = _SETTING_CHOICES.index(UpdateChoice.ROLLBACK)
        possible = self.capable[:, place] & bool((self._choices == place).any())
        return np.asarray((self.rollbacks_left > 0) & ~self.is_final & possible)

    def apply(self, actions: Integers) -> tuple[Integers, Booleans]:
        """Carries out one action in each lane; an unavailable one counts as holding.

        Returns:
            The actions carried out, int64[E], and the lanes that must now return to their snapshot, bool[E].
        """
        actions = np.asarray(actions, np.int64)
        if actions.shape != (self.num_lanes,) or (actions < 0).any() or (actions >= self.table.num_actions).any():
            raise ValueError(
                f"actions: expected int64[{self.num_lanes}] in [0, {self.table.num_actions}), got {actions!r}"
            )
        rows = np.arange(self.num_lanes)
        actions = np.where(self.mask()[rows, actions], actions, self.table.hold)
        movable = ~self.is_final
        choice = self._choices[actions]
        rollback = choice == _SETTING_CHOICES.index(UpdateChoice.ROLLBACK)
        level = np.where(movable, self.target_levels()[rows, actions], self.level) - rollback
        level = np.clip(level, 0, len(self._grid) - 1)
        toggled = np.isin(
            choice, [_SETTING_CHOICES.index(UpdateChoice.FREEZE), _SETTING_CHOICES.index(UpdateChoice.TIGHTEN)]
        )
        self.frozen ^= choice == _SETTING_CHOICES.index(UpdateChoice.FREEZE)
        self.tight ^= choice == _SETTING_CHOICES.index(UpdateChoice.TIGHTEN)
        leaning = choice == _SETTING_CHOICES.index(UpdateChoice.QUASI_HYPERBOLIC)
        self.leaning |= leaning
        cooling = choice == _SETTING_CHOICES.index(UpdateChoice.COOLDOWN)
        self.cooldown_start = np.where(cooling, self.step, self.cooldown_start)
        self.rollbacks_left -= rollback
        changed = (level != self.level) | toggled | leaning | cooling | rollback
        self.decisions_since_change = np.where(changed, 0, self.decisions_since_change + 1)
        self.level = level
        self.highest_level = np.maximum(self.highest_level, level)
        self.last_action = actions
        return actions, np.asarray(rollback)

    def advance(self, step: Integers) -> None:
        """Tells the schedule how many optimizer steps are done, int64[E]."""
        self.step = np.array(step, np.int64)

    def fall_back(self, lanes: Booleans) -> None:
        """Takes lanes out of the policy's hands; those that are out already stay as they are. See `step_down`."""
        self.step_down((lanes & ~self.fallen_back).astype(np.int64))

    def step_down(self, places: Integers) -> None:
        """Out of the policy's hands: linear decay from so many places below the present or default level, int64[E]."""
        lanes = places > 0
        lower = np.maximum(np.minimum(self.level, self.table.default_level) - places, 0)
        self.level = np.where(lanes, lower, self.level)
        self.cooldown_start = np.where(lanes & (self.cooldown_start < 0), self.step, self.cooldown_start)
        self.frozen &= ~lanes
        self.leaning &= ~lanes
        self.fallen_back |= lanes

    # -- state ----------------------------------------------------------------------------------------------------

    _STATE = (
        "step", "total_steps", "given_rate", "level", "highest_level", "decisions_since_change", "last_action",
        "frozen", "tight", "leaning", "cooldown_start", "rollbacks_left", "has_snapshot", "fallen_back",
        "weight_to_update", "num_measurements", "grid_shift", "job_scale", "leaning_scale", "capable",
    )  # fmt: skip

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        return {name: getattr(self, name).copy() for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave; in earlier versions too, whose jobs never leaned on their gradients."""
        for name in self._STATE:
            older = "mode_scale" if name == "job_scale" and name not in state else name
            if older in state or name not in ("leaning", "leaning_scale"):
                setattr(self, name, np.array(state[older]))
        missing = len(_SETTING_CHOICES) - self.capable.shape[1]
        self.capable = np.pad(self.capable, ((0, 0), (0, max(missing, 0))))
