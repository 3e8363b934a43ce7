"""What a policy costs in a Trainer: the same job with and without the callback, in turn, in one process.

    python scripts/bench_hosts.py --quick --output hosts.json
    python scripts/bench_hosts.py --models path/of/a/causal/model --output hosts.json

Time: two Trainers, each in its thread, take blocks of ten optimizer steps in turn; with 400 steps in the budget a block
holds one decision. A steered block is divided by the mean of the plain ones before and after it, in wall time and in
the thread's CPU time, which neighbours disturb less. `own` is the CPU time inside the callback's hooks over that of the
rest, block by block: it needs no pair, and leaves out what the hooks do to others (caches).

Memory: each variant alone in a fresh process, its peak; no snapshots are kept (the policy holds). Models are built from
random configurations of 3 and 22 million parameters unless a path is given; batches are 8 x 128 random tokens.

`ratios.wall` and `ratios.memory` are the largest of the models' medians, steered over plain.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from benchmarking import compare_peak_memory, describe_machine, describe_versions, median_ratio, write_report
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llmrl import ScheduleCallback

BLOCK_STEPS, BUDGET_STEPS, UNTIMED_BLOCKS = 10, 400, 1
MODELS = {
    "3M": LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6,
    ),
    "22M": LlamaConfig(
        vocab_size=10000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6,
    ),
}  # fmt: skip


class Turns(TrainerCallback):
    """Lets two Trainers go on in turn, a block at a time, and times the blocks.

    Attributes:
        blocks: Wall and CPU seconds of each block, and those of its CPU seconds that were spent in `Timed` hooks.
    """

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore, num_blocks: int) -> None:
        self._mine, self._others, self._num_blocks = mine, others, num_blocks
        self.blocks: list[tuple[float, float, float]] = []
        self.steering: Timed | None = None
        self._began = (0.0, 0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for the first turn."""
        self._mine.acquire()
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At a block's end, hands over and waits."""
        if state.global_step % BLOCK_STEPS:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu, own = (now - then for now, then in zip(self._now(), self._began, strict=True))
        self.blocks.append((wall, cpu, own))
        self._others.release()
        if len(self.blocks) == self._num_blocks:
            control.should_training_stop = True
            return
        self._mine.acquire()
        self._began = self._now()

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.thread_time(), self.steering.seconds if self.steering else 0.0


class Timed(ScheduleCallback):
    """The callback, with the CPU time that its hooks take."""

    seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._time(super().on_step_begin, *args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._time(super().on_pre_optimizer_step, *args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._time(super().on_optimizer_step, *args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Timed."""
        self._time(super().on_step_end, *args, **kwargs)

    def _time(self, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        began = time.thread_time()
        hook(*args, **kwargs)
        self.seconds += time.thread_time() - began


def build_model(name: str) -> Any:
    """A random model of that size, or the one at that path."""
    torch.manual_seed(0)
    return LlamaForCausalLM(MODELS[name]) if name in MODELS else AutoModelForCausalLM.from_pretrained(name)


def make_trainer(name: str, *, callbacks: list[TrainerCallback], folder: str) -> Trainer:
    """The job."""
    model = build_model(name)
    rows = torch.randint(0, model.config.vocab_size, (512, 128), generator=torch.Generator().manual_seed(0))
    return Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            max_steps=BUDGET_STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            logging_steps=BLOCK_STEPS,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=callbacks,
    )


def measure_time(name: str, num_pairs: int) -> list[dict[str, Any]]:
    """Blocks of both variants in turn; rows of wall time, CPU time and the callback's own CPU time."""
    locks = threading.Semaphore(1), threading.Semaphore(0)
    plain, steered = (Turns(locks[i], locks[1 - i], num_pairs + UNTIMED_BLOCKS + 1 - i) for i in (0, 1))
    steered.steering = Timed("hold")
    with tempfile.TemporaryDirectory() as folder:
        # The clock stops last, so that what the schedule does at a block's end is inside.
        trainers = [
            make_trainer(name, callbacks=callbacks, folder=folder)
            for callbacks in ([plain], [steered.steering, steered])
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    without, within = (np.array(turns.blocks[UNTIMED_BLOCKS:]) for turns in (plain, steered))  # [N + 1, 3], [N, 3]
    beside = (without[:-1] + without[1:]) / 2
    parameters = sum(p.numel() for p in trainers[0].model.parameters())
    common = {"parameters": parameters, "pairs": num_pairs}
    return [
        {"name": f"wall_{name}", **common, **paired(within[:, 0], beside[:, 0])},
        {"name": f"cpu_{name}", **common, **paired(within[:, 1], beside[:, 1])},
        {"name": f"own_{name}", **common, **paired(within[:, 1], within[:, 1] - within[:, 2])},
    ]


def paired(steered: NDArray[np.float64], plain: NDArray[np.float64]) -> dict[str, float]:
    """Medians, and the median ratio with its interval."""
    ratio, low, high = median_ratio(steered, plain)
    return {
        "plain_seconds": float(np.median(plain)),
        "steered_seconds": float(np.median(steered)),
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
    }


class Peak(TrainerCallback):
    """Notes the process's memory at every step, and stops after two blocks."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks."""
        cuda = torch.cuda.is_available()
        found = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        self.bytes = max(self.bytes, found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops in time."""
        control.should_training_stop = state.global_step >= 2 * BLOCK_STEPS


def peak_memory(name: str, variant: str) -> None:
    """Prints the peak memory of one variant, bytes; run in a process of its own."""
    peak = Peak()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [ScheduleCallback("hold"), peak] if variant == "steered" else [peak]
        make_trainer(name, callbacks=callbacks, folder=folder).train()
    print(json.dumps(peak.bytes))


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs")
    parser.add_argument("--pairs", type=int, help="pairs of blocks; 36, with --quick 10")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="3M, 22M, or paths of causal models")
    parser.add_argument("--no-memory", action="store_true", help="time alone; ratios.memory is null then")
    parser.add_argument("--peak-memory", choices=("plain", "steered"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        peak_memory(arguments.models[0], arguments.peak_memory)
        return
    if arguments.output is None:
        parser.error("--output is required")
    num_pairs = arguments.pairs or (10 if arguments.quick else 36)
    times = [row for name in arguments.models for row in measure_time(name, num_pairs)]
    memory = [
        compare_peak_memory(
            f"memory_{name}", [__file__, "--models", name, "--peak-memory"], 1 if arguments.quick else 5
        )
        for name in arguments.models
        if not arguments.no_memory
    ]
    rows = times + memory
    ratios = {
        kind: max((row["ratio"] for row in rows if row["name"].startswith(kind)), default=None)
        for kind in ("wall", "memory")
    }
    report = {"machine": describe_machine(), "versions": describe_versions(), "rows": rows, "ratios": ratios}
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
