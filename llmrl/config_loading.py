"""From a YAML file and `key.sub=value` overrides to a checked configuration; every mistake is reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml
from llmrl_envs.errors import UserError
from pydantic import ValidationError

from llmrl.config import CONFIG_MODELS, CompareConfig, ConfigKind, FinetuneConfig, TrainConfig
from llmrl.config_base import Settings
from llmrl.config_errors import Problem, combine_problems, place_of, problems_of

KIND_KEYS: Mapping[ConfigKind, frozenset[str]] = {
    "train": frozenset({"env", "agent", "training"}),
    "finetune": frozenset({"task", "learning_rate", "save_model"}),
    "compare": frozenset({"tasks", "methods", "learning_rate_factors", "seeds", "oracle_factors", "workers"}),
}
"""Top-level keys that only one kind of configuration has."""

_VARIABLE = re.compile(r"\$\{env:(\w+)\}")

SettingsT = TypeVar("SettingsT", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-3` is a number (YAML 1.1 reads text), and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Builds a mapping.

        Raises:
            yaml.constructor.ConstructorError: A key stands twice.
        """
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen and key_node.value != "<<":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Reads YAML text.

    Raises:
        UserError: The text is not YAML; says the line and the column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise UserError("not valid YAML", where=place, expected="YAML", got=error.problem or error.context) from None
    except yaml.YAMLError as error:
        raise UserError("not valid YAML", where=where, got=str(error)) from None


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping; an empty file is an empty mapping.

    Raises:
        UserError: The file is missing, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such configuration file", where=str(path), expected="a YAML file") from None
    except IsADirectoryError:
        raise UserError("a directory, not a configuration file", where=str(path), expected="a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=f"{path}, byte {error.start}", expected="a YAML file") from None
    data = parse_yaml(text, where=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError("not a mapping", where=str(path), expected="key: value lines", got=type(data).__name__)
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one value in nested mappings and lists: `env.tasks.tasks.0.steps=20`. Missing sections are made.

    Raises:
        UserError: No `=`, an empty key, a value that is not YAML, or a way that leads through something else.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError("not an override", expected="key.sub=value", got=override, where="command line")
    value = parse_yaml(text, where=f"command line, {key}")
    target: Any = data
    for position, part in enumerate(parts):
        path = ".".join(parts[:position])
        last = position == len(parts) - 1
        if isinstance(target, list):
            if not (part.isdigit() and int(part) < len(target)):
                expected = f"an index below {len(target)}"
                raise UserError(f"no such entry of {path}", expected=expected, got=part, where="command line")
            if last:
                target[int(part)] = value
            else:
                target = target[int(part)]
        elif isinstance(target, dict):
            if last:
                target[part] = value
            elif target.get(part) is None:
                target[part] = {}
                target = target[part]
            else:
                target = target[part]
        else:
            expected = f"{path} to be a section; write it as one in the file"
            raise UserError(f"{key} leads through a value", expected=expected, got=repr(target), where="command line")


def expand_environment(value: Any, key: str = "") -> tuple[Any, dict[str, str]]:
    """Puts the values of environment variables where a text says `${env:NAME}`.

    Args:
        value: Nested mappings and lists.
        key: Where they stand, as a dotted path.

    Returns:
        The same with the variables filled in; and the variables that are not set, each with the first key that needs
        it.
    """
    if isinstance(value, str):
        missing = {name: key for name in _VARIABLE.findall(value) if name not in os.environ}
        return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value), missing
    if not isinstance(value, dict | list):
        return value, {}
    unset: dict[str, str] = {}
    found: dict[Any, Any] = {}
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        found[name], inner = expand_environment(item, f"{key}.{name}" if key else str(name))
        unset = inner | unset
    return found if isinstance(value, dict) else list(found.values()), unset


def guess_kind(data: Mapping[str, Any]) -> ConfigKind:
    """Tells by its top-level keys which command a configuration is for.

    Raises:
        UserError: Nothing in it tells, or it could be several.
    """
    kinds = [kind for kind, keys in KIND_KEYS.items() if keys & data.keys()]
    if len(kinds) == 1:
        return kinds[0]
    raise UserError(
        "cannot tell what the configuration is for",
        expected="env (train), task (finetune) or tasks (compare) at the top level, or --kind",
        got=", ".join(map(str, data)) or "an empty file",
    )


@overload
def load_config(kind: Literal["train"], path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig: ...
@overload
def load_config(kind: Literal["finetune"], path: Path | str, overrides: Sequence[str] = ()) -> FinetuneConfig: ...
@overload
def load_config(kind: Literal["compare"], path: Path | str, overrides: Sequence[str] = ()) -> CompareConfig: ...
@overload
def load_config(kind: None, path: Path | str, overrides: Sequence[str] = ()) -> Settings: ...


def load_config(kind: ConfigKind | None, path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Reads and checks a configuration; `${env:NAME}` in a text is the environment variable of that name.

    Args:
        kind: Which command it is for; None tells by its keys.
        path: The YAML file.
        overrides: `key.sub=value`, applied in order; values are YAML.

    Raises:
        UserError: Everything that is wrong, each with its key, what was expected and what was got.
    """
    path = Path(path)
    data = read_yaml_mapping(path)
    problems: list[Problem] = []
    for override in overrides:
        try:
            apply_override(data, override)
        except UserError as error:
            problems.append(Problem.from_user_error(error))
    model = CONFIG_MODELS[guess_kind(data) if kind is None else kind]
    overridden = {override.partition("=")[0].strip() for override in overrides}
    data, unset = expand_environment(data)
    for name, key in unset.items():
        place = place_of(key, str(path), key_lines(path.read_text(encoding="utf-8")), overridden)
        problems.append(Problem(f"the environment variable {name} is not set", place, f"{name}=... before the command"))
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        lines = key_lines(path.read_text(encoding="utf-8"))
        problems += problems_of(error, model, data, source=str(path), lines=lines, overridden=overridden)
    if problems:
        raise combine_problems(problems)
    return config


def key_lines(text: str) -> dict[str, int]:
    """Line (from 1) of every key and list entry of a valid YAML text, by dotted path."""
    lines: dict[str, int] = {}

    def visit(node: yaml.Node, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            entries = [(key.value, key.start_mark.line, item) for key, item in node.value]
        elif isinstance(node, yaml.SequenceNode):
            entries = [(str(index), item.start_mark.line, item) for index, item in enumerate(node.value)]
        else:
            return
        for name, line, item in entries:
            inner = f"{path}.{name}" if path else str(name)
            lines[inner] = line + 1
            visit(item, inner)

    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        visit(root, "")
    return lines


def config_to_dict(config: Settings) -> dict[str, Any]:
    """The configuration with every default filled in, as plain values."""
    return config.model_dump(mode="json", by_alias=True)


def config_to_yaml(config: Settings) -> str:
    """The configuration with every default filled in, as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)
