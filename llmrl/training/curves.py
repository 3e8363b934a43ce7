"""The picture of a training: returns of episodes, and greedy evaluations beside holding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW = 20


def draw_learning_curve(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the rows of `metrics.jsonl`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    episodes = [row for row in rows if row["kind"] == "episode" and row["score"] is not None]
    greedy = [row for row in rows if row["kind"].endswith("evaluation")]
    if episodes:
        at = [row["decisions"] for row in episodes]
        scores = np.array([row["score"] for row in episodes])
        axes.plot(at, scores, ".", markersize=3, color="tab:gray", alpha=0.5, label="training episodes")
        width = min(_WINDOW, len(scores))
        mean = np.convolve(scores, np.ones(width) / width, mode="valid")
        axes.plot(at[width - 1 :], mean, color="tab:gray", label=f"mean of {width}")
        low = float(np.percentile(scores, 5))
        axes.set_ylim(bottom=min(low, float(scores.max())) - 0.1 * (abs(low) + 0.1))
    if greedy:
        at = [row["decisions"] for row in greedy]
        axes.plot(at, [row["score"] for row in greedy], "o-", color="tab:blue", label="greedy policy")
        if all("hold_score" in row for row in greedy):
            axes.axhline(greedy[-1]["hold_score"], color="tab:green", linestyle="--", label="hold, same jobs")
    axes.set_xlabel("decisions")
    axes.set_ylabel("score (for schedules: 1 = linear decay)")
    axes.legend(loc="lower right")
    return figure
