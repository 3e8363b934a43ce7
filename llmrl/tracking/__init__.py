"""Where metrics, tables, pictures and artifacts of a run go: Weights & Biases, other trackers, or nowhere.

    tracker             the `Tracker` protocol, which is all that everything else sees
    wandb_tracker       Weights & Biases, offline by default
    accelerate_tracker  tensorboard, trackio and whatever else accelerate knows
    decisions           a job's decisions as series, table and picture
    artifacts           fetches files from Weights & Biases

wandb is imported in this package only, and only when a run needs it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.tracking.decisions import DecisionLog
from llmrl.tracking.tracker import JobType, NullTracker, Tracker, TrackerGroup, ending
from llmrl.tracking.wandb_tracker import (
    WandbTracker,
    make_wandb_tracker,
    open_run_tracker,
    resolve_wandb_mode,
    without_dots,
)

if TYPE_CHECKING:
    from llmrl.config import TrackingConfig

__all__ = [
    "DecisionLog",
    "JobType",
    "NullTracker",
    "Tracker",
    "TrackerGroup",
    "WandbTracker",
    "ending",
    "make_tracker",
    "open_run_tracker",
    "resolve_wandb_mode",
    "without_dots",
]


def make_tracker(
    tracking: TrackingConfig,
    job_type: JobType,
    run_directory: Path,
    config: Mapping[str, Any],
    resume_id: str | None = None,
) -> Tracker:
    """The trackers that a configuration asks for. Of several processes only the first gets any that record.

    Args:
        tracking: Mode, project, group, name and tags, and the trackers beside Weights & Biases.
        job_type: What the run is.
        run_directory: Gets the directories `wandb` and `trackers`, with the run's files and its id.
        config: The whole configuration, nested.
        resume_id: Continue the Weights & Biases run of this id.

    Raises:
        UserError: WANDB_MODE is set to something unknown, or a tracker cannot be started.
    """
    wandb = make_wandb_tracker(tracking, job_type, run_directory, config, resume_id)
    if not tracking.trackers or os.environ.get("RANK", "0") != "0":
        return wandb
    from llmrl.tracking.accelerate_tracker import start_tracker

    others = [start_tracker(name, run_directory, tracking.project, config) for name in tracking.trackers]
    return TrackerGroup([wandb, *others])
