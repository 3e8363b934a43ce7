"""Losses of jobs on fixed subsets of their data: all jobs in one pass, or one after the other where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llmrl_envs.jobs.batches import IGNORED
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.population.batches import Sequences, collate_rows, place_rows
from llmrl_envs.jobs.population.losses import sequence_losses
from llmrl_envs.jobs.population.members import Member
from llmrl_envs.jobs.population.passes import PassWidth
from llmrl_envs.jobs.population.rows import PopulationRows
from llmrl_envs.jobs.precision import Precision

FULL_CORE_TOKENS = 1024
"""Tokens of one job that keep a core busy by themselves: its plain kernels are then faster than stacked ones."""


class PopulationEvaluation:
    """Evaluation of jobs whose rows lie next to each other.

    Args:
        rows: The jobs' weights.
        precision: Number format of forward passes.
        width: How many jobs go through the model at once.
        device: Where the jobs are.
        classification: The model is a classifier.
    """

    def __init__(
        self,
        rows: PopulationRows,
        precision: Precision,
        width: PassWidth,
        device: torch.device,
        *,
        classification: bool,
    ) -> None:
        self._rows = rows
        self._precision = precision
        self._width = width
        self._device = device
        self._classification = classification
        self._subsets: dict[tuple[int, str, int], Sequences] = {}

    @torch.no_grad()
    def run(self, members: Sequence[Member], split: str, averaged: Sequence[bool]) -> dict[Member, Evaluation]:
        """Evaluates jobs that share batch size and accumulation.

        Args:
            members: In the order of their rows.
            split: "validation" or "test".
            averaged: For each job, evaluate the averaged weights in place of the deployed ones.
        """
        self._rows.stack.model.eval()
        weights = self._rows.shown(members[0].row, averaged)
        subsets = [self._subset(member, split) for member in members]
        if self._one_by_one(members, subsets):
            sums = torch.cat([self._sums([m], [s], weights) for m, s in zip(members, subsets, strict=True)], dim=1)
        else:
            sums = self._sums(members, subsets, weights)
        loss, correct = sums.tolist()
        return {
            member: _evaluation(subsets[place], loss[place], correct[place], is_classifier=self._classification)
            for place, member in enumerate(members)
        }

    def _sums(self, members: Sequence[Member], subsets: Sequence[Sequences], weights: Tensor) -> Tensor:
        """Summed losses and hits of jobs that go through the model together, float64[2, P]."""
        start, lanes = members[0].row, len(members)
        rows = _rows_at_once(members)

        def run() -> Tensor:
            sums = torch.zeros(2, lanes, dtype=torch.float64, device=self._device)
            for sequences in _chunks(subsets, rows):
                for first, stop in self._width.ranges(lanes):
                    part = sequences[first:stop,]
                    self._rows.stack.bind(start + first, start + stop, part.lengths.size, weights)
                    with torch.inference_mode(), self._precision.autocast():
                        losses = sequence_losses(
                            self._rows.stack.model, part.to(self._device), classification=self._classification
                        )
                    sums[0, first:stop] += losses.loss
                    sums[1, first:stop] += 0 if losses.correct is None else losses.correct
            return sums

        return self._width.attempt(lanes, run, lambda: None)

    def _one_by_one(self, members: Sequence[Member], subsets: Sequence[Sequences]) -> bool:
        """Whether each job's batches of evaluation fill a core by themselves."""
        sizes = [member.job.task.evaluation_batch_size for member in members]
        tokens = min(int(subset.lengths[:size].sum()) for subset, size in zip(subsets, sizes, strict=True))
        return self._device.type == "cpu" and tokens >= FULL_CORE_TOKENS

    def _subset(self, member: Member, split: str) -> Sequences:
        """The sequences of the fixed subset, [R, L]; jobs that share a subset share them."""
        data = getattr(member.job.data, split)
        indices = np.concatenate(member.job.subset(split))
        key = (id(data), split, len(indices))
        if key not in self._subsets:
            self._subsets[key] = collate_rows(data, indices)
        return self._subsets[key]


def _rows_at_once(members: Sequence[Member]) -> int:
    """Sequences of each job in one pass: about as many in all as in training, and no fewer than the task says."""
    task = members[0].job.task
    most = max(member.job.task.evaluation_batch_size for member in members)
    return min(most, max(task.batch_size, -(-most // len(members))))


def _chunks(subsets: Sequence[Sequences], rows: int) -> Iterator[Sequences]:
    """The subsets of P jobs, so many sequences of each at a time, [P, B, L]; a job that has fewer is filled up."""
    longest = max(len(subset.lengths) for subset in subsets)
    for first in range(0, longest, rows):
        parts: list[tuple[tuple[int | slice, ...], Sequences]] = []
        for place, subset in enumerate(subsets):
            count = min(rows, len(subset.lengths) - first)
            if count > 0:
                parts.append(((place, slice(count)), subset[slice(first, first + count),]))
        yield place_rows((len(subsets), min(rows, longest - first)), parts)


def _evaluation(subset: Sequences, loss: float, correct: float, *, is_classifier: bool) -> Evaluation:
    num_targets = max(int((subset.targets != IGNORED).sum()), 1)
    accuracy = correct / num_targets if is_classifier else None
    return Evaluation(loss / num_targets, accuracy, num_targets, int(subset.lengths.sum()))
