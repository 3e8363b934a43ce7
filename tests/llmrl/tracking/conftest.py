import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    yield
    if wandb.run is not None:
        wandb.finish()


@pytest.fixture
def read_back() -> Callable[[Path], dict[str, list[dict[str, Any]]]]:
    """Reads the records of an offline run by type, through W&B's own reader."""

    def read(run_directory: Path) -> dict[str, list[dict[str, Any]]]:
        (file,) = run_directory.glob("wandb/offline-run-*/run-*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        records: dict[str, list[dict[str, Any]]] = {}
        for record in map(json.loads, lines):
            records.setdefault(record["type"], []).append(record.get(record["type"], {}))
        return records

    return read
