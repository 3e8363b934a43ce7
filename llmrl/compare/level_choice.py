"""The best constant level: every level of the grid on every task and seed, and one of them for all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from llmrl_envs.jobs.loading import resolve_device

from llmrl.compare.baselines.search import combine_trials, validation_loss
from llmrl.compare.cache import Fingerprints, RunResult, RunStore, run_key
from llmrl.compare.methods import BestLevelMethod, Method, PolicyMethod
from llmrl.compare.plan import Run
from llmrl.compare.setting import Setting


def best_levels(methods: Mapping[str, Method]) -> tuple[PolicyMethod, ...]:
    """The levels of the method among `methods` that chooses one; none where it is not compared."""
    return next((method.levels for method in methods.values() if isinstance(method, BestLevelMethod)), ())


class LevelChoice:
    """Knows the runs that the choice needs, and makes it once they are on disk.

    Args:
        setting: The comparison.
        methods: By name, the one that chooses a level among them.
    """

    def __init__(self, setting: Setting, methods: Mapping[str, Method]) -> None:
        self._config = setting.config
        self._store = RunStore(setting.store)
        self._levels = best_levels(methods)
        self._method = next(method for method in methods.values() if isinstance(method, BestLevelMethod))
        self._device_type = resolve_device(setting.config.device).type
        fingerprints = Fingerprints()
        self._files = [fingerprints.of_task(task) for task in setting.config.tasks]

    def runs(self) -> list[Run]:
        """Those that are not on disk with a curve."""
        jobs = [(task, seed) for task in range(len(self._config.tasks)) for seed in self._config.seeds]
        wanted = [self._run(level, task, seed) for task, seed in jobs for level in self._levels]
        return [run for run in wanted if not _has_curve(self._store.read(run.key))]

    def result(self, run: Run) -> RunResult:
        """The result of the chosen level with the compute of all levels; it is kept as the run's."""
        trials = self._trials(run.task, run.seed)
        result = combine_trials(trials, self.chosen())
        description = {"task": self._config.tasks[run.task].name, "method": run.method, "seed": run.seed}
        self._store.write(run.key, {**description, "level": self.level()}, result)
        return result

    def chosen(self) -> int:
        """The place of the level whose validation loss, as a share of the loss before training, is lowest on average.

        The geometric mean over tasks and seeds, so that a task of high losses counts no more than another.
        """
        jobs = [(task, seed) for task in range(len(self._config.tasks)) for seed in self._config.seeds]
        return choose_level([self._trials(task, seed) for task, seed in jobs])

    def level(self) -> float:
        """The chosen level."""
        policy = self._levels[self.chosen()].policy
        return policy.table.levels[policy.table.default_level]

    def _trials(self, task: int, seed: int) -> list[RunResult]:
        found = [self._store.read(self._run(level, task, seed).key) for level in self._levels]
        trials = [result for result in found if result is not None]
        if len(trials) < len(found):
            raise RuntimeError(f"expected the runs of {len(found)} levels on disk, got {len(trials)}")
        return trials

    def _run(self, level: PolicyMethod, task: int, seed: int) -> Run:
        key = run_key(
            self._config.tasks[task],
            fingerprints=self._files[task],
            method_digest=level.digest,
            learning_rate=None,
            seed=seed,
            device_type=self._device_type,
        )
        return Run(key, task, level.name, self._config.tasks[task].learning_rate, seed)


def choose_level(jobs: Iterable[Sequence[RunResult]]) -> int:
    """The level of the lowest mean log-ratio of final to initial validation loss; `jobs` hold a result a level."""
    means = np.mean([[_log_ratio(result) for result in levels] for levels in jobs], axis=0)
    return int(np.argmin(means))


def _log_ratio(result: RunResult) -> float:
    before, after = result.curve[0].loss_validation, validation_loss(result)
    return math.log(after / before) if before and math.isfinite(after) else math.inf


def _has_curve(result: RunResult | None) -> bool:
    return result is not None and bool(result.curve)
