"""What a policy costs in a Trainer: the same job with and without the callback, in turn, in one process.

    python scripts/bench_hosts.py --quick --output hosts.json
    python scripts/bench_hosts.py --models path/of/a/causal/model --output hosts.json

Time: two Trainers, each in its thread, take blocks of ten optimizer steps in turn; with 400 steps in the budget a block
holds one decision. A steered block is divided by the mean of two plain ones beside it, in wall time and in the thread's
CPU time, which neighbours disturb less. The same Trainer made twice differs by per cents for as long as it lives, by
where its tensors lie; so both are made anew in every round, the other one first, and intervals are over rounds. `own`
is the CPU time of a block over what it would be without the callback's hooks: it needs no pair, and leaves out what the
hooks do to others (caches).

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
from benchmarking import compare_peak_memory, describe_machine, describe_versions, write_report
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

BLOCK_STEPS, BUDGET_STEPS, UNTIMED_BLOCKS, RESAMPLES = 10, 400, 2, 2000
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


def measure_time(name: str, num_pairs: int, num_rounds: int) -> list[dict[str, Any]]:
    """Blocks of both variants in turn; rows of wall time, CPU time and the callback's own CPU time."""
    rounds = [measure_round(name, num_pairs, steered_first=bool(index % 2)) for index in range(num_rounds)]
    common = {"pairs": num_pairs, "rounds": num_rounds}
    return [
        {"name": f"wall_{name}", **common, **compare([(plain[:, 0], steered[:, 0]) for plain, steered in rounds])},
        {"name": f"cpu_{name}", **common, **compare([(plain[:, 1], steered[:, 1]) for plain, steered in rounds])},
        {"name": f"own_{name}", **common, **compare([(s[:, 1] - s[:, 2], s[:, 1]) for _, s in rounds])},
    ]


def measure_round(
    name: str, num_pairs: int, *, steered_first: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # [N, 3] each: wall, CPU, own CPU
    """Two Trainers, made anew, in turn; a steered block, and the mean of the plain ones on both sides of it."""
    locks = threading.Semaphore(1), threading.Semaphore(0)
    # One block more of whoever begins; of the plain ones one more than of the steered ones is needed.
    plain, steered = (Turns(locks[i], locks[1 - i], UNTIMED_BLOCKS + num_pairs + 1) for i in (0, 1))
    steered.steering = Timed("hold")
    with tempfile.TemporaryDirectory() as folder:
        variants: list[list[TrainerCallback]] = [[plain], [steered.steering, steered]]  # the clock stops last
        made = [
            make_trainer(name, callbacks=callbacks, folder=folder) for callbacks in variants[:: 1 - 2 * steered_first]
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    without, within = (np.array(turns.blocks[UNTIMED_BLOCKS:]) for turns in (plain, steered))  # [N + 1, 3]
    return (without[:-1] + without[1:]) / 2, within[:-1]


def compare(rounds: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> dict[str, Any]:
    """Medians, the median ratio of all pairs, and its 95 % bootstrap interval over rounds and their pairs."""
    plain, steered = (np.concatenate(side) for side in zip(*rounds, strict=True))
    ratios = [steered / plain for plain, steered in rounds]
    rng = np.random.default_rng(0)
    medians = [
        np.median(
            np.concatenate([rng.choice(ratios[i], len(ratios[i])) for i in rng.integers(len(ratios), size=len(ratios))])
        )
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "plain_seconds": float(np.median(plain)),
        "steered_seconds": float(np.median(steered)),
        "ratio": float(np.median(np.concatenate(ratios))),
        "ci_low": float(low),
        "ci_high": float(high),
        "round_ratios": [float(np.median(found)) for found in ratios],
    }


class Peak(TrainerCallback):
    """Notes the process's memory at every step, and stops after a block."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks."""
        cuda = torch.cuda.is_available()
        found = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        self.bytes = max(self.bytes, found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops in time."""
        control.should_training_stop = state.global_step >= BLOCK_STEPS


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
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of blocks in a round")
    parser.add_argument("--rounds", type=int, help="8, with --quick 2")
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
    num_rounds = arguments.rounds or (2 if arguments.quick else 8)
    times = [row for name in arguments.models for row in measure_time(name, arguments.pairs, num_rounds)]
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
