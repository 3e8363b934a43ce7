"""Jobs per second of a population against one by one and against processes, and how cost grows; JSON.

    python scripts/bench_population.py --output population.json [--quick] [--page docs/population.md]

CPU, with the built-in model in jobs of the quickstart's shape: `FineTuningVectorEnv` with 16 lanes as it comes, one
`FineTuningEnv` with one thread or one for each core, whichever is faster, and `AsyncVectorEnv` with two single-threaded
workers. In each round each of them runs the same 16 jobs from beginning to end, with the same decisions, evaluations
and restarts; the ratios are the median over the rounds. Reference runs are made before.

GPU: the built-in model with P = 256 and a 135M-parameter Llama of random weights, LoRA in bf16, with P = 16, against
one job after the other each; and the tokens per second of plain training of the same 135M base at the same total batch.

Tables of cost over P, sequence length and model size follow, in one process, on a CPU with one thread; bytes of a job
are those that `population: auto` counts;
`--page` writes the tables between the marks of a docs page, and their picture beside it.

Writes {machine, versions, rows, ratios}; ratios are {throughput_p16_vs_sequential, throughput_p16_vs_async} of the CPU
and, with a GPU, {tiny_p256_vs_sequential, lora135m_p16_vs_sequential, lora135m_share_of_plain}.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import describe_machine, describe_versions, median_ratio, write_report
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from llmrl_envs.builtin import builtin_model_path
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.jobs.loading import Job, JobLibrary
from llmrl_envs.jobs.population.members import IntervalPlan
from llmrl_envs.jobs.population.memory import job_memory
from llmrl_envs.jobs.population.session import PopulationSession
from llmrl_envs.jobs.reference import given_rate_schedule
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

TASK: dict[str, Any] = {
    "name": "json", "data": "builtin:json", "steps": 40, "batch_size": 4, "max_length": 64, "validation_examples": 32,
}  # fmt: skip
NUM_LANES, NUM_WORKERS = 16, 2
PAGE_MARKS = ("<!-- tables: begin -->\n", "<!-- tables: end -->\n")


# -- environments on a CPU ------------------------------------------------------------------------------------------


class Runner:
    """A way of running jobs, holding throughout; one after the other in each lane, whole jobs only.

    Args:
        env: A vector environment that begins anew in the same step, or a single one.
        num_threads: Threads of torch in this process while it runs.
    """

    def __init__(self, env: Any, num_threads: int) -> None:
        self._env, self._threads = env, num_threads
        self._lanes = env.num_envs if isinstance(env, VectorEnv) else None
        env.reset(seed=0)

    def seconds(self, num_jobs: int) -> float:
        """Wall time of so many jobs, a multiple of the lanes, from their beginning to the last one's end."""
        torch.set_num_threads(self._threads)
        began, steps, left = time.perf_counter(), 0, num_jobs
        while left:
            ended = self._step()
            left, steps = left - len(ended), steps + sum(ended)
        if left < 0 or steps != num_jobs * TASK["steps"]:
            raise RuntimeError(f"expected {num_jobs} whole jobs of {TASK['steps']} steps, got {steps} steps")
        return time.perf_counter() - began

    def _step(self) -> list[int]:
        """One decision in every lane; the optimizer steps of the jobs that ended with it."""
        hold = 2
        if self._lanes is None:
            _, _, terminated, _, info = self._env.step(hold)
            if terminated:
                self._env.reset()
            return [int(info["step"])] if terminated else []
        *_, terminations, _, infos = self._env.step(np.full(self._lanes, hold))
        return [int(step) for step in infos["final_info"]["step"][terminations]] if terminations.any() else []


def _single_threaded() -> FineTuningEnv:
    torch.set_num_threads(1)
    return FineTuningEnv(_tasks(), actions="moves_only", device="cpu")


def _tasks() -> dict[str, Any]:
    # One seed: one reference run, made before anything is measured.
    return {"tasks": [TASK], "num_seeds": 1}


