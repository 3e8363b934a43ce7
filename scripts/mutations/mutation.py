"""What a known bug is to `check_mutations.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug: a text of one file, what it becomes, and the test files that are to notice."""

    name: str
    file: str  # in llmrl/dqn
    old: str
    new: str
    tests: tuple[str, ...]  # tests/llmrl/dqn/test_NAME.py
    quick: bool = False
