"""How fast the DQN is, beside other libraries measured in the same run.

    python scripts/bench_dqn.py --output bench.json          # peers that are installed beside this package
    python scripts/bench_dqn.py --output bench.json --sb3-python ENV/bin/python --cpprb-python ENV/bin/python \
        --cleanrl-python ENV/bin/python --cleanrl-directory CHECKOUT --torchrl-python ENV/bin/python
    python scripts/bench_dqn.py --quick --output bench.json ...
    python scripts/bench_dqn.py --only steps --repeats 9 --output bench.json ...  # those with the word in their name

Peers may live in environments of their own, given by their Python; one that is found nowhere leaves null. Every
measurement is a process with one thread that counts its own CPU seconds; ours and the peer's alternate. The replay's
operations are those of `bench_replay.py`, which also has them for a million transitions. A ratio is the
median over the repeats, with a 95 % bootstrap interval. Above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench_replay
import numpy as np
from benchmarking import describe_machine, describe_versions, median_ratio, write_report

EPSILON = 0.29  # as in dqn_peers.py
PEERS = Path(__file__).with_name("dqn_peers.py")


def our_steps(count: int) -> float:
    """Environment steps on CartPole at the hyper-parameters of CleanRL's `dqn.py`, after learning has started."""
    import gymnasium

    from llmrl.dqn.agent import DQNAgent
    from llmrl.dqn.collector import Collector
    from llmrl.dqn.config import DQNConfig

    config = DQNConfig(
        hidden_sizes=(120, 84),
        layer_norm=False,
        dueling=False,
        double=False,
        n_step=1,
        loss="squared",
        learning_rate=2.5e-4,
        max_grad_norm=None,
        batch_size=128,
        replay_capacity=10_000,
        learning_starts=10_000,
        replay_ratio=0.1,
        target_update_period=50,
        target_ema=1.0,
        epsilon_start=EPSILON,
        epsilon_end=EPSILON,
    )
    agent = DQNAgent(config, num_envs=1, obs_shape=(4,), num_actions=2)
    collector = Collector(gymnasium.make("CartPole-v1"), agent, seed=0)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            collector.step()
            agent.learn()

    run(10_500)
    return timed(lambda: run(count))


def our_learner(count: int) -> float:
    """Learner steps of the plain agent: 40 observations, two layers of 128, batch 128, sampling included."""
    from llmrl.dqn.agent import DQNAgent
    from llmrl.dqn.config import DQNConfig

    config = DQNConfig(layer_norm=False, dueling=False, double=False, n_step=1, replay_capacity=100_000)
    agent = DQNAgent(config, num_envs=100, obs_shape=(40,), num_actions=9)
    rng = np.random.default_rng(0)
    for _ in range(100):
        obs, next_obs = rng.normal(size=(2, 100, 40)).astype(np.float32)
        terminated = rng.random(100) < 0.02
        agent.observe(obs, rng.integers(9, size=100), rng.normal(size=100), terminated, terminated & False, next_obs)
    for _ in agent.learn_from_log(100):
        pass

    def run() -> None:
        for _ in agent.learn_from_log(count):
            pass

    return timed(run)


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


class Measured(NamedTuple):
    """One measurement of one library."""

    microseconds: float  # of CPU time for one operation
    version: str


Measure = Callable[[], Measured]


