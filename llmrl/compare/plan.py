"""Which runs a comparison needs: every row of the results names its run, and runs that are equal are one.

The plan has two stages. The first holds the sweep and every row whose start is known; the second the rows of the tuned
regime, which start from the rate that the sweep found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmrl.compare.cache import Fingerprints, run_key
from llmrl.compare.methods import Method
from llmrl.compare.regimes import STRESS, TUNED_RATE, regime_of
from llmrl.config import CompareConfig


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        key: Names its result in the store.
        task: Place of the task in the configuration.
        method: Name of the method.
        learning_rate: The rate that the job is given.
        seed: Data order and dropout.
    """

    key: str
    task: int
    method: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Cell:
    """One row of the results, or one point of the sweep.

    Attributes:
        task: Place of the task in the configuration, tasks of `stress_tasks` behind the others.
        method: Name of the method.
        regime: What the row is for; see `llmrl.compare.regimes`.
        factor: Starting rate as a factor on the task's default.
        learning_rate: Their product.
        seed: Data order and dropout.
        key: The run that it takes its numbers from.
        reused: An earlier row of the same method already has this run: the method does not depend on the given rate,
            or the tuned rate is one of those that it was started from.
    """

    task: int
    method: str
    regime: str
    factor: float
    learning_rate: float
    seed: int
    key: str
    reused: bool


@dataclass
class Plan:
    """Everything that a comparison trains and reports.

    Attributes:
        rows: Methods x tasks x starting rates x seeds.
        sweep: Linear-to-zero x tasks x rates of the grid x seeds.
        runs: What has to be trained, by key; those of one task stand together.
    """

    rows: list[Cell] = field(default_factory=list)
    sweep: list[Cell] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)


class Planner:
    """Lays out all runs; the same configuration, files and sweep give the same plan.

    Args:
        config: Tasks, factors and seeds.
        methods: What is compared, by name.
        sweep: Linear-to-zero.
        device_type: Where the runs take place.
    """

    def __init__(self, config: CompareConfig, methods: Mapping[str, Method], sweep: Method, device_type: str) -> None:
        self.plan = Plan()
        self._config, self._methods, self._sweep = config, methods, sweep
        self._device_type = device_type
        self._fingerprints = Fingerprints()
        self._seen: set[tuple[str, str]] = set()

    def add_known(self) -> None:
        """Plans the first stage: the sweep of every task, and all rows but those of the tuned regime."""
        for task, _ in enumerate(self._config.all_tasks):
            stress = task >= len(self._config.tasks)
            factors = (1.0,) if stress else self._config.learning_rate_factors
            for method in self._methods.values():
                for seed in self._config.seeds:
                    for factor in factors:
                        self._add_row(task, method, STRESS if stress else regime_of(factor), factor, seed)
            for seed in self._config.seeds:
                for factor in self._config.oracle_factors:
                    self.plan.sweep.append(self._cell(task, self._sweep, TUNED_RATE, factor, seed, reused=False))

    def add_tuned(self, factors: Mapping[int, float]) -> None:
        """Plans the second stage; tasks of `stress_tasks` have none.

        Args:
            factors: Best rate of the sweep, as a factor on the default, by place of the task.
        """
        for task in range(len(self._config.tasks)):
            if (factor := factors.get(task)) is None:
                continue
            for method in self._methods.values():
                for seed in self._config.seeds:
                    self._add_row(task, method, TUNED_RATE, factor, seed)

    def _add_row(self, task: int, method: Method, regime: str, factor: float, seed: int) -> None:
        cell = self._cell(task, method, regime, factor, seed, reused=False)
        mark = (method.name, cell.key)
        self.plan.rows.append(replace(cell, reused=True) if mark in self._seen else cell)
        self._seen.add(mark)

    def _cell(self, task: int, method: Method, regime: str, factor: float, seed: int, *, reused: bool) -> Cell:
        """One cell, and its run if it is the first that needs it."""
        chosen = self._config.all_tasks[task]
        rate = factor * chosen.learning_rate
        key = run_key(
            chosen,
            fingerprints=self._fingerprints.of_task(chosen),
            method_digest=method.digest,
            learning_rate=rate if method.depends_on_rate else None,
            seed=seed,
            device_type=self._device_type,
        )
        given = rate if method.depends_on_rate else chosen.learning_rate
        self.plan.runs.setdefault(key, Run(key, task, method.name, given, seed))
        return Cell(task, method.name, regime, factor, rate, seed, key, reused)


def make_plan(config: CompareConfig, methods: Mapping[str, Method], sweep: Method, device_type: str) -> Plan:
    """The first stage: everything that is known before the sweep is. See `Planner` for the arguments."""
    planner = Planner(config, methods, sweep, device_type)
    planner.add_known()
    return planner.plan
