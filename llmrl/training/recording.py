"""What a training tells while it runs: rows of metrics.jsonl, charts of the tracker, the line in the terminal.

Of several processes the first tells, of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.config import TrainConfig
from llmrl.dqn.collector import Episode
from llmrl.run_directory import JsonlWriter, read_jsonl
from llmrl.tracking import NullTracker, Tracker, make_tracker
from llmrl.training.curves import draw_learning_curve
from llmrl.training.status import TrainingStatus

METRICS_FILE = "metrics.jsonl"
FACTS = ("task", "given_rate", "total_steps", "diverged")  # what fine-tuning says of its jobs


class Recorder:
    """Rows, charts and the terminal, of the process that tells; in the others every method does nothing.

    Args:
        config: The configuration.
        output: Run directory.
        is_schedule: The environment's score compares with a linear decay.
        enabled: This process tells.

    Attributes:
        status: The line in the terminal.
    """

    def __init__(self, config: TrainConfig, output: Path, *, is_schedule: bool, enabled: bool) -> None:
        self._config, self._output = config, output
        self._rows = JsonlWriter(output / METRICS_FILE) if enabled else None
        self._tracker: Tracker = NullTracker()
        self.status = TrainingStatus(config.training.decisions, is_schedule=is_schedule, enabled=enabled)

    @property
    def offset(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return 0 if self._rows is None else self._rows.offset

    def truncate_to(self, offset: int) -> None:
        """Removes the rows behind `offset`."""
        if self._rows is not None:
            self._rows.truncate_to(offset)

    def start(self) -> None:
        """Opens the tracker, and begins metrics.jsonl unless the run goes on."""
        if self._rows is None:
            return
        if self._rows.offset == 0:
            self._rows.write({"kind": "start", "decisions": 0, "seed": self._config.seed})
        config = self._config
        self._tracker = make_tracker(config.tracking, "train-policy", self._output, config.model_dump(mode="json"))

    def row(self, row: Mapping[str, Any]) -> None:
        """Appends a row."""
        if self._rows is not None:
            self._rows.write(row)

    def chart(self, values: Mapping[str, float | None], step: int) -> None:
        """Sends the numbers that are there and finite to the tracker."""
        numbers = {name: value for name, value in values.items() if value is not None and np.isfinite(value)}
        self._tracker.log(numbers, step=step)

    def episode(self, row: Mapping[str, Any], step: int) -> None:
        """Tells of an episode that ended."""
        self.row({"kind": "episode", **row})
        charts = {
            "charts/episodic_return": row["return"],
            "charts/episodic_length": row["length"],
            "charts/score": row["score"],
            "charts/epsilon": row["epsilon"],
        }
        self.chart({**charts, **loss_charts(row["learner"])}, step)
        self.status.episode(row["episode"], row["return"], row["score"])

    def finish(self, policy: Path, final: Mapping[str, float]) -> None:
        """Draws the learning curve, hands over the policy, and closes everything."""
        if self._rows is None:
            return
        self._rows.close()
        picture = self._output / "learning_curve.png"
        draw_learning_curve(read_jsonl(self._output / METRICS_FILE)).savefig(picture)
        self._tracker.log_image("learning_curve", picture)
        self._tracker.log_artifact("policy", "model", policy)
        self._tracker.set_summary(final)
        self._tracker.finish()


def episode_facts(episode: Episode) -> dict[str, Any]:
    """What an episode was, as JSON values."""
    info = episode.info
    score = float(info.get("score", episode.episode_return))
    facts = {name: info[name] for name in FACTS if name in info}
    return {"return": episode.episode_return, "length": episode.length, "score": score, **facts}


def loss_charts(learner_metrics: Mapping[str, float]) -> dict[str, float]:
    """The learner's numbers under the names of charts."""
    return {f"losses/{name}": value for name, value in learner_metrics.items()}
