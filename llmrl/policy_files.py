"""Reads a policy folder that a stranger may have made: every file is checked before anything in it is believed.

    config.json         schema version, action table, observation, schedule settings, training provenance
    model.safetensors   the Q-network; missing where the policy holds
    README.md           the policy card

Nothing is unpickled; a folder that holds a pickle, a link that leads out of it, or a key that nobody knows is refused.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import ActionTable
from llmrl_envs.interface.observation import OBSERVATION_VERSION, ObservationSpec
from llmrl_envs.interface.schedule_settings import ADDED_SETTINGS, ScheduleSettings
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmrl.policy_reference import CONFIG_FILE, WEIGHTS_FILE, HoldsOn, shortened

SCHEMA_VERSION = 1
MAX_CONFIG_BYTES = 4 * 2**20
"""A config of this size is no config; the largest that the code writes has a few kilobytes."""

_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill"})
_PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_TORCH_ARCHIVE = b"PK\x03\x04"
_LONGEST_NAME = 200
_SAFETENSORS_START = 8
"""Bytes before the JSON header of a safetensors file: its length."""


class PolicyConfig(BaseModel):
    """`config.json` of a policy; unknown and missing keys are errors.

    Attributes:
        schema_version: Version of this file's layout.
        kind: A Q-network, or the policy that holds.
        action_table: The table, as `ActionTable.to_dict` gives it.
        action_table_hash: Its digest.
        observation: `ObservationSpec.to_dict` of the observation that the network was trained on.
        observation_hash: Its digest.
        schedule: Arguments of the `ScheduleSettings` that the actions were learned with.
        provenance: What the policy was trained on, and its results.
        holds_on: Jobs on which it holds; see `SchedulePolicy.for_model`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    kind: Literal["network", "hold"]
    action_table: dict[str, Any]
    action_table_hash: str
    observation: dict[str, Any]
    observation_hash: str
    schedule: dict[str, Any]
    provenance: dict[str, Any] = Field(default_factory=dict)
    holds_on: list[HoldsOn] = Field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PolicyLanguage:
    """What a policy's config says, understood.

    Attributes:
        config: The file.
        table: What the action indices mean.
        spec: What the observation's entries mean.
        settings: The schedule that the actions were learned with.
    """

    config: PolicyConfig
    table: ActionTable
    spec: ObservationSpec
    settings: ScheduleSettings


def read_language(folder: Path, weights_file: str = WEIGHTS_FILE) -> PolicyLanguage:
    """Checks a policy folder and reads everything but the weights.

    Args:
        folder: The policy.
        weights_file: Name of the file that holds its weights.

    Raises:
        UserError: It is no policy, damaged, unsafe, of another version, or made for another observation or action
            table; says which file.
    """
    if not os.path.lexists(folder / CONFIG_FILE):  # first, because a folder that is no policy may be a whole disk
        where = str(folder / CONFIG_FILE)
        raise UserError("the policy has no readable config", expected=CONFIG_FILE, got="no such file", where=where)
    check_folder(folder)
    config = _read_config(folder / CONFIG_FILE)
    if (config.kind == "hold") == (folder / weights_file).exists():
        raise UserError(
            "the policy's files do not fit its kind",
            where=str(folder),
            expected=f"{weights_file} beside a config of kind 'network', and none beside one of kind 'hold'",
            got=f"kind {config.kind!r} and {'no' if config.kind == 'network' else 'a'} {weights_file}",
        )
    table = _read_table(config, folder)
    return PolicyLanguage(config, table, _read_spec(config, table, folder), _read_settings(config, folder))


def check_folder(folder: Path) -> None:
    """Refuses links that lead out of the folder or nowhere, pipes and devices, pickles, and files without access.

    Raises:
        UserError: Says which file.
    """
    root = _root(folder)
    for path in sorted(folder.rglob("*")):
        try:
            _check_file(path, root)
        except (OSError, RuntimeError) as error:  # the latter where links lead in a circle
            raise UserError(
                "a file of the policy cannot be read",
                where=str(path),
                expected="files that everyone who uses the policy may read",
                got=getattr(error, "strerror", None) or str(error),
            ) from error


def _check_file(path: Path, root: Path) -> None:
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise UserError(
            "a file of the policy lies outside of its folder",
            where=str(path),
            expected="files, or links that stay inside",
            got=f"a link to {resolved}",
        )
    if path.is_dir():
        return
    if not path.is_file():  # to read from a pipe would wait for ever
        raise UserError(
            "not a file",
            where=str(path),
            expected="files and folders alone",
            got="a link to nothing" if path.is_symlink() else "a pipe, a socket or a device",
        )
    if _is_pickle(path):
        raise UserError(
            "the policy folder holds a pickle, which can run any code when it is read",
            where=str(path),
            expected="JSON and safetensors files alone",
            got=path.name,
        )


def _root(folder: Path) -> Path:
    """What links may not leave: the folder itself, or the Hub's cache of the repository that it is a snapshot of."""
    resolved = folder.resolve()
    repository = resolved.parent.parent
    is_snapshot = resolved.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if is_snapshot else resolved


def _is_pickle(path: Path) -> bool:
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        return True
    with open(path, "rb") as file:
        start = file.read(_SAFETENSORS_START + 1)
    if path.suffix == ".safetensors" and start[_SAFETENSORS_START:] == b"{":
        return False  # the length that comes first may look like the start of a pickle
    # NumPy's archives are zip files as well; they are read without pickles.
    return start.startswith(_PICKLE_STARTS) or (start.startswith(_TORCH_ARCHIVE) and path.suffix != ".npz")


