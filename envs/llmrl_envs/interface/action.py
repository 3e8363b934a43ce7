"""What a policy can do to a fine-tuning job: a table from action index to a move of the level and an update choice.

A *level* is a place on a geometric grid. What the grid measures is the table's `unit`: the relative size of one
optimizer step, `||dtheta|| / ||theta||`, or a factor on the learning rate that the job was given. The tables are data;
`Schedule` in `schedule.py` gives them their meaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from llmrl_envs.errors import UserError

DEFAULT_RELATIVE_UPDATE = 2.5e-3
"""The level that holding keeps: relative change of the weights per optimizer step at the peak of the schedule."""


class LevelUnit(StrEnum):
    """What a level multiplies."""

    RELATIVE_UPDATE = "relative_update"
    GIVEN_RATE = "given_rate"


class UpdateChoice(StrEnum):
    """What an action does beside moving the level."""

    NONE = "none"
    ROLLBACK = "rollback"
    FREEZE = "freeze"
    TIGHTEN = "tighten"
    COOLDOWN = "cooldown"
    QUASI_HYPERBOLIC = "quasi_hyperbolic"


@dataclass(frozen=True)
class ScheduleAction:
    """One row of an action table.

    Attributes:
        name: Shown in logs and stored with a policy.
        move: Grid places to move from the present level; ignored when `level` is given.
        level: Grid place to jump to, whatever the present one.
        choice: What else happens to the job's updates.
    """

    name: str
    move: int = 0
    level: int | None = None
    choice: UpdateChoice = UpdateChoice.NONE


@dataclass(frozen=True)
class ActionTable:
    """Maps an action index to a `ScheduleAction`, over a grid of levels.

    Attributes:
        name: The table's name in `ACTION_TABLES`.
        unit: What a level multiplies.
        levels: The grid, ascending, in the unit.
        default_level: The grid place at which a job starts.
        actions: One entry an action index.
    """

    name: str
    unit: LevelUnit
    levels: tuple[float, ...]
    default_level: int
    actions: tuple[ScheduleAction, ...]

    @property
    def num_actions(self) -> int:
        """Number of action indices, A."""
        return len(self.actions)

    @property
    def names(self) -> tuple[str, ...]:
        """The actions' names, in index order."""
        return tuple(action.name for action in self.actions)

    @property
    def hold(self) -> int:
        """The index of the action that changes nothing (for absolute tables: that jumps to the default level)."""
        return self.names.index("hold")

    @property
    def rise(self) -> int | None:
        """The index of the action that does nothing but raise the level by one place; None where there is none."""
        found = [i for i, a in enumerate(self.actions) if (a.move, a.level, a.choice) == (1, None, UpdateChoice.NONE)]
        return found[0] if found else None

    @property
    def lean(self) -> int | None:
        """The index of the action that makes steps lean on their own gradient; None where there is none."""
        found = [i for i, action in enumerate(self.actions) if action.choice is UpdateChoice.QUASI_HYPERBOLIC]
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActionTable:
        """Builds a table from what `to_dict` gave."""
        actions = tuple(
            ScheduleAction(row["name"], int(row["move"]), row["level"], UpdateChoice(row["choice"]))
            for row in values["actions"]
        )
        levels = tuple(float(level) for level in values["levels"])
        return cls(values["name"], LevelUnit(values["unit"]), levels, int(values["default_level"]), actions)

    @property
    def hash(self) -> str:
        """A short digest of everything that gives an action index its meaning."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _geometric_grid(centre: float, ratio: float, below: int, above: int) -> tuple[float, ...]:
    return tuple(centre * ratio**power for power in range(-below, above + 1))


_RELATIVE_GRID = _geometric_grid(DEFAULT_RELATIVE_UPDATE, 1.7, 4, 4)
_FINE_GRID = _geometric_grid(DEFAULT_RELATIVE_UPDATE, 1.3, 8, 8)
_FACTOR_GRID = _geometric_grid(1.0, 2**0.5, 20, 20)

_MOVES = (
    ScheduleAction("two_down", move=-2),
    ScheduleAction("one_down", move=-1),
    ScheduleAction("hold"),
    ScheduleAction("one_up", move=1),
    ScheduleAction("two_up", move=2),
)
_CHOICES = (
    ScheduleAction("rollback", choice=UpdateChoice.ROLLBACK),
    ScheduleAction("freeze", choice=UpdateChoice.FREEZE),
    ScheduleAction("tighten", choice=UpdateChoice.TIGHTEN),
    ScheduleAction("cooldown", choice=UpdateChoice.COOLDOWN),
)


def _joint_actions() -> tuple[ScheduleAction, ...]:
    """Every move together with every update choice that can accompany a move, and the cooldown."""
    rows = list(_MOVES)
    for choice in _CHOICES[:-1]:
        for move in _MOVES:
            name = choice.name if move.move == 0 else f"{move.name}+{choice.name}"
            rows.append(ScheduleAction(name, move=move.move, choice=choice.choice))
    return (*rows, _CHOICES[-1])


# A rate that is too high ruins a job within a few steps, one that is too low for a while costs little: a job starts at
# half the default level (three places below it), goes down faster than up, and up one place at a time: nothing is
# known of a job at its first decision, and two places up ruin one noisy quadratic in five hundred there.
_CAREFUL = (ScheduleAction("four_down", move=-4), *_MOVES[:-1])
_FACTORS = (
    ScheduleAction("quarter", move=-4),
    ScheduleAction("half", move=-2),
    ScheduleAction("down_sqrt2", move=-1),
    ScheduleAction("hold"),
    ScheduleAction("up_sqrt2", move=1),
    ScheduleAction("double", move=2),
    ScheduleAction("quadruple", move=4),
)
_LEVELS = tuple(
    ScheduleAction("hold" if place == 4 else f"level_{level:.2g}", level=place)
    for place, level in enumerate(_RELATIVE_GRID)
)

ACTION_TABLES: dict[str, ActionTable] = {
    table.name: table
    for table in (
        ActionTable("moves", LevelUnit.RELATIVE_UPDATE, _RELATIVE_GRID, 4, _MOVES + _CHOICES),
        ActionTable("moves_only", LevelUnit.RELATIVE_UPDATE, _RELATIVE_GRID, 4, _MOVES),
        ActionTable("decay", LevelUnit.RELATIVE_UPDATE, _RELATIVE_GRID, 4, (_MOVES[2], _CHOICES[-1])),
        # Waiting with the decay, and one place up at most; the place below is for guards.
        ActionTable("rise", LevelUnit.RELATIVE_UPDATE, _RELATIVE_GRID[3:6], 1, (_MOVES[2], _CHOICES[-1], _MOVES[3])),
        # And steps that lean on their own gradient, from there on; all places below the default, for guards.
        ActionTable(
            "lean",
            LevelUnit.RELATIVE_UPDATE,
            _RELATIVE_GRID[:6],
            4,
            (_MOVES[2], _CHOICES[-1], _MOVES[3], ScheduleAction("lean", choice=UpdateChoice.QUASI_HYPERBOLIC)),
        ),
        ActionTable("joint", LevelUnit.RELATIVE_UPDATE, _RELATIVE_GRID, 4, _joint_actions()),
        ActionTable("careful", LevelUnit.RELATIVE_UPDATE, _FINE_GRID, 5, _CAREFUL),
        ActionTable("levels", LevelUnit.RELATIVE_UPDATE, _RELATIVE_GRID, 4, _LEVELS),
        ActionTable("factors", LevelUnit.GIVEN_RATE, _FACTOR_GRID, 20, _FACTORS),
    )
}


def action_table(name: str) -> ActionTable:
    """The built-in table of that name.

    Raises:
        UserError: There is no such table.
    """
    if name not in ACTION_TABLES:
        raise UserError("unknown action table", expected=f"one of {', '.join(ACTION_TABLES)}", got=repr(name))
    return ACTION_TABLES[name]