def process(python: str, script: Path, *arguments: str) -> Measured:
    """Runs one measurement in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, str(script), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: expected a measurement, got\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured(1e6 * found["cpu_seconds"] / found["count"], found["version"])


def replay(python: str, library: str, operation: str, count: int) -> Measured:
    """One operation of `bench_replay.py`, with 100,000 transitions: the same for every library."""
    found = bench_replay.in_a_process(python, library, 100_000, count, operation)
    return Measured(found["microseconds"][operation], found["facts"].get("version", "ours"))


def compare(name: str, ours: Measure, peer: Measure, repeats: int) -> dict[str, Any]:
    """Alternating measurements and their ratios."""
    pairs = [(ours(), peer()) for _ in range(repeats)]
    ours_us, peer_us = (np.array([one.microseconds for one in side]) for side in zip(*pairs, strict=True))
    ratio, low, high = median_ratio(peer_us, ours_us)
    print(f"{name} {ratio:.2f} [{low:.2f}, {high:.2f}]", flush=True)
    return {
        "name": name,
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
        "our_microseconds": float(np.median(ours_us)),
        "peer_microseconds": float(np.median(peer_us)),
        "peer_version": pairs[-1][1].version,
        "repeats": repeats,
    }


def find_python(module: str, given: str | None) -> str | None:
    """The Python that has a peer: the one that was given, or this one if the peer is installed beside us."""
    return given or (sys.executable if importlib.util.find_spec(module) is not None else None)


def measure(name: str, count: int) -> None:
    """One measurement of ours, printed as JSON."""
    import torch

    torch.set_num_threads(1)
    seconds = {"steps": our_steps, "learner": our_learner}[name](count)
    print(json.dumps({"cpu_seconds": seconds, "count": count, "version": "ours"}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and operations")
    parser.add_argument("--repeats", type=int, help="pairs of measurements; 7, or 3 with --quick")
    parser.add_argument("--only", default="", help="only comparisons whose name contains this")
    for peer in ("sb3", "cleanrl", "cpprb", "torchrl"):
        parser.add_argument(f"--{peer}-python", help=f"Python of an environment with what {peer} needs")
    parser.add_argument("--cleanrl-directory", help="a checkout with cleanrl/dqn.py and cleanrl_utils")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure[0], int(arguments.measure[1]))
    if arguments.output is None:
        parser.error("expected --output FILE")
    repeats, steps, updates = (3, "5000", "500") if arguments.quick else (7, "20000", "1000")
    repeats = repeats if arguments.repeats is None else arguments.repeats
    if repeats < 1:
        parser.error(f"expected --repeats of at least 1, got {repeats}")
    checkout = arguments.cleanrl_directory
    sb3 = find_python("stable_baselines3", arguments.sb3_python)
    cleanrl = None if checkout is None else arguments.cleanrl_python or sys.executable
    torchrl = find_python("torchrl", arguments.torchrl_python)
    cpprb = find_python("cpprb", arguments.cpprb_python)

    def ours(*numbers: str) -> Measure:
        return lambda: process(sys.executable, Path(__file__), "--measure", *numbers)

    def theirs(python: str | None, *numbers: str) -> Measure | None:
        return None if python is None else lambda: process(python, PEERS, *numbers)

    def buffer(python: str | None, library: str, operation: str) -> Measure | None:
        return None if python is None else lambda: replay(python, library, operation, int(updates) // 2)

    comparisons = {
        "steps_per_second_vs_sb3": (ours("steps", steps), theirs(sb3, "sb3_steps", steps)),
        "steps_per_second_vs_cleanrl": (
            ours("steps", steps),
            theirs(cleanrl, "cleanrl_steps", steps, str(checkout)),
        ),
        "learner_step_vs_sb3": (ours("learner", updates), theirs(sb3, "sb3_learner", updates)),
        "uniform_vs_torchrl": (buffer(sys.executable, "ours", "uniform"), buffer(torchrl, "torchrl", "uniform")),
        "prioritized_vs_cpp": (buffer(sys.executable, "ours", "prioritized"), buffer(cpprb, "cpprb", "prioritized")),
    }
    rows = [
        compare(name, mine, peer, repeats)
        for name, (mine, peer) in comparisons.items()
        if mine is not None and peer is not None and arguments.only in name
    ]
    found = {row["name"]: row["ratio"] for row in rows}
    report = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "rows": rows,
        "ratios": {name: found.get(name) for name in comparisons},
    }
    write_report(report, arguments.output)
    return None


if __name__ == "__main__":
    main()