def _read_config(path: Path) -> PolicyConfig:
    values = _parse_json(_read_text(path), path)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            "the policy is of another version",
            expected=f"schema_version {SCHEMA_VERSION}",
            got=shortened(repr(version)),
            where=str(path),
        )
    try:
        config = PolicyConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("the policy's config does not fit its schema", got=_told(error), where=str(path)) from error
    name = config.provenance.get("name", CONFIG_FILE)
    if not isinstance(name, str) or not is_line(name):
        raise UserError(
            "the policy's name is none",
            where=f"{path}, provenance.name",
            expected=f"at most {_LONGEST_NAME} printable characters",
            got=shortened(repr(name)),
        )
    return config


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise UserError(
                "the policy's config is too large",
                expected=f"at most {MAX_CONFIG_BYTES} bytes",
                got=f"{size} bytes",
                where=str(path),
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            "the policy has no readable config", expected=CONFIG_FILE, got=error.strerror, where=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise UserError("the policy's config is not JSON", got=shortened(str(error)), where=str(path)) from error


def _parse_json(text: str, path: Path) -> Any:
    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"the key {repeated[0]!r} stands twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=refuse_repeats)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written down anywhere
        return values
    except RecursionError as error:
        raise UserError("the policy's config is not JSON", got="too many nested brackets", where=str(path)) from error
    except ValueError as error:
        raise UserError("the policy's config is not JSON", got=shortened(str(error)), where=str(path)) from error


def _read_table(config: PolicyConfig, folder: Path) -> ActionTable:
    where = str(folder / CONFIG_FILE)
    try:
        table = ActionTable.from_dict(config.action_table)
        written = json.loads(json.dumps(table.to_dict()))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError("the policy's action table cannot be read", got=shortened(repr(error)), where=where) from error
    if defect := table_defect(table):
        raise UserError("the policy's action table cannot be used", expected=defect, got="others", where=where)
    if written != config.action_table:
        raise UserError(
            "the policy's action table cannot be read",
            expected="the keys and values that ActionTable.to_dict writes",
            got="others",
            where=where,
        )
    if table.hash != config.action_table_hash:
        raise UserError(
            "the policy's action table was changed after training",
            expected=shortened(repr(config.action_table_hash)),
            got=repr(table.hash),
            where=where,
        )
    return table


def _read_spec(config: PolicyConfig, table: ActionTable, folder: Path) -> ObservationSpec:
    stack = config.observation.get("stack")
    usable = isinstance(stack, int) and 1 <= stack <= 16
    spec = ObservationSpec(table, stack=int(stack)) if usable else None  # type: ignore[arg-type]
    if spec is None or spec.hash != config.observation_hash or spec.to_dict() != config.observation:
        names = config.observation.get("names")
        size = len(names) if isinstance(names, list) else "unknown"
        raise UserError(
            "the policy was made for another observation",
            expected=f"version {OBSERVATION_VERSION}, hash {spec.hash if spec else 'of a valid stack'}",
            got=shortened(
                f"version {config.observation.get('version')!r}, hash {config.observation_hash!r}, {size} entries"
            ),
            where=str(folder / CONFIG_FILE),
        )
    return spec


def _read_settings(config: PolicyConfig, folder: Path) -> ScheduleSettings:
    where = str(folder / CONFIG_FILE)
    wanted = {field.name for field in dataclasses.fields(ScheduleSettings)}
    if not wanted - ADDED_SETTINGS <= config.schedule.keys() <= wanted:
        raise UserError(
            "the policy's schedule settings cannot be read",
            expected=f"the keys {', '.join(sorted(wanted))}",
            got=shortened(", ".join(sorted(map(repr, config.schedule))) or "none"),
            where=where,
        )
    try:
        return TypeAdapter(ScheduleSettings).validate_json(json.dumps(config.schedule), strict=True)
    except ValidationError as error:
        raise UserError("the policy's schedule settings cannot be read", got=_told(error), where=where) from error


def table_defect(table: ActionTable) -> str | None:
    """What an action table lacks to steer a job by; None where it lacks nothing.

    >>> table_defect(ActionTable("mine", LevelUnit.GIVEN_RATE, (1.0, -2.0), 0, (ScheduleAction("hold"),)))
    'levels above zero, ascending and finite'
    """
    levels, places = table.levels, range(len(table.levels))
    ascending = all(low < high for low, high in itertools.pairwise((0.0, *levels, math.inf)))
    names = [table.name, *table.names]
    moves = [action.move for action in table.actions]
    jumps = [action.level for action in table.actions if action.level is not None]
    checks = (
        (ascending and levels, "levels above zero, ascending and finite"),
        (table.default_level in places, "a default level on the grid"),
        (all(isinstance(name, str) and is_line(name) for name in names), "names of printable characters"),
        (len(set(map(str, table.names))) == len(table.names), "a name of its own for every action"),
        ("hold" in table.names, "an action 'hold'"),
        (all(abs(move) < len(levels) for move in moves), "moves that are shorter than the grid"),
        (all(type(jump) is int and jump in places for jump in jumps), "jumps to places of the grid"),
    )
    return next((wanted for fits, wanted in checks if not fits), None)


def is_line(text: str) -> bool:
    """Whether a terminal shows a text as it is: nothing moves its cursor or colours what follows."""
    return 0 < len(text) <= _LONGEST_NAME and text.isprintable()


def _told(error: ValidationError) -> str:
    return shortened("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()))
