"""Rows to examples: which column plays which role, and what an example of each objective is.

`DataSpec.fields` maps a role to a column, to a path into nested columns (`translation.de`), or to a template of columns
(`"Translate to German: {en}"`). Where it is empty the usual column names are recognised.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_files import Place, Table, shorten
from llmrl_envs.jobs.task import Objective

TEXT_COLUMNS = ("text", "content")
CLASSIFICATION_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
LABEL_COLUMNS = ("label", "labels")
INSTRUCTION_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)

_MISSING = object()


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class TextExample(NamedTuple):
    """A document to model."""

    text: str
    place: Place

    @property
    def identity(self) -> tuple[object, ...]:
        """Examples that share it are the same example."""
        return (self.text,)


class InstructionExample(NamedTuple):
    """A conversation so far and the answer to learn."""

    prompt: tuple[Message, ...]
    completion: str
    place: Place

    @property
    def identity(self) -> tuple[object, ...]:
        """Examples that share it are the same example."""
        return (*self.prompt, self.completion)


class ClassificationExample(NamedTuple):
    """A text, or a pair of texts, and its class: a number or a name."""

    text: str
    text_pair: str | None
    label: int | str
    place: Place

    @property
    def identity(self) -> tuple[object, ...]:
        """Examples that share it are the same example, whatever their labels say."""
        return (self.text, self.text_pair)


Example = TextExample | InstructionExample | ClassificationExample


def read_examples(table: Table, objective: Objective, fields: Mapping[str, str]) -> list[Example]:
    """Turns the rows of a table into examples of an objective.

    Raises:
        UserError: A column is missing, or a value is missing or of another type than text.
    """
    make = _MAKERS[objective](table, fields)
    return [make(row, table.place(index)) for index, row in enumerate(table.rows)]


Row = Mapping[str, object]
Maker = Callable[[Row, Place], Example]


def _text_maker(table: Table, fields: Mapping[str, str]) -> Maker:
    columns = table.columns
    source = fields.get("text") or _first_present(TEXT_COLUMNS, columns) or (columns[0] if len(columns) == 1 else None)
    if source is None:
        raise _unrecognised(table, "a column 'text'", "text")
    _check_columns(source, table, "text")
    return lambda row, place: TextExample(_render(source, row, place), place)


def _instruction_maker(table: Table, fields: Mapping[str, str]) -> Maker:
    columns = table.columns
    if "messages" in fields or (not fields and "messages" in columns):
        source = fields.get("messages", "messages")
        _check_columns(source, table, "messages")
        return lambda row, place: _conversation(_lookup(row, source), place, source)
    if fields:
        return _given_instruction_maker(table, fields)
    for prompt, completion in INSTRUCTION_COLUMNS:
        if prompt in columns and completion in columns:
            extra = "input" if prompt == "instruction" and "input" in columns else None
            return lambda row, place: _instruction(row, place, prompt, completion, extra)
    expected = "columns messages, or " + ", or ".join(f"{a} and {b}" for a, b in INSTRUCTION_COLUMNS)
    raise _unrecognised(table, expected, "prompt and completion")


def _given_instruction_maker(table: Table, fields: Mapping[str, str]) -> Maker:
    missing = {"prompt", "completion"} - set(fields)
    if missing:
        got = ", ".join(fields)
        raise UserError(
            "instruction fields are incomplete", where="data.fields", expected="prompt, completion", got=got
        )
    for role in ("prompt", "completion"):
        _check_columns(fields[role], table, role)
    return lambda row, place: _instruction(row, place, fields["prompt"], fields["completion"], None)


def _instruction(row: Row, place: Place, prompt: str, completion: str, extra: str | None) -> Example:
    """One prompt and its completion; either may itself be a list of messages."""
    asked = _lookup(row, prompt)
    if isinstance(asked, list):
        answer = _lookup(row, completion)
        turns = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return _conversation([*asked, *turns], place, f"{prompt} and {completion}")
    content = _render(prompt, row, place)
    addition = row.get(extra) if extra else None
    if addition:
        content = f"{content}\n\n{addition}"
    return InstructionExample((Message("user", content),), _render(completion, row, place), place)


def _conversation(value: object, place: Place, source: str) -> Example:
    """A list of messages: the last one is the completion, those before it the prompt."""
    turns = value if isinstance(value, list) else []
    messages = [Message(str(turn.get("role")), turn["content"]) for turn in turns if _is_message(turn)]
    if len(messages) < 2 or len(messages) != len(turns) or messages[-1].role != "assistant":
        raise UserError(
            f"column {source!r} holds no conversation that ends with an answer",
            where=str(place),
            expected='[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            got=shorten(repr(value)),
        )
    return InstructionExample(tuple(messages[:-1]), messages[-1].content, place)


def _is_message(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _classification_maker(table: Table, fields: Mapping[str, str]) -> Maker:
    columns = table.columns
    text, text_pair = fields.get("text"), fields.get("text_pair")
    if text is None:
        found = [
            pair for pair in CLASSIFICATION_COLUMNS if pair[0] in columns and (pair[1] is None or pair[1] in columns)
        ]
        if not found:
            raise _unrecognised(table, "a column 'text' or 'sentence'", "text")
        text, text_pair = found[0][0], text_pair or found[0][1]
    label = fields.get("label") or _first_present(LABEL_COLUMNS, columns)
    if label is None:
        raise _unrecognised(table, "a column 'label'", "label")
    for role, source in (("text", text), ("text_pair", text_pair), ("label", label)):
        if source is not None:
            _check_columns(source, table, role)
    return lambda row, place: ClassificationExample(
        _render(text, row, place),
        None if text_pair is None else _render(text_pair, row, place),
        _label(_lookup(row, label), place, label),
        place,
    )


def _label(value: object, place: Place, column: str) -> int | str:
    """A class as a number where it is one, else as its name; CSV gives numbers as text."""
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() else text
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    got = "nothing" if value is None or value is _MISSING else shorten(repr(value))
    raise UserError(
        f"label in column {column!r} is no class", where=str(place), expected="an integer or a name", got=got
    )


def label_column(table: Table, fields: Mapping[str, str]) -> str | None:
    """The column that the labels come from."""
    return fields.get("label") or _first_present(LABEL_COLUMNS, table.columns)


def template_columns(source: str) -> tuple[str, ...]:
    """The columns that a role reads: those in the braces of a template, otherwise the one it names.

    >>> template_columns("Translate to German: {en}"), template_columns("prompt")
    (('en',), ('prompt',))
    """
    if "{" not in source and "}" not in source:
        return (source,)
    try:
        return tuple(name for _, name, _, _ in string.Formatter().parse(source) if name is not None)
    except ValueError as error:
        expected = "columns in braces, doubled braces for literal ones"
        raise UserError(
            f"malformed template: {error}", where="data.fields", expected=expected, got=repr(source)
        ) from None


def _render(source: str, row: Row, place: Place) -> str:
    """The text of a column, or of a template with the columns filled in."""
    if "{" not in source and "}" not in source:
        return _text(row, source, place)
    # Not str.format: a column's name may hold dots, and a template must not reach attributes.
    parts = string.Formatter().parse(source)
    return "".join(literal + ("" if name is None else _text(row, name, place)) for literal, name, _, _ in parts)


def _text(row: Row, column: str, place: Place) -> str:
    value = _lookup(row, column)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    got = "nothing" if value is None or value is _MISSING else f"{type(value).__name__} {shorten(repr(value))}"
    raise UserError(f"column {column!r} holds no text", where=str(place), expected="text", got=got)


def _lookup(row: Row, column: str) -> object:
    """The value of a column; dots lead into nested ones unless a column is called so."""
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _first_present(candidates: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in columns), None)


def _check_columns(source: str, table: Table, role: str) -> None:
    columns = table.columns
    for name in template_columns(source):
        if all(_lookup(row, name) is _MISSING for row in table.rows):
            close = difflib.get_close_matches(name, columns, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"column {name!r} is missing (read as {role})",
                where=str(table.place(0)),
                expected=f"one of the columns there are: {', '.join(columns)}",
                got=f"{name!r}{hint}",
            )


def _unrecognised(table: Table, expected: str, roles: str) -> UserError:
    return UserError(
        f"no column recognised as {roles}",
        where=str(table.place(0)),
        expected=f"{expected}; or name columns in data.fields",
        got=f"columns {', '.join(table.columns)}",
    )


_MAKERS: Mapping[Objective, Callable[[Table, Mapping[str, str]], Maker]] = {
    "language_modeling": _text_maker,
    "instruction": _instruction_maker,
    "classification": _classification_maker,
}