def measure_environments(num_rounds: int, num_cores: int) -> list[dict[str, Any]]:
    """Population, one by one and two processes in turn: the same jobs in each round."""
    processes = AsyncVectorEnv([_single_threaded] * NUM_WORKERS, autoreset_mode=AutoresetMode.SAME_STEP)
    torch.set_num_threads(num_cores)
    population = FineTuningVectorEnv(NUM_LANES, _tasks(), actions="moves_only", device="cpu")
    single = FineTuningEnv(_tasks(), actions="moves_only", device="cpu")
    alone = {threads: Runner(single, threads) for threads in sorted({1, num_cores})}
    trial = {threads: (runner.seconds(1), runner.seconds(2))[1] for threads, runner in alone.items()}
    fastest = min(trial, key=lambda threads: trial[threads])
    runners = {
        "population": Runner(population, num_cores),
        "sequential": alone[fastest],
        "async": Runner(processes, num_cores),
    }
    for name in ("population", "async"):
        runners[name].seconds(NUM_LANES)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(num_rounds):
        for name, runner in runners.items():
            times[name].append(runner.seconds(NUM_LANES))
    lanes = {"population": NUM_LANES, "sequential": 1, "async": NUM_WORKERS}
    used = {"population": population.num_workers, "sequential": 1, "async": NUM_WORKERS}
    population.close()
    processes.close(terminate=True)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "lanes": lanes[name],
            "processes": used[name],
            "threads": fastest if name == "sequential" else 1,
            "seconds": found,
            "jobs_per_second": NUM_LANES / float(np.median(found)),
            "steps_per_second": NUM_LANES * TASK["steps"] / float(np.median(found)),
        }
        for name, found in times.items()
    ]
    for other in ("sequential", "async"):
        ratio, low, high = median_ratio(np.array(times[other]), np.array(times["population"]))
        rows.append({"name": f"ratio_{other}", "ratio": ratio, "ci_low": low, "ci_high": high})
    return rows


# -- training alone -------------------------------------------------------------------------------------------------


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_step(run: Callable[[int], None], num_steps: int, num_repeats: int) -> float:
    """Median wall time of an optimizer step, device work included; the first run is not counted."""
    found = []
    for _ in range(num_repeats + 1):
        _wait()
        began = time.perf_counter()
        run(num_steps)
        _wait()
        found.append((time.perf_counter() - began) / num_steps)
    return float(np.median(found[1:]))


def population_seconds(job: Job, num_jobs: int, num_steps: int = 4, num_repeats: int = 3) -> float:
    """Wall time of one optimizer step of all jobs of a population."""
    session = PopulationSession(job)
    session.reserve(num_jobs)
    members = [session.add(job, seed) for seed in range(num_jobs)]

    def run(steps: int) -> None:
        session.run_interval([IntervalPlan(member, np.full(steps, 1e-4), 1.0) for member in members])

    return seconds_per_step(run, num_steps, num_repeats)


def sequential_seconds(job: Job, num_steps: int = 4, num_repeats: int = 3) -> float:
    """Wall time of one optimizer step of one job."""
    session = FineTuningSession(job, seed=0)
    schedule = given_rate_schedule("constant", job.task.steps, 1e-4, 0.0)
    return seconds_per_step(lambda steps: session.run_interval(steps, schedule) and None, num_steps, num_repeats)


