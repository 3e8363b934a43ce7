#!/usr/bin/env python
"""Does the built-in base model behave as a pretrained model does? Fine-tune it by topic, learning rate and schedule.

    python scripts/bench_base_model.py --output base_model.json       # 6 topics, 5 rates, 2 schedules, 3 seeds
    python scripts/bench_base_model.py --quick --output base_model.json

Each job takes the model as it ships, trains on the topic's training split with AdamW in batches of 8 windows of 128
bytes, and measures the mean loss on the whole test split, before and after. Asked of the result: fine-tuning lowers
the test loss; the best rate lies inside the grid; the highest rate ends above the loss of doing nothing; linear decay
to zero ends below a constant rate, each at its own best rate. It also times one training step on one thread.

No controller and no environment takes part, so that what is shown here is a property of the model alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from llmrl_envs.builtin import builtin_model_path, corpus_topics, load_corpus
from transformers import AutoModelForCausalLM, PreTrainedModel

TOPICS = ("json", "email", "typing", "html", "reference", "syntax_trees")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
SCHEDULES = ("linear", "constant")
WINDOW_BYTES = 128
BATCH_SIZE = 8


def windows(documents: list[str]) -> torch.Tensor:  # int64[N, WINDOW_BYTES]
    """Text in windows one behind the other; the token of a byte is its value. The remainder is dropped."""
    tokens = np.frombuffer("".join(documents).encode("utf-8"), dtype=np.uint8)
    count = len(tokens) // WINDOW_BYTES
    return torch.from_numpy(tokens[: count * WINDOW_BYTES].reshape(count, WINDOW_BYTES).astype(np.int64))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Nats per byte over all windows."""
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in batch.split(32)]
    return sum(losses) / len(batch)


def fine_tune(
    base: PreTrainedModel,
    train: torch.Tensor,  # int64[N, L]
    test: torch.Tensor,  # int64[M, L]
    *,
    learning_rate: float,
    schedule: str,
    steps: int,
    seed: int,
) -> float:
    """Fine-tune a copy of `base`; a step whose gradient is not finite is skipped.

    Returns:
        Test loss at the end, nats per byte; infinite if it is not a number.
    """
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    rng = np.random.default_rng(seed)
    for step in range(steps):
        factor = (steps - step) / steps if schedule == "linear" else 1.0
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        batch = train[torch.from_numpy(rng.integers(0, len(train), size=BATCH_SIZE))]
        model(input_ids=batch, labels=batch).loss.backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            optimizer.step()
        optimizer.zero_grad()
    loss = mean_loss(model, test)
    return loss if np.isfinite(loss) else float("inf")


def measure_topic(
    base: PreTrainedModel, topic: str, rates: tuple[float, ...], steps: int, seeds: int
) -> list[dict[str, object]]:
    """One row for each rate, schedule and seed."""
    corpus = load_corpus(topic)
    train, test = windows(corpus["train"]), windows(corpus["test"])
    before = mean_loss(base, test)
    rows = []
    for schedule in SCHEDULES:
        for rate in rates:
            for seed in range(seeds):
                after = fine_tune(base, train, test, learning_rate=rate, schedule=schedule, steps=steps, seed=seed)
                rows.append(
                    {"topic": topic, "schedule": schedule, "learning_rate": rate, "seed": seed}
                    | {"loss_initial": before, "loss_test": after}
                )
    return rows


def mean_by_rate(rows: list[dict[str, object]], topic: str, schedule: str) -> dict[float, float]:
    """Test loss of each rate, mean over the seeds."""
    chosen = [row for row in rows if row["topic"] == topic and row["schedule"] == schedule]
    rates = sorted({float(row["learning_rate"]) for row in chosen})  # type: ignore[arg-type]
    return {
        rate: statistics.fmean(float(row["loss_test"]) for row in chosen if row["learning_rate"] == rate)  # type: ignore[arg-type]
        for rate in rates
    }


def step_milliseconds(base: PreTrainedModel, batch_size: int, length: int, repeats: int = 30) -> float:
    """Least time of one training step (other processes only add to it): forward, backward, clipping, AdamW."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    batch = torch.randint(0, 256, (batch_size, length), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def summarise(rows: list[dict[str, object]], topics: tuple[str, ...]) -> dict[str, float]:
    """Print a line for each topic.

    Returns:
        Over all topics: mean of loss after / loss before, and of linear / constant, each at its best rate; share of
        topics where linear is better.
    """
    after, against = [], []
    for topic in topics:
        before = next(float(row["loss_initial"]) for row in rows if row["topic"] == topic)  # type: ignore[arg-type]
        linear, constant = (mean_by_rate(rows, topic, schedule) for schedule in SCHEDULES)
        best = {name: min(losses, key=losses.__getitem__) for name, losses in (("l", linear), ("c", constant))}
        after.append(linear[best["l"]] / before)
        against.append(linear[best["l"]] / constant[best["c"]])
        grid = "  ".join(f"{rate:g}: {loss:.3f}" for rate, loss in linear.items())
        print(
            f"{topic:14s} before {before:.3f}  linear {linear[best['l']]:.3f} at {best['l']:g}"
            f"  constant {constant[best['c']]:.3f} at {best['c']:g}   [linear by rate  {grid}]",
            flush=True,
        )
    return {
        "loss_after_over_before": statistics.fmean(after),
        "loss_linear_over_constant": statistics.fmean(against),
        "share_linear_better": statistics.fmean(float(ratio < 1) for ratio in against),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the jobs, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--quick", action="store_true", help="2 topics, 3 rates, 1 seed, 20 steps")
    parser.add_argument("--model", type=Path, default=builtin_model_path())
    parser.add_argument("--topics", nargs="+", choices=corpus_topics(), default=list(TOPICS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    topics, rates = tuple(options.topics), RATES
    if options.quick:
        topics, rates, options.steps, options.seeds = topics[:2], RATES[1::2], 20, 1
    base = AutoModelForCausalLM.from_pretrained(options.model)
    milliseconds = {f"{size[0]}x{size[1]}": step_milliseconds(base, *size) for size in ((8, 64), (8, 128), (16, 256))}
    print("milliseconds per step: " + "  ".join(f"{size}: {value:.1f}" for size, value in milliseconds.items()))
    rows: list[dict[str, object]] = []
    for topic in topics:
        new = measure_topic(base, topic, rates, options.steps, options.seeds)
        summarise(new, (topic,))
        rows += new
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {"steps": options.steps, "seeds": options.seeds, "batch_size": BATCH_SIZE, "length": WINDOW_BYTES},
        "milliseconds_per_step": milliseconds,
        "rows": rows,
        "ratios": summarise(rows, topics),
    }
    print(result["ratios"])
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
