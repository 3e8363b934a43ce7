"""What everything else sees of tracking: a place to follow a run from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def log_html(self, name: str, path: Path) -> None:
        """Records a page that stands for itself."""

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records a file or a directory, as it is now."""

    def use_policy(self, reference: str, folder: Path | None) -> None:
        """Records which policy steers the run: where it comes from, and the folder that it was read from."""

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

    def log_html(self, name: str, path: Path) -> None:
        """Does nothing."""

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Does nothing."""

    def use_policy(self, reference: str, folder: Path | None) -> None:
        """Does nothing."""

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, *, failed: bool = False) -> None:
        """Does nothing."""


@contextmanager
def ending(tracker: Tracker) -> Iterator[Tracker]:
    """Ends the record with the block; as crashed where the block raises."""
    try:
        yield tracker
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish()


class TrackerGroup:
    """Records to several trackers at once.

    Args:
        trackers: All of them get everything, in this order.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table."""
        for tracker in self.trackers:
            tracker.log_table(name, columns, rows)

    def log_image(self, name: str, path: Path) -> None:
        """Records a picture file."""
        for tracker in self.trackers:
            tracker.log_image(name, path)

    def log_html(self, name: str, path: Path) -> None:
        """Records a page that stands for itself."""
        for tracker in self.trackers:
            tracker.log_html(name, path)

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records a file or a directory."""
        for tracker in self.trackers:
            tracker.log_artifact(name, artifact_type, path)

    def use_policy(self, reference: str, folder: Path | None) -> None:
        """Records which policy steers the run."""
        for tracker in self.trackers:
            tracker.use_policy(reference, folder)

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Records final results."""
        for tracker in self.trackers:
            tracker.set_summary(values)

    def finish(self, *, failed: bool = False) -> None:
        """Ends every record."""
        for tracker in self.trackers:
            tracker.finish(failed=failed)
