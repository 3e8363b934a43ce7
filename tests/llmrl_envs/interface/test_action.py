"""Action tables: what an index means, and that it cannot change unnoticed."""

import json
from dataclasses import replace

import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import ACTION_TABLES, ActionTable, LevelUnit, UpdateChoice, action_table

TABLES = list(ACTION_TABLES.values())


def test_the_default_table_moves_holds_and_chooses_updates():
    table = action_table("moves")
    assert table.names == (
        "two_down", "one_down", "hold", "one_up", "two_up", "rollback", "freeze", "tighten", "cooldown",
    )  # fmt: skip
    assert [action.move for action in table.actions[:5]] == [-2, -1, 0, 1, 2]
    assert {action.choice for action in table.actions[:5]} == {UpdateChoice.NONE}
    assert table.levels[table.default_level] == 2.5e-3
    assert 2.9e-4 < table.levels[0] < 3.1e-4
    assert 2e-2 < table.levels[-1] < 2.1e-2
    assert all(high / low == pytest.approx(1.7) for low, high in zip(table.levels, table.levels[1:], strict=False))


def test_the_published_table_multiplies_the_given_rate():
    table = action_table("factors")
    assert table.unit is LevelUnit.GIVEN_RATE
    assert table.levels[table.default_level] == 1.0
    ratio = {a.name: table.levels[table.default_level + a.move] for a in table.actions}
    wanted = {"quarter": 1 / 4, "half": 1 / 2, "down_sqrt2": 2**-0.5, "hold": 1.0, "up_sqrt2": 2**0.5, "double": 2.0}
    assert ratio == pytest.approx(wanted | {"quadruple": 4.0})


def test_the_joint_table_has_every_move_with_every_choice():
    table = action_table("joint")
    pairs = {(action.move, action.choice) for action in table.actions}
    expected = {(move, choice) for move in (-2, -1, 0, 1, 2) for choice in UpdateChoice}
    expected -= {(move, UpdateChoice.COOLDOWN) for move in (-2, -1, 1, 2)}
    expected -= {(move, UpdateChoice.QUASI_HYPERBOLIC) for move in (-2, -1, 0, 1, 2)}
    assert pairs == expected
    assert table.num_actions == len(expected) == 21


def test_the_careful_table_starts_low_and_goes_down_faster_than_up():
    table = action_table("careful")
    assert table.levels[table.default_level] == pytest.approx(2.5e-3 / 1.3**3)
    assert [action.move for action in table.actions] == [-4, -2, -1, 0, 1]
    assert all(high / low == pytest.approx(1.3) for low, high in zip(table.levels, table.levels[1:], strict=False))


def test_the_levels_table_reaches_every_level():
    table = action_table("levels")
    assert [action.level for action in table.actions] == list(range(len(table.levels)))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_is_sound_and_survives_json(table):
    assert len(set(table.names)) == table.num_actions
    assert list(table.levels) == sorted(table.levels)
    holding = table.actions[table.hold]
    assert (holding.move, holding.choice) == (0, UpdateChoice.NONE)
    assert holding.level in (None, table.default_level)
    again = ActionTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert again.hash == table.hash


def test_the_hash_changes_with_whatever_gives_an_index_its_meaning():
    table = action_table("moves")
    reordered = (table.actions[1], table.actions[0], *table.actions[2:])
    changed = [
        replace(table, actions=reordered),
        replace(table, levels=(*table.levels[:-1], 1.0)),
        replace(table, default_level=3),
        replace(table, unit=LevelUnit.GIVEN_RATE),
        *(other for other in TABLES if other != table),
    ]
    assert len({table.hash, *(other.hash for other in changed)}) == len(changed) + 1


def test_an_unknown_table_is_named_together_with_those_there_are():
    with pytest.raises(UserError, match="moves_only") as caught:
        action_table("move")
    assert "'move'" in str(caught.value)
