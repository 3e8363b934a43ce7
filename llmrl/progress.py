"""Live progress in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def make_progress(*columns: str, enabled: bool = True) -> Progress:
    """A progress bar with time used and time left, on stderr, and the task fields named in `columns`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


@contextmanager
def job_progress(total_steps: int, *, enabled: bool = True) -> Iterator[Callable[[int, float, float], None]]:
    """Progress of one job; gives a function of (step, train loss, learning rate)."""
    columns = ("loss {task.fields[loss]}", "rate {task.fields[rate]}")
    with make_progress(*columns, enabled=enabled) as progress:
        bar = progress.add_task("fine-tuning", total=total_steps, loss="-", rate="-")

        def advance(step: int, loss: float, rate: float) -> None:
            shown = f"{loss:.4f}" if math.isfinite(loss) else "not finite"
            progress.update(bar, completed=step, loss=shown, rate=f"{rate:.2e}")

        yield advance
