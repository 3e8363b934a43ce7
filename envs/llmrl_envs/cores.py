"""How many cores this process may keep busy, and into how many worker processes a population is cut for them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import torch

from llmrl_envs.errors import UserError

LANES_PER_WORKER = 4
"""Fewest lanes for which a worker is started by itself: with fewer, a pass saves less than half of what it can."""

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores of this process: as many as torch would use as threads, so that workers never need more than threads did.

    Torch's number follows from the machine, `OMP_NUM_THREADS` and `torch.set_num_threads`. It is cut to the cores that
    the process may run on, to a container's share of them, and where a launcher started several processes on this
    machine (`LOCAL_WORLD_SIZE`) to this one's part.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    part = min(allowed, container_cores() or allowed) // _local_processes()
    return max(min(torch.get_num_threads(), part), 1)


def container_cores(path: Path = _QUOTA_FILE) -> int | None:
    """Whole cores that the container's quota is worth, at least one; None where there is none.

    Args:
        path: Holds the quota and its period in microseconds, or `max` in place of the first.
    """
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return max(int(quota) // int(period), 1)
    except (OSError, ValueError):
        return None


def population_workers(workers: int | str, num_envs: int, group_size: int, device: torch.device) -> int:
    """Worker processes of a population; 1 is none beside this process.

    Args:
        workers: A number, or "auto": one for each usable core, but four lanes or more for each; on a GPU one.
        num_envs: Lanes.
        group_size: Lanes that must stay together.
        device: Where the jobs run.

    Raises:
        UserError: There cannot be so many.
    """
    most = num_envs // group_size
    if workers == "auto":
        able = device.type == "cpu" and os.name == "posix" and not multiprocessing.current_process().daemon
        return max(min(usable_cores(), num_envs // LANES_PER_WORKER, most), 1) if able else 1
    found = workers if isinstance(workers, int) else 0
    if found > 1 and device.type != "cpu":
        raise UserError(
            "a population has workers on a CPU only; an accelerator takes all jobs in one pass",
            expected="1 or auto",
            got=workers,
            where="workers",
        )
    if not 1 <= found <= most:
        kind = "groups" if group_size > 1 else "jobs"
        raise UserError(
            "the population cannot be cut into workers",
            expected=f"1 to {most}, the number of {kind}, or auto",
            got=workers,
            where="workers",
        )
    return found


def _local_processes() -> int:
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(told), 1) if told.isdecimal() else 1
