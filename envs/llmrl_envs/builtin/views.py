"""From a source file to a topic's text: the source itself, its English, its comments, its syntax tree, or a table."""

from __future__ import annotations

import ast
import io
import tokenize
import unicodedata
from pathlib import Path

from llmrl_envs.builtin.topics import View

# Scripts and symbols with names of their own; CJK ideographs and Hangul syllables are named by number only.
_UNICODE_RANGES = ((0x00A1, 0x2E7F), (0xA4D0, 0xABFF), (0x10000, 0x11FFF))


def read_view(path: Path, view: View) -> str:
    """The text that `view` takes from the Python file at `path`.

    Raises:
        SyntaxError: The file is not Python of the running version.
    """
    with tokenize.open(path) as file:
        source = file.read()
    if view is View.DOCSTRINGS:
        return docstrings(source)
    if view is View.COMMENTS:
        return comments(source)
    if view is View.SYNTAX_TREE:
        return syntax_tree(source)
    if view is View.DOCUMENTATION:
        return documentation(source)
    return source


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, in source order, a blank line between them.

    >>> print(docstrings('def f():\\n    "Twice."\\n    return 2'))
    Twice.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            line = getattr(node, "lineno", 0)
            if text:
                found.append((line, text))
    return "\n\n".join(text for _, text in sorted(found, key=lambda item: item[0]))


def comments(source: str) -> str:
    """The comments without their `#`; comments on neighbouring lines stay together.

    >>> print(comments('# one\\n# two\\nx = 1\\ny = 2  # three'))
    one
    two
    <BLANKLINE>
    three
    """
    lines: list[str] = []
    previous_row = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("#!: ").rstrip("# ")
        row = token.start[0]
        if lines and row != previous_row + 1:
            lines.append("")
        lines.append(text)
        previous_row = row
    return "\n".join(lines)


def syntax_tree(source: str) -> str:
    """The abstract syntax tree as text, one node a line, a blank line after each top-level statement."""
    return "\n\n".join(ast.dump(statement, indent=1) for statement in ast.parse(source).body)


def documentation(source: str) -> str:
    """The strings of the module's dictionary literals in order of their keys: `pydoc_data.topics` is one of them."""
    texts: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    texts[str(key.value)] = str(value.value)
    return "\n\n".join(texts[key].strip() for key in sorted(texts))


def unicode_table() -> str:
    """Code point, category, character and name, one a line, a blank line after each sixteen."""
    lines: list[str] = []
    for first, last in _UNICODE_RANGES:
        for code in range(first, last + 1):
            name = unicodedata.name(chr(code), "")
            if name and code % 16 == 0 and lines:
                lines.append("")
            if name:
                lines.append(f"U+{code:04X} {unicodedata.category(chr(code))} {chr(code)} {name}")
    return "\n".join(lines)
