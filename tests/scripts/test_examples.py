"""The worked examples run without arguments, and the policy does what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOSSES = re.compile(r"test loss: ([\d.]+|nan) with linear decay, ([\d.]+) with the policy")


@pytest.mark.parametrize("name", ["trainer", "sft", "accelerate_loop"])
def test_an_example_ends_better_than_linear_decay_from_the_same_wrong_rate(name, tmp_path):
    found = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "examples" / f"{name}.py")],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'envs'}"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    match = LOSSES.search(found.stdout)
    assert match is not None, found.stdout[-2000:]
    linear, steered = map(float, match.groups())
    assert steered < linear
