"""What a process is measured to take stands beside what the formula says of a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = ("bench_population_memory", "bench_population", "benchmarking")


@pytest.fixture
def script(monkeypatch):
    """The script, importable as it is when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_population_memory

    yield bench_population_memory
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_job_is_measured_beside_its_formula(script):
    full, lora = (script.measure("builtin", mode, 2) for mode in ("full", "lora"))
    assert full["peak_bytes"] > 2 * full["formula_bytes"] > 0
    assert lora["formula_bytes"] < full["formula_bytes"]


def test_ratios_are_what_one_job_more_adds_over_the_formula(script, tmp_path, monkeypatch):
    def measured(model, mode, num_jobs, changes):
        each = {"full": 100, "lora": 50}[mode] + (0 if changes else 10)
        return {"mode": mode, "jobs": num_jobs, "peak_bytes": 1000 + each * num_jobs, "formula_bytes": 100}

    output = tmp_path / "memory.json"
    monkeypatch.setattr(script, "measured_alone", measured)
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_population_memory.py", "--output", str(output)])
    script.main()
    ratios = json.loads(output.read_text())["ratios"]
    assert ratios == pytest.approx({"full": 1.0, "full_malloc": 1.1, "lora": 0.5, "lora_malloc": 0.6})