def write_llama(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """A Llama of random weights with the built-in tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    heads = max(hidden // 64, 1)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=int(hidden * 8 / 3), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(heads // 3, 1), vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=256,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained(folder)
    return folder


def make_task(**changes: Any) -> FineTuningTask:
    """The benchmark's job with changes."""
    return FineTuningTask.model_validate({**TASK, "steps": 10_000, **changes})


def measure_gpu(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The GPU's ratios."""
    tiny = JobLibrary("cuda").job(make_task())
    many, one = population_seconds(tiny, 256), sequential_seconds(tiny)
    rows: list[dict[str, Any]] = [{"name": "tiny_p256", "population_seconds": many, "sequential_seconds": one}]
    model = str(write_llama(folder / "llama135m", 576, 30, 49_152))
    lora = make_task(model=model, mode="lora", batch_size=4, max_length=256, precision="bf16")
    job = JobLibrary("cuda").job(lora)
    stacked, alone = population_seconds(job, 16), sequential_seconds(job)
    # The same base as an ordinary job: one adapter for all 64 sequences.
    plain = sequential_seconds(JobLibrary("cuda").job(lora.model_copy(update={"batch_size": 64})))
    names = ("population_seconds", "sequential_seconds", "plain_seconds")
    rows.append({"name": "lora135m_p16", **dict(zip(names, (stacked, alone, plain), strict=True))})
    ratios = {
        "tiny_p256_vs_sequential": 256 * one / many,
        "lora135m_p16_vs_sequential": 16 * alone / stacked,
        "lora135m_share_of_plain": plain / stacked,
    }
    return rows, ratios


# -- how cost grows -------------------------------------------------------------------------------------------------


def measure_growth(folder: Path, device: str, *, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a job's step and bytes of a job over P, sequence length and model size, full and LoRA."""
    sizes = {"0.2M": "builtin"}
    for name, hidden, layers in (("1M", 128, 6), ("3M", 192, 8)) if quick else (("1M", 128, 6), ("11M", 384, 8)):
        sizes[name] = str(write_llama(folder / name, hidden, layers, 259))
    widths = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64)
    lengths = (32, 64, 128) if quick else (32, 64, 128, 256, 512)
    settings = [("jobs", width, {}, width) for width in widths]
    settings += [("length", length, {"max_length": length}, 4) for length in lengths]
    settings += [("model", name, {"model": model}, 4) for name, model in sizes.items()]
    rows = []
    for mode in ("full", "lora"):
        for axis, value, changes, num_jobs in settings:
            job = JobLibrary(device).job(make_task(mode=mode, **changes))
            told = job_memory(PopulationSession(job), job, rolls_back=False, averaged=False)
            alone = sequential_seconds(job, 2, 2)
            each = population_seconds(job, num_jobs, 2, 2) / num_jobs
            rows.append(
                {
                    "name": f"{mode}_{axis}_{value}", "mode": mode, "axis": axis, "value": value, "jobs": num_jobs,
                    "milliseconds_per_job_step": 1e3 * each, "speedup": alone / each,
                    "row_bytes": told.row, "activation_bytes": told.activations,
                }
            )  # fmt: skip
    return rows


def growth_tables(rows: list[dict[str, Any]], machine: dict[str, Any], picture: str) -> str:
    """The tables of the docs page, with a link to their picture."""
    heads = {"jobs": "P", "length": "tokens of a sequence (P = 4)", "model": "parameters (P = 4)"}
    threads = ", one thread" if machine["device"] == "cpu" else ""
    measured = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
    lines = [f"Measured on {measured}; one process{threads}.", ""]
    for axis, head in heads.items():
        lines += [f"| {head} | mode | ms per job and step | times one by one | row, MiB | activations, MiB |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in (row for row in rows if row.get("axis") == axis):
            figures = f"{row['milliseconds_per_job_step']:.2f} | {row['speedup']:.2f}"
            sizes = f"{row['row_bytes'] / 2**20:.2f} | {row['activation_bytes'] / 2**20:.1f}"
            lines.append(f"| {row['value']} | {row['mode']} | {figures} | {sizes} |")
        lines.append("")
    return "\n".join([*lines, f"![Cost of a job over P, sequence length and model size]({picture})"])


def draw_growth(rows: list[dict[str, Any]], picture: Path) -> None:
    """Milliseconds of a job's step over P, sequence length and model size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.2), dpi=100, layout="constrained")
    for axes, axis in zip(figure.subplots(1, 3), ("jobs", "length", "model"), strict=True):
        for mode, colour in (("full", "tab:blue"), ("lora", "tab:orange")):
            chosen = [row for row in rows if row.get("axis") == axis and row["mode"] == mode]
            times = [row["milliseconds_per_job_step"] for row in chosen]
            axes.plot([str(row["value"]) for row in chosen], times, "o-", color=colour, label=mode)
        axes.set_xlabel({"jobs": "jobs, P", "length": "tokens of a sequence", "model": "parameters"}[axis])
        axes.set_ylim(bottom=0.0)
    figure.axes[0].set_ylabel("ms per job and step")
    figure.axes[0].legend()
    figure.savefig(picture)


def write_page(page: Path, tables: str) -> None:
    """Puts the tables between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(PAGE_MARKS[0])
    after = rest.split(PAGE_MARKS[1])[1]
    page.write_text(f"{before}{PAGE_MARKS[0]}\n{tables}\n{PAGE_MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer sizes")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--page", type=Path, help="docs page whose tables and picture are written")
    arguments = parser.parse_args()
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_cores)
    machine, quick = describe_machine(), arguments.quick
    rows = measure_environments(3 if quick else 10, num_cores)
    by_name = {row["name"]: row for row in rows}
    ratios = {
        "throughput_p16_vs_sequential": by_name["ratio_sequential"]["ratio"],
        "throughput_p16_vs_async": by_name["ratio_async"]["ratio"],
    }
    with tempfile.TemporaryDirectory() as folder:
        if torch.cuda.is_available():
            more, of_gpu = measure_gpu(Path(folder))
            rows, ratios = rows + more, ratios | of_gpu
        if arguments.page is not None or not quick:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            torch.set_num_threads(1 if device == "cpu" else num_cores)
            rows += measure_growth(Path(folder), device, quick=quick)
    if arguments.page is not None:
        picture = arguments.page.with_suffix(".png")
        draw_growth(rows, picture)
        write_page(arguments.page, growth_tables(rows, machine, picture.name))
    report = {"machine": machine, "versions": describe_versions(), "rows": rows, "ratios": ratios}
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
