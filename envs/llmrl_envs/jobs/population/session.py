"""Many fine-tuning jobs of one model, trained together: a batch of P x B sequences, every job its own.

What `FineTuningSession` does for one job, with the same numbers up to the rounding of float32; see docs/population.md
for what is exact. Jobs come and go at any time. Those that do the same number of steps lie next to each other, so a
pass works on a range of rows and no job computes what it does not need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice
from llmrl_envs.interface.statistics import TrainingStatistics, TuningMode, empty_statistics
from llmrl_envs.jobs.batches import IGNORED
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.population.batches import Sequences, collate_rows, interval_sequences, place_rows
from llmrl_envs.jobs.population.best_states import BestStates
from llmrl_envs.jobs.population.loss_scale import LossScales
from llmrl_envs.jobs.population.losses import LaneLosses, sequence_losses
from llmrl_envs.jobs.population.members import IntervalPlan, IntervalResult, Member
from llmrl_envs.jobs.population.optimizer import PopulationAdamW, RowStep
from llmrl_envs.jobs.population.passes import PassWidth
from llmrl_envs.jobs.population.probes import UpdateProbe, initial_norms
from llmrl_envs.jobs.population.stack import WeightStack, grown
from llmrl_envs.jobs.precision import Precision
from llmrl_envs.jobs.session import (
    LEVEL_NORMS,
    current_random_state,
    own_random_state,
    seeded_random_state,
)


class PopulationSession:
    """Jobs of one model and mode.

    Args:
        job: One of the jobs; it says which model, mode and number format.
        level_norm: As for `FineTuningSession`.
        averaged: Keep an exponential average of the weights of every job.

    Raises:
        UserError: The model cannot be stacked, or there is no such `level_norm`.
    """

    def __init__(self, job: Job, *, level_norm: str = "effective", averaged: bool = False) -> None:
        if level_norm not in LEVEL_NORMS:
            expected = " or ".join(LEVEL_NORMS)
            raise UserError("unknown norm of a level", expected=expected, got=repr(level_norm), where="level_norm")
        self.device = job.device
        self.stack = WeightStack(job)
        self.optimizer = PopulationAdamW(self.stack.layout, job.device)
        self.members: list[Member] = []
        self.precision = Precision(job.task.precision, job.device)
        self.width = PassWidth()
        self.mode: TuningMode = job.mode
        self.trainable_fraction = job.loaded.trainable_fraction
        self._classification = job.task.objective == "classification"
        pairs = self.stack.pairs if level_norm == "effective" else ()
        self._probe = UpdateProbe(self.stack.layout, self.optimizer, pairs)
        self._initial_norms = initial_norms(job.initial, self.stack.layout, pairs)
        self._scales = LossScales(job.device, enabled=self.precision.name == "fp16")
        self._best = BestStates(self.stack, self.optimizer)
        self._average = torch.zeros(0, self.stack.layout.num_columns, device=job.device) if averaged else None
        self._average_weight = np.zeros(0, np.float32)
        self._touched = np.zeros((0, 2), np.bool_)  # [C, 2] lower half and rest: the optimizer has seen a step
        self._random_state = seeded_random_state(0, job.device)
        self._validation: dict[tuple[int, str, int], Sequences] = {}

    # -- jobs -----------------------------------------------------------------------------------------------------

    def reserve(self, capacity: int) -> None:
        """Makes room for so many jobs."""
        for part in (self.stack, self.optimizer, self._scales):
            part.reserve(capacity)
        if self._average is not None and capacity > len(self._average):
            self._average = grown(self._average, capacity)
        missing = capacity - len(self._touched)
        if missing > 0:
            self._touched = np.concatenate([self._touched, np.zeros((missing, 2), np.bool_)])
            self._average_weight = np.concatenate([self._average_weight, np.zeros(missing, np.float32)])

    @torch.no_grad()
    def add(self, job: Job, seed: int, *, average_steps: float = 0.0) -> Member:
        """Begins a job, from the weights as loaded.

        Args:
            job: The task; its model must be the population's.
            seed: Seed of the data order.
            average_steps: Time constant of the averaged weights, in optimizer steps; 0 keeps none.
        """
        row = len(self.members)
        self.reserve(row + 1)
        homes = {member.home for member in self.members}
        home = next(index for index in range(row + 1) if index not in homes)
        weight = 0.0 if average_steps <= 0 else 1.0 - math.exp(-1.0 / average_steps)
        member = Member(job, seed, row, home, average_weight=weight)
        self.members.append(member)
        self.stack.weights[row] = self.stack.initial
        self.optimizer.begin(row, job.task.optimizer)
        self._scales.begin(row)
        self._touched[row] = False
        self._average_weight[row] = weight
        if self._average is not None:
            self._average[row] = self.stack.initial
        return member

    @torch.no_grad()
    def remove(self, member: Member) -> None:
        """Ends a job; the last one moves to its row."""
        last = self.members[-1]
        if last is not member:
            self._move([member.row], [last.row])
            self.members[member.row], last.row = last, member.row
        self.members.pop()

    def reseed(self, seed: int) -> None:
        """Seeds the dropout of all jobs."""
        self._random_state = seeded_random_state(seed, self.device)

    def parameters(self, member: Member) -> dict[str, Tensor]:
        """A job's trained parameters by name, as views."""
        return self.stack.parameters(member.row)

    def capabilities(self, member: Member) -> frozenset[UpdateChoice]:
        """Update choices that would change a job; see `FineTuningSession.capabilities`."""
        useless = set() if self.stack.lower_half else {UpdateChoice.FREEZE}
        useless |= set() if math.isfinite(member.job.task.optimizer.max_grad_norm) else {UpdateChoice.TIGHTEN}
        return frozenset(UpdateChoice) - useless

    def initial_statistics(self, member: Member) -> TrainingStatistics:
        """Statistics of a job before its first step (E = 1)."""
        total, fraction = np.array([member.job.task.steps]), np.array([self.trainable_fraction])
        return empty_statistics(total, np.array([int(self.mode)]), fraction)

    def initial_norms(self) -> tuple[float, float]:
        """||u|| and ||theta|| as far as they are known before the first step."""
        return self._initial_norms

    # -- training -------------------------------------------------------------------------------------------------

    def run_interval(self, plans: Sequence[IntervalPlan]) -> list[IntervalResult]:
        """Trains jobs for an interval each; the others rest.

        Args:
            plans: At most one for each job; their lengths may differ.
        """
        by_member = {plan.member: plan for plan in plans}
        order = sorted(plans, key=lambda plan: (plan.member.shape_key, -len(plan.rates)))
        self._arrange([plan.member for plan in order])
        found: dict[Member, IntervalResult] = {}
        with self._own_random_state():
            for _, group in groupby(order, key=lambda plan: plan.member.shape_key):
                found |= self._run_group(list(group))
        return [found[member] for member in by_member]

    def _run_group(self, plans: list[IntervalPlan]) -> dict[Member, IntervalResult]:
        members, lengths = [plan.member for plan in plans], [len(plan.rates) for plan in plans]
        start, longest = members[0].row, max(lengths)
        sequences, weights = interval_sequences(members, lengths)
        sequences = sequences.to(self.device)
        shares = torch.from_numpy(weights).float().to(self.device, non_blocking=True)
        rates = np.zeros((longest, len(plans)))
        for place, plan in enumerate(plans):
            rates[: lengths[place], place] = plan.rates
        on_device = torch.from_numpy(rates).to(self.device, non_blocking=True)
        limits = torch.tensor([plan.limit for plan in plans], device=self.device)
        measured = torch.full((2, longest, len(plans)), float("nan"), device=self.device)
        probes = torch.full((4, len(plans)), float("nan"), device=self.device)
        self.stack.model.train()
        for index in range(longest):
            count = sum(length > index for length in lengths)
            rows = slice(start, start + count)
            measured[0, index, :count] = self._accumulate(sequences[index, :, :count], shares[index, :count], start)
            self._scales.unscale(self.stack.gradients, rows.start, rows.stop)
            frozen = frozenset(place for place in range(count) if plans[place].frozen)
            norms = self._gradient_norms(rows.start, rows.stop, frozen)
            measured[1, index, :count] = norms
            step = RowStep(rows.start, rows.stop, on_device[index, :count], limits[:count], norms, frozen)
            ending = [place for place in range(count) if lengths[place] == index + 1 and plans[place].probe]
            self._step(step, probes, ending)
        return self._collect(plans, measured, probes)

    @torch.no_grad()
    def _step(self, step: RowStep, probes: Tensor, ending: Sequence[int]) -> None:
        """One optimizer step of rows, probed in those that end their interval with it (the last ones)."""
        first, last = (ending[0], ending[-1] + 1) if ending else (0, 0)
        if ending:
            is_frozen = torch.tensor([place in step.frozen for place in range(first, last)], device=self.device)
            touched = torch.from_numpy(self._touched[step.start + first : step.start + last]).to(self.device)
            counted = torch.stack([touched[:, 0] & ~is_frozen, touched[:, 1]], dim=1)
            gradients = self.stack.gradients
            probes[0, first:last] = self._probe.cosines(gradients, step.start + first, step.start + last, counted)
        self.optimizer.step(self.stack.weights, self.stack.gradients, step)
        self._scales.update(torch.isfinite(step.norms), step.start, step.stop)
        self._touched[step.start : step.stop, 1] = True
        self._touched[[row for row in range(step.start, step.stop) if row - step.start not in step.frozen], 0] = True
        if ending:
            norms = self._probe.norms(self.stack.weights, step.start + first, step.start + last, is_frozen)
            probes[1:, first:last] = norms
        if self._average is not None:
            weight = torch.from_numpy(self._average_weight[step.start : step.stop, None]).to(self.device)
            average, deployed = (rows[step.start : step.stop] for rows in (self._average, self.stack.weights))
            average.lerp_(deployed, weight.expand_as(average))
        self.stack.gradients[step.start : step.stop].zero_()
        for row in range(step.start, step.stop):
            self.members[row].step += 1

    def _accumulate(self, sequences: Sequences, shares: Tensor, start: int) -> Tensor:
        """Backward passes of one optimizer step of rows from `start` on; their losses, float32[P] nats per target.

        Args:
            sequences: [A, P, B, L].
            shares: float32[P], one over the targets of each job's step.
            start: First row.
        """
        lanes = len(shares)

        def run() -> Tensor:
            losses = torch.zeros(lanes, device=self.device)
            for micro in range(len(sequences.lengths)):
                for first, stop in self.width.ranges(lanes):
                    part = sequences[micro, first:stop]
                    losses[first:stop] += self._backward(part, shares[first:stop], start + first)
            return losses

        return self.width.attempt(lanes, run, lambda: self._forget_gradients(start, start + lanes))

    def _forget_gradients(self, start: int, stop: int) -> None:
        self.stack.gradients[start:stop].zero_()

    def _backward(self, sequences: Sequences, shares: Tensor, start: int) -> Tensor:
        stop = start + len(shares)
        self.stack.bind(start, stop, sequences.lengths.size)
        losses = self._forward(sequences).loss * shares
        detached = losses.detach()
        # Where a loss is not finite its gradients must not be either, or the norm would not tell.
        usable = torch.where(torch.isfinite(detached), 1.0, float("nan"))
        self._scales.scale(losses * usable, start, stop).sum().backward()  # type: ignore[no-untyped-call]
        return detached

    def _forward(self, sequences: Sequences) -> LaneLosses:
        with self.precision.autocast():
            return sequence_losses(self.stack.model, sequences, classification=self._classification)

    def _gradient_norms(self, start: int, stop: int, frozen: frozenset[int]) -> Tensor:
        """Norm of each row's gradient, float32[M]; of a frozen row that of what is left."""
        gradients = self.stack.gradients[start:stop]
        if not frozen:
            norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
            return norms
        middle = self.stack.layout.lower_stop
        lower, rest = (torch.linalg.vector_norm(g, dim=1) for g in (gradients[:, :middle], gradients[:, middle:]))
        lower[sorted(frozen)] = 0.0
        return torch.hypot(lower, rest)

    def _collect(self, plans: list[IntervalPlan], measured: Tensor, probes: Tensor) -> dict[Member, IntervalResult]:
        """One copy to the host for all jobs of a group."""
        host = torch.cat([measured.reshape(-1), probes.reshape(-1)]).double().cpu().numpy()
        steps = host[: measured.numel()].reshape(measured.shape)
        values = host[measured.numel() :].reshape(probes.shape)
        found = {}
        for place, plan in enumerate(plans):
            loss, norm = steps[:, : len(plan.rates), place]
            found[plan.member] = IntervalResult(loss.copy(), norm.copy(), *(float(v) for v in values[:, place]))
        return found

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self, members: Sequence[Member], split: str, averaged: Sequence[bool] | None = None
    ) -> list[Evaluation]:
        """Losses on the fixed subset of a split ("validation" or "test").

        Args:
            members: The jobs.
            split: Which split.
            averaged: For each job, evaluate the averaged weights in place of the deployed ones.
        """
        flags = dict(zip(members, averaged or [False] * len(members), strict=True))
        if any(flags.values()) and self._average is None:
            raise ValueError("averaged: expected a population made with averaged=True")
        order = sorted(members, key=lambda member: (member.shape_key, member.row))
        self._arrange(order)
        self.stack.model.eval()
        found: dict[Member, Evaluation] = {}
        for _, group in groupby(order, key=lambda member: member.shape_key):
            jobs = list(group)
            found |= self._evaluate(jobs, split, [flags[member] for member in jobs])
        return [found[member] for member in members]

    @torch.no_grad()
    def _evaluate(self, members: list[Member], split: str, averaged: list[bool]) -> dict[Member, Evaluation]:
        start, stop = members[0].row, members[-1].row + 1
        weights = self._shown_weights(start, stop, averaged)
        subsets = [self._subset(member, split) for member in members]
        lanes = len(members)

        def run() -> Tensor:
            sums = torch.zeros(2, lanes, dtype=torch.float64, device=self.device)
            for first, end in self.width.ranges(lanes):
                rows = self._evaluation_rows(members[first:end])
                for part in _chunks(subsets[first:end], rows):
                    self.stack.bind(start + first, start + end, part.lengths.size, weights)
                    losses = self._forward(part.to(self.device))
                    sums[0, first:end] += losses.loss
                    sums[1, first:end] += 0 if losses.correct is None else losses.correct
            return sums

        sums = self.width.attempt(lanes, run, lambda: None)
        loss, correct = sums.tolist()
        return {
            member: _evaluation(subsets[place], loss[place], correct[place], is_classifier=self._classification)
            for place, member in enumerate(members)
        }

    def _shown_weights(self, start: int, stop: int, averaged: list[bool]) -> Tensor:
        if self._average is None or not any(averaged):
            return self.stack.weights
        if all(averaged):
            return self._average
        shown = self.stack.weights.clone()
        chosen = [row for row, flag in zip(range(start, stop), averaged, strict=True) if flag]
        shown[chosen] = self._average[chosen]
        return shown

    def _evaluation_rows(self, members: list[Member]) -> int:
        """Sequences of each job in one pass: about as many in all as in training, and no fewer than the task says."""
        task = members[0].job.task
        most = max(member.job.task.evaluation_batch_size for member in members)
        return min(most, max(task.batch_size, -(-most // len(members))))

    def _subset(self, member: Member, split: str) -> Sequences:
        """The sequences of the fixed subset, [R, L]; jobs that share a subset share them."""
        data = getattr(member.job.data, split)
        indices = np.concatenate(member.job.subset(split))
        key = (id(data), split, len(indices))
        if key not in self._validation:
            self._validation[key] = collate_rows(data, indices)
        return self._validation[key]

    # -- snapshots ------------------------------------------------------------------------------------------------

    def mark_best(self, members: Sequence[Member]) -> None:
        """Keeps the present states of jobs as those that `roll_back` returns to."""
        self._best.keep(members, self._average, self._touched)

    def roll_back(self, members: Sequence[Member]) -> None:
        """Takes weights and moments of jobs back to their best states; data and budget move on."""
        self._best.restore(members, self._average, self._touched)

    def state_dict(self) -> dict[str, Any]:
        """Where every job stands, in the order of the rows: JSON values, and arrays by name."""
        count = len(self.members)
        arrays = {name: tensor[:count] for name, tensor in self._row_tensors().items()}
        kept = self._best.arrays([member for member in self.members if member.has_best])
        arrays |= {f"best.{index}": tensor for index, tensor in enumerate(kept)}
        arrays |= {f"random.{name}": tensor for name, tensor in self._random_state.items()}
        found = {name: tensor.detach().cpu().numpy().copy() for name, tensor in arrays.items()}
        members = [
            {"step": member.step, "average_weight": member.average_weight, "has_best": member.has_best}
            for member in self.members
        ]
        touched = {"touched": self._touched[:count].copy(), "best.touched": self._best.touched_by(self.members)}
        return {"members": members, "arrays": found | touched}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called.

        Args:
            state: What it gave; as many jobs as it tells of must have been added, in the same order.
        """
        arrays, count = state["arrays"], len(self.members)
        if len(state["members"]) != count:
            raise ValueError(f"state: expected {count} jobs, got {len(state['members'])}")
        for member, saved in zip(self.members, state["members"], strict=True):
            member.step, member.average_weight = int(saved["step"]), float(saved["average_weight"])
            member.has_best = bool(saved["has_best"])
            self._average_weight[member.row] = member.average_weight
        for name, tensor in self._row_tensors().items():
            tensor[:count] = torch.from_numpy(arrays[name]).to(tensor.device)
        self._touched[:count] = arrays["touched"]
        best = [member for member in self.members if member.has_best]
        kept = [
            torch.from_numpy(arrays[name]) for name in sorted(arrays) if name.startswith("best.") and name[5:].isdigit()
        ]
        self._best.load(best, kept, arrays["best.touched"])
        names = [name for name in arrays if name.startswith("random.")]
        self._random_state = {name[len("random.") :]: torch.from_numpy(arrays[name].copy()) for name in names}

    def _row_tensors(self) -> dict[str, Tensor]:
        """What there is of every row, but for gradients, which are zero between steps."""
        optimizer = self.optimizer
        found = {"weights": self.stack.weights, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        found |= {"steps": optimizer.steps, "loss_scale": self._scales.state}
        return found if self._average is None else {**found, "average": self._average}

    # -- rows -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _arrange(self, members: Sequence[Member]) -> None:
        """Moves the jobs to the first rows, in this order; the others follow."""
        chosen = set(members)
        order = [*members, *(member for member in self.members if member not in chosen)]
        moves = [(target, member.row) for target, member in enumerate(order) if member.row != target]
        if not moves:
            return
        targets, sources = (list(side) for side in zip(*moves, strict=True))
        self._move(targets, sources)
        self.members = order
        for row, member in enumerate(order):
            member.row = row

    def _move(self, targets: list[int], sources: list[int]) -> None:
        self.stack.weights[targets] = self.stack.weights[sources]
        self.optimizer.move(targets, sources)
        self._scales.move(targets, sources)
        self._touched[targets] = self._touched[sources]
        self._average_weight[targets] = self._average_weight[sources]
        if self._average is not None:
            self._average[targets] = self._average[sources]

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Runs with the population's random numbers (dropout) and leaves the global generators as they were."""
        with own_random_state(self._random_state, self.device):
            yield
            self._random_state = current_random_state(self.device)


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
