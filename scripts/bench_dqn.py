"""How fast the DQN is, beside other libraries measured in the same run.

    python scripts/bench_dqn.py --output bench.json --sb3-python ENV/bin/python --cpprb-python ENV/bin/python \
        --cleanrl-python ENV/bin/python --cleanrl-directory CHECKOUT --torchrl-python ENV/bin/python

Peers live in environments of their own, given by their Python; a peer that is not given leaves null. Every measurement
is a process with one thread that counts its own CPU seconds; ours and the peer's alternate, and a ratio is the median
over the repeats with the smallest and the largest. Above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    import numpy as np

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


def our_replay(count: int, capacity: int, sampling: str) -> float:
    """Add one, draw 128 and, where prioritised, set 128 priorities, with 40 observations."""
    import numpy as np

    from llmrl.dqn.replay import ReplayBuffer

    buffer = ReplayBuffer(capacity, 1, (40,), 9, sampling=sampling)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    obs, end = rng.normal(size=(1, 40)).astype(np.float32), np.zeros(1, dtype=np.bool_)
    action, reward = np.zeros(1, dtype=np.int64), np.full(1, 0.5)

    def add() -> None:
        buffer.add(obs, action, reward, end, end, obs)

    def run() -> None:
        for _ in range(count):
            add()
            batch = buffer.sample(128, rng, n_step=1, gamma=0.99, beta=0.4)
            if sampling != "uniform":
                buffer.update_priorities(batch.index, batch.generation, np.abs(batch.reward) + 0.5)

    for _ in range(capacity):
        add()
    run()
    return timed(run)


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def cpu_seconds(python: str, script: Path, arguments: list[str]) -> dict[str, Any]:
    """Runs one measurement in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, str(script), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: expected a measurement, got\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def compare(ours: list[str], python: str, peer: list[str], repeats: int) -> dict[str, Any]:
    """Alternating measurements and their ratios; both do the same number of operations."""
    pairs = []
    for _ in range(repeats):
        mine = cpu_seconds(sys.executable, Path(__file__), ["--measure", *ours])
        theirs = cpu_seconds(python, PEERS, peer)
        pairs.append((mine["cpu_seconds"] / mine["count"], theirs["cpu_seconds"] / theirs["count"], theirs["version"]))
    ratios = [theirs / mine for mine, theirs, _ in pairs]
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "our_microseconds": 1e6 * statistics.median(mine for mine, _, _ in pairs),
        "peer_microseconds": 1e6 * statistics.median(theirs for _, theirs, _ in pairs),
        "peer_version": pairs[0][2],
    }


def measure(name: str, *numbers: str) -> None:
    """One measurement of ours, printed as JSON."""
    import torch

    torch.set_num_threads(1)
    count = int(numbers[0])
    if name == "replay":
        seconds = our_replay(count, int(numbers[1]), numbers[2])
    else:
        seconds = {"steps": our_steps, "learner": our_learner}[name](count)
    print(json.dumps({"cpu_seconds": seconds, "count": count, "version": "ours"}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    for peer in ("sb3", "cleanrl", "cpprb", "torchrl"):
        parser.add_argument(f"--{peer}-python", help=f"Python of an environment with {peer}")
    parser.add_argument("--cleanrl-directory", help="a checkout with cleanrl/dqn.py and cleanrl_utils")
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of one measurement")
    parser.add_argument("--updates", type=int, default=1_000, help="learner steps of one measurement")
    parser.add_argument("--capacity", type=int, default=100_000, help="transitions in the replay measurements")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure)
    if arguments.output is None:
        parser.error("expected --output FILE")
    steps, updates, capacity = str(arguments.steps), str(arguments.updates), str(arguments.capacity)
    table: dict[str, tuple[str | None, list[str], list[str]]] = {
        "steps_per_second_vs_sb3": (arguments.sb3_python, ["steps", steps], ["sb3_steps", steps]),
        "steps_per_second_vs_cleanrl": (
            arguments.cleanrl_python,
            ["steps", steps],
            ["cleanrl_steps", steps, str(arguments.cleanrl_directory)],
        ),
        "learner_step_vs_sb3": (arguments.sb3_python, ["learner", updates], ["sb3_learner", updates]),
        "uniform_vs_torchrl": (
            arguments.torchrl_python,
            ["replay", updates, capacity, "uniform"],
            ["torchrl_uniform", updates, capacity],
        ),
        "prioritized_vs_cpp": (
            arguments.cpprb_python,
            ["replay", updates, capacity, "prioritized"],
            ["cpprb_prioritized", updates, capacity],
        ),
    }
    results = {
        name: None if python is None else compare(ours, python, peer, arguments.repeats)
        for name, (python, ours, peer) in table.items()
    }
    arguments.output.write_text(
        json.dumps(
            {
                "ratios": {name: None if result is None else result["ratio"] for name, result in results.items()},
                "measurements": results,
                "machine": {
                    "cores": os.cpu_count(),
                    "system": platform.platform(),
                    "python": platform.python_version(),
                },
            },
            indent=1,
        )
    )
    return None


if __name__ == "__main__":
    main()
