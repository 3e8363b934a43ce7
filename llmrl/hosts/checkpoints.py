"""Checkpoints of one job of `llmrl finetune`, written by all of its processes into one folder.

    shared.safetensors              weights, optimizer and best snapshot, where they are the same in every process
    process.R.safetensors           of process R alone: its generators, and its shards where the model is shared out
    state.json, arrays.safetensors  what the job is, what was decided and measured, the place in the data

A folder counts only when it is complete (see `llmrl.training.checkpoint`). One that is damaged is refused, not passed
over: the job would quietly begin again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.parallel import ParallelContext
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrl.hosts.accelerate import AcceleratorContext, found_by_first
from llmrl.hosts.job_state import JobState
from llmrl.run_directory import to_json_value
from llmrl.training.checkpoint import CHECKPOINTS, newest_whole_checkpoint, read_state, save_together

SHARED = "shared.safetensors"


class JobCheckpoints:
    """The checkpoints of one job.

    Args:
        output: Run directory, the same one for all processes.
        identity: What the job is, JSON values; a checkpoint of another job is refused.
        context: The processes that share it.
        period_decisions: Decisions between checkpoints; 0 writes none.
    """

    def __init__(
        self, output: Path, identity: Mapping[str, Any], context: ParallelContext, period_decisions: int
    ) -> None:
        self._directory = output / CHECKPOINTS
        self._identity = to_json_value(identity)
        self._context = context
        self._period = period_decisions

    def due(self, num_decisions: int) -> bool:
        """Whether a checkpoint belongs behind the interval of the latest decision."""
        return self._period > 0 and num_decisions % self._period == 0

    def save(self, num_decisions: int, state: JobState) -> None:
        """Writes a checkpoint together with the other processes.

        Raises:
            UserError: A process does not see the folder of the first.
            OSError: The disk is full or not writable; earlier checkpoints are untouched.
        """
        rank = self._context.rank

        def write(folder: Path) -> None:
            if rank == 0 and state.shared:
                save_file(_whole(state.shared), folder / SHARED)
            save_file(_whole(state.own), folder / _own_file(rank))

        values = {"job": self._identity, "processes": self._context.world_size, "state": state.values}
        save_together(self._directory, num_decisions, values, write, rank=rank, meet=self._meet)

    def load(self) -> JobState | None:
        """The newest checkpoint as this process needs it; None where there is none.

        Raises:
            UserError: It is damaged, of another job, or of another number of processes.
        """
        name = found_by_first(self._context, self._newest)
        if not name:
            return None
        path = self._directory / name
        read = read_state(path)
        self._check(read, path)
        shared = load_file(path / SHARED) if (path / SHARED).exists() else {}
        return JobState(read["state"], shared, load_file(path / _own_file(self._context.rank)))

    def _newest(self) -> str:
        found = newest_whole_checkpoint(self._directory)
        return "" if found is None else found.name

    def _check(self, read: Mapping[str, Any], path: Path) -> None:
        if changed := differences(read["job"], self._identity):
            raise UserError(
                "the checkpoint is of another job",
                where=str(path),
                expected="the configuration and the policy that it was begun with, or another --output",
                got="; ".join(changed),
            )
        if read["processes"] != self._context.world_size:
            raise UserError(
                "the checkpoint is of another number of processes, each of which has random numbers of its own",
                where=str(path),
                expected=f"{read['processes']} processes",
                got=self._context.world_size,
            )

    def _meet(self) -> None:
        if isinstance(self._context, AcceleratorContext):
            self._context.barrier()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested JSON values, a line each.

    >>> differences({"task": {"steps": 20}, "seed": 0}, {"task": {"steps": 30}, "seed": 0})
    ['task.steps: 20 before, 30 now']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name}: {before} before, {now} now"]


def _own_file(rank: int) -> str:
    return f"process.{rank}.safetensors"


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file wants them: each contiguous."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
