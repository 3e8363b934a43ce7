"""How fast replay is, beside cpprb (C++) and TorchRL measured in the same run, and how much memory it takes.

    python scripts/bench_replay.py --output replay.json --cpprb-python ENV/bin/python --torchrl-python ENV/bin/python
    python scripts/bench_replay.py --quick --output replay.json ...      # 100,000 transitions only, fewer repeats

Every measurement is a process with one thread that counts its own CPU seconds and takes the least of 15 rounds, since
whatever else runs only adds to them; ours and the peers' alternate. One operation adds one transition (40 float32
observed) and draws 128; where prioritised it sets 128 priorities, too. A ratio is the median over the repeats with the
smallest and the largest; above 1 ours is faster. A peer that is not given, or whose C++ part does not load, leaves
null. Run with a peer's Python, this file imports nothing of this project.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

OBS, ACTIONS, BATCH = 40, 9, 128
Operations = dict[str, Callable[[], Any]]


def our_operations(capacity: int, facts: dict[str, Any]) -> Operations:
    """Ours: full buffers of one environment; also notes the memory they take, and the time to save and load one."""
    from llmrl.dqn.replay import ReplayBuffer

    rng = np.random.default_rng(0)
    uniform = ReplayBuffer(capacity, 1, (OBS,), ACTIONS)
    prioritized = ReplayBuffer(capacity, 1, (OBS,), ACTIONS, sampling="prioritized")
    source = ReplayBuffer(10_000, 100, (OBS,), ACTIONS)
    end = np.zeros(100, dtype=np.bool_)
    for _ in range(100):
        obs, next_obs = rng.normal(size=(2, 100, OBS)).astype(np.float32)
        source.add(obs, rng.integers(ACTIONS, size=100), rng.normal(size=100), end, end, next_obs)
    for replay in (uniform, prioritized):
        for _ in range(capacity // len(source)):
            replay.merge(source)
    slots = np.arange(capacity)
    prioritized.update_priorities(slots, prioritized.rows.generation[slots], rng.random(capacity))
    raw_row = 2 * 4 * OBS + 4 + 4 + 1 + 1 + 2 * ACTIONS
    facts["bytes_over_raw_uniform"] = uniform.num_bytes / (capacity * raw_row)
    facts["bytes_over_raw_prioritized"] = prioritized.num_bytes / (capacity * raw_row)
    facts |= save_and_load(prioritized, ReplayBuffer(capacity, 1, (OBS,), ACTIONS, sampling="prioritized"))
    one, end = rng.normal(size=(1, OBS)).astype(np.float32), np.zeros(1, dtype=np.bool_)
    action, reward = np.zeros(1, dtype=np.int64), np.full(1, 0.5)

    def run_prioritized() -> None:
        prioritized.add(one, action, reward, end, end, one)
        drawn = prioritized.sample(BATCH, rng, n_step=1, gamma=0.99, beta=0.4)
        prioritized.update_priorities(drawn.index, drawn.generation, rng.random(BATCH))

    def run_uniform(n_step: int = 1) -> None:
        uniform.add(one, action, reward, end, end, one)
        uniform.sample(BATCH, rng, n_step=n_step, gamma=0.99)

    return {
        "add": lambda: uniform.add(one, action, reward, end, end, one),
        "uniform": run_uniform,
        "uniform_3_step": lambda: run_uniform(3),
        "prioritized": run_prioritized,
    }


def save_and_load(replay: Any, other: Any) -> dict[str, float]:
    """Seconds to write a buffer to disk and to read it back, and megabytes on disk."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        path, start = Path(name) / "replay", time.perf_counter()
        replay.save(path)
        saved = time.perf_counter()
        other.restore(path)
        loaded = time.perf_counter()
        size = sum(file.stat().st_size for file in path.iterdir())
    return {"save_seconds": saved - start, "load_seconds": loaded - saved, "disk_megabytes": size / 1e6}


