"""What trackers get to see of a job's decisions: series as they are taken, a table and a picture at the end.

Everything here works on the rows of `schedule.jsonl` (see `llmrl.finetune.decision_row`), so that a job that has ended
can be shown as one that runs. Of a row only `step`, `action` and `learning_rate` have to be there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.tracking.tracker import Tracker

if TYPE_CHECKING:
    from llmrl_envs.rendering import ScheduleHistory

Row = Mapping[str, Any]

TABLE_COLUMNS = ("decision", "step", "action", "learning_rate", "train_loss", "validation_loss", "events")
TABLE_NAME, PICTURE_NAME = "llmrl/decisions", "llmrl/schedule"
COUNTED_EVENTS = ("rollback", "fallback", "spike", "skipped_steps")
"""Events whose series exist in every job, zero where nothing happened."""

_NUMBERS = ("decision", "learning_rate", "level", "step_size", "gradient_norm", "train_loss", "validation_loss")
_DERIVED_FEATURES = re.compile(r"@|^(progress_tanh|mode|last|has)_")
"""Features that another series tells already: earlier decisions, transforms of the progress, the action, the host."""


def decision_series(row: Row) -> dict[str, float]:
    """The numbers of one decision by the name of their series, all under `llmrl/`; what is not finite is left out.

    Args:
        row: One row of `schedule.jsonl`.

    Returns:
        decision, action (its index, where the row says which there are), learning_rate, level, step_size,
        gradient_norm, train_loss, validation_loss;
        q/ACTION; observation/FEATURE as the policy saw it; event_NAME, how often.
    """
    actions = list(row.get("mask") or ())
    values: dict[str, Any] = {name: row.get(name) for name in _NUMBERS}
    if row["action"] in actions:
        values["action"] = actions.index(row["action"])
    values |= {f"q/{name}": value for name, value in (row.get("q_values") or {}).items()}
    for name, value in (row.get("observation") or {}).items():
        if not _is_derived(name):
            values[f"observation/{name}"] = value
    events = dict.fromkeys(COUNTED_EVENTS, 0) | dict(row.get("events") or {})
    values |= {f"event_{name}": value for name, value in events.items()}
    numbers = {name: _number(value) for name, value in values.items()}
    return {_series_name(name): value for name, value in numbers.items() if math.isfinite(value)}


def decision_table(rows: Sequence[Row]) -> list[list[Any]]:
    """The lines of the end-of-job table under `TABLE_COLUMNS`."""
    return [
        [
            row.get("decision", index),
            row["step"],
            row["action"],
            _number(row.get("learning_rate")),
            _number(row.get("train_loss")),
            _number(row.get("validation_loss")),
            ", ".join(row.get("events") or ()),
        ]
        for index, row in enumerate(rows)
    ]


def schedule_history(rows: Sequence[Row], *, title: str, total_steps: int) -> ScheduleHistory:
    """The rows as what `llmrl_envs.rendering` draws."""
    from llmrl_envs.rendering import ScheduleHistory

    names = tuple(dict.fromkeys([*(name for row in rows for name in row.get("mask") or ()), *_actions(rows)]))
    history = ScheduleHistory(names, title, total_steps)
    for row in rows:
        history.append(
            step=int(row.get("step_after", row["step"])),
            train_loss=_number(row.get("train_loss")),
            validation_loss=_number(row.get("validation_loss")),
            learning_rate=_number(row.get("learning_rate")),
            action=names.index(row["action"]),
        )
    return history


class DecisionLog:
    """Follows one job.

    Args:
        tracker: Where everything goes.
        title: The job's name, over the picture.
        total_steps: The job's budget.
    """

    def __init__(self, tracker: Tracker, *, title: str, total_steps: int) -> None:
        self.rows: list[Row] = []
        self._tracker = tracker
        self._title, self._total_steps = title, total_steps

    def add(self, row: Row, extra: Mapping[str, float] | None = None) -> None:
        """Logs one decision, at the step where its interval ended.

        Args:
            row: One row of `schedule.jsonl`.
            extra: Further series of the same step, by their whole name.
        """
        self.rows.append(row)
        finite = {name: value for name, value in (extra or {}).items() if math.isfinite(value)}
        self._tracker.log({**decision_series(row), **finite}, step=int(row.get("step_after", row["step"])))

    def finish(self, picture: Path) -> None:
        """Draws the schedule to a PNG file, and logs table and picture; a job without decisions has neither."""
        from llmrl_envs.rendering import draw_history

        if not self.rows:
            return
        draw_history(schedule_history(self.rows, title=self._title, total_steps=self._total_steps)).savefig(picture)
        self._tracker.log_table(TABLE_NAME, TABLE_COLUMNS, decision_table(self.rows))
        self._tracker.log_image(PICTURE_NAME, picture)


def _actions(rows: Sequence[Row]) -> list[str]:
    return [row["action"] for row in rows]


def _number(value: Any) -> float:
    """A number; NaN for what is none, as JSON's null is."""
    return float(value) if isinstance(value, int | float) else math.nan


@lru_cache(maxsize=1024)
def _is_derived(feature: str) -> bool:
    return _DERIVED_FEATURES.search(feature) is not None


@lru_cache(maxsize=1024)
def _series_name(name: str) -> str:
    """W&B reads a dot as nesting, so no name has one."""
    return "llmrl/" + re.sub(r"[^\w/+-]", "_", name)
