"""Finished runs on disk, one file each, named by a hash of everything that the run's numbers depend on.

A comparison that was killed finds its finished runs here and trains only the others.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from llmrl_envs.builtin import builtin_model_path
from llmrl_envs.jobs.task import FineTuningTask
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import llmrl
from llmrl.hosts.curve import CurvePoint
from llmrl.hosts.result import JobResult
from llmrl.run_directory import atomic_write_json, to_json_value

_BUILTIN = "builtin"
_KEY_LENGTH = 24


class RunResult(BaseModel):
    """What one run came to.

    Attributes:
        loss_initial: Test loss before training, nats per target; None if not finite.
        loss_test: Test loss of the deployed weights; None if not finite.
        accuracy_test: Share of test targets hit; None for language models.
        diverged: The job ended worse than it began, or not finite.
        seconds: Wall time of training.
        tokens_trained: Tokens in training batches, padding not counted; those of steps that a rollback undid are.
        tokens_evaluated: Tokens in evaluations that the method itself needed.
        curve: Validation loss over the budget, from before training to the end; empty in files of earlier versions.
            It is measured for the record and changes nothing in the run.
        tokens_measured: Tokens in the evaluations of the curve.
        peak_memory_bytes: Most memory in use during the run; None where it is not known.
        num_trials: Jobs that were trained for this result; more than one for a search or a population, whose seconds
            and tokens are those of all its jobs.
        events: How often a step was skipped, a loss spiked, and a job rolled back or fell back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    loss_initial: float | None
    loss_test: float | None
    accuracy_test: float | None
    diverged: bool
    seconds: float
    tokens_trained: int
    tokens_evaluated: int
    curve: tuple[CurvePoint, ...] = ()
    tokens_measured: int = 0
    peak_memory_bytes: int | None = None
    num_trials: int = 1
    events: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def from_job(cls, result: JobResult, num_trials: int = 1) -> RunResult:
        """What of a job's result is kept; `num_trials` jobs were trained for it."""
        values = {
            "loss_initial": result.initial.loss,
            "loss_test": result.final.loss,
            "accuracy_test": result.final.accuracy,
            "diverged": result.diverged,
            "seconds": result.seconds,
            "tokens_trained": result.tokens_trained,
            "tokens_evaluated": result.tokens_evaluated,
            "curve": [asdict(point) for point in result.curve],
            "tokens_measured": result.tokens_measured,
            "peak_memory_bytes": result.peak_memory_bytes,
            "num_trials": num_trials,
            "events": result.events,
        }
        return cls.model_validate_json(json.dumps(to_json_value(values)))


class RunStore:
    """The folder of finished runs.

    Args:
        directory: Made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> RunResult | None:
        """The result of a run; None if it is not there or its file is damaged, so that it is made again."""
        try:
            values = json.loads((self.directory / f"{key}.json").read_text(encoding="utf-8"))
            return RunResult.model_validate_json(json.dumps(values["result"]))
        except (FileNotFoundError, ValueError, ValidationError, KeyError, TypeError):
            return None

    def write(self, key: str, description: Mapping[str, Any], result: RunResult) -> None:
        """Keeps a result, atomically, with words that tell a reader which run it was."""
        atomic_write_json(self.directory / f"{key}.json", {**description, "result": result.model_dump()})


class Fingerprints:
    """Hashes of local models and data, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of_task(self, task: FineTuningTask) -> dict[str, str]:
        """Hash of every local file or folder that the task reads, by the key that names it."""
        named = {"model": str(builtin_model_path()) if task.model == _BUILTIN else task.model}
        named |= {split: getattr(task.data, split) for split in ("train", "validation", "test")}
        return {key: self._of_path(source) for key, source in named.items() if source and Path(source).exists()}

    def _of_path(self, source: str) -> str:
        if source not in self._known:
            self._known[source] = hash_path(Path(source))
        return self._known[source]


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of every file of a folder."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        digest.update(f"{inner.relative_to(path).as_posix()} {hash_path(inner)}\n".encode())
    return digest.hexdigest()


def run_key(
    task: FineTuningTask,
    *,
    fingerprints: Mapping[str, str],
    method_digest: str,
    learning_rate: float | None,
    seed: int,
    device_type: str,
) -> str:
    """Name of a run: equal for equal runs, whatever the task is called and wherever the policy lies.

    The versions of the package, of torch and of Python (whose library the built-in corpora are cut from) are part of
    it; an edit of the package's own code under the same version is not seen.

    Args:
        task: The job; its name and its default rate change nothing in a run.
        fingerprints: Of the files that it reads.
        method_digest: What chooses the rates.
        learning_rate: The given rate; None where the method does not depend on it.
        seed: Data order and dropout.
        device_type: "cpu", "cuda", ...: numbers differ between them.
    """
    content = {
        "task": task.model_dump(mode="json", exclude={"name", "learning_rate"}),
        "files": dict(fingerprints),
        "method": method_digest,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": device_type,
        "versions": [llmrl.__version__, torch.__version__, platform.python_version()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY_LENGTH]
