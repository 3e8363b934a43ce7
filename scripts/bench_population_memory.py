"""Memory of a population against the formula that `population: auto` counts with; JSON.

    python scripts/bench_population_memory.py --output memory.json

A Llama of 3 million parameters and random weights, in full and with LoRA, 8 sequences of 64 tokens: what one job more
adds to the highest memory of a process that trains, from 3 jobs to 9, over the bytes of `job_memory` without the
reference run's, which is over before these jobs begin. On a GPU that is the allocator's highest figure. On a CPU it is
the resident memory of a fresh process for each, twice: as it comes, and with `MALLOC_MMAP_THRESHOLD_` and
`MALLOC_TRIM_THRESHOLD_` at 64 KiB, where glibc's malloc gives back what tensors have left free; what the first shows
beyond the second is free memory that malloc keeps.

Writes {machine, versions, rows, ratios}; ratios are {full, lora} and on a CPU {full_malloc, lora_malloc} as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_population import make_task, write_llama
from benchmarking import describe_machine, describe_versions, write_report
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.population.memory import job_memory
from llmrl_envs.jobs.population.session import PopulationSession
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

FEW, MANY = 3, 9
DECISIONS = 6
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(model: str, mode: str, num_jobs: int) -> dict[str, Any]:
    """Highest memory of this process while it trains so many jobs, and the formula's bytes of one, in bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = make_task(model=model, mode=mode, steps=24, batch_size=8, max_length=64)
    library = JobLibrary(device)
    env = FineTuningVectorEnv(
        num_jobs, {"tasks": [task.model_dump()], "num_seeds": 1}, actions="moves_only", device=device, workers=1,
        library=library,
    )  # fmt: skip
    env.reset(seed=0)
    for _ in range(DECISIONS):
        env.step(np.full(num_jobs, 2))
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    job = library.job(task)
    told = job_memory(PopulationSession(job), job, rolls_back=False, averaged=False)
    return {"mode": mode, "jobs": num_jobs, "peak_bytes": peak, "formula_bytes": told.row + told.activations}


def measured_alone(model: str, mode: str, num_jobs: int, changes: dict[str, str]) -> dict[str, Any]:
    """`measure` in a fresh process with changes of its environment."""
    command = [sys.executable, __file__, "--output", os.devnull, "--measure", model, mode, str(num_jobs)]
    environment = {name: value for name, value in os.environ.items() if name not in GIVING_BACK} | changes
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    row: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return {**row, "gives_back": bool(changes)}


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "MODE", "JOBS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        model, mode, num_jobs = arguments.measure
        print(json.dumps(measure(model, mode, int(num_jobs))))
        return
    rows, ratios = [], {}
    ways = {"": {}} if torch.cuda.is_available() else {"": GIVING_BACK, "_malloc": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_llama(Path(folder) / "llama3m", 192, 8, 259))
        for mode in ("full", "lora"):
            for suffix, changes in ways.items():
                few, many = (measured_alone(model, mode, num_jobs, changes) for num_jobs in (FEW, MANY))
                each = (many["peak_bytes"] - few["peak_bytes"]) / (MANY - FEW)
                ratios[mode + suffix] = each / many["formula_bytes"]
                rows += [few, many]
                told = f"{each / 2**20:.1f} MiB a job, formula {many['formula_bytes'] / 2**20:.1f}"
                print(f"{mode}{suffix}: {told}, ratio {ratios[mode + suffix]:.3f}", flush=True)
    report = {"machine": describe_machine(), "versions": describe_versions(), "rows": rows, "ratios": ratios}
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
