"""`llmrl doctor`: what is installed, what the machine can do, and what a configured job would take."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import accelerate
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from rich.console import Console
from rich.table import Table

from llmrl.config import TrackingConfig
from llmrl.config_base import Settings
from llmrl.dry_run import TaskTrial, estimate_seconds, population_of, schedule_settings_of, tasks_of, try_task
from llmrl.run_directory import check_writable
from llmrl.tracking import resolve_wandb_mode

PACKAGES = (
    "llmrl", "torch", "transformers", "accelerate", "peft", "datasets", "gymnasium", "wandb", "numpy", "safetensors",
)  # fmt: skip


def doctor(config: Settings | None) -> None:
    """Prints the report; of several processes only the first prints.

    Args:
        config: With one, its tasks are tried for a few steps.

    Raises:
        UserError: The configured job cannot be run, for the reason that it gives.
    """
    # Not PartialState(), which overlooks ACCELERATE_USE_CPU and then counts one process.
    state = accelerate.Accelerator().state
    console = Console(quiet=not state.is_main_process)
    _print(console, "Versions", versions())
    _print(console, "Machine", machine())
    _print(console, "Processes", processes(state))
    tracking = getattr(config, "tracking", None) or TrackingConfig()
    _print(console, "Weights & Biases", weights_and_biases(tracking, Path.cwd()))
    if config is not None and state.is_main_process:
        _print_dry_run(console, config)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, str]:
    """The device that `auto` takes, the number formats it has, and threads."""
    found = {"platform": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    found["torch threads"] = str(torch.get_num_threads())
    if not torch.cuda.is_available():
        return {**found, "device": "cpu", "precision": "fp32 (auto), bf16"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {_size(properties.total_memory)}"
    bf16 = torch.cuda.is_bf16_supported()
    return {**found, "device": "cuda", "precision": "bf16 (auto), fp16, fp32" if bf16 else "fp32 (auto), fp16"}


def processes(state: Any) -> dict[str, str]:
    """How many processes share the work, and whether that is what the launcher was asked for."""
    found = {
        "started": str(state.num_processes),
        "kind": "single process" if state.num_processes == 1 else str(state.distributed_type.value).lower(),
        "device of the first": str(state.device),
    }
    asked = _asked_processes()
    if asked is not None and asked != state.num_processes:
        found["asked for"] = str(asked)
        found["warning"] = (
            "the launcher started fewer processes than asked for; on CPUs use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    return found


def weights_and_biases(tracking: TrackingConfig, directory: Path) -> dict[str, str]:
    """The mode that a run would have, and whether its files can be written below `directory`."""
    found = {"mode": resolve_wandb_mode(tracking), "project": tracking.project}
    try:
        check_writable(directory)
        found["working directory"] = "writable"
    except UserError as error:
        found["working directory"] = f"not writable: {error.got}"
    return found


def _asked_processes() -> int | None:
    """The `--num_processes` of the launcher that started this process, where the system shows it."""
    command = Path(f"/proc/{os.getppid()}/cmdline")
    try:
        words = command.read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return None
    match = re.search(r"--num[_-]processes[ =](\d+)", words)
    return int(match.group(1)) if match and "accelerate" in words else None


def _print_dry_run(console: Console, config: Settings) -> None:
    tasks = tasks_of(config)
    if not tasks:
        console.print("No fine-tuning task to try: the configuration names another environment.")
        return
    library = JobLibrary(getattr(config, "device", None) or getattr(config, "env").device)  # noqa: B009
    trials = []
    population, workers = population_of(config, library)
    for task in tasks:
        with console.status(f"trying {task.name}"):
            trials.append(try_task(task, library, population, workers, schedule_settings_of(config)))
        _print(console, f"Task {task.name}", describe_trial(trials[-1]))
    seconds = estimate_seconds(config, tuple(trials))
    console.print(f"Estimated time of the whole command: [bold]{_duration(seconds)}[/bold]")


def describe_trial(trial: TaskTrial) -> dict[str, str]:
    """The trial as lines of text."""
    memory = ", ".join(f"{name} {_size(count)}" for name, count in trial.memory_bytes.items())
    workers = f" in {trial.workers} processes" if trial.workers > 1 else ""
    together = {"at once": f"{trial.population} jobs{workers}; times are a job's share"} if trial.population > 1 else {}
    return {
        "batch": ", ".join(f"{name} {list(shape)}" for name, shape in trial.batch_shapes.items()),
        "tokens per step": f"{trial.tokens_per_step:,.0f}",
        "parameters": f"{trial.num_parameters:,}, of which trained {trial.num_trained:,}",
        "precision": trial.precision,
        "memory": f"{_size(sum(trial.memory_bytes.values()))}: {memory}",
        "decisions per job": str(trial.num_decisions),
        **together,
        "step": f"{trial.seconds_per_step:.3f} s",
        "validation pass": f"{trial.seconds_per_evaluation:.3f} s",
        "steps of a job": _duration(trial.job_seconds),
    }


def _print(console: Console, title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print()


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
