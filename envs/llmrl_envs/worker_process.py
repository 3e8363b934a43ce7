"""A process that holds an object and carries out its methods when asked.

It is a fresh interpreter with one thread for computing, which imports nothing of the caller's own program. Ctrl-C does
not reach it; it ends when the other end of its connection is gone, whatever became of that.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from llmrl_envs.errors import UserError

_PROGRAM = "import sys; from llmrl_envs.worker_process import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEEPING_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""The C library keeps what tensors of up to 32 MiB leave free. Given back to the system with each of them, it would
come anew page by page, which takes longer than computing what goes in."""
_ENDING_SECONDS = 5.0
_WATCH_SECONDS = 1.0


class WorkerProcess:
    """The caller's side of a worker.

    Args:
        make: Makes the object there; a function of a module, with arguments that can be pickled.
        arguments: Its arguments.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's signals are for the caller
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        self._number = 0
        self.ask("", make, arguments)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def ask(self, method: str, *arguments: Any) -> None:
        """Asks for a method to be carried out; `answer` waits for it.

        Raises:
            UserError: The worker is gone.
        """
        self._number += 1
        try:
            self._connection.send((self._number, method, arguments))
        except OSError as error:
            raise self._lost() from error

    def answer(self) -> Any:
        """What the latest question brought; answers to earlier ones, which an interruption left, are dropped.

        Raises:
            UserError: The worker is gone.
            Exception: Whatever the method raised.
        """
        number = 0
        while number < self._number:
            try:
                number, error, value = self._connection.recv()
            except (EOFError, OSError) as lost:
                raise self._lost() from lost
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Ends the process."""
        self._end()

    def _lost(self) -> UserError:
        try:
            code: object = self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            code = "no answer"
        return UserError(
            "a worker process of the population is gone",
            expected="memory for all of them, or fewer workers",
            got=f"exit code {code}",
            where="workers",
        )


def ask_all(workers: Sequence[WorkerProcess], method: str, *arguments: Sequence[Any]) -> list[Any]:
    """Asks all workers at once and waits for all.

    Args:
        workers: W of them.
        method: What to carry out.
        arguments: For each argument of the method, W values.

    Raises:
        Exception: The first of what the workers raised; by then all have answered.
    """
    for worker, *own in zip(workers, *arguments, strict=True):
        worker.ask(method, *own)
    found, failures = [], []
    for worker in workers:
        try:
            found.append(worker.answer())
        except Exception as error:  # raised below
            failures.append(error)
    if failures:
        raise failures[0]
    return found


def _environment() -> dict[str, str]:
    """Of the worker: the caller's modules, one thread, freed memory at hand, and no part in the caller's launch."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return _KEEPING_MEMORY | kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.terminate()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# -- the worker's side ----------------------------------------------------------------------------------------------


def serve(descriptor: int, caller: int) -> None:
    """Answers until the caller closes the connection.

    Args:
        descriptor: Of the connection.
        caller: Process number of the caller.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
    connection = Connection(descriptor)
    held: Any = None
    while True:
        try:
            number, method, arguments = connection.recv()
        except (EOFError, OSError):
            return
        error: BaseException | None = None
        value: Any = None
        try:
            if method:
                value = getattr(held, method)(*arguments)
            else:
                held = arguments[0](*arguments[1])
        except Exception as raised:  # told to the caller
            error = _portable(raised)
        try:
            connection.send((number, error, value))
        except OSError:
            return


def _end_with(caller: int) -> None:
    while os.getppid() == caller:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, with the worker's traceback as a note."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception class makes impossible
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker process:\n{told}")
    return error
