"""What a policy costs in a Trainer: the same job with and without the callback, in turn, in one process.

    python scripts/bench_hosts.py --quick --output hosts.json
    python scripts/bench_hosts.py --models path/of/a/causal/model --output hosts.json

Time: two Trainers, each in its thread, take optimizer steps in turn, and ten of each side are compared; with 400 steps
in the budget they hold one decision. They are compared in wall time and in the thread's CPU time, which neighbours
disturb less. Two models of one kind differ by per cents for as long as they live, by where their tensors lie; so both
Trainers train one model with one optimizer, and every round makes them anew and begins with the other. Intervals are
over rounds. `own` is the CPU time of a block over what it would be without the callback's hooks: it needs no pair, and
leaves out what the hooks do to others (caches).

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
LONGEST_START_SECONDS = 120.0
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
    """Lets two Trainers go on in turn, a step at a time, and times blocks of their steps.

    Attributes:
        blocks: Wall and CPU seconds of each block, and those of its CPU seconds that were spent in `Timed` hooks.
        arrived: Training is about to begin.
    """

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore, num_blocks: int) -> None:
        self._mine, self._others, self._num_blocks = mine, others, num_blocks
        self.blocks: list[NDArray[np.float64]] = []
        self.arrived = threading.Event()
        self.steering: Timed | None = None
        self._began = self._spent = np.zeros(3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for the first turn."""
        self.arrived.set()
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands over and waits."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._spent = self._spent + self._now() - self._began
        if state.global_step % BLOCK_STEPS == 0:
            self.blocks.append(self._spent)
            self._spent = np.zeros(3)
        control.should_training_stop = len(self.blocks) == self._num_blocks
        self._others.release()
        if not control.should_training_stop:
            self._wait()

    def _wait(self) -> None:
        self._mine.acquire()
        self._began = self._now()

    def _now(self) -> NDArray[np.float64]:
        return np.array([time.perf_counter(), time.thread_time(), self.steering.seconds if self.steering else 0.0])


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


def make_trainer(
    model: Any, *, callbacks: list[TrainerCallback], folder: str, optimizer: torch.optim.Optimizer | None = None
) -> Trainer:
    """The job."""
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
        optimizers=(optimizer, None),
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
    """Two Trainers of one model and one optimizer, made anew, in turn; plain blocks and the steered ones among them."""
    locks = threading.Semaphore(0), threading.Semaphore(0)
    plain, steered = (Turns(locks[i], locks[1 - i], UNTIMED_BLOCKS + num_pairs) for i in (0, 1))
    steered.steering = Timed("hold")
    model = build_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    variants: list[tuple[Turns, list[TrainerCallback]]] = [
        (plain, [plain]),
        (steered, [steered.steering, steered]),  # the clock stops last
    ]
    with tempfile.TemporaryDirectory() as folder:
        threads = []
        for turns, callbacks in variants[:: 1 - 2 * steered_first]:
            trainer = make_trainer(model, callbacks=callbacks, folder=folder, optimizer=optimizer)
            threads.append(threading.Thread(target=trainer.train, daemon=True))
            threads[-1].start()
            if not turns.arrived.wait(LONGEST_START_SECONDS):  # it prepares the model, which must not be in a step then
                raise RuntimeError("training: expected it to begin, got an error or no answer")
        locks[int(steered_first)].release()
        for thread in threads:
            thread.join()
    without, within = (np.array(turns.blocks[UNTIMED_BLOCKS:]) for turns in (plain, steered))  # [N, 3]
    return without, within


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
        make_trainer(build_model(name), callbacks=callbacks, folder=folder).train()
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
