"""The best state of every job, which a rollback returns to; memory is taken when the first one is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.jobs.population.members import Member
from llmrl_envs.jobs.population.rows import PopulationRows
from llmrl_envs.jobs.population.stack import grown


class BestStates:
    """Weights, moments and averages of jobs as they were at their best, by each job's `home`.

    Args:
        rows: The jobs' present states.
    """

    def __init__(self, rows: PopulationRows) -> None:
        self._rows = rows
        self._kept: list[Tensor] = []
        self.touched: NDArray[np.bool_] = np.zeros((0, 2), np.bool_)

    def keep(self, members: Sequence[Member]) -> None:
        """Keeps the present states of jobs."""
        if not members:
            return
        live = self._live()
        self._make_room(live, max(max(member.home for member in members) + 1, len(self._rows.touched)))
        homes, rows = [member.home for member in members], [member.row for member in members]
        for kept, tensor in zip(self._kept, live, strict=True):
            kept[homes] = tensor[rows]
        self.touched[homes] = self._rows.touched[rows]
        for member in members:
            member.has_best = True

    def restore(self, members: Sequence[Member]) -> None:
        """Takes jobs back to their best states.

        Raises:
            ValueError: A job has none.
        """
        missing = [member.row for member in members if not member.has_best]
        if missing:
            raise ValueError(f"roll_back: expected a best state to have been kept, got none for rows {missing}")
        if not members:
            return
        homes, rows = [member.home for member in members], [member.row for member in members]
        for kept, tensor in zip(self._kept, self._live(), strict=True):
            tensor[rows] = kept[homes]
        self._rows.touched[rows] = self.touched[homes]

    def _make_room(self, live: Sequence[Tensor], capacity: int) -> None:
        if not self._kept:
            self._kept = [torch.zeros(0, *tensor.shape[1:], device=tensor.device) for tensor in live]
        missing = capacity - len(self._kept[0])
        if missing > 0:
            self._kept = [grown(tensor, capacity) for tensor in self._kept]
            self.touched = np.concatenate([self.touched, np.zeros((missing, 2), np.bool_)])

    def _live(self) -> list[Tensor]:
        optimizer, average = self._rows.optimizer, self._rows.average
        live = [self._rows.stack.weights, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps]
        return live if average is None else [*live, average]

    # -- state ----------------------------------------------------------------------------------------------------

    def arrays(self, members: Sequence[Member]) -> list[Tensor]:
        """The best states of jobs that have one, each [len(members), ...]."""
        homes = [member.home for member in members]
        return [kept[homes] for kept in self._kept] if homes else []

    def touched_by(self, members: Sequence[Member]) -> NDArray[np.bool_]:
        """Which halves had been stepped, bool[M, 2], of the jobs that have a best state."""
        return self.touched[[member.home for member in members if member.has_best]]

    def load(self, members: Sequence[Member], kept: Sequence[Tensor], touched: NDArray[np.bool_]) -> None:
        """Takes in what `arrays` and `touched_by` gave for the same jobs."""
        if not members:
            return
        homes = [member.home for member in members]
        self._kept = [tensor[:0].to(self._rows.stack.weights.device) for tensor in kept]
        self.touched = self.touched[:0]
        self._make_room(self._kept, max(homes) + 1)
        for target, tensor in zip(self._kept, kept, strict=True):
            target[homes] = tensor.to(target.device)
        self.touched[homes] = touched
