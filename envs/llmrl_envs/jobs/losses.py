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
        loss: Scalar, sum over targets of the cross-entropy in nats; float32, without gradients float64.
        correct: int64 scalar, targets that the most probable class hits; -1 for language models.
    """

    loss: Tensor
    correct: Tensor


def language_model_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Next-token loss of `logits` float[B, L, V] for `labels` int64[B, L]; labels of -100 are no targets."""
    loss = _summed_cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    return LossSum(loss, torch.full((), -1, device=loss.device))


def classification_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Loss of `logits` float[B, C] for `labels` int64[B]."""
    return LossSum(_summed_cross_entropy(logits, labels), (logits.argmax(dim=-1) == labels).sum())


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of `logits` float[N, C]; in evaluations added up in float64, because rewards are differences."""
    if torch.is_grad_enabled():
        return functional.cross_entropy(wide(logits), targets, ignore_index=IGNORED, reduction="sum")
    return functional.cross_entropy(wide(logits), targets, ignore_index=IGNORED, reduction="none").double().sum()


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
