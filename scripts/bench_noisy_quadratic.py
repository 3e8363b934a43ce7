#!/usr/bin/env python
"""How many decisions a second NoisyQuadratic takes on one core: observation, masks, rewards and new jobs included.

    python scripts/bench_noisy_quadratic.py --output noisy_quadratic.json
    python scripts/bench_noisy_quadratic.py --quick --output noisy_quadratic.json

The native vector environment with 1,024 lanes is measured against Gymnasium's `SyncVectorEnv` around single
environments in the same run. Actions are random among the available ones, every fifth decision of a lane; in between
the lane holds. Choosing them is not counted. A block is a number of vector steps; the best and the median block are
reported, by the wall clock and by the processor time of this process, which other processes disturb less. The share
of the observation encoder, which is that of a real job, is given because it is the largest single part. NumPy runs all
of this on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from llmrl_envs.interface.observation import ObservationEncoder
from llmrl_envs.noisy_quadratic import NoisyQuadraticEnv, NoisyQuadraticVectorEnv

LANES = 1024
RANDOM_SHARE = 0.2
TARGET = 100_000


class Stopwatch:
    """Adds up wall and processor seconds of what it wraps."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call and measure."""
        wall, processor = time.perf_counter(), time.process_time()
        result = function(*arguments)
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return result


def choose(masks: np.ndarray, hold: int, rng: np.random.Generator) -> np.ndarray:
    """Mostly hold, else one of the available actions, int64[E]."""
    drawn = (rng.random(masks.shape) * (masks > 0)).argmax(axis=1)
    return np.where(rng.random(len(masks)) < RANDOM_SHARE, drawn, hold)


def measure(env: VectorEnv, hold: int, *, blocks: int, steps: int, warm_up: int) -> dict[str, float]:
    """Decisions a second of one vector environment."""
    rng = np.random.default_rng(0)
    _, infos = env.reset(seed=0)
    wall, processor = [], []
    # Lanes of different budgets drift apart over the warm-up, so that resets come in every step as they do later.
    for block in range(-1, blocks):
        watch = Stopwatch()
        count = warm_up if block < 0 else steps
        for _ in range(count):
            infos = watch(env.step, choose(infos["action_mask"], hold, rng))[4]
        if block >= 0:
            wall.append(env.num_envs * count / watch.wall)
            processor.append(env.num_envs * count / watch.processor)
    return {
        "decisions_per_second_best": max(wall),
        "decisions_per_second_median": statistics.median(wall),
        "decisions_per_processor_second_best": max(processor),
        "decisions_per_processor_second_median": statistics.median(processor),
    }


def encoder_share(actions: str, *, steps: int, warm_up: int) -> float:
    """Share of the processor time of a step that the observation encoder takes."""
    env, rng, whole, part = NoisyQuadraticVectorEnv(LANES, actions=actions), np.random.default_rng(0), None, None
    encode = ObservationEncoder.encode
    _, infos = env.reset(seed=0)
    try:
        for step in range(warm_up + steps):
            if step == warm_up:
                whole, part = Stopwatch(), Stopwatch()
                ObservationEncoder.encode = lambda *a, watch=part: watch(encode, *a)  # type: ignore[method-assign]
            masked = choose(infos["action_mask"], env.table.hold, rng)
            infos = (whole(env.step, masked) if whole else env.step(masked))[4]
    finally:
        ObservationEncoder.encode = encode  # type: ignore[method-assign]
    assert whole is not None
    assert part is not None
    return part.processor / whole.processor


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line for each, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    options = parser.parse_args(arguments)
    blocks, steps, warm_up = (3, 20, 30) if options.quick else (10, 60, 80)
    rows: list[dict[str, Any]] = []
    for actions in ("factors", "moves"):
        single = [lambda actions=actions: NoisyQuadraticEnv(actions=actions)] * 8
        environments: dict[str, VectorEnv] = {
            "native": NoisyQuadraticVectorEnv(LANES, actions=actions),
            "sync": SyncVectorEnv(single, autoreset_mode=AutoresetMode.SAME_STEP),
        }
        hold = NoisyQuadraticEnv(actions=actions).table.hold
        for name, env in environments.items():
            speed = measure(env, hold, blocks=blocks, steps=steps, warm_up=warm_up)
            rows.append({"environment": name, "actions": actions, "num_envs": env.num_envs, **speed})
            wall, processor = speed["decisions_per_second_best"], speed["decisions_per_processor_second_best"]
            print(
                f"{name:7s} {actions:8s} {env.num_envs:5d} lanes: {wall:10,.0f} decisions/s, "
                f"{processor:10,.0f} per processor second (best blocks)",
                flush=True,
            )
    best = {(row["environment"], row["actions"]): row["decisions_per_processor_second_best"] for row in rows}
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "gymnasium": gymnasium.__version__,
        },
        "rows": rows,
        "ratios": {
            "native_vs_sync": best["native", "factors"] / best["sync", "factors"],
            "decisions_per_second_vs_target": best["native", "factors"] / TARGET,
            "encoder_share": encoder_share("factors", steps=steps, warm_up=warm_up),
        },
    }
    print(result["ratios"])
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
