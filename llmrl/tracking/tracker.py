"""What everything else sees of tracking: a place to follow a run from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

JobType = Literal["train-policy", "finetune", "compare"]


class Tracker(Protocol):
    """A place to follow a run from outside."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers; `step` never falls within one run."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table."""

    def log_image(self, name: str, path: Path) -> None:
        """Records a picture file."""

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records a file or a directory, as it is now."""

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Records final results."""

    def finish(self, *, failed: bool = False) -> None:
        """Ends the record; `failed` marks the run as crashed."""


class NullTracker:
    """Records nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Does nothing."""

    def log_image(self, name: str, path: Path) -> None:
        """Does nothing."""

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Does nothing."""

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, *, failed: bool = False) -> None:
        """Does nothing."""
