"""Batches of several jobs side by side: sequences [P, B, L], padded to the longest of a pass and no further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.jobs.batches import IGNORED, TokenizedSplit, batch_indices, is_bad_batch
from llmrl_envs.jobs.population.members import Member


@dataclass(frozen=True)
class Sequences:
    """Sequences of several jobs.

    Attributes:
        tokens: int64[..., L].
        types: int64[..., L], or None where no job tells segments apart.
        targets: int64[..., L], the token that each position is to predict, or int64[...], the class; `IGNORED` where
            there is none.
        lengths: int64[...] on the host, tokens of each sequence.
    """

    tokens: Tensor
    types: Tensor | None
    targets: Tensor
    lengths: NDArray[np.int64]

    def __getitem__(self, index: tuple[int | slice, ...]) -> Sequences:
        """The sequences at an index into the leading dimensions, cut to the longest of them."""
        lengths = self.lengths[index]
        longest = max(int(lengths.max()), 1)
        cut = (*index, ..., slice(longest))
        targets = self.targets[index] if self.targets.ndim < self.tokens.ndim else self.targets[cut]
        types = None if self.types is None else self.types[cut]
        return Sequences(self.tokens[cut], types, targets, lengths)

    def to(self, device: torch.device) -> Sequences:
        """The sequences on a device."""
        types = None if self.types is None else self.types.to(device, non_blocking=True)
        tokens, targets = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.targets))
        return Sequences(tokens, types, targets, self.lengths)

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a model's forward pass over all sequences, [P x B, L]; a mask only where there is padding."""
        tokens = self.tokens.reshape(-1, self.tokens.shape[-1])
        found = {"input_ids": tokens}
        if int(self.lengths.min()) < tokens.shape[1]:
            lengths = torch.from_numpy(self.lengths.reshape(-1, 1)).to(tokens.device, non_blocking=True)
            found["attention_mask"] = (torch.arange(tokens.shape[1], device=tokens.device) < lengths).long()
        if self.types is not None:
            found["token_type_ids"] = self.types.reshape(tokens.shape)
        return found


def collate_rows(
    split: TokenizedSplit, indices: NDArray[np.int64], spoiled: bool | NDArray[np.bool_] = False
) -> Sequences:
    """The examples `indices` int64[R] of a split, [R, L], each position with the token after it as its target.

    Those that are `spoiled`, bool[R], are; see `TokenizedSplit.collate`.
    """
    batch = split.collate(indices, spoiled)
    tokens, targets = batch["input_ids"], batch["labels"]
    if not split.is_classification:
        targets = torch.cat([targets[:, 1:], torch.full((len(targets), 1), IGNORED)], dim=1)
    return Sequences(tokens, batch.get("token_type_ids"), targets, split.num_tokens[indices])


def place_rows(shape: tuple[int, ...], parts: Sequence[tuple[tuple[int | slice, ...], Sequences]]) -> Sequences:
    """Puts the sequences of several jobs into one array [*shape, L]; what no job fills is padding without targets.

    Args:
        shape: Leading dimensions.
        parts: For each job, an index into the leading dimensions and its sequences, of the shape of that index.
    """
    first = parts[0][1]
    longest = max(part.tokens.shape[-1] for _, part in parts)
    tokens = torch.zeros(*shape, longest, dtype=torch.int64)
    types = torch.zeros_like(tokens) if any(part.types is not None for _, part in parts) else None
    per_sequence = first.targets.ndim < first.tokens.ndim
    targets = torch.full(shape if per_sequence else (*shape, longest), IGNORED)
    lengths = np.zeros(shape, np.int64)
    for index, part in parts:
        cut = (*index, ..., slice(part.tokens.shape[-1]))
        tokens[cut] = part.tokens
        if types is not None and part.types is not None:
            types[cut] = part.types
        targets[index if per_sequence else cut] = part.targets
        lengths[index] = part.lengths
    return Sequences(tokens, types, targets, lengths)


def interval_sequences(members: Sequence[Member], num_steps: Sequence[int]) -> tuple[Sequences, NDArray[np.float64]]:
    """The batches of an interval of jobs that share batch size and accumulation.

    Args:
        members: The jobs, P of them.
        num_steps: Optimizer steps of each, falling.

    Returns:
        Sequences [N, A, P, B, L], N steps of A accumulated batches; and one over the targets of each job's step,
        float64[N, P].
    """
    task = members[0].job.task
    accumulation, size = task.gradient_accumulation, task.batch_size
    longest = max(num_steps)
    weights = np.zeros((longest, len(members)))
    parts: list[tuple[tuple[int | slice, ...], Sequences]] = []
    for place, (member, count) in enumerate(zip(members, num_steps, strict=True)):
        split = member.job.data.train
        steps = range(member.step, member.step + count)
        rows = np.stack([batch_indices(len(split), size * accumulation, member.seed, step) for step in steps])
        weights[:count, place] = 1.0 / np.maximum(split.num_target_tokens[rows].sum(axis=1), 1)
        spoiled = [is_bad_batch(member.job.task.bad_batches, member.seed, step) for step in steps]
        flat = collate_rows(split, rows.reshape(-1), np.repeat(spoiled, rows.shape[1]))
        parts.append(((slice(count), slice(None), place), _reshaped(flat, (count, accumulation, size))))
    return place_rows((longest, accumulation, len(members), size), parts), weights


def _reshaped(flat: Sequences, shape: tuple[int, ...]) -> Sequences:
    length = flat.tokens.shape[-1]
    per_sequence = flat.targets.ndim < flat.tokens.ndim
    return Sequences(
        flat.tokens.view(*shape, length),
        None if flat.types is None else flat.types.view(*shape, length),
        flat.targets.view(shape if per_sequence else (*shape, length)),
        flat.lengths.reshape(shape),
    )
