"""What the benchmarks share: the machine, the versions, ratios with intervals, and the report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

PACKAGES = ("llmrl", "torch", "transformers", "peft", "accelerate", "gymnasium", "numpy")
_RESAMPLES = 2000


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads and device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }


def describe_versions() -> dict[str, str]:
    """Python's version and those of the packages that matter."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def median_ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median of the ratios of paired measurements, with a 95 % bootstrap interval over the pairs.

    The two of a pair are taken one right after the other, so that what slows the machine down slows both.
    """
    ratios = numerator / denominator
    rng = np.random.default_rng(0)
    resampled = np.median(ratios[rng.integers(len(ratios), size=(_RESAMPLES, len(ratios)))], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def compare_peak_memory(name: str, arguments: list[str], num_pairs: int) -> dict[str, Any]:
    """Peak memory of the variants "plain" and "steered", each in a fresh process, as a row of the report.

    Args:
        name: Name of the row.
        arguments: Script and options; the variant is put behind them. The last line printed is the peak in bytes.
        num_pairs: Processes of each variant.
    """
    totals: dict[str, list[float]] = {"plain": [], "steered": []}
    for _ in range(num_pairs):
        for variant, found in totals.items():
            command = [sys.executable, *arguments, variant]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(float(json.loads(printed.strip().splitlines()[-1])))
    plain, steered = np.array(totals["plain"]), np.array(totals["steered"])
    ratio, low, high = median_ratio(steered, plain)
    return {
        "name": name,
        "plain_bytes": float(np.median(plain)),
        "steered_bytes": float(np.median(steered)),
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
    }


def write_report(report: dict[str, Any], output: Path) -> None:
    """Writes the report as JSON and prints its ratios."""
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["ratios"], indent=2))
