"""Built-in corpora: text that every Python carries, by topic, with fixed splits.

`builtin:json` is the source code of the running Python's modules for JSON, TOML, property lists, CSV and INI;
`builtin:reference` is the language reference in English; `builtin:encodings` are code tables; and so on
(`topics.py`). Nothing is downloaded and nothing is shipped.

How a topic is cut, so that the result depends on the Python version alone and never on the order in which a file
system lists its files:

1. files sorted by their path in the library, test folders left out;
2. **a line or a paragraph of 40 characters or more (20 in code tables) is kept where it comes first and dropped where
   it comes again**, so that none is in two splits (licence headers, boilerplate, the lower half of each code page);
3. each file is cut at blank lines into documents of about 1,000 characters;
4. topics over 320 documents keep that many, evenly spaced;
5. of each twenty documents in a row, the first fourteen are for training, three for validation, three for test.
"""

from __future__ import annotations

import difflib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from llmrl_envs.builtin.topics import TOPICS, Topic, View
from llmrl_envs.builtin.views import read_view, unicode_table
from llmrl_envs.errors import UserError

DOCUMENT_CHARACTERS = 1_000
MAX_DOCUMENTS = 320
_BLOCK = ("train",) * 14 + ("validation",) * 3 + ("test",) * 3
_Item = TypeVar("_Item")
_TEST_FOLDERS = frozenset({"test", "tests"})


def corpus_topics() -> tuple[str, ...]:
    """Names of all topics, sorted; `builtin:NAME` in a task."""
    return tuple(sorted(TOPICS))


def load_corpus(topic: str) -> dict[str, list[str]]:
    """Documents of a topic by split.

    Args:
        topic: One of `corpus_topics()`.

    Returns:
        `train`, `validation` and `test`, each a list of documents of 500 to 2,000 characters (the last of a file may
        be shorter).

    Raises:
        UserError: There is no such topic, or this Python lacks one of its files.
    """
    return deal(_documents(_find_topic(topic)))


def deal(items: Sequence[_Item]) -> dict[str, list[_Item]]:
    """Splits items that stand in an order: of each twenty fourteen for training, three for validation, three for test.

    >>> {split: len(part) for split, part in deal(range(20)).items()}
    {'train': 14, 'validation': 3, 'test': 3}
    """
    splits: dict[str, list[_Item]] = {"train": [], "validation": [], "test": []}
    for index, item in enumerate(items):
        splits[_BLOCK[index % len(_BLOCK)]].append(item)
    return splits


def topic_files(topic: str, library: Path | None = None) -> tuple[Path, ...]:
    """The library files that a topic is made of, in the order in which they are read.

    Args:
        topic: One of `corpus_topics()`.
        library: Folder of the standard library; the running Python's if not given.

    Raises:
        UserError: There is no such topic, or a source is missing.
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    return tuple(path for source in _find_topic(topic).sources for path in _source_files(topic, source, folder))


def _find_topic(name: str) -> Topic:
    if name in TOPICS:
        return TOPICS[name]
    close = difflib.get_close_matches(name, TOPICS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(f"no built-in corpus of that name{hint}", expected=f"one of {', '.join(TOPICS)}", got=repr(name))


def _source_files(topic: str, source: str, library: Path) -> list[Path]:
    for name in source.split("|"):
        module = library / f"{name}.py"
        if module.is_file():
            return [module]
        package = [path for path in (library / name).rglob("*.py") if not _is_test(path.relative_to(library))]
        if package:
            return sorted(package, key=lambda path: path.relative_to(library).as_posix())
    raise UserError(
        f"this Python lacks a part of the standard library that builtin:{topic} is made of",
        expected=f"{source}.py or a package {source}/",
        got="neither",
        where=str(library),
    )


def _is_test(relative: Path) -> bool:
    return not _TEST_FOLDERS.isdisjoint(relative.parts)


def _documents(topic: Topic) -> list[str]:
    """All documents of a topic, before they are split."""
    if topic.view is View.UNICODE_TABLE:
        texts = [unicode_table()]
    else:
        texts = [read_view(path, topic.view) for path in topic_files(topic.name)]
    seen: set[str] = set()
    documents = [document for text in texts for document in _cut(_drop_repeated(text, topic.distinct_characters, seen))]
    return _evenly_spaced(list(dict.fromkeys(documents)), MAX_DOCUMENTS)


def _drop_repeated(text: str, at_least: int, seen: set[str]) -> list[str]:
    """Lines of `text` less those lines and paragraphs of `at_least` characters that `seen` has; adds the new ones."""
    kept: list[str] = []
    for paragraph in _paragraphs(text):
        lines = [line.rstrip() for line in paragraph.split("\n") if _is_new(line, at_least, seen)]
        if len(lines) < 2 or _is_new("\n".join(lines), at_least, seen):
            kept += [*lines, ""]
    return kept


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n(?:[ \t\f]*\n)+", text)


def _is_new(text: str, at_least: int, seen: set[str]) -> bool:
    """Whether `text` is shorter than `at_least` or not in `seen` yet, where it is put."""
    key = text.strip()
    if len(key) < at_least:
        return True
    new = key not in seen
    seen.add(key)
    return new


def _cut(lines: list[str]) -> list[str]:
    """Documents of about `DOCUMENT_CHARACTERS`: cut at a blank line once that long, anywhere at twice as long."""
    documents: list[str] = []
    current: list[str] = []
    size = 0
    for line in lines:
        current.append(line)
        size += len(line) + 1
        if (size >= DOCUMENT_CHARACTERS and not line) or size >= 2 * DOCUMENT_CHARACTERS:
            documents.append("\n".join(current))
            current, size = [], 0
    documents.append("\n".join(current))
    return [f"{document.strip(chr(10))}\n" for document in documents if document.strip()]


def _evenly_spaced(documents: list[str], most: int) -> list[str]:
    if len(documents) <= most:
        return documents
    return [documents[index * len(documents) // most] for index in range(most)]
