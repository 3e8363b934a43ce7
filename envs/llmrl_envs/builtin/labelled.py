"""Built-in examples with an answer: prompts with completions, and texts with labels, from the same library files.

| `builtin:` | objective | example |
|---|---|---|
| `summaries` | instruction | the signature of a function, and the first line of its docstring |
| `signatures` | instruction | the other way round |
| `modules` | classification | a few lines of source, and which of eight topics they are from |
| `kinds` | classification | a few lines, and whether they are source, docstrings, comments, a syntax tree, ... |

All are cut from the files of the corpora's topics (`corpora.py`), which the built-in model has not seen. The splits of
a text with a label are those of its topic; functions are dealt in their order, of twenty in a row three each for
validation and test, and no signature and no summary occurs twice.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

from llmrl_envs.builtin.corpora import deal, load_corpus, topic_files
from llmrl_envs.builtin.topics import TOPICS, View
from llmrl_envs.builtin.views import read_view

Splits = dict[str, list[dict[str, str]]]

MODULES = ("argparse", "asyncio", "datetime", "email", "logging", "protocols", "tarfile", "xml")
KINDS = {
    "source": "http",
    "docstrings": "docstrings",
    "comments": "comments",
    "syntax tree": "syntax_trees",
    "documentation": "reference",
    "code table": "encodings",
    "characters": "unicode",
}
SNIPPET_CHARACTERS = 100
MAX_SNIPPETS = {"train": 200, "validation": 30, "test": 30}
"""Of each label; few enough that the labels are about equally frequent."""
_SUMMARY_CHARACTERS = (12, 80)
_SIGNATURE_CHARACTERS = 80


def example_sets() -> tuple[str, ...]:
    """Names of the sets, sorted; `builtin:NAME` in a task."""
    return tuple(sorted(_SETS))


def load_examples(name: str) -> Splits:
    """Rows of a set by split.

    Args:
        name: One of `example_sets()`.

    Returns:
        `train`, `validation` and `test`: rows of `prompt` and `completion`, or of `text` and `label`.
    """
    return _SETS[name]()


def _functions(prompt: str, completion: str) -> Splits:
    rows = [{"prompt": pair[prompt], "completion": pair[completion]} for pair in _described_functions()]
    return deal(rows)


@cache
def _described_functions() -> tuple[Mapping[str, str], ...]:
    """Signature and summary of the functions of all source topics that have both in a line."""
    found: list[Mapping[str, str]] = []
    seen: set[str] = set()
    for topic in TOPICS.values():
        if topic.view not in (View.SOURCE, View.DOCSTRINGS, View.COMMENTS):
            continue
        for path in topic_files(topic.name):
            for signature, summary in described_functions(read_view(path, View.SOURCE)):
                if seen.isdisjoint((signature, summary)):
                    found.append({"signature": signature, "summary": summary})
                    seen.update((signature, summary))
    return tuple(found)


def described_functions(source: str) -> Iterator[tuple[str, str]]:
    """Signature and first docstring line of each function of a module for which both are of a usual length.

    >>> list(described_functions('def twice(x):\\n    "Multiply by two."\\n    return 2 * x'))
    [('def twice(x):', 'Multiply by two.')]
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        low, high = _SUMMARY_CHARACTERS
        if "(" in summary.partition(" ")[0]:
            continue  # the docstrings of some modules begin with the signature
        if low <= len(summary) <= high and len(signature) <= _SIGNATURE_CHARACTERS:
            yield signature, summary


def _snippets(topics: Mapping[str, str]) -> Splits:
    """Rows of text and label from topics by label."""
    splits: Splits = {split: [] for split in MAX_SNIPPETS}
    for label, topic in topics.items():
        for split, documents in load_corpus(topic).items():
            texts = [text for document in documents for text in snippets(document)][: MAX_SNIPPETS[split]]
            splits[split] += [{"text": text, "label": label} for text in texts]
    return splits


def snippets(document: str) -> Iterator[str]:
    """Cuts a document at line ends into pieces of at least `SNIPPET_CHARACTERS`; the rest is dropped."""
    lines: list[str] = []
    for line in document.split("\n"):
        lines.append(line)
        text = "\n".join(lines).strip()
        if len(text) >= SNIPPET_CHARACTERS:
            yield text
            lines = []


_SETS: Mapping[str, Callable[[], Splits]] = {
    "summaries": partial(_functions, "signature", "summary"),
    "signatures": partial(_functions, "summary", "signature"),
    "modules": partial(_snippets, {topic: topic for topic in MODULES}),
    "kinds": partial(_snippets, KINDS),
}
