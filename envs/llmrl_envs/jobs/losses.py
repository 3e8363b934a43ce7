"""Cross-entropy of a batch as a sum over its targets, in nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmrl_envs.interface.tensor_sums import wide

IGNORED = -100


@dataclass(frozen=True)
class LossSum:
    """A batch's summed loss.

    Attributes:
        loss: float32 scalar, sum over targets of the cross-entropy in nats.
        correct: int64 scalar, targets that the most probable class hits; -1 for language models.
    """

    loss: Tensor
    correct: Tensor


def language_model_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Next-token loss of `logits` float[B, L, V] for `labels` int64[B, L]; labels of -100 are no targets."""
    vocabulary = logits.shape[-1]
    loss = functional.cross_entropy(
        wide(logits[:, :-1].reshape(-1, vocabulary)),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return LossSum(loss, torch.full((), -1, device=loss.device))


def classification_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Loss of `logits` float[B, C] for `labels` int64[B]."""
    loss = functional.cross_entropy(wide(logits), labels, reduction="sum")
    return LossSum(loss, (logits.argmax(dim=-1) == labels).sum())


def batch_loss(model: torch.nn.Module, batch: dict[str, Tensor], *, classification: bool) -> LossSum:
    """Runs the model on a collated batch and sums its loss.

    Args:
        model: A Hugging Face causal language model or sequence classifier.
        batch: input_ids, attention_mask and labels, on the model's device.
        classification: Which of the two it is.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    return (classification_loss if classification else language_model_loss)(logits, batch["labels"])
