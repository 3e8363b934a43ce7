"""What deciding costs, and what importing costs.

    python scripts/bench_policy.py --output policy.json [--quick]

Decide: one observation through a network of two layers of 128, every head, as torch policy and as NumPy
export; median over calls. Import: a fresh interpreter that imports `llmrl`, `llmrl.policy_numpy`, or transformers, with
and without `llmrl` after it; median over processes.

Writes {machine, versions, rows, ratios}; `ratios.decide` is NumPy over torch, `ratios.import` transformers with `llmrl`
over transformers alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import describe_machine, describe_versions, write_report
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy
from llmrl.policy_export import export_policy
from llmrl.policy_numpy import NumpyPolicy

HEADS: dict[str, dict[str, Any]] = {
    "expected": {"dueling": True, "layer_norm": True},
    "categorical": {"head": "categorical", "cvar_level": 0.25, "layer_norm": True},
    "quantile": {"head": "quantile", "cvar_level": 0.25, "layer_norm": True},
}
IMPORTS = {
    "llmrl": "import llmrl",
    "policy_numpy": "import llmrl.policy_numpy",
    "transformers": "import transformers",
    "transformers_and_llmrl": "import transformers, llmrl",
}


def make_policies(folder: Path, shape: dict[str, Any]) -> tuple[SchedulePolicy, NumpyPolicy]:
    """A policy with random weights, and its NumPy export."""
    table = action_table("moves")
    spec = ObservationSpec(table)
    config = NetworkConfig(obs_shape=(spec.size,), num_actions=table.num_actions, hidden_sizes=(128, 128), **shape)
    network = QNetwork(config, torch.Generator().manual_seed(0)).eval()
    SchedulePolicy(table, spec, ScheduleSettings(), network, {"name": "bench"}).save_pretrained(folder / "policy")
    export_policy(str(folder / "policy"), folder / "numpy", file_format="numpy")
    return SchedulePolicy.from_pretrained(folder / "policy"), NumpyPolicy.from_export(folder / "numpy")


def median_seconds(call: Callable[[], object], num_calls: int) -> float:
    """Median wall time of a call, after some that are not counted."""
    for _ in range(20):
        call()
    found = []
    for _ in range(num_calls):
        before = time.perf_counter()
        call()
        found.append(time.perf_counter() - before)
    return statistics.median(found)


def measure_decide(name: str, shape: dict[str, Any], num_calls: int) -> dict[str, Any]:
    """Seconds of one decision in both forms."""
    with tempfile.TemporaryDirectory() as directory:
        policy, exported = make_policies(Path(directory), shape)
    observation = np.random.default_rng(0).normal(size=(1, policy.spec.size)).astype(np.float32)
    mask = np.ones((1, policy.table.num_actions), np.bool_)
    torch_seconds = median_seconds(lambda: policy.act(observation, mask), num_calls)
    numpy_seconds = median_seconds(lambda: exported.act(observation, mask), num_calls)
    return {"name": f"decide_{name}", "torch_seconds": torch_seconds, "numpy_seconds": numpy_seconds}


def measure_import(name: str, statement: str, num_processes: int) -> dict[str, Any]:
    """Seconds that a statement takes in a fresh interpreter, the interpreter's own start not counted."""
    code = f"import time; before = time.perf_counter()\n{statement}\nprint(time.perf_counter() - before)"
    found = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(num_processes)
    ]
    return {"name": f"import_{name}", "seconds": statistics.median(found)}


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer calls and processes")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    num_calls, num_processes = (300, 3) if arguments.quick else (3000, 11)
    torch.set_num_threads(1)
    decide = [measure_decide(name, shape, num_calls) for name, shape in HEADS.items()]
    imports = {name: measure_import(name, statement, num_processes) for name, statement in IMPORTS.items()}
    ratios = {
        "decide": max(row["numpy_seconds"] / row["torch_seconds"] for row in decide),
        "import": imports["transformers_and_llmrl"]["seconds"] / imports["transformers"]["seconds"],
    }
    rows = [*decide, *imports.values()]
    report = {"machine": describe_machine(), "versions": describe_versions(), "rows": rows, "ratios": ratios}
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
