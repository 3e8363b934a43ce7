"""What steering costs: the same job with and without the controller, paired in one process.

    python scripts/bench_overhead.py --output overhead.json [--quick]

Wall time: full fine-tuning and LoRA of the built-in model, intervals of ten steps run in turn with the controller
(statistics, decision, best snapshot) and without; the median of the pairs' ratios, and its bootstrap interval.
Memory: peak of a LoRA job above what the process held before it, each variant in a process of its own; on a GPU the
allocator's peak. Reset: time of an environment's second reset against loading its model.

Writes {machine, versions, rows, ratios}; `ratios.wall` and `ratios.memory` are with / without, `ratios.reset` is
the environment's second reset / loading the model and the data.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from benchmarking import compare_peak_memory, describe_machine, describe_versions, median_ratio, write_report
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.jobs.loading import Job, JobLibrary
from llmrl_envs.jobs.reference import given_rate_schedule
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask

from llmrl.decisions import DecisionLoop
from llmrl.policy import hold_policy

PERIOD_STEPS = 10


def make_task(mode: str, steps: int) -> FineTuningTask:
    """The benchmark's job."""
    return FineTuningTask.model_validate(
        {"name": mode, "data": "builtin:json", "mode": mode, "steps": steps, "batch_size": 8, "max_length": 128}
    )


class PlainLoop:
    """The job at a linear decay, nothing measured, nothing decided."""

    def __init__(self, job: Job) -> None:
        self.session = FineTuningSession(job, seed=0, record=False)
        self.schedule = given_rate_schedule("linear", job.task.steps, job.task.learning_rate, 0.05)

    def interval(self) -> None:
        """Ten optimizer steps."""
        self.session.run_interval(PERIOD_STEPS, self.schedule)


class SteeredLoop:
    """The job under the controller: statistics, one decision an interval, snapshots of the best state."""

    def __init__(self, job: Job) -> None:
        self.session = FineTuningSession(job, seed=0)
        steps = job.task.steps
        intervals = (PERIOD_STEPS,) * (steps // PERIOD_STEPS)
        self.controller = DecisionLoop(
            hold_policy(), total_steps=steps, given_rate=job.task.learning_rate, intervals=intervals
        )
        self.controller.begin(self.session.initial_statistics(), *self.session.initial_norms())

    def interval(self) -> None:
        """A decision and ten optimizer steps."""
        self.controller.decide()
        statistics = self.session.run_interval(PERIOD_STEPS, self.controller.schedule)
        if self.controller.observe(statistics).at_best[0]:
            self.session.mark_best()


def time_interval(loop: PlainLoop | SteeredLoop) -> float:
    """Wall time of one interval, seconds, device work included."""
    began = time.perf_counter()
    loop.interval()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_wall(mode: str, num_pairs: int) -> dict[str, Any]:
    """Interleaved intervals of both loops; their models are separate, their work the same."""
    task = make_task(mode, PERIOD_STEPS * (num_pairs + 2))
    loops = [PlainLoop(JobLibrary().job(task)), SteeredLoop(JobLibrary().job(task))]
    seconds: list[list[float]] = [[], []]
    for pair in range(num_pairs + 2):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[which].append(time_interval(loops[which]))
    plain, steered = (np.array(values[2:]) for values in seconds)
    ratio, low, high = median_ratio(steered, plain)
    return {
        "name": f"wall_{mode}",
        "pairs": num_pairs,
        "plain_seconds": float(np.median(plain)),
        "steered_seconds": float(np.median(steered)),
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
    }


def measure_reset(num_resets: int) -> dict[str, Any]:
    """Time of an environment's later resets against that of loading its job."""
    task = make_task("full", 40)
    began = time.perf_counter()
    JobLibrary().job(task)
    loading = time.perf_counter() - began
    env = FineTuningEnv({"tasks": [task.model_dump()], "num_seeds": 1})
    env.reset(seed=0)
    resets = []
    for _ in range(num_resets):
        began = time.perf_counter()
        env.reset()
        resets.append(time.perf_counter() - began)
    seconds = float(np.median(resets))
    return {"name": "reset", "loading_seconds": loading, "reset_seconds": seconds, "ratio": seconds / loading}


def peak_memory(variant: str) -> None:
    """Prints the peak memory of one LoRA job, bytes; run in a process of its own."""
    task = make_task("lora", PERIOD_STEPS * 6)
    job = JobLibrary().job(task)
    process = psutil.Process()
    warm = PlainLoop(job)
    warm.interval()
    del warm
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loop = PlainLoop(job) if variant == "plain" else SteeredLoop(job)
    peak = 0
    for _ in range(6):
        loop.interval()
        # On a CPU the whole process is what a person sees grow; its change alone would be noise over almost nothing.
        peak = max(peak, torch.cuda.max_memory_allocated() if cuda else process.memory_info().rss)
    print(json.dumps(peak))


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--peak-memory", choices=("plain", "steered"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        peak_memory(arguments.peak_memory)
        return
    if arguments.output is None:
        parser.error("--output is required")
    pairs = 10 if arguments.quick else 40
    rows = [measure_wall("full", pairs), measure_wall("lora", pairs)]
    rows += [compare_peak_memory("memory_lora", [__file__, "--peak-memory"], 2 if arguments.quick else 5)]
    rows += [measure_reset(3 if arguments.quick else 10)]
    by_name = {row["name"]: row for row in rows}
    ratios = {
        "wall": max(by_name["wall_full"]["ratio"], by_name["wall_lora"]["ratio"]),
        "memory": by_name["memory_lora"]["ratio"],
        "reset": by_name["reset"]["ratio"],
    }
    report = {"machine": describe_machine(), "versions": describe_versions(), "rows": rows, "ratios": ratios}
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
