"""Which runs a comparison needs: every row of the results names its run, and runs that are equal are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmrl.compare.cache import Fingerprints, run_key
from llmrl.compare.methods import Method
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
        task: Place of the task in the configuration.
        method: Name of the method.
        factor: Starting rate as a factor on the task's default.
        learning_rate: Their product.
        seed: Data order and dropout.
        key: The run that it takes its numbers from.
        reused: An earlier row of the same method already has this run, because the method does not depend on the
            given rate.
    """

    task: int
    method: str
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


def make_plan(config: CompareConfig, methods: Mapping[str, Method], sweep: Method, device_type: str) -> Plan:
    """Lays out all runs; the same configuration and files give the same plan.

    Args:
        config: Tasks, factors and seeds.
        methods: What is compared, by name.
        sweep: Linear-to-zero.
        device_type: Where the runs take place.
    """
    planner = _Planner(config, device_type)
    for task in range(len(config.tasks)):
        for method in methods.values():
            for seed in config.seeds:
                planner.add(planner.plan.rows, task, method, config.learning_rate_factors, seed)
        for seed in config.seeds:
            planner.add(planner.plan.sweep, task, sweep, config.oracle_factors, seed)
    return planner.plan


class _Planner:
    """Collects cells, and a run for each that needs a new one."""

    def __init__(self, config: CompareConfig, device_type: str) -> None:
        self.plan = Plan()
        self._config = config
        self._device_type = device_type
        self._fingerprints = Fingerprints()

    def add(self, cells: list[Cell], task: int, method: Method, factors: tuple[float, ...], seed: int) -> None:
        """Plans one method from every starting rate."""
        seen: set[str] = set()
        default = self._config.tasks[task].learning_rate
        for factor in factors:
            rate = factor * default
            key = run_key(
                self._config.tasks[task],
                fingerprints=self._fingerprints.of_task(self._config.tasks[task]),
                method_digest=method.digest,
                learning_rate=rate if method.depends_on_rate else None,
                seed=seed,
                device_type=self._device_type,
            )
            given = rate if method.depends_on_rate else default
            self.plan.runs.setdefault(key, Run(key, task, method.name, given, seed))
            cells.append(Cell(task, method.name, factor, rate, seed, key, reused=key in seen))
            seen.add(key)
