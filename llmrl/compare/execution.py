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
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from rich.progress import Progress, TaskID

from llmrl.compare.baselines.population import run_population
from llmrl.compare.baselines.running import run_baseline
from llmrl.compare.baselines.search import best_trial, combine_trials, search_learning_rate
from llmrl.compare.cache import Fingerprints, RunResult, RunStore, run_key
from llmrl.compare.level_choice import LevelChoice, best_levels
from llmrl.compare.methods import (
    BaselineMethod,
    BestLevelMethod,
    Method,
    PolicyMethod,
    PopulationMethod,
    SearchMethod,
    resolve_methods,
    sweep_method,
)
from llmrl.compare.plan import Run
from llmrl.compare.setting import Setting as Setting
from llmrl.compare.units import Unit, make_units
from llmrl.config import CompareConfig
from llmrl.hosts.curve import NUM_CURVE_POINTS
from llmrl.hosts.job import run_job
from llmrl.progress import make_progress


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
        self._fingerprints = Fingerprints()
        self._sweep = sweep_method(setting.config)
        resolved = resolve_methods(setting.config, setting.policy)
        levels = {level.name: level for level in best_levels(resolved)}
        self._methods: dict[str, Method] = {self._sweep.name: self._sweep} | levels | resolved

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
            on_step: Told the optimizer steps done, those of all its jobs together.
        """
        method = self._methods[run.method]
        result = self._train(run, method, on_step or _ignore)
        self._store.write(run.key, self._describe(run, method), result)
        return result

    def _train(self, run: Run, method: Method, on_step: Callable[[int], None]) -> RunResult:
        job = self._library.job(self._config.tasks[run.task])
        if isinstance(method, PolicyMethod):
            outcome = run_job(
                job,
                method.policy_for(run.seed),
                learning_rate=run.learning_rate,
                seed=run.seed,
                settings=method.replaced_settings,
                guarded=method.guarded,
                validate=method.validations,
                curve_points=NUM_CURVE_POINTS,
                on_decision=lambda record: on_step(record.step),
            )
            return RunResult.from_job(outcome)
        if isinstance(method, BaselineMethod):
            outcome = run_baseline(
                job,
                method.baseline,
                learning_rate=run.learning_rate,
                seed=run.seed,
                curve_points=NUM_CURVE_POINTS,
                on_step=on_step,
            )
            return RunResult.from_job(outcome)
        if isinstance(method, PopulationMethod):
            outcome = run_population(
                job,
                num_members=method.num_members,
                learning_rate=run.learning_rate,
                seed=run.seed,
                warmup_fraction=method.warmup_fraction,
                on_step=on_step,
            )
            return RunResult.from_job(outcome, method.num_members)
        if isinstance(method, SearchMethod):
            return self._search(run, method, on_step)
        raise TypeError(f"{method.name}: expected a method that is trained, got {type(method).__name__}")

    def _search(self, run: Run, method: SearchMethod, on_step: Callable[[int], None]) -> RunResult:
        """Trains the trials that are not on disk: those of an interrupted or of a shorter search are."""
        steps = self._config.tasks[run.task].steps
        trials: list[RunResult] = []

        def train_at(rate: float) -> RunResult:
            trial = self._trial(run, rate)
            found = self._store.read(trial.key)
            done = len(trials) * steps
            if found is None or not found.curve:
                found = self.train(trial, lambda step: on_step(done + step))
            trials.append(found)
            return found

        search_learning_rate(
            train_at,
            learning_rate=run.learning_rate,
            num_trials=method.num_trials,
            seed=int(self._trial(run, run.learning_rate).key[:8], 16),
        )
        return combine_trials(trials, best_trial(trials))

    def _trial(self, run: Run, rate: float) -> Run:
        task = self._config.tasks[run.task]
        key = run_key(
            task,
            fingerprints=self._fingerprints.of_task(task),
            method_digest=self._sweep.digest,
            learning_rate=rate,
            seed=run.seed,
            device_type=self._library.device.type,
        )
        return Run(key, run.task, self._sweep.name, rate, run.seed)

    def _describe(self, run: Run, method: Method) -> dict[str, Any]:
        return {
            "task": self._config.tasks[run.task].name,
            "method": run.method,
            "learning_rate": run.learning_rate if method.depends_on_rate else None,
            "seed": run.seed,
        }


def _ignore(step: int) -> None:
    """Nobody looks at the progress of this run."""


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
    methods = resolve_methods(setting.config, setting.policy)
    chosen_later = [run for run in runs if isinstance(methods.get(run.method), BestLevelMethod)]
    choice = LevelChoice(setting, methods) if chosen_later else None
    wanted = {run.key for run in runs}
    hidden = [run for run in choice.runs() if run.key not in wanted] if choice else []
    trained = [run for run in runs if run not in chosen_later]

    def note(run: Run, result: RunResult) -> None:
        if run.key in wanted:
            on_result(run, result)

    _train_all(setting, make_units([*trained, *hidden], methods), note)
    if choice is not None:
        for run in chosen_later:
            on_result(run, choice.result(run))


def _train_all(setting: Setting, units: Sequence[Unit], on_result: Callable[[Run, RunResult], None]) -> None:
    if not units:
        return
    config = setting.config
    num_workers = min(config.workers, len(units))
    # Several workers have their own copies; this process then only looks whether everything can be loaded.
    trainer = Trainer(setting, config.device if num_workers == 1 else "cpu")
    trainer.load(sorted({run.task for unit in units for run in unit.runs}))
    with _progress(config, units) as progress:
        if num_workers == 1:
            for unit in units:
                for run in unit.runs:
                    on_result(run, trainer.train(run, progress.on_step))
                progress.finish(unit)
            return
        del trainer

        def note(unit: Unit, results: Sequence[RunResult]) -> None:
            for run, result in zip(unit.runs, results, strict=True):
                on_result(run, result)
            progress.finish(unit)

        _execute_in_workers(setting, units, num_workers, note)


class _Progress:
    """The bar, in optimizer steps over all jobs; budgets differ, so that counting runs would mislead."""

    def __init__(self, bar: Progress, bar_id: TaskID, config: CompareConfig, num_runs: int) -> None:
        self._bar, self._id, self._config, self._num_runs = bar, bar_id, config, num_runs
        self._steps = self._finished = 0

    def on_step(self, step: int) -> None:
        """Notes the steps done by the present unit."""
        self._bar.update(self._id, completed=self._steps + step)

    def finish(self, unit: Unit) -> None:
        """Notes a finished unit."""
        self._steps += unit.num_steps(self._config)
        self._finished += len(unit.runs)
        self._bar.update(self._id, completed=self._steps, runs=f"{self._finished}/{self._num_runs}")


@contextmanager
def _progress(config: CompareConfig, units: Sequence[Unit]) -> Iterator[_Progress]:
    total, num_runs = sum(unit.num_steps(config) for unit in units), sum(len(unit.runs) for unit in units)
    with make_progress("steps, runs {task.fields[runs]}") as bar:
        yield _Progress(bar, bar.add_task("comparing", total=total, runs=f"0/{num_runs}"), config, num_runs)


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


def _train_in_worker(unit: Unit) -> list[RunResult]:
    if _trainer is None:
        raise RuntimeError("a run arrived before the worker was prepared")
    return [_trainer.train(run) for run in unit.runs]


def _worker_devices(device: str, num_workers: int) -> list[str]:
    """Device of each worker: "auto" spreads them over all GPUs."""
    num_gpus = torch.cuda.device_count() if device == "auto" else 0
    return [f"cuda:{worker % num_gpus}" if num_gpus else device for worker in range(num_workers)]


def _execute_in_workers(
    setting: Setting, units: Sequence[Unit], num_workers: int, on_result: Callable[[Unit, list[RunResult]], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    devices: SimpleQueue[str] = context.SimpleQueue()
    for device in _worker_devices(setting.config.device, num_workers):
        devices.put(device)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(num_workers, context, _start_worker, (setting, devices)) as pool:
        try:
            futures: dict[Future[list[RunResult]], Unit] = {pool.submit(_train_in_worker, u): u for u in units}
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
