"""Pretraining of base models, kept at the stages that are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import numpy as np
import torch
from base_model_networks import CONTEXT_BYTES, MASK, Recipe, build_model
from transformers import BertForMaskedLM, PreTrainedModel

MASKED_SHARE = 0.15


def window_batch(tokens: np.ndarray, batch_size: int, rng: np.random.Generator) -> torch.Tensor:  # int64[B, L]
    """Windows of `CONTEXT_BYTES` tokens that begin anywhere."""
    starts = rng.integers(0, len(tokens) - CONTEXT_BYTES, size=batch_size)
    return torch.from_numpy(np.stack([tokens[start : start + CONTEXT_BYTES] for start in starts]).astype(np.int64))


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear to zero at the last step."""
    warmup = max(1, round(recipe.steps * recipe.warmup_fraction))
    return min((step + 1) / warmup, (recipe.steps - step) / max(1, recipe.steps - warmup))


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def model_loss(model: PreTrainedModel, batch: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mean loss in nats per token: of the next one, or for BERT of `MASKED_SHARE` of them, which it does not see."""
    if not isinstance(model, BertForMaskedLM):
        return model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]
    is_masked = torch.from_numpy(rng.random(batch.shape) < MASKED_SHARE)
    return model(  # type: ignore[no-any-return]
        input_ids=batch.masked_fill(is_masked, MASK),
        attention_mask=torch.ones_like(batch),
        labels=batch.masked_fill(~is_masked, -100),
    ).loss


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, batch: torch.Tensor, recipe: Recipe, rng: np.random.Generator
) -> float:
    """One optimizer step; the mean loss in nats per token before it."""
    loss = model_loss(model, batch, rng)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(
    model: PreTrainedModel,
    tokens: np.ndarray,
    validation: np.ndarray,
    recipe: Recipe,
    stages: Collection[int],
    keep: Callable[[int, float], None],
) -> None:
    """Train in place, up to the last stage.

    Args:
        model: What to train.
        tokens: For training, int16[N].
        validation: For validation, int16[M].
        recipe: How.
        stages: Steps after which the model is kept.
        keep: Called at each of them with the step and the validation loss, nats per token.
    """
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    model.train()
    start = time.monotonic()
    for step in range(max(stages)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe)
        loss = train_step(model, optimizer, window_batch(tokens, recipe.batch_size, rng), recipe, rng)
        if (step + 1) % max(1, recipe.steps // 40) == 0:
            seconds = time.monotonic() - start
            print(
                f"step {step + 1}/{recipe.steps}  train {loss:.3f}  validation {evaluate(model, validation):.3f}"
                f"  {(step + 1) * recipe.batch_size * CONTEXT_BYTES / seconds:,.0f} bytes/s",
                flush=True,
            )
        if step + 1 in stages:
            keep(step + 1, evaluate(model, validation, num_windows=512))


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: np.ndarray, num_windows: int = 64) -> float:
    """Mean loss in nats per token over windows that are evenly spaced in `tokens`."""
    was_training = model.training
    model.eval()
    starts = np.linspace(0, len(tokens) - CONTEXT_BYTES, num_windows).astype(int)
    windows = np.stack([tokens[start : start + CONTEXT_BYTES] for start in starts]).astype(np.int64)
    rng = np.random.default_rng(0)
    losses = [float(model_loss(model, batch, rng)) for batch in torch.from_numpy(windows).split(32)]
    model.train(was_training)
    return float(np.mean(losses))


def steps_in(minutes: float, tokens: np.ndarray, recipe: Recipe) -> int:
    """How many steps fit into `minutes` here, from a short trial on a model that is thrown away."""
    model = build_model(recipe)
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    num_trials = 12
    for trial in range(num_trials):
        if trial == 2:  # the first two pay for allocation
            start = time.monotonic()
        train_step(model, optimizer, window_batch(tokens, recipe.batch_size, rng), recipe, rng)
    return max(1, int(minutes * 60 * (num_trials - 2) / (time.monotonic() - start)))
