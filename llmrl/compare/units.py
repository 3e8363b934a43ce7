"""What is handed to a worker at a time: one run, or the searches of one job, which share their trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmrl.compare.methods import Method, SearchMethod
from llmrl.compare.plan import Run
from llmrl.config import CompareConfig


@dataclass(frozen=True)
class Unit:
    """Runs that one worker trains, one after the other.

    Attributes:
        runs: Of one task.
        num_jobs: Jobs that they take together.
    """

    runs: tuple[Run, ...]
    num_jobs: int

    def num_steps(self, config: CompareConfig) -> int:
        """Optimizer steps of all its jobs."""
        return self.num_jobs * config.tasks[self.runs[0].task].steps


def make_units(runs: Sequence[Run], methods: Mapping[str, Method]) -> list[Unit]:
    """Groups runs: searches of the same job come last and together, the longest first.

    The trials of a shorter search are the first of a longer one, and the very first is a linear decay that stands among
    the other runs: so whoever comes later finds them on disk.

    Args:
        runs: What is to be trained.
        methods: By name; runs of other names are single jobs.
    """
    single: list[Unit] = []
    searches: dict[tuple[int, float, int], list[Run]] = {}
    for run in runs:
        method = methods.get(run.method)
        if isinstance(method, SearchMethod):
            searches.setdefault((run.task, run.learning_rate, run.seed), []).append(run)
        else:
            single.append(Unit((run,), 1 if method is None else method.num_jobs))
    single.sort(key=lambda unit: unit.num_jobs)
    return [*single, *(_search_unit(family, methods) for family in searches.values())]


def _search_unit(family: Sequence[Run], methods: Mapping[str, Method]) -> Unit:
    longest_first = sorted(family, key=lambda run: -methods[run.method].num_jobs)
    return Unit(tuple(longest_first), methods[longest_first[0].method].num_jobs)
