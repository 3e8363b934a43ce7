"""The same comparison from runs that exist already: directories of `llmrl finetune`, or a group of recorded runs.

Rows are what the runs were: each has a task, a method, the rate that it was given and a seed. The yardstick is the best
rate of the runs of linear decay; without such runs there are losses and no scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.task import FineTuningTask
from pydantic import ValidationError

from llmrl.compare.cache import RunResult
from llmrl.compare.methods import LINEAR
from llmrl.compare.plan import Cell, Plan
from llmrl.compare.regimes import regime_of
from llmrl.compare.results import ComparisonShape, make_results
from llmrl.config_loading import read_yaml_mapping
from llmrl.run_directory import read_jsonl, to_json_value
from llmrl.tracking.runs import RecordedRun

CONFIG_FILE, SUMMARY_FILE, SCHEDULE_FILE = "config.yaml", "summary.json", "schedule.jsonl"
FINISHED = "finished"
_RESULT_KEYS = frozenset(RunResult.model_fields)
_REQUIRED_KEYS = frozenset(name for name, field in RunResult.model_fields.items() if field.is_required())
"""The others tell more than a score needs; runs recorded without them are compared all the same."""


@dataclass(frozen=True)
class FinishedJob:
    """One job that ended.

    Attributes:
        label: Where it was found.
        task: What was fine-tuned.
        method: What chose the rates.
        policy: The reference of its policy.
        learning_rate: The rate that it was given.
        seed: Data order and dropout.
        result: What it came to.
    """

    label: str
    task: FineTuningTask
    method: str
    policy: str
    learning_rate: float
    seed: int
    result: RunResult

    @property
    def factor(self) -> float:
        """The given rate over the task's default one, to six digits."""
        return float(f"{self.learning_rate / self.task.learning_rate:.6g}")


def read_runs(directories: Sequence[Path]) -> list[RecordedRun]:
    """Run directories as recorded runs, in the order given; a directory of run directories stands for all of them.

    Raises:
        UserError: A directory is missing, or neither is nor holds a run of `llmrl finetune`.
    """
    runs = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError("no such directory", where="--from-runs", expected="run directories", got=directory)
        folders = [directory] if _is_run(directory) else sorted(filter(_is_run, directory.iterdir()))
        if not folders:
            raise UserError(
                "no run of `llmrl finetune` there",
                where=f"--from-runs {directory}",
                expected=f"{CONFIG_FILE} with a task and {SUMMARY_FILE}, in it or in the directories inside it",
                got=", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing",
            )
        runs += [_read_run(folder) for folder in folders]
    return runs


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and (folder / CONFIG_FILE).is_file() and "task" in read_yaml_mapping(folder / CONFIG_FILE)


def _read_run(folder: Path) -> RecordedRun:
    """A run without a summary did not end; the summary is written last."""
    summary = folder / SUMMARY_FILE
    finished = summary.is_file()
    values = {"curve": _read_curve(folder), **read_yaml_mapping(summary)} if finished else {}  # JSON is YAML
    return RecordedRun(str(folder), FINISHED if finished else "not finished", read_yaml_mapping(folder / CONFIG_FILE),
                       values)  # fmt: skip


def _read_curve(folder: Path) -> list[dict[str, Any]]:
    """The learning curve that the decisions tell; none where they were not kept."""
    path = folder / SCHEDULE_FILE
    return [
        {
            "step": row.get("step_after", row["step"]),
            "loss_validation": row.get("validation_loss"),
            "loss_train": row.get("train_loss"),
            "learning_rate": row.get("learning_rate"),
        }
        for row in (read_jsonl(path) if path.is_file() else [])
    ]


