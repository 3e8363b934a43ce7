"""What every run of a comparison shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmrl.config import CompareConfig


@dataclass(frozen=True)
class Setting:
    """What every run of a comparison shares; small enough to be sent to a worker.

    Attributes:
        config: Tasks, device, schedule.
        policy: The policy of the command line.
        store: Folder of the finished runs.
    """

    config: CompareConfig
    policy: str
    store: Path
