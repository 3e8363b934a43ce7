"""The rows of a population: weights, gradients and moments of its jobs, and the model that reads any range of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.layers import lower_half
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.population.columns import ColumnLayout
from llmrl_envs.jobs.population.conversion import REMEDY, AdapterPair, convert_model

_PROBE_LENGTH = 5
_PROBE_NOISE = 0.02
_PROBE_TOLERANCE = 1e-3


class WeightStack:
    """Weights of C jobs of one model.

    Args:
        job: A job of the model; the stack shares with it all that is not trained.

    Attributes:
        layout: Columns of the trained parameters.
        pairs: Adapters of a LoRA model.
        initial: float32[N], the weights as loaded.
        weights: float32[C, N].
        gradients: float32[C, N], zero between steps.
        unused: Trained parameters that no gradient reaches; they stay as loaded.

    Raises:
        UserError: A layer cannot be stacked, or the stacked model computes something else than the plain one.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.unused = tuple(_without_gradient(job))
        trained = {name: p for name, p in job.loaded.trainable.items() if name not in self.unused}
        self.lower_half = lower_half(tuple(job.loaded.trainable))
        self.layout = ColumnLayout(trained, self.lower_half)
        conversion = convert_model(job.loaded.model, trained, job.task.model)
        self.model: nn.Module = conversion.model
        self.pairs: tuple[AdapterPair, ...] = tuple(conversion.pairs)
        self._layers, self._rows = conversion.layers, conversion.rows
        self.initial = self.layout.flatten({name: job.initial[name] for name in trained})
        self.weights = self.gradients = torch.zeros(0, self.layout.num_columns, device=job.device)
        self._bound: tuple[int, int, int, bool] | None = None
        self._single_rows: dict[int, dict[str, Parameter]] = {}
        self._check()

    @property
    def capacity(self) -> int:
        """Rows that there is room for, C."""
        return len(self.weights)

    def reserve(self, capacity: int) -> None:
        """Makes room for at least so many rows, keeping those there are."""
        if capacity > self.capacity:
            self.weights, self.gradients = grown(self.weights, capacity), grown(self.gradients, capacity)
            self._forget_views()

    def bind(self, start: int, stop: int, num_sequences: int, weights: Tensor | None = None) -> None:
        """Makes the model compute with the rows start .. stop.

        Args:
            start: First row.
            stop: End.
            num_sequences: Sequences of the next pass, a multiple of the rows.
            weights: float32[C, N] to use in place of the jobs' own, without gradients.
        """
        self._rows[0] = num_sequences
        source = self.weights if weights is None else weights
        # The views of the present key keep their memory, so no other tensor can be at the same address.
        key = (start, stop, source.data_ptr(), weights is None)
        if key == self._bound:
            return
        leaves = self._leaves(start, stop, source, has_gradients=weights is None)
        for layer in self._layers:
            layer.bind(leaves)
        self._bound = key

    def _leaves(self, start: int, stop: int, source: Tensor, *, has_gradients: bool) -> dict[str, Parameter]:
        """The parameters of rows, as views; those of one job without gradients, which evaluations need, are kept."""
        is_kept = stop == start + 1 and source is self.weights and not has_gradients
        if is_kept and start in self._single_rows:
            return self._single_rows[start]
        rows, gradients = source[start:stop], self.gradients[start:stop]
        leaves = {}
        for name in self.layout.columns:
            leaf = Parameter(self.layout.view(rows, name), requires_grad=has_gradients)
            if has_gradients:
                leaf.grad = self.layout.view(gradients, name)
            leaves[name] = leaf
        if is_kept:
            self._single_rows[start] = leaves
        return leaves

    def _forget_views(self) -> None:
        self._bound = None
        self._single_rows = {}

    def parameters(self, row: int) -> dict[str, Tensor]:
        """The trained parameters of a row by name, as views; those that nothing reaches as loaded."""
        rows = self.weights[row : row + 1]
        own = {name: self.layout.view(rows, name)[0] for name in self.layout.columns}
        return own | {name: self._job.initial[name] for name in self.unused}

    @torch.no_grad()
    def _check(self) -> None:
        """Compares the stacked model with the plain one on two jobs of different weights and one sequence each."""
        self.reserve(2)
        generator = torch.Generator().manual_seed(0)
        noise = _PROBE_NOISE * torch.randn(self.layout.num_columns, generator=generator).to(self.initial.device)
        self.weights[0], self.weights[1] = self.initial, self.initial + noise
        ids = _probe_ids(self._job, 2)
        try:
            self.bind(0, 2, 2, self.weights)
            found = self.model.eval()(input_ids=ids).logits
            # One row, as in training and as in evaluation: an output that only the last row gets right would pass.
            self.bind(1, 2, 1)
            single = self.model(input_ids=ids[1:]).logits
            self.bind(1, 2, 1, self.weights)
            alone = self.model(input_ids=ids[1:]).logits
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self._refusal(f"{type(error).__name__}: {error}") from error
        expected = [_plain_logits(self._job, self.parameters(row), ids[row : row + 1]) for row in range(2)]
        for got, wanted in ((found, torch.cat(expected)), (single, expected[1]), (alone, expected[1])):
            distance = float((got.float() - wanted.float()).abs().max() / (wanted.float().abs().max() + 1e-6))
            if not distance <= _PROBE_TOLERANCE:
                raise self._refusal(f"outputs that differ by a relative {distance:.2g}")
        self.weights = self.gradients = self.weights[:0].clone()
        self._forget_views()

    def _refusal(self, got: str) -> UserError:
        return UserError(
            "the model does not compute the same with stacked layers",
            where=self._job.task.model,
            expected=f"layers that treat every sequence by itself; otherwise {REMEDY}",
            got=got,
        )


def grown(rows: Tensor, capacity: int) -> Tensor:
    """A tensor with `capacity` rows that begins with `rows`; the others are zero."""
    larger = torch.zeros(capacity, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    larger[: len(rows)] = rows
    return larger


def _probe_ids(job: Job, rows: int) -> Tensor:
    model: Any = job.loaded.model
    tokens = min(int(model.get_input_embeddings().num_embeddings), 997)
    ids = torch.arange(rows * _PROBE_LENGTH, device=job.device) * 7 % (tokens - 1) + 1
    return ids.view(rows, _PROBE_LENGTH) % tokens


def _plain_logits(job: Job, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    logits: Tensor = functional_call(job.loaded.model, dict(parameters), (), {"input_ids": ids}).logits
    return logits


def _without_gradient(job: Job) -> list[str]:
    """Names of trained parameters that the model's output does not depend on."""
    job.loaded.model.eval()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in job.initial.items()}
    logits = _plain_logits(job, leaves, _probe_ids(job, 1))
    found = torch.autograd.grad(logits.float().sum(), list(leaves.values()), allow_unused=True)
    return [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]