def compare_existing(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """What `results.json` holds, from runs that ended.

    Raises:
        UserError: None of them can be used, or tasks of one name differ.
    """
    jobs, warnings = [], []
    for run in runs:
        try:
            jobs.append(_finished_job(run))
        except UserError as error:
            warnings.append(f"{run.label}: left out: {error.what}" + (f" ({error.got})" if error.got else ""))
    if not jobs:
        raise UserError(
            "none of the runs can be compared", expected="finished runs of `llmrl finetune`", got="; ".join(warnings)
        )
    _check_tasks(jobs)
    names = _method_names(jobs)
    chosen, replaced = _one_of_each(jobs, names)
    warnings += [f"{job.label}: left out: a later run has the same task, method, rate and seed" for job in replaced]
    tasks = list(dict.fromkeys(job.task.name for job in chosen))
    shape = ComparisonShape(
        tasks=tuple(tasks),
        factors=tuple(sorted({job.factor for job in chosen})),
        seeds=tuple(sorted({job.seed for job in chosen})),
    )
    plan, found = _plan(chosen, names, tasks)
    if not plan.sweep:
        warnings.append("no task has a run of linear decay from some rate with every seed: there are no scores")
    methods = {names[job.method, job.policy]: {"source": job.policy, "depends_on_rate": True} for job in chosen}
    results: dict[str, Any] = to_json_value(make_results(shape, plan, found, methods))
    return {**results, "warnings": [*warnings, *results["warnings"]]}


def _finished_job(run: RecordedRun) -> FinishedJob:
    """Raises UserError where the run cannot be used."""
    if run.state != FINISHED:
        raise UserError("it did not finish", got=run.state)
    summary = run.summary
    try:
        task = FineTuningTask.model_validate(run.config["task"])
        values = {name: summary[name] for name in _RESULT_KEYS if name in summary or name in _REQUIRED_KEYS}
        result = RunResult.model_validate(to_json_value(values), strict=False)
        method, seed, rate = str(summary["method"]), int(summary["seed"]), float(summary["learning_rate"])
    except KeyError as error:
        raise UserError("it is no run of `llmrl finetune`", got=f"no {error}") from None
    except (ValidationError, ValueError, TypeError) as error:
        raise UserError("its record cannot be read", got=str(error).splitlines()[0]) from None
    return FinishedJob(run.label, task, method, str(summary.get("policy", method)), rate, seed, result)


def _check_tasks(jobs: Sequence[FinishedJob]) -> None:
    first: dict[str, FinishedJob] = {}
    for job in jobs:
        other = first.setdefault(job.task.name, job)
        here, there = job.task.model_dump(mode="json"), other.task.model_dump(mode="json")
        if here != there:
            changed = ", ".join(f"task.{key}" for key in here if here[key] != there[key])
            raise UserError(
                f"two different tasks are called {job.task.name!r}",
                where=f"{other.label}, {job.label}",
                expected="one name for one task; another starting rate is given as `learning_rate`, not as "
                "`task.learning_rate`, which is the default that the factors refer to",
                got=f"other values of {changed}",
            )


def _method_names(jobs: Sequence[FinishedJob]) -> dict[tuple[str, str], str]:
    """What a method is called: its name, or the reference of its policy where several policies have that name."""
    kinds = list(dict.fromkeys((job.method, job.policy) for job in jobs))
    names = [method for method, _ in kinds]
    return {kind: kind[0] if names.count(kind[0]) == 1 else kind[1] for kind in kinds}


def _one_of_each(
    jobs: Sequence[FinishedJob], names: Mapping[tuple[str, str], str]
) -> tuple[list[FinishedJob], list[FinishedJob]]:
    """The last run of every cell, and those that it replaces."""
    cells: dict[tuple[str, str, float, int], FinishedJob] = {}
    replaced = []
    for job in jobs:
        key = (job.task.name, names[job.method, job.policy], job.factor, job.seed)
        if key in cells:
            replaced.append(cells[key])
        cells[key] = job
    return list(cells.values()), replaced


def _plan(
    jobs: Sequence[FinishedJob], names: Mapping[tuple[str, str], str], tasks: Sequence[str]
) -> tuple[Plan, dict[str, RunResult]]:
    plan, found = Plan(), {}
    for index, job in enumerate(jobs):
        key, method = str(index), names[job.method, job.policy]
        start = (regime_of(job.factor), job.factor, job.learning_rate, job.seed)
        cell = Cell(tasks.index(job.task.name), method, *start, key, reused=False)
        plan.rows.append(cell)
        found[key] = job.result
    plan.sweep += _complete_rates([cell for cell in plan.rows if cell.method == LINEAR])
    return plan, found


def _complete_rates(cells: Sequence[Cell]) -> list[Cell]:
    """Those rates of linear decay that a task has with every seed that it has at all, so that their means compare."""
    seeds: dict[int, set[int]] = {}
    at_rate: dict[tuple[int, float], set[int]] = {}
    for cell in cells:
        seeds.setdefault(cell.task, set()).add(cell.seed)
        at_rate.setdefault((cell.task, cell.factor), set()).add(cell.seed)
    return [cell for cell in cells if at_rate[cell.task, cell.factor] == seeds[cell.task]]
