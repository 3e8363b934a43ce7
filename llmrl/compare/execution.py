"""Trains what a plan still lacks, here or in worker processes; every finished run is on disk at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from rich.progress import Progress, TaskID

from llmrl.compare.cache import RunResult, RunStore
from llmrl.compare.methods import Method, resolve_methods, sweep_method
from llmrl.compare.plan import Run
from llmrl.config import CompareConfig
from llmrl.hosts.curve import NUM_CURVE_POINTS
from llmrl.hosts.job import run_job
from llmrl.progress import make_progress


@dataclass(frozen=True)
class Setting:
    """What every run of a comparison shares; small enough to be sent to a worker.

    Attributes:
        config: Tasks, device, schedule.
        policy: The policy of the command line.
        store: Folder of the finished runs.
    """

    config: CompareConfig
    policy: str
    store: Path


class Trainer:
    """Trains runs in this process; loads every model and dataset once.

    Args:
        setting: The comparison.
        device: Where the jobs run.
    """

    def __init__(self, setting: Setting, device: str) -> None:
        self._config = setting.config
        self._store = RunStore(setting.store)
        self._library = JobLibrary(device)
        sweep = sweep_method(setting.config)
        self._methods: dict[str, Method] = {sweep.name: sweep} | resolve_methods(setting.config, setting.policy)

    def load(self, tasks: Sequence[int]) -> None:
        """Loads the models and data of tasks, so that a mistake in the last one is found before anything is trained.

        Raises:
            UserError: One cannot be loaded.
        """
        for task in tasks:
            self._library.job(self._config.tasks[task])

    def train(self, run: Run, on_step: Callable[[int], None] | None = None) -> RunResult:
        """Trains one run and keeps its result.

        Args:
            run: What to train.
            on_step: Told the optimizer steps done, at every decision.
        """
        method = self._methods[run.method]
        task = self._config.tasks[run.task]
        outcome = run_job(
            self._library.job(task),
            method.policy,
            learning_rate=run.learning_rate,
            seed=run.seed,
            settings=method.settings,
            guarded=method.guarded,
            curve_points=NUM_CURVE_POINTS,
            on_decision=None if on_step is None else lambda record: on_step(record.step),
        )
        result = RunResult.from_job(outcome)
        description = {
            "task": task.name,
            "method": run.method,
            "learning_rate": run.learning_rate if method.depends_on_rate else None,
            "seed": run.seed,
        }
        self._store.write(run.key, description, result)
        return result


def execute(setting: Setting, runs: Sequence[Run], on_result: Callable[[Run, RunResult], None]) -> None:
    """Trains runs and waits for all of them, with progress on stderr.

    Args:
        setting: The comparison.
        runs: What is missing.
        on_result: Called in this process after each run.

    Raises:
        UserError: A task cannot be loaded (nothing has been trained then), or a worker was killed.
    """
    if not runs:
        return
    config = setting.config
    tasks = sorted({run.task for run in runs})
    num_workers = min(config.workers, len(runs))
    # Several workers have their own copies; this process then only looks whether everything can be loaded.
    trainer = Trainer(setting, config.device if num_workers == 1 else "cpu")
    trainer.load(tasks)
    with _progress(config, runs) as progress:
        if num_workers == 1:
            for run in runs:
                on_result(run, trainer.train(run, progress.on_step))
                progress.finish(run)
            return
        del trainer

        def note(run: Run, result: RunResult) -> None:
            on_result(run, result)
            progress.finish(run)

        _execute_in_workers(setting, runs, num_workers, note)


class _RunProgress:
    """The bar, in optimizer steps over all runs; budgets differ, so that counting runs would mislead."""

    def __init__(self, bar: Progress, bar_id: TaskID, config: CompareConfig, num_runs: int) -> None:
        self._bar, self._id, self._config, self._num_runs = bar, bar_id, config, num_runs
        self._steps = self._finished = 0

    def on_step(self, step: int) -> None:
        """Notes the steps done by the present run."""
        self._bar.update(self._id, completed=self._steps + step)

    def finish(self, run: Run) -> None:
        """Notes a finished run."""
        self._steps += self._config.tasks[run.task].steps
        self._finished += 1
        self._bar.update(self._id, completed=self._steps, runs=f"{self._finished}/{self._num_runs}")


@contextmanager
def _progress(config: CompareConfig, runs: Sequence[Run]) -> Iterator[_RunProgress]:
    total = sum(config.tasks[run.task].steps for run in runs)
    with make_progress("steps, runs {task.fields[runs]}") as bar:
        yield _RunProgress(bar, bar.add_task("comparing", total=total, runs=f"0/{len(runs)}"), config, len(runs))


# -- worker processes ---------------------------------------------------------------------------------------------

_trainer: Trainer | None = None


def _start_worker(setting: Setting, devices: SimpleQueue[str]) -> None:
    """Prepares a worker: one thread, its device, no Ctrl-C of its own, and an end when the parent is gone."""
    global _trainer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _trainer = Trainer(setting, devices.get())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_in_worker(run: Run) -> RunResult:
    if _trainer is None:
        raise RuntimeError("a run arrived before the worker was prepared")
    return _trainer.train(run)


def _worker_devices(device: str, num_workers: int) -> list[str]:
    """Device of each worker: "auto" spreads them over all GPUs."""
    num_gpus = torch.cuda.device_count() if device == "auto" else 0
    return [f"cuda:{worker % num_gpus}" if num_gpus else device for worker in range(num_workers)]


def _execute_in_workers(
    setting: Setting, runs: Sequence[Run], num_workers: int, on_result: Callable[[Run, RunResult], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    devices: SimpleQueue[str] = context.SimpleQueue()
    for device in _worker_devices(setting.config.device, num_workers):
        devices.put(device)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(num_workers, context, _start_worker, (setting, devices)) as pool:
        try:
            futures: dict[Future[RunResult], Run] = {pool.submit(_train_in_worker, run): run for run in runs}
            for future in as_completed(futures):
                on_result(futures[future], future.result())
        except BrokenProcessPool:
            raise UserError(
                "a worker process died; finished runs are kept",
                expected=f"memory for {num_workers} models at a time, or fewer workers",
                where="workers",
            ) from None
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
