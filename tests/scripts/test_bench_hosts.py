"""What a policy costs in a Trainer can be measured again by anybody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_writes_the_ratios_and_what_they_are_from(tmp_path):
    output = tmp_path / "hosts.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench_hosts.py"), "--quick", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'envs'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--models", "3M", "--pairs", "1"], check=True, env=environment, timeout=1_800)
    report = json.loads(output.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"wall_3M", "cpu_3M", "own_3M", "memory_3M"}
    assert report["ratios"] == {"wall": rows["wall_3M"]["ratio"], "memory": rows["memory_3M"]["ratio"]}
    assert all(row["ci_low"] <= row["ratio"] <= row["ci_high"] for row in rows.values())
    assert rows["own_3M"]["ratio"] > 1.0
