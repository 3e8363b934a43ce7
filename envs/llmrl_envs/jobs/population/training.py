"""Trains jobs of one shape for an interval: passes over all of them at once, a step of its own for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmrl_envs.jobs.population.batches import Sequences, interval_sequences
from llmrl_envs.jobs.population.losses import sequence_losses
from llmrl_envs.jobs.population.members import IntervalPlan, IntervalResult, Member
from llmrl_envs.jobs.population.optimizer import RowStep
from llmrl_envs.jobs.population.passes import PassWidth
from llmrl_envs.jobs.population.probes import UpdateProbe
from llmrl_envs.jobs.population.rows import PopulationRows
from llmrl_envs.jobs.precision import Precision


class PopulationTraining:
    """Training of jobs whose rows lie next to each other, the longest interval first.

    Args:
        rows: The jobs' weights and moments.
        probe: Measures updates.
        precision: Number format of forward passes.
        width: How many jobs go through the model at once.
        device: Where the jobs are.
        classification: The model is a classifier.
    """

    def __init__(
        self,
        rows: PopulationRows,
        probe: UpdateProbe,
        precision: Precision,
        width: PassWidth,
        device: torch.device,
        *,
        classification: bool,
    ) -> None:
        self._rows = rows
        self._stack = rows.stack
        self._probe = probe
        self._precision = precision
        self._width = width
        self._device = device
        self._classification = classification

    def run(self, plans: Sequence[IntervalPlan]) -> dict[Member, IntervalResult]:
        """Trains jobs that share batch size and accumulation.

        Args:
            plans: In the order of their rows, the number of steps falling.
        """
        members, lengths = [plan.member for plan in plans], [len(plan.rates) for plan in plans]
        start, longest = members[0].row, max(lengths)
        sequences, weights = interval_sequences(members, lengths)
        sequences = sequences.to(self._device)
        shares = torch.from_numpy(weights).to(self._stack.weights.dtype).to(self._device, non_blocking=True)
        rates = np.zeros((longest, len(plans)))
        for place, plan in enumerate(plans):
            rates[: lengths[place], place] = plan.rates
        on_device = torch.from_numpy(rates).to(self._device, non_blocking=True)
        limits = torch.tensor([plan.limit for plan in plans], device=self._device)
        any_skips = any(plan.skip_outliers for plan in plans)
        skips = torch.tensor([plan.skip_outliers for plan in plans], device=self._device)
        shares_of_mean = tuple(plan.momentum_share for plan in plans)
        measured = torch.full((2, longest, len(plans)), float("nan"), device=self._device)
        probes = torch.full((4, len(plans)), float("nan"), device=self._device)
        self._stack.model.train()
        for index in range(longest):
            count = sum(length > index for length in lengths)
            stop = start + count
            measured[0, index, :count] = self._accumulate(sequences[index, :, :count], shares[index, :count], start)
            self._rows.scales.unscale(self._stack.gradients, start, stop)
            frozen = frozenset(place for place in range(count) if plans[place].frozen)
            norms = self._gradient_norms(start, stop, frozen)
            measured[1, index, :count] = norms
            self._rows.scales.update(torch.isfinite(norms), start, stop)
            if any_skips:
                outlying = self._rows.outliers.judge(measured[0, index, :count], slice(start, stop)) & skips[:count]
                measured[0, index, :count].masked_fill_(outlying, float("nan"))
                norms = norms.masked_fill(outlying, float("nan"))
            step = RowStep(start, stop, on_device[index, :count], limits[:count], norms, frozen, shares_of_mean[:count])
            ending = [place for place in range(count) if lengths[place] == index + 1 and plans[place].probe]
            self._step(step, probes, ending)
            for member in members[:count]:
                member.step += 1
        return self._collect(plans, measured, probes)

    @torch.no_grad()
    def _step(self, step: RowStep, probes: Tensor, ending: Sequence[int]) -> None:
        """One optimizer step of rows, probed in those that end their interval with it (the last ones)."""
        rows, gradients = self._rows, self._stack.gradients
        first, last = (ending[0], ending[-1] + 1) if ending else (0, 0)
        if ending:
            is_frozen = torch.tensor([place in step.frozen for place in range(first, last)], device=self._device)
            touched = torch.from_numpy(rows.touched[step.start + first : step.start + last]).to(self._device)
            counted = torch.stack([touched[:, 0] & ~is_frozen, touched[:, 1]], dim=1)
            probes[0, first:last] = self._probe.cosines(gradients, step.start + first, step.start + last, counted)
        rows.optimizer.step(self._stack.weights, gradients, step)
        rows.touched[step.start : step.stop, 1] = True
        rows.touched[[row for row in range(step.start, step.stop) if row - step.start not in step.frozen], 0] = True
        if ending:
            norms = self._probe.norms(self._stack.weights, step.start + first, step.start + last, is_frozen)
            probes[1:, first:last] = norms
        rows.average_in(step.start, step.stop)
        self._forget_gradients(step.start, step.stop)

    def _accumulate(self, sequences: Sequences, shares: Tensor, start: int) -> Tensor:
        """Backward passes of one optimizer step of rows from `start` on; their losses, float32[P] nats per target.

        Args:
            sequences: [A, P, B, L].
            shares: float32[P], one over the targets of each job's step.
            start: First row.
        """
        lanes = len(shares)

        def run() -> Tensor:
            losses = torch.zeros(lanes, device=self._device)
            for micro in range(len(sequences.lengths)):
                for first, stop in self._width.ranges(lanes):
                    part = sequences[micro, first:stop]
                    losses[first:stop] += self._backward(part, shares[first:stop], start + first)
            return losses

        return self._width.attempt(lanes, run, lambda: self._forget_gradients(start, start + lanes))

    def _forget_gradients(self, start: int, stop: int) -> None:
        self._stack.gradients[start:stop].zero_()

    def _backward(self, sequences: Sequences, shares: Tensor, start: int) -> Tensor:
        stop = start + len(shares)
        self._stack.bind(start, stop, sequences.lengths.size)
        with self._precision.autocast():
            found = sequence_losses(self._stack.model, sequences, classification=self._classification)
        losses = found.loss * shares
        detached = losses.detach()
        # Where a loss is not finite its gradients must not be either, or the norm would not tell.
        usable = torch.where(torch.isfinite(detached), 1.0, float("nan"))
        self._rows.scales.scale(losses * usable, start, stop).sum().backward()  # type: ignore[no-untyped-call]
        return detached

    def _gradient_norms(self, start: int, stop: int, frozen: frozenset[int]) -> Tensor:
        """Norm of each row's gradient, float32[M]; of a frozen row that of what is left."""
        gradients = self._stack.gradients[start:stop]
        if not frozen:
            norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
            return norms
        middle = self._stack.layout.lower_stop
        lower, rest = (torch.linalg.vector_norm(g, dim=1) for g in (gradients[:, :middle], gradients[:, middle:]))
        lower[sorted(frozen)] = 0.0
        return torch.hypot(lower, rest)

    def _collect(self, plans: Sequence[IntervalPlan], measured: Tensor, probes: Tensor) -> dict[Member, IntervalResult]:
        """One copy to the host for all jobs."""
        host = torch.cat([measured.reshape(-1), probes.reshape(-1)]).double().cpu().numpy()
        steps = host[: measured.numel()].reshape(measured.shape)
        values = host[measured.numel() :].reshape(probes.shape)
        found = {}
        for place, plan in enumerate(plans):
            loss, norm = steps[:, : len(plan.rates), place]
            found[plan.member] = IntervalResult(loss.copy(), norm.copy(), *(float(v) for v in values[:, place]))
        return found
