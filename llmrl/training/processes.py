"""The processes that learn one policy together, and the one that learns alone.

Every process runs the same loop and meets the others at the same places: after each step of its environments
(`exchange`), in each update (`add`), and around a checkpoint. What a process does between two meetings may fail there
alone; it then comes to the next meeting to say so, and all of them end. A process that is gone closes its connections,
on which the others fail at once.

The connections are gloo's, on the CPU, whatever device the jobs run on: what travels is small.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
import torch.distributed as dist
from llmrl_envs.errors import UserError
from numpy.typing import NDArray
from torch import Tensor

from llmrl.failures import explain
from llmrl.hosts.accelerate import launched_processes

LAUNCHER_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
NUM_NUMBERS = 3  # that a process brings to an exchange, beside two flags
IMPATIENCE_SECONDS = (
    3.0  # launchers pass a signal on that the terminal has delivered already; later ones are a person's
)


class ProcessLostError(UserError):
    """Another process is gone, or did not come to a meeting in time."""

    told_by_all = True  # whoever of the survivors it is that can still speak


class OtherProcessFailedError(UserError):
    """Another process came to a meeting to say that it failed."""


class Processes(Protocol):
    """The processes that learn one policy together."""

    rank: int
    num_processes: int

    def exchange(self, *numbers: int) -> NDArray[np.int64]:
        """Everyone's numbers [P, 3], those that are not given being 0; by rank.

        Raises:
            KeyboardInterrupt: Somebody was asked to stop.
        """

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""

    def add(self, tensor: Tensor) -> None:
        """Replaces a tensor by the sum of everyone's, the same bits everywhere."""

    def first(self, action: Callable[[], None]) -> None:
        """Does something in the first process, and waits for it in the others."""

    @contextmanager
    def inseparable(self) -> Iterator[None]:
        """A block within which others wait for this process; a failure there cannot be told to them."""
        yield


class OneProcess:
    """A process that learns alone."""

    rank = 0
    num_processes = 1

    def exchange(self, *numbers: int) -> NDArray[np.int64]:
        """The own numbers [1, 3]."""
        return np.array([_padded(numbers)], dtype=np.int64)

    def gather(self, value: Any) -> list[Any]:
        """The own value."""
        return [value]

    def add(self, tensor: Tensor) -> None:
        """Leaves the tensor as it is."""

    def first(self, action: Callable[[], None]) -> None:
        """Does it."""
        action()

    @contextmanager
    def inseparable(self) -> Iterator[None]:
        """Nothing more."""
        yield


class SeveralProcesses:
    """Those that a launcher (`accelerate launch`, `torchrun`) started.

    Args:
        timeout_seconds: How long to wait for another process at a meeting.

    Raises:
        ProcessLostError: The others did not come.
        UserError: The environment says that there are others, but not where.
    """

    def __init__(self, timeout_seconds: float) -> None:
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={launched_processes()} says that there are other processes, but not where they meet",
                expected="accelerate launch -m llmrl train .., or WORLD_SIZE unset",
                got=f"no {', '.join(missing)}",
                where="environment variables",
            )
        timeout = timedelta(seconds=timeout_seconds)
        self._owned = not dist.is_initialized()
        self.rank, self.num_processes = int(os.environ["RANK"]), launched_processes()
        with self._connection():
            if self._owned:
                dist.init_process_group("gloo", timeout=timeout)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._can_tell = True
        self.stop_requested = False

    def exchange(self, *numbers: int) -> NDArray[np.int64]:
        """See `Processes`.

        Raises:
            OtherProcessFailedError: Somebody failed since the last meeting.
            ProcessLostError: Somebody is gone.
            KeyboardInterrupt: Somebody was asked to stop.
        """
        met = self._meet(False, numbers)
        if met[:, 0].any():
            self._end_with_the_others("")
        if met[:, 1].any():
            raise KeyboardInterrupt
        return met[:, 2:]

    def gather(self, value: Any) -> list[Any]:
        """See `Processes`; an exchange comes first, so that a failure is told instead of a value."""
        self.exchange()
        return self._gather(value)

    def add(self, tensor: Tensor) -> None:
        """See `Processes`; the sum is made once, piece by piece, and handed round."""
        vector = tensor if tensor.device.type == "cpu" else tensor.cpu()
        with self._connection():
            dist.all_reduce(vector, group=self._group)
        if vector is not tensor:
            tensor.copy_(vector)

    def first(self, action: Callable[[], None]) -> None:
        """See `Processes`."""
        if self.rank == 0:
            action()
        self.exchange()

    @contextmanager
    def inseparable(self) -> Iterator[None]:
        """See `Processes`."""
        self._can_tell = False
        yield
        self._can_tell = True  # not after a failure

    def tell(self, error: Exception) -> None:
        """Comes to the next meeting to say that this process failed, if that is possible."""
        if not self._can_tell or isinstance(error, ProcessLostError | OtherProcessFailedError):
            return
        try:
            self._meet(True, ())
            self._end_with_the_others(explain(error) or f"{type(error).__name__}: {error}")
        except UserError:
            return

    def stop(self, number: int, _: FrameType | None) -> None:
        """Handles a signal: everyone stops at the next exchange; asked again after a while, this process at once."""
        now = time.monotonic()
        if not self.stop_requested:
            self.stop_requested, self._stop_time = True, now
        elif now - self._stop_time > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt

    def leave(self) -> None:
        """Closes the connections."""
        if self._owned:
            dist.destroy_process_group()

    def _meet(self, failed: bool, numbers: Sequence[int]) -> NDArray[np.int64]:  # [P, 2 + 3]
        own = torch.tensor([failed, self.stop_requested, *_padded(numbers)], dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.num_processes)]
        with self._connection():
            dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows).numpy()

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.num_processes
        with self._connection():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _end_with_the_others(self, failure: str) -> NoReturn:
        failures = self._gather(failure)
        rank = next(rank for rank, text in enumerate(failures) if text)
        raise OtherProcessFailedError(f"process {rank} of {self.num_processes} failed", got=failures[rank])

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """Turns what the connections say into one clear sentence."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise ProcessLostError(
                f"process {self.rank} of {self.num_processes} lost another one, so the run cannot go on",
                expected="all processes alive; the same command with --resume goes on from the last checkpoint",
                got=re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition(". ")[0].strip(),  # without the library's file
            ) from error


@contextmanager
def join_processes(timeout_seconds: float) -> Iterator[Processes]:
    """The processes of this run, while it runs.

    With several, SIGINT and SIGTERM stop all of them at the same step, and a failure of one ends all.

    Args:
        timeout_seconds: How long one may wait for another.
    """
    if launched_processes() == 1:
        yield OneProcess()
        return
    processes = SeveralProcesses(timeout_seconds)
    with _handled_signals(processes.stop):
        try:
            yield processes
        except Exception as error:
            processes.tell(error)
            raise
    processes.leave()


@contextmanager
def _handled_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sends SIGINT and SIGTERM to a handler; only the main thread may ask for that.

    After a failure they stay there: launchers end the processes that are left when one is gone, and these are to say
    why before they go.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, old in before.items():
        signal.signal(number, old)


def process_seed(seed: int, rank: int) -> int:
    """The run's seed for the first process, and unrelated ones for the others."""
    return seed if rank == 0 else int(np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(1)[0])


def process_device(name: str) -> str:
    """The device for the jobs of this process: where several share GPUs, each takes the next one."""
    if launched_processes() == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _padded(numbers: Sequence[int]) -> list[int]:
    return [*map(int, numbers), *[0] * (NUM_NUMBERS - len(numbers))]
