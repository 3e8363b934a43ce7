"""From pydantic's errors to what a person wants to read: the key, the line, what was expected and what was got."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl_envs.errors import UserError
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmrl.config_base import section_fields

EXPECTED_BY_TYPE: Mapping[str, str] = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (key: value)",
    "model_type": "a section (key: value)",
    "dataclass_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "at least {min_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
}


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Attributes:
        what: One sentence.
        where: File, line and key.
        expected: What would have been right.
        got: What was found.
    """

    what: str
    where: str | None = None
    expected: str | None = None
    got: str | None = None

    @classmethod
    def from_user_error(cls, error: UserError) -> Problem:
        """The same mistake, told by a `UserError`."""
        got = None if error.got is None else str(error.got)
        return cls(error.what, error.where, error.expected, got)

    def as_error(self) -> UserError:
        """The mistake as an error of its own."""
        return UserError(self.what, expected=self.expected, got=self.got, where=self.where)


def combine_problems(problems: Sequence[Problem]) -> UserError:
    """One error that tells all the problems."""
    if len(problems) == 1:
        return problems[0].as_error()
    blocks = "\n\n".join(str(problem.as_error()) for problem in problems)
    return UserError(f"{len(problems)} mistakes in the configuration\n\n{blocks}")


def problems_of(
    error: ValidationError,
    model: type[BaseModel],
    data: Any,
    *,
    source: str,
    lines: Mapping[str, int],
    overridden: Collection[str] = (),
) -> list[Problem]:
    """Turns a validation error into problems, one per key.

    Args:
        error: What pydantic found.
        model: The model that was validated.
        data: What it was given.
        source: Name of the file.
        lines: Line of each dotted key of the file.
        overridden: Dotted keys that the command line set.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_key.setdefault(".".join(_real_path(details, data)), []).append(details)
    # Entries that failed are not counted, so a list of nothing but mistakes is called too short as well.
    consequences = {
        key
        for key, group in by_key.items()
        if group[0]["type"] == "too_short" and any(other.startswith(f"{key}.") for other in by_key)
    }
    return [
        _problem(group, key, place_of(key, source, lines, overridden), model)
        for key, group in by_key.items()
        if key not in consequences
    ]


def _real_path(details: ErrorDetails, data: Any) -> list[str]:
    """The error's location without the names that pydantic gives to the branches of a union."""
    path: list[str] = []
    value = data
    for item in details["loc"]:
        if _has(value, item):
            value = value[item]
        elif not (details["type"] == "missing" and item == details["loc"][-1]):
            continue
        path.append(str(item))
    error = details.get("ctx", {}).get("error")
    if isinstance(error, UserError) and error.where and _has(value, error.where.rpartition(".")[2]):
        path.append(error.where.rpartition(".")[2])
    return path


def _has(value: Any, item: str | int) -> bool:
    if isinstance(value, Mapping):
        return item in value
    return isinstance(value, list | tuple) and isinstance(item, int) and item < len(value)


def place_of(key: str, source: str, lines: Mapping[str, int], overridden: Collection[str]) -> str:
    """Where a dotted key stands: on the command line, or in the file `source`, in which line; see `problems_of`."""
    if key in overridden:
        return f"command line, {key}"
    parent = key
    while parent and parent not in lines:
        parent = parent.rpartition(".")[0]
    line = f", line {lines[parent]}" if parent else ""
    return f"{source}{line}, {key}" if key else f"{source}{line}"


def _problem(group: list[ErrorDetails], key: str, place: str, model: type[BaseModel]) -> Problem:
    first = group[0]
    kind, name = first["type"], key.rpartition(".")[2]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        siblings = sorted(_fields_at(model, key.split(".")[:-1]))
        suggestion = _suggest_key(key, siblings, model)
        hint = f"; did you mean {suggestion!r}?" if suggestion else ""
        expected = None if suggestion else f"one of {', '.join(siblings)}"
        return Problem(f"unknown key {name!r}{hint}", place, expected, _shown(first["input"]))
    if kind == "missing":
        return Problem(f"the key {name!r} is missing", place, "a value")
    if kind in ("value_error", "assertion_error"):
        return _problem_of_validator(first, place, key)
    expectations = list(dict.fromkeys(_expected(details) for details in group))
    got = first["input"]
    hint = _suggest_value(got, group)
    return Problem(f"wrong value of {name!r}{hint}", place, " or ".join(expectations), _shown(got))


def _problem_of_validator(details: ErrorDetails, place: str, key: str) -> Problem:
    """A check of our own: a `UserError` tells its parts, another `ValueError` one sentence."""
    error = details.get("ctx", {}).get("error")
    if isinstance(error, UserError):
        told = Problem.from_user_error(error)
        return Problem(told.what, place, told.expected, told.got)
    what = str(error) if error is not None else details["msg"]
    got = details["input"]
    return Problem(what, place, None, None if isinstance(got, Mapping | BaseModel) or not key else _shown(got))


def _expected(details: ErrorDetails) -> str:
    template = EXPECTED_BY_TYPE.get(details["type"])
    return template.format(**details.get("ctx", {})) if template else details["msg"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _suggest_value(got: Any, group: Sequence[ErrorDetails]) -> str:
    choices = [
        choice.strip("' ")
        for details in group
        if details["type"] == "literal_error"
        for choice in str(details["ctx"]["expected"]).replace(" or ", ", ").split(",")
    ]
    close = difflib.get_close_matches(str(got), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _suggest_key(key: str, siblings: Sequence[str], model: type[BaseModel]) -> str | None:
    """The nearest name beside the key, or the place elsewhere in the configuration where this name belongs."""
    name = key.rpartition(".")[2]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if close:
        return close[0]
    elsewhere = [path for path in _all_paths(section_fields(model)) if path.rpartition(".")[2] == name]
    return elsewhere[0] if elsewhere else None


def _sections_in(annotation: Any) -> list[dict[str, Any]]:
    """Keys of the sections that a type mentions, also within `X | None` or `tuple[X, ...]`."""
    fields = section_fields(annotation)
    if fields:
        return [fields]
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> set[str]:
    """Names of the keys that the section at a dotted path may have."""
    sections = [section_fields(model)]
    for part in path:
        if not part.isdigit():
            sections = [inner for outer in sections if part in outer for inner in _sections_in(outer[part])]
    return {name for section in sections for name in section}


def _all_paths(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of every key, shallow ones first; entries of lists are named by their list."""
    here = [f"{prefix}{name}" for name in section]
    inner = [
        path
        for name, annotation in section.items()
        for found in _sections_in(annotation)
        for path in _all_paths(found, f"{prefix}{name}.")
    ]
    return here + inner
