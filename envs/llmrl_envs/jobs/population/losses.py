"""Cross-entropy of the jobs of a pass, summed for each job, in nats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmrl_envs.interface.tensor_sums import wide
from llmrl_envs.jobs.batches import IGNORED
from llmrl_envs.jobs.population.batches import Sequences


@dataclass(frozen=True)
class LaneLosses:
    """Losses of P jobs.

    Attributes:
        loss: float32[P], sum over each job's targets; float64 without gradients, as in single jobs.
        correct: int64[P], targets that the most probable class hits; None for language models.
    """

    loss: Tensor
    correct: Tensor | None


def sequence_losses(model: nn.Module, sequences: Sequences, *, classification: bool) -> LaneLosses:
    """Runs the model on sequences [P, B, L] and sums each job's loss.

    A row of the logits belongs to one job, so what is not finite in one stays out of the others.

    Args:
        model: A stacked model, bound to the jobs.
        sequences: Their batches.
        classification: The model is a classifier; otherwise it predicts the next token.
    """
    lanes = len(sequences.lengths)
    logits = model(**sequences.inputs()).logits
    targets = sequences.targets.reshape(-1)
    rows = logits.reshape(-1, logits.shape[-1])
    each = functional.cross_entropy(wide(rows), targets, ignore_index=IGNORED, reduction="none")
    correct = (rows.argmax(dim=-1) == targets).view(lanes, -1).sum(dim=1) if classification else None
    summands = each if torch.is_grad_enabled() else each.double()
    return LaneLosses(summands.view(lanes, -1).sum(dim=1), correct)
