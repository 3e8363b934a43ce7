"""Where metrics, tables, pictures and artifacts of a run go: Weights & Biases, or nowhere.

Everything else sees the `Tracker` protocol; wandb is imported in this package only, and only when a run needs it.
"""

from __future__ import annotations

from llmrl.tracking.tracker import JobType, NullTracker, Tracker
from llmrl.tracking.wandb_tracker import WandbTracker, make_tracker, resolve_wandb_mode, without_dots

__all__ = [
    "JobType",
    "NullTracker",
    "Tracker",
    "WandbTracker",
    "make_tracker",
    "resolve_wandb_mode",
    "without_dots",
]
