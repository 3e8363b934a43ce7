"""Measures the updates of several jobs at once: what `StatisticsRecorder` measures for one, as vectors over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrl_envs.jobs.population.columns import ColumnLayout
from llmrl_envs.jobs.population.conversion import AdapterPair
from llmrl_envs.jobs.population.optimizer import PopulationAdamW

_EPSILON = 1e-30
_MOST_ENTRIES = {"cpu": 2**18, "cuda": 2**26}
"""Entries of a temporary: more rows than fit are measured in turns. On a CPU a temporary stays in a core's cache."""


class UpdateProbe:
    """Probes of the rows of a stack.

    Args:
        layout: Columns of the parameters.
        optimizer: Holds the moments.
        pairs: Adapters whose effective weight change is measured; empty for plain parameters.
    """

    def __init__(self, layout: ColumnLayout, optimizer: PopulationAdamW, pairs: Sequence[AdapterPair]) -> None:
        self._layout = layout
        self._optimizer = optimizer
        self._pairs = tuple(pairs)
        paired = {name for pair in pairs for name in (pair.a, pair.b)}
        self._plain = tuple(name for name in layout.columns if name not in paired)

    def cosines(self, gradients: Tensor, start: int, stop: int, counted: Tensor) -> Tensor:
        """Cosine of each row's gradient to the momentum of the step before, float32[M].

        Args:
            gradients: float32[C, N].
            start: First row.
            stop: End.
            counted: bool[M, 2], whether the lower half and the rest have been stepped before and are not frozen.
        """
        products = []
        for columns in self._parts():
            g, m = gradients[start:stop, columns], self._optimizer.exp_avg[start:stop, columns]
            products.append(torch.stack([_dots(*pair) for pair in ((g, m), (g, g), (m, m))]))
        parts = torch.stack(products, dim=-1)  # [3, M, 2]
        dot, gradient, momentum = torch.where(counted, parts, 0.0).sum(dim=-1)
        cosine = dot / ((gradient * momentum).sqrt() + _EPSILON)
        return torch.where(counted.any(dim=1), cosine, float("nan"))

    def norms(self, weights: Tensor, start: int, stop: int, frozen: Tensor) -> Tensor:
        """||u||, ||theta|| and the signal-to-noise ratio of each row after its step, float32[3, M].

        Args:
            weights: float32[C, N].
            start: First row.
            stop: End.
            frozen: bool[M], rows whose lower half does not count.
        """
        optimizer, rows = self._optimizer, slice(start, stop)
        settings = optimizer.settings[rows].to(weights.device)
        counts = optimizer.steps[rows].double()
        correction1 = 1.0 - settings[:, :1] ** counts  # [M, 2]
        correction2 = 1.0 - settings[:, 1:2] ** counts
        # m / (c1 (sqrt(v / c2) + eps)) is m / (sqrt(v) scale + shift).
        scale, shift = (
            factor.to(weights.dtype) for factor in (correction1 * correction2.rsqrt(), correction1 * settings[:, 2:3])
        )
        most = _MOST_ENTRIES.get(weights.device.type, _MOST_ENTRIES["cuda"])
        size = min(max(1, most // max(self._layout.num_columns, 1)), stop - start)
        update = torch.empty(size, self._layout.num_columns, device=weights.device)
        found = []
        for first in range(start, stop, size):
            chosen, own = slice(first, min(first + size, stop)), slice(first - start, first - start + size)
            found.append(self._sums(weights[chosen], chosen, scale[own], shift[own], update))
        sums = torch.cat(found, dim=1)
        counted = torch.stack([~frozen, torch.ones_like(frozen)], dim=1)
        # No step taken yet, every one was skipped: nothing is known.
        nothing = torch.where(correction2 > 0.0, 0.0, float("nan"))
        parts = torch.stack([sums[0] + nothing, sums[1], sums[2] / correction1**2, sums[3] / correction2])
        updates, sizes, mean_square, variance = torch.where(counted, parts, 0.0).sum(dim=2)
        return torch.stack([updates.sqrt(), sizes.sqrt(), (mean_square / (variance + _EPSILON)).sqrt()]).to(
            weights.dtype
        )

    def _sums(self, weights: Tensor, rows: slice, scale: Tensor, shift: Tensor, update: Tensor) -> Tensor:
        """Squares of update, weights and first moments and the sum of the second ones, float[4, M, 2]: by half."""
        update = update[: len(weights)]
        mean_squares, variances = [], []
        for part, columns in enumerate(self._parts()):
            mean, square = self._optimizer.exp_avg[rows, columns], self._optimizer.exp_avg_sq[rows, columns]
            one = slice(part, part + 1)
            torch.div(mean, square.sqrt().mul_(scale[:, one]).add_(shift[:, one]), out=update[:, columns])
            mean_squares.append(_dots(mean, mean))
            variances.append(square.sum(dim=1))
        updates, sizes = self._squares(weights, update)
        return torch.stack([updates, sizes, torch.stack(mean_squares, dim=1), torch.stack(variances, dim=1)])

    def _squares(self, weights: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norms of update and weights, float[M, 2] each: of the lower half and of the rest."""
        if not self._pairs:
            parts = [(update[:, columns], weights[:, columns]) for columns in self._sized_parts()]
            squares = [torch.stack([_dots(x, x) for x in part]) for part in parts]
            stacked = torch.stack(squares, dim=-1)
            return stacked[0], stacked[1]
        totals = torch.zeros(2, len(weights), 2, device=weights.device)
        for name in (name for name in self._plain if len(self._layout.columns[name].shape) >= 2):
            part = 0 if self._layout.columns[name].is_lower else 1
            for index, source in enumerate((update, weights)):
                totals[index, :, part] += self._layout.view(source, name).flatten(1).square().sum(dim=1)
        for pair in self._pairs:
            part = 0 if self._layout.columns[pair.a].is_lower else 1
            totals[0, :, part] += self._pair_square(pair, weights, update)
            totals[1, :, part] += pair.weight_norm**2
        return totals[0], totals[1]

    def _pair_square(self, pair: AdapterPair, weights: Tensor, update: Tensor) -> Tensor:
        """Squared Frobenius norm of `scaling * (u_b a + b u_a)` of every row, by 2r x 2r products; float[M]."""
        a, b = (self._layout.view(weights, name) for name in (pair.a, pair.b))
        update_a, update_b = (self._layout.view(update, name) for name in (pair.a, pair.b))
        left = torch.cat([update_b, b], dim=2)  # [M, out, 2r]
        right = torch.cat([a, update_a], dim=1)  # [M, 2r, in]
        inner = torch.bmm(left.transpose(1, 2), left) * torch.bmm(right, right.transpose(1, 2))
        return pair.scaling**2 * inner.sum(dim=(1, 2)).clamp(min=0.0)

    def _parts(self) -> tuple[slice, slice]:
        return slice(0, self._layout.lower_stop), slice(self._layout.lower_stop, self._layout.num_columns)

    def _sized_parts(self) -> tuple[slice, slice]:
        """The columns of `level_parameters`: matrices lie together, lower half first."""
        start, stop = self._layout.decayed
        return (
            (slice(start, self._layout.lower_stop), slice(self._layout.lower_stop, stop))
            if stop > start
            else self._parts()
        )


def _dots(x: Tensor, y: Tensor) -> Tensor:  # [M, N] each -> [M]
    """Products of rows; on a CPU one by one, because `vecdot` writes all products to memory before it adds them up."""
    if x.device.type != "cpu":
        products: Tensor = torch.linalg.vecdot(x, y)
        return products
    return torch.stack([torch.dot(*pair) for pair in zip(x.unbind(), y.unbind(), strict=True)])


def initial_norms(
    initial: dict[str, Tensor], layout: ColumnLayout, pairs: Sequence[AdapterPair]
) -> tuple[float, float]:
    """||u|| and ||theta|| before the first step; see `StatisticsRecorder.initial_norms`.

    Args:
        initial: Every trained parameter as loaded.
        layout: Columns of those that gradients reach.
        pairs: Adapters whose effective weight change counts.
    """
    paired = {name for pair in pairs for name in (pair.a, pair.b)}
    trained = [value for name, value in initial.items() if name not in paired]
    plain = [value for value in trained if value.ndim >= 2 or not (pairs or any(v.ndim >= 2 for v in trained))]
    update = float(sum(value.numel() for value in plain))
    weight = sum(float(value.double().square().sum()) for value in plain)
    for pair in pairs:
        outputs = layout.columns[pair.b].shape[0]
        update += pair.scaling**2 * outputs * float(initial[pair.a].double().square().sum())
        weight += pair.weight_norm**2
    return update**0.5, weight**0.5
