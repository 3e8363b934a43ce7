"""Cuts one set of examples into train, validation and test, the same way every time.

The rule: examples are ordered by the SHA-256 of their content, the first go to validation, the next to test, the rest
to train. So the cut depends on what the examples say and not on their order or on any generator, and examples that
say the same end up in the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_sources import SPLIT_NAMES, Split
from llmrl_envs.jobs.examples import Example, TextExample

FEW_DOCUMENTS = 10
"""A text of fewer documents is cut by position, because whole documents would make splits of odd sizes."""


def complete_splits(
    given: Mapping[Split, Sequence[Example]], fractions: tuple[float, float, float]
) -> dict[Split, list[Example]]:
    """Cuts the splits that were not given from the training examples.

    Args:
        given: The splits there are; `train` is one of them.
        fractions: Shares of train, validation and test. The shares of the splits that are given are left out, and the
            others keep their proportions.

    Raises:
        UserError: There are too few different examples to fill the splits.
    """
    splits: dict[Split, list[Example]] = {split: list(examples) for split, examples in given.items()}
    shares = dict(zip(SPLIT_NAMES, fractions, strict=True))
    missing = [split for split in shares if split not in splits]
    if missing:
        total = shares["train"] + sum(shares[split] for split in missing)
        wanted = {split: shares[split] / total for split in missing}
        splits.update(cut(splits["train"], wanted))
    return splits


def cut(examples: Sequence[Example], wanted: Mapping[Split, float]) -> dict[Split, list[Example]]:
    """Cuts the `wanted` shares from examples, by the rule above; what is left is train. Each keeps the file's order."""
    texts = [example for example in examples if isinstance(example, TextExample)]
    if texts and len(texts) < FEW_DOCUMENTS:
        return _cut_by_position(texts, wanted)
    digests = [_digest(example) for example in examples]
    groups = sorted(set(digests))
    if len(groups) <= len(wanted):
        raise UserError(
            "too few different examples to cut into splits",
            where=examples[0].place.source,
            expected=f"at least {len(wanted) + 1}, or a file for each split",
            got=len(groups),
        )
    counts = {digest: 0 for digest in groups}
    for digest in digests:
        counts[digest] += 1
    owner: dict[bytes, Split] = {}
    position = 0
    for split, share in wanted.items():
        target, filled = max(1, round(share * len(examples))), 0
        while filled < target and position < len(groups) - 1:
            owner[groups[position]] = split
            filled += counts[groups[position]]
            position += 1
    splits: dict[Split, list[Example]] = {split: [] for split in ("train", *wanted)}
    for example, digest in zip(examples, digests, strict=True):
        splits[owner.get(digest, "train")].append(example)
    return splits


def _digest(example: Example) -> bytes:
    return hashlib.sha256(repr(example.identity).encode("utf-8", "surrogatepass")).digest()


def _cut_by_position(documents: Sequence[TextExample], wanted: Mapping[Split, float]) -> dict[Split, list[Example]]:
    """Joins the documents and cuts the shares from the end, at a space where one is near."""
    text = "\n\n".join(document.text for document in documents)
    place = documents[0].place
    splits: dict[Split, list[Example]] = {}
    end = len(text)
    for split, share in reversed(list(wanted.items())):
        start = _space_near(text, end - max(1, round(share * len(text))), end)
        splits[split] = [TextExample(text[start:end].strip(), place)]
        end = start
    splits["train"] = [TextExample(text[:end].strip(), place)]
    if not all(example.text for split in splits.values() for example in split if isinstance(example, TextExample)):
        raise UserError("text is too short to cut into splits", where=str(place), got=f"{len(text)} characters")
    return splits


def _space_near(text: str, start: int, end: int, reach: int = 100) -> int:
    """The first white space at or after `start`, or `start` itself where none is near (as in Chinese)."""
    window = text[start : min(end - 1, start + reach)]
    return next((start + offset for offset, character in enumerate(window) if character.isspace()), start)


def fixed_subset(num_examples: int, size: int) -> NDArray[np.int64]:
    """`size` of the indices below `num_examples`, chosen at random but always the same ones, ascending."""
    if size >= num_examples:
        return np.arange(num_examples)
    chosen = np.random.default_rng(num_examples).permutation(num_examples)[:size]
    return np.sort(chosen)


def noisy_answers(num_examples: int, noise: float) -> NDArray[np.int64]:
    """For each example, the one whose answer it gets: itself, but another one for a share `noise` of them.

    Always the same ones. A single example has no other to get an answer from.
    """
    answers: NDArray[np.int64] = np.arange(num_examples)
    count = round(noise * num_examples)
    if count and num_examples > 1:
        rng = np.random.default_rng([num_examples, count])
        chosen = rng.permutation(num_examples)[:count]
        answers[chosen] = (chosen + rng.integers(1, num_examples, size=count)) % num_examples
    return answers
