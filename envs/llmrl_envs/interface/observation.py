"""From training statistics to the observation of a policy: named, scale-free, versioned features.

No feature holds an absolute loss, learning rate or step number, so that a policy carries from a small model to a
large one. Environments and real jobs use this one encoder. Features that a job cannot supply are zero, and a flag of
their group says so; training drops whole groups at random so that a policy copes with hosts that lack them.

The multi-scale losses and the progress features follow the learned optimizer VeLO (Metz et al. 2022,
https://arxiv.org/abs/2211.09760).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.interface.action import ActionTable
from llmrl_envs.interface.loss_tracker import LossTracker
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.statistics import Booleans, Floats, Integers, TrainingStatistics, TuningMode

OBSERVATION_VERSION = 1
PROGRESS_CENTRES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


class FeatureGroup(StrEnum):
    """Groups of features that a host has or lacks together."""

    LOSS = "loss"
    GRADIENT = "gradient"
    UPDATE = "update"
    DIRECTION = "direction"
    VALIDATION = "validation"


GROUPS: tuple[FeatureGroup, ...] = tuple(FeatureGroup)


@dataclass(frozen=True)
class Feature:
    """One entry of an observation: its name, the range that it is clipped to, and the group it depends on."""

    name: str
    low: float
    high: float
    group: FeatureGroup | None = None


def _job_features() -> tuple[Feature, ...]:
    """What describes the job as a whole; present once in an observation."""
    return (
        Feature("progress", 0.0, 1.1),
        *(Feature(f"progress_tanh_{centre:g}", -1.0, 1.0) for centre in PROGRESS_CENTRES),
        *(Feature(f"mode_{mode.name.lower()}", 0.0, 1.0) for mode in TuningMode),
        Feature("log10_trainable_fraction", -4.0, 0.0),
        Feature("log10_total_steps", 0.0, 2.0),
        Feature("rollbacks_left", 0.0, 1.0),
        *(Feature(f"has_{group}", 0.0, 1.0) for group in GROUPS),
    )


def _decision_features(table: ActionTable) -> tuple[Feature, ...]:
    """What one decision interval showed; present once for each stacked decision."""
    loss, gradient, update = FeatureGroup.LOSS, FeatureGroup.GRADIENT, FeatureGroup.UPDATE
    direction, validation = FeatureGroup.DIRECTION, FeatureGroup.VALIDATION
    return (
        Feature("level", -1.0, 1.0),
        Feature("level_below_highest", -2.0, 0.0),
        Feature("decisions_since_change", 0.0, 1.0),
        Feature("frozen", 0.0, 1.0),
        Feature("tight_clipping", 0.0, 1.0),
        *([Feature("leaning", 0.0, 1.0)] if table.lean is not None else []),
        Feature("final", 0.0, 1.0),
        *(Feature(f"last_{name}", 0.0, 1.0) for name in table.names),
        Feature("log10_step_size", -4.0, 4.0, update),
        *(Feature(f"loss_ratio_{scale}", -1.0, 1.0, loss) for scale in range(LossTracker.NUM_SCALES - 1)),
        Feature("loss_slope", -5.0, 5.0, loss),
        Feature("loss_noise", -8.0, 2.0, loss),
        Feature("loss_spike", -5.0, 10.0, loss),
        Feature("gradient_trend", -3.0, 3.0, gradient),
        Feature("gradient_last", -5.0, 5.0, gradient),
        Feature("gradient_variation", 0.0, 3.0, gradient),
        Feature("clipped_share", 0.0, 1.0, gradient),
        Feature("skipped_share", 0.0, 1.0, gradient),
        Feature("momentum_cosine", -1.0, 1.0, direction),
        Feature("log10_signal_to_noise", -4.0, 0.0, direction),
        Feature("generalisation_gap", -2.0, 2.0, validation),
        Feature("validation_above_best", 0.0, 2.0, validation),
    )


@dataclass(frozen=True)
class ObservationSpec:
    """Names, ranges and order of an observation's entries.

    The layout is the job's features followed by `stack` copies of the decision's features, newest first.

    Attributes:
        table: The action table; its names appear as features.
        stack: How many of the latest decisions are seen.
    """

    table: ActionTable
    stack: int = 3
    job_features: tuple[Feature, ...] = field(init=False)
    decision_features: tuple[Feature, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.stack < 1:
            raise ValueError(f"stack: expected at least 1, got {self.stack}")
        object.__setattr__(self, "job_features", _job_features())
        object.__setattr__(self, "decision_features", _decision_features(self.table))

    @property
    def features(self) -> tuple[Feature, ...]:
        """All entries in order; those of earlier decisions carry their age in the name."""
        rows = list(self.job_features)
        for age in range(self.stack):
            suffix = f"@{age}" if age else ""
            rows += [Feature(f.name + suffix, f.low, f.high, f.group) for f in self.decision_features]
        return tuple(rows)

    @property
    def names(self) -> tuple[str, ...]:
        """The entries' names, length O."""
        return tuple(feature.name for feature in self.features)

    @property
    def size(self) -> int:
        """Length of an observation, O."""
        return len(self.job_features) + self.stack * len(self.decision_features)

    def bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest value of each entry, float32[O] each."""
        features = self.features
        return (
            np.array([feature.low for feature in features], np.float32),
            np.array([feature.high for feature in features], np.float32),
        )

    def to_dict(self) -> dict[str, Any]:
        """What a policy stores to recognise the observation that it was trained on."""
        return {
            "version": OBSERVATION_VERSION,
            "stack": self.stack,
            "names": list(self.names),
            "actions": self.table.hash,
        }

    @property
    def hash(self) -> str:
        """A short digest of version, names, ranges and action table."""
        low, high = self.bounds()
        text = json.dumps([self.to_dict(), low.tolist(), high.tolist()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class ObservationEncoder:
    """Turns the statistics of E jobs into their observations; remembers what its features need.

    Args:
        spec: The layout.
        num_lanes: E.
    """

    def __init__(self, spec: ObservationSpec, num_lanes: int = 1) -> None:
        self.spec = spec
        self.losses = LossTracker(num_lanes)
        self._hidden: Booleans = np.zeros((num_lanes, len(GROUPS)), np.bool_)
        self._history: NDArray[np.float32] = np.zeros((num_lanes, spec.stack, len(spec.decision_features)), np.float32)
        self._best_validation: Floats = np.full(num_lanes, np.inf)
        self._low, self._high = spec.bounds()
        self._group_of: Integers = np.array(
            [-1 if f.group is None else GROUPS.index(f.group) for f in spec.decision_features], np.int64
        )

    def reset(self, lanes: Integers, hidden: Booleans | None = None) -> None:
        """Forgets `lanes`; `hidden`, bool[len(lanes), G], names feature groups to withhold from now on."""
        self.losses.reset(lanes)
        self._history[lanes] = 0.0
        self._best_validation[lanes] = np.inf
        self._hidden[lanes] = False if hidden is None else hidden

    def encode(self, statistics: TrainingStatistics, schedule: Schedule) -> NDArray[np.float32]:
        """The observations after an interval, float32[E, O]; call once per interval, in order.

        Args:
            statistics: What the interval measured.
            schedule: The schedules at its end.
        """
        self.losses.update(statistics)
        available = self._available(statistics) & ~self._hidden
        decision = self._decision_values(statistics, schedule)
        usable = np.where(self._group_of >= 0, available[:, np.maximum(self._group_of, 0)], True)
        decision = np.where(usable & np.isfinite(decision), decision, 0.0)
        self._history[:, 1:] = self._history[:, :-1].copy()
        self._history[:, 0] = decision
        job = self._job_values(statistics, schedule, available)
        flat = np.concatenate([job, self._history.reshape(len(job), -1)], axis=1)
        observation: NDArray[np.float32] = np.clip(flat, self._low, self._high).astype(np.float32)
        return observation

    def encode_lanes(
        self,
        lanes: Booleans,  # [E]
        statistics: TrainingStatistics,
        schedule: Schedule,
    ) -> NDArray[np.float32]:
        """Like `encode`, but what is remembered changes in `lanes` alone; rows of other lanes mean nothing."""
        before = self.state_dict()
        observation = self.encode(statistics, schedule)
        after = self.state_dict()
        chosen = {
            name: np.where(lanes.reshape(-1, *[1] * (value.ndim - 1)), value, before[name])
            for name, value in after.items()
        }
        self.load_state_dict(chosen)
        return observation

    def _available(self, statistics: TrainingStatistics) -> Booleans:
        """Which feature groups the statistics can fill, bool[E, G]."""
        valid = statistics.valid
        columns = {
            FeatureGroup.LOSS: (np.isfinite(statistics.loss) & valid).any(axis=1),
            FeatureGroup.GRADIENT: ((np.isfinite(statistics.gradient_norm) | statistics.skipped) & valid).any(axis=1),
            FeatureGroup.UPDATE: np.isfinite(statistics.step_size),
            FeatureGroup.DIRECTION: np.isfinite(statistics.momentum_cosine),
            FeatureGroup.VALIDATION: np.isfinite(statistics.validation_loss),
        }
        return np.stack([columns[group] for group in GROUPS], axis=1)

    def _job_values(self, statistics: TrainingStatistics, schedule: Schedule, available: Booleans) -> Floats:
        progress = statistics.step / statistics.total_steps
        most_rollbacks = max(schedule.settings.rollbacks, 1)
        columns = [
            progress,
            *(np.tanh(10.0 * (progress - centre)) for centre in PROGRESS_CENTRES),
            *((statistics.mode == mode).astype(np.float64) for mode in TuningMode),
            np.log10(np.maximum(statistics.trainable_fraction, 1e-12)),
            np.log10(statistics.total_steps) / 4.0,
            schedule.rollbacks_left / most_rollbacks,
        ]
        return np.concatenate([np.stack(columns, axis=1), available.astype(np.float64)], axis=1)

    def _decision_values(self, statistics: TrainingStatistics, schedule: Schedule) -> Floats:
        table = schedule.table
        levels = np.asarray(table.levels)
        centre = max(table.default_level, len(levels) - 1 - table.default_level, 1)
        one_hot = schedule.last_action[:, None] == np.arange(table.num_actions)[None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = [
                (schedule.level - table.default_level) / centre,
                np.log2(levels[schedule.level] / levels[schedule.highest_level]) / 4.0,
                np.tanh(schedule.decisions_since_change / 5.0),
                schedule.frozen.astype(np.float64),
                schedule.tight.astype(np.float64),
                *([schedule.leaning.astype(np.float64)] if table.lean is not None else []),
                schedule.is_final.astype(np.float64),
                *one_hot.astype(np.float64).T,
                np.log10(statistics.step_size) + 4.0,
                *self.losses.ratios().T,
                self.losses.slope,
                np.log(self.losses.noise()),
                self.losses.spike,
                *self.losses.gradient_features.T,
                statistics.momentum_cosine,
                np.log10(statistics.signal_to_noise),
                *self._validation_values(statistics.validation_loss),
            ]
        return np.stack(columns, axis=1)

    def _validation_values(self, loss: Floats) -> tuple[Floats, Floats]:
        known = np.isfinite(loss)
        self._best_validation = np.where(known, np.minimum(self._best_validation, loss), self._best_validation)
        log_loss = np.log(np.maximum(loss, 1e-12))
        gap = log_loss - np.log(np.maximum(self.losses.smoothed(), 1e-12))
        above = (log_loss - np.log(np.maximum(self._best_validation, 1e-12))) / np.maximum(self.losses.noise(), 1e-3)
        return gap, above

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """Everything that changes, as arrays of leading dimension E."""
        own: dict[str, NDArray[np.generic]] = {
            "hidden": self._hidden.copy(),
            "history": self._history.copy(),
            "best_validation": self._best_validation.copy(),
        }
        return own | {f"losses.{name}": value for name, value in self.losses.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Restores what `state_dict` gave."""
        self._hidden = np.array(state["hidden"], np.bool_)
        self._history = np.array(state["history"], np.float32)
        self._best_validation = np.array(state["best_validation"], np.float64)
        prefix = "losses."
        self.losses.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
