"""Many fine-tuning jobs of one model, trained together: a batch of P x B sequences, every job its own.

What `FineTuningSession` does for one job, with the same numbers but for rounding; see docs/population.md
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
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.population.best_states import BestStates
from llmrl_envs.jobs.population.evaluation import PopulationEvaluation
from llmrl_envs.jobs.population.members import IntervalPlan, IntervalResult, Member
from llmrl_envs.jobs.population.passes import PassWidth
from llmrl_envs.jobs.population.probes import UpdateProbe, initial_norms
from llmrl_envs.jobs.population.rows import PopulationRows
from llmrl_envs.jobs.population.stack import WeightStack
from llmrl_envs.jobs.population.training import PopulationTraining
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
        self.precision = Precision(job.task.precision, job.device)
        self.stack = WeightStack(job)
        self.rows = PopulationRows(self.stack, job.device, averaged=averaged, scaled=self.precision.name == "fp16")
        self.members: list[Member] = []
        self.width = PassWidth()
        self.mode: TuningMode = job.mode
        self.trainable_fraction = job.loaded.trainable_fraction
        pairs = self.stack.pairs if level_norm == "effective" else ()
        self._initial_norms = initial_norms(job.initial, self.stack.layout, pairs)
        probe = UpdateProbe(self.stack.layout, self.rows.optimizer, pairs)
        common = (self.precision, self.width, job.device)
        classification = job.task.objective == "classification"
        self._training = PopulationTraining(self.rows, probe, *common, classification=classification)
        self._evaluation = PopulationEvaluation(self.rows, *common, classification=classification)
        self._best = BestStates(self.rows)
        self._random_state = seeded_random_state(0, job.device)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def reserve(self, capacity: int) -> None:
        """Makes room for so many jobs."""
        self.rows.reserve(capacity)

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
        self.rows.begin(row, job.task.optimizer, weight)
        return member

    def remove(self, member: Member) -> None:
        """Ends a job; the last one moves to its row."""
        last = self.members[-1]
        if last is not member:
            self.rows.move([member.row], [last.row])
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
                found |= self._training.run(list(group))
        return [found[member] for member in by_member]

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
        if any(flags.values()) and self.rows.average is None:
            raise ValueError("averaged: expected a population made with averaged=True")
        order = sorted(members, key=lambda member: (member.shape_key, member.row))
        self._arrange(order)
        found: dict[Member, Evaluation] = {}
        for _, group in groupby(order, key=lambda member: member.shape_key):
            jobs = list(group)
            found |= self._evaluation.run(jobs, split, [flags[member] for member in jobs])
        return [found[member] for member in members]

    # -- snapshots ------------------------------------------------------------------------------------------------

    def mark_best(self, members: Sequence[Member]) -> None:
        """Keeps the present states of jobs as those that `roll_back` returns to."""
        self._best.keep(members)

    def roll_back(self, members: Sequence[Member]) -> None:
        """Takes weights and moments of jobs back to their best states; data and budget move on."""
        self._best.restore(members)

    def state_dict(self) -> dict[str, Any]:
        """Where every job stands, in the order of the rows: JSON values, and arrays by name."""
        count = len(self.members)
        arrays = {name: tensor[:count] for name, tensor in self.rows.tensors().items()}
        kept = self._best.arrays([member for member in self.members if member.has_best])
        arrays |= {f"best.{index}": tensor for index, tensor in enumerate(kept)}
        arrays |= {f"random.{name}": tensor for name, tensor in self._random_state.items()}
        found = {name: tensor.detach().cpu().numpy().copy() for name, tensor in arrays.items()}
        members = [
            {"step": member.step, "average_weight": member.average_weight, "has_best": member.has_best}
            for member in self.members
        ]
        touched = {"touched": self.rows.touched[:count].copy(), "best.touched": self._best.touched_by(self.members)}
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
            self.rows.average_weight[member.row] = member.average_weight
        for name, tensor in self.rows.tensors().items():
            if name in arrays or name != "outliers":  # unknown to earlier versions
                tensor[:count] = torch.from_numpy(arrays[name]).to(tensor.device)
        self.rows.touched[:count] = arrays["touched"]
        best = [member for member in self.members if member.has_best]
        kept = [
            torch.from_numpy(arrays[name]) for name in sorted(arrays) if name.startswith("best.") and name[5:].isdigit()
        ]
        self._best.load(best, kept, arrays["best.touched"])
        names = [name for name in arrays if name.startswith("random.")]
        self._random_state = {name[len("random.") :]: torch.from_numpy(arrays[name].copy()) for name in names}

    # -- rows -----------------------------------------------------------------------------------------------------

    def _arrange(self, members: Sequence[Member]) -> None:
        """Moves the jobs to the first rows, in this order; the others follow."""
        chosen = set(members)
        order = [*members, *(member for member in self.members if member not in chosen)]
        moves = [(target, member.row) for target, member in enumerate(order) if member.row != target]
        if not moves:
            return
        targets, sources = (list(side) for side in zip(*moves, strict=True))
        self.rows.move(targets, sources)
        self.members = order
        for row, member in enumerate(order):
            member.row = row

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Runs with the population's random numbers (dropout) and leaves the global generators as they were."""
        with own_random_state(self._random_state, self.device):
            yield
            self._random_state = current_random_state(self.device)