def cpprb_operations(capacity: int, facts: dict[str, Any]) -> Operations:
    """cpprb's buffers, whose trees are C++."""
    import cpprb

    facts["version"] = version("cpprb")
    rng = np.random.default_rng(0)
    fields = {"obs": {"shape": OBS}, "next_obs": {"shape": OBS}, "act": {"dtype": np.int64}, "rew": {}}
    fields |= {"terminated": {"dtype": bool}, "truncated": {"dtype": bool}}
    uniform, prioritized = cpprb.ReplayBuffer(capacity, fields), cpprb.PrioritizedReplayBuffer(capacity, fields)
    for replay in (uniform, prioritized):
        for _ in range(capacity // 10_000):
            obs, no = rng.normal(size=(10_000, OBS)).astype(np.float32), np.zeros(10_000)
            replay.add(obs=obs, next_obs=obs, act=no, rew=no, terminated=no, truncated=no)
    prioritized.update_priorities(np.arange(capacity), rng.random(capacity))
    one = rng.normal(size=OBS).astype(np.float32)
    row = {"obs": one, "next_obs": one, "act": 0, "rew": 0.5, "terminated": False, "truncated": False}

    def run_prioritized() -> None:
        prioritized.add(**row)
        drawn = prioritized.sample(BATCH, beta=0.4)
        prioritized.update_priorities(drawn["indexes"], rng.random(BATCH))

    def run_uniform() -> None:
        uniform.add(**row)
        uniform.sample(BATCH)

    return {"add": lambda: uniform.add(**row), "uniform": run_uniform, "prioritized": run_prioritized}


def torchrl_operations(capacity: int, facts: dict[str, Any]) -> Operations:
    """TorchRL's buffers; the prioritised one only where its extension loads."""
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

    facts["version"] = version("torchrl")
    torch.set_num_threads(1)

    def steps(num: int) -> TensorDict:
        columns = {"obs": torch.randn(num, OBS), "next_obs": torch.randn(num, OBS), "reward": torch.zeros(num)}
        columns |= {name: torch.zeros(num, dtype=torch.bool) for name in ("terminated", "truncated")}
        return TensorDict({**columns, "action": torch.zeros(num, dtype=torch.int64)}, batch_size=[num])

    def filled(replay: Any) -> Any:
        for _ in range(capacity // 10_000):
            replay.extend(steps(10_000))
        return replay

    one = steps(1)
    uniform = filled(TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=BATCH))

    def run_uniform() -> None:
        uniform.extend(one)
        uniform.sample()

    operations: Operations = {"add": lambda: uniform.extend(one), "uniform": run_uniform}
    try:
        storage = LazyTensorStorage(capacity)
        prioritized = filled(TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=storage, batch_size=BATCH))
    except (ImportError, NameError, RuntimeError) as error:
        facts["prioritized"] = f"not measured: {type(error).__name__}: {str(error)[:200]}"
        return operations

    def run_prioritized() -> None:
        prioritized.extend(one)
        drawn = prioritized.sample()
        drawn["td_error"] = torch.rand(BATCH)
        prioritized.update_tensordict_priority(drawn)

    return {**operations, "prioritized": run_prioritized}


def measure(library: str, capacity: int, count: int, names: list[str]) -> None:
    """Prints CPU microseconds of some operations of one library, or of all where none is named, as JSON."""
    facts: dict[str, Any] = {}
    prepare = {"ours": our_operations, "cpprb": cpprb_operations, "torchrl": torchrl_operations}[library]
    operations = prepare(capacity, facts)
    operations = {name: run for name, run in operations.items() if name in (names or operations)}
    for run in operations.values():
        run_times(run, count)
    microseconds = {name: min(run_times(run, count) for _ in range(15)) for name, run in operations.items()}
    print(json.dumps({"microseconds": microseconds, "facts": facts}))


def run_times(run: Callable[[], Any], count: int) -> float:
    """CPU microseconds of one call."""
    start = time.process_time()
    for _ in range(count):
        run()
    return 1e6 * (time.process_time() - start) / count


def in_a_process(python: str, library: str, capacity: int, count: int, *names: str) -> dict[str, Any]:
    """One measurement of some operations, or of all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, __file__, "--measure", library, str(capacity), str(count), *names]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: expected a measurement, got\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def ratio(ours: list[dict[str, Any]], peers: list[dict[str, Any]], name: str) -> dict[str, float] | None:
    """How many times longer the peer takes for an operation; None where it lacks it."""
    if not peers or name not in peers[0]["microseconds"]:
        return None
    pairs = zip(ours, peers, strict=True)
    ratios = [theirs["microseconds"][name] / mine["microseconds"][name] for mine, theirs in pairs]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def compare(capacity: int, pythons: dict[str, str | None], repeats: int, count: int) -> dict[str, Any]:
    """Alternating measurements at one capacity."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "cpprb": [], "torchrl": []}
    for _ in range(repeats):
        for library, python in pythons.items():
            if python is not None:
                found[library].append(in_a_process(python, library, capacity, count))
    rows = {
        library: {
            name: statistics.median(one["microseconds"][name] for one in measured)
            for name in measured[0]["microseconds"]
        }
        for library, measured in found.items()
        if measured
    }
    return {
        "capacity": capacity,
        "microseconds": rows,
        "facts": {library: measured[-1]["facts"] for library, measured in found.items() if measured},
        "ratios": {
            "add_vs_cpp": ratio(found["ours"], found["cpprb"], "add"),
            "uniform_vs_cpp": ratio(found["ours"], found["cpprb"], "uniform"),
            "uniform_vs_torchrl": ratio(found["ours"], found["torchrl"], "uniform"),
            "prioritized_vs_cpp": ratio(found["ours"], found["cpprb"], "prioritized"),
            "prioritized_vs_torchrl": ratio(found["ours"], found["torchrl"], "prioritized"),
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="100,000 transitions only, fewer repeats")
    parser.add_argument("--cpprb-python", help="Python of an environment with cpprb")
    parser.add_argument("--torchrl-python", help="Python of an environment with torchrl")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        library, capacity, count, *names = arguments.measure
        return measure(library, int(capacity), int(count), names)
    if arguments.output is None:
        parser.error("expected --output FILE")
    pythons = {"ours": sys.executable, "cpprb": arguments.cpprb_python, "torchrl": arguments.torchrl_python}
    capacities, repeats, count = ((100_000,), 2, 200) if arguments.quick else ((100_000, 1_000_000), 5, 300)
    rows = [compare(capacity, pythons, repeats, count) for capacity in capacities]
    report = {
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "processor": platform.processor()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
        "ratios": {
            name: min((row["ratios"][name]["ratio"] for row in rows if row["ratios"][name]), default=None)
            for name in rows[0]["ratios"]
        },
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratios"], indent=1))
    return None


if __name__ == "__main__":
    main()
