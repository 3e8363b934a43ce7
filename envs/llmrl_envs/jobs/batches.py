"""Tokenised examples and how they become batches: pure functions of an integer, no loader, no worker, no state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

IGNORED = -100
"""Label of a position that is no target, as the losses of torch and transformers have it."""

_BAD_BATCHES = 0xBAD
"""Keeps the random numbers of bad batches apart from those of the data order."""


class TokenizedSplit:
    """The tokenised examples of one split, kept end to end in flat arrays; a batch is a few slice copies.

    Args:
        input_ids: Tokens of each example.
        labels: Either a token (or `IGNORED`) for every position of each example, or one class for each example.
        pad_token_id: Token that fills the end of shorter examples; masked, so any token does.
        token_type_ids: Segment of every position, for pairs of texts where the tokenizer tells segments apart.

    Attributes:
        num_tokens: int64[N], tokens of each example, padding not counted.
        num_target_tokens: int64[N], targets of each example; 1 for a class.
    """

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | Sequence[int],
        pad_token_id: int,
        token_type_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if len(input_ids) != len(labels):
            raise ValueError(f"expected a label entry for each of {len(input_ids)} examples, got {len(labels)}")
        self.pad_token_id = pad_token_id
        self.num_tokens = np.array([len(tokens) for tokens in input_ids], dtype=np.int64)
        self._offsets = np.concatenate(([0], np.cumsum(self.num_tokens)))
        self._tokens = _flatten(input_ids)
        self._types = None if token_type_ids is None else _flatten(token_type_ids)
        self.is_classification = len(labels) > 0 and isinstance(labels[0], int | np.integer)
        self._labels = np.array(labels, dtype=np.int32) if self.is_classification else _flatten(labels)  # type: ignore[arg-type]
        if not self.is_classification and len(self._labels) != len(self._tokens):
            raise ValueError(f"expected a label for each of {len(self._tokens)} tokens, got {len(self._labels)}")
        self.num_target_tokens = self._count_targets()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def input_ids(self) -> list[NDArray[np.int32]]:
        """Tokens of each example."""
        return self._split(self._tokens)

    @property
    def labels(self) -> list[NDArray[np.int32]] | NDArray[np.int32]:
        """Labels of each example's positions, or one class for each example, int32[N]."""
        return self._labels if self.is_classification else self._split(self._labels)

    def collate(
        self, indices: Sequence[int] | NDArray[np.int64], spoiled: bool | NDArray[np.bool_] = False
    ) -> dict[str, torch.Tensor]:
        """Makes a batch, padded at the end to its longest example.

        Args:
            indices: int64[B], examples of the batch.
            spoiled: bool[B] or one for all: which examples are spoiled. Tokens, as inputs and as targets, are then
                those of the split in random order; a class is then the next class, and the text stays. Counts of
                tokens and of targets do not change.

        Returns:
            `input_ids` and `attention_mask` int64[B, L]; `labels` int64[B, L] with `IGNORED` where there is no target,
            or int64[B] for classification; `token_type_ids` int64[B, L] where the tokenizer tells segments apart.
        """
        rows = np.asarray(indices, dtype=np.int64)
        starts = self._offsets[rows]
        lengths = self._offsets[rows + 1] - starts
        positions = np.arange(int(lengths.max()), dtype=np.int64)
        inside = positions < lengths[:, None]
        places = np.where(inside, starts[:, None] + positions, 0)

        def padded(flat: NDArray[np.int32], fill: int) -> NDArray[np.int64]:
            return np.where(inside, flat[places], fill).astype(np.int64)

        batch = {"input_ids": padded(self._tokens, self.pad_token_id), "attention_mask": inside.astype(np.int64)}
        if self._types is not None:
            batch["token_type_ids"] = padded(self._types, 0)
        labels = self._labels[rows].astype(np.int64) if self.is_classification else padded(self._labels, IGNORED)
        if np.any(spoiled):
            bad = np.broadcast_to(spoiled, rows.shape)
            if self.is_classification:
                labels = np.where(bad, (labels + 1) % (int(self._labels.max()) + 1), labels)
            else:
                noise = padded(self._scrambled, self.pad_token_id)
                batch["input_ids"] = np.where(bad[:, None], noise, batch["input_ids"])
                labels = np.where(bad[:, None] & (labels != IGNORED), noise, labels)
        batch["labels"] = labels
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    @cached_property
    def _scrambled(self) -> NDArray[np.int32]:
        """The tokens of the split in random order, always the same one."""
        return np.random.default_rng(len(self._tokens)).permutation(self._tokens)

    def _count_targets(self) -> NDArray[np.int64]:
        """Targets of each example: 1 for a class; for tokens those that have a token before them to be told from."""
        if self.is_classification:
            return np.ones(len(self), dtype=np.int64)
        is_target = self._labels != IGNORED
        is_target[self._offsets[:-1][np.diff(self._offsets) > 0]] = False
        running = np.concatenate(([0], np.cumsum(is_target)))
        counts: NDArray[np.int64] = running[self._offsets[1:]] - running[self._offsets[:-1]]
        return counts

    def _split(self, flat: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        return [flat[start:end] for start, end in zip(self._offsets[:-1], self._offsets[1:], strict=True)]


def _flatten(sequences: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    total = sum(map(len, sequences))
    return np.fromiter(chain.from_iterable(sequences), dtype=np.int32, count=total)


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The examples of batch number `step`, a pure function: the position in the data is one integer.

    The examples come in epochs, each a permutation drawn from (seed, epoch). Batches run on across the border of two
    epochs, so every batch is full.

    Args:
        num_examples: Size of the split.
        batch_size: Examples of a batch, B.
        seed: Seed of the order, at least 0.
        step: Number of the batch, from 0.

    Returns:
        int64[B].

    >>> batch_indices(num_examples=3, batch_size=2, seed=0, step=0)
    array([2, 0])
    """
    if num_examples < 1 or batch_size < 1 or seed < 0 or step < 0:
        expected = "expected num_examples and batch_size of at least 1, seed and step of at least 0"
        raise ValueError(f"{expected}, got {num_examples}, {batch_size}, {seed}, {step}")
    parts, position, missing = [], step * batch_size, batch_size
    while missing > 0:
        epoch, start = divmod(position, num_examples)
        part = _permutation(num_examples, seed, epoch)[start : start + missing]
        parts.append(part)
        position += len(part)
        missing -= len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=64)
def _permutation(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Cached because a job asks for the same epoch at every step; 64 jobs side by side keep theirs.
    permutation = np.random.default_rng([seed, epoch]).permutation(num_examples)
    permutation.flags.writeable = False
    return permutation


def is_bad_batch(bad_batches: float | tuple[int, ...], seed: int, step: int) -> bool:
    """Whether the batch of an optimizer step is spoiled, a pure function like `batch_indices`.

    Args:
        bad_batches: Share of the steps, or their numbers; see `FineTuningTask`.
        seed: Seed of the data order.
        step: Number of the optimizer step, from 0.
    """
    if isinstance(bad_batches, tuple):
        return step in bad_batches
    return bad_batches > 0.0 and bool(np.random.default_rng([seed, step, _BAD_BATCHES]).random() < bad_batches)
