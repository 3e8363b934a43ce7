"""A process's share of a job's passes through its model: of every step's batches, and of every evaluation.

All loops over a job go through here, so that neither gradient accumulation nor the number of processes changes what is
trained or measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.batches import TokenizedSplit, batch_indices, is_bad_batch
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.losses import LossSum, batch_loss
from llmrl_envs.jobs.parallel import ParallelContext
from llmrl_envs.jobs.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """What a pass over a fixed subset found.

    Attributes:
        loss: Mean cross-entropy, nats per target.
        accuracy: Share of targets hit; None for language models.
        num_targets: Targets that were averaged over.
        num_tokens: Tokens that went through the model, padding not counted.
    """

    loss: float
    accuracy: float | None
    num_targets: int
    num_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """One backward pass of an optimizer step.

    Attributes:
        share: int64[B], the examples that are this process's.
        num_tokens: Tokens of all processes' examples, padding not counted.
        weight: Factor of this process's summed loss, so that the mean over the processes of what a step's micro-batches
            add up to is the step's mean loss per target.
        last: Whether it is the step's last.
        spoiled: The task makes this step's examples bad on purpose.
    """

    share: NDArray[np.int64]
    num_tokens: int
    weight: float
    last: bool
    spoiled: bool


class JobPasses:
    """The passes of one job.

    Args:
        job: The job.
        seed: Seed of the data order.
        parallel: The processes that share it.
        precision: Number format of forward passes.

    Raises:
        UserError: A batch has fewer examples than there are processes.
    """

    def __init__(self, job: Job, seed: int, parallel: ParallelContext, precision: Precision) -> None:
        _check_shares(job.task.batch_size, parallel.world_size)
        self._job = job
        self._seed = seed
        self._parallel = parallel
        self._precision = precision
        self._classification = job.task.objective == "classification"

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The backward passes of the optimizer step with index `step`; every process has as many."""
        split, task, world = self._job.data.train, self._job.task, self._parallel.world_size
        count = task.gradient_accumulation
        indices = batch_indices(len(split), task.batch_size * count, self._seed, step).reshape(count, -1)
        weight = world / max(int(split.num_target_tokens[indices].sum()), 1)
        spoiled = is_bad_batch(task.bad_batches, self._seed, step)
        for position, row in enumerate(indices):
            share = row[self._parallel.rank :: world]
            yield MicroBatch(share, int(split.num_tokens[row].sum()), weight, position == count - 1, spoiled)

    def training_loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Weighted loss of this process's share, a scalar to run backward from."""
        return self._loss_sum(model, self._job.data.train, batch.share, spoiled=batch.spoiled).loss * batch.weight

    @torch.no_grad()
    def evaluate(self, split: str) -> Evaluation:
        """Loss of the present weights on the fixed subset of a split ("validation" or "test")."""
        self._job.loaded.model.eval()
        data: TokenizedSplit = getattr(self._job.data, split)
        subset = self._job.subset(split)
        rank, world = self._parallel.rank, self._parallel.world_size
        sums = torch.zeros(2, dtype=torch.float64, device=self._job.device)
        for first in range(0, len(subset), world):
            mine = first + rank < len(subset)
            if mine or self._parallel.sharded:  # shards are gathered by all processes together
                found = self._loss_sum(self._job.loaded.model, data, subset[first + rank if mine else first])
            if mine:
                sums[0] += found.loss
                sums[1] += found.correct
        loss, correct = self._parallel.sum(sums).tolist()
        num_targets = sum(int(data.num_target_tokens[indices].sum()) for indices in subset)
        num_tokens = sum(int(data.num_tokens[indices].sum()) for indices in subset)
        accuracy = correct / max(num_targets, 1) if self._classification else None
        return Evaluation(loss / max(num_targets, 1), accuracy, num_targets, num_tokens)

    def _loss_sum(
        self, model: nn.Module, split: TokenizedSplit, indices: NDArray[np.int64], *, spoiled: bool = False
    ) -> LossSum:
        batch = {k: v.to(self._job.device, non_blocking=True) for k, v in split.collate(indices, spoiled).items()}
        with self._precision.autocast():
            return batch_loss(model, batch, classification=self._classification)


def nan_unless_finite(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, one whose gradients are all NaN.

    So the gradient norm alone tells every process, and the loss scaler, to skip the same steps.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def _check_shares(batch_size: int, world_size: int) -> None:
    if batch_size < world_size:
        raise UserError(
            "a batch has too few examples to share among the processes",
            expected=f"at least {world_size}, the number of processes",
            got=batch_size,
            where="batch_size",
        )
