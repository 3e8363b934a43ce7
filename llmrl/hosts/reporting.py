"""Puts a job's decisions where a Trainer reports to.

W&B gets them as `llmrl finetune` gives them: series under their own names, `llmrl/*`, against `train/global_step`, and
at the end a table and a picture; its integration would put `train/` before every name. The other integrations
(TensorBoard, Trackio, ...) get the series through their own `on_log`. `log_history`, and so `trainer_state.json`, has
them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.decisions import DecisionRecord, decision_row
from llmrl.policy import SchedulePolicy
from llmrl.tracking.decisions import DecisionLog
from llmrl.tracking.tracker import NullTracker, Tracker
from llmrl.tracking.wandb_tracker import open_run_tracker

_INTEGRATIONS = "transformers.integrations"
_WANDB = "WandbCallback"
PICTURE = "llmrl-schedule.png"


class TrainerReport:
    """What one job's decisions are told to.

    Args:
        trainer: The Trainer.
        policy: What steers the job.
        total_steps: The job's budget.
    """

    def __init__(self, trainer: Any, policy: SchedulePolicy, total_steps: int) -> None:
        self._trainer = trainer
        self._policy = policy
        self._tracker = _IntegrationsTracker(trainer)
        self._log = DecisionLog(self._tracker, title=policy.name, total_steps=total_steps)
        self._told = False

    def add(self, record: DecisionRecord) -> None:
        """Reports one decision."""
        if not self._told:
            self._tracker.use_policy(self._policy.reference, self._policy.folder)
            self._told = True
        self._log.add(decision_row(record, self._policy.spec.names, self._policy.table.names))

    def finish(self) -> None:
        """Gives W&B the table and the picture."""
        if self._told and self._trainer.is_world_process_zero() and self._tracker.has_tables:
            self._log.finish(Path(self._trainer.args.output_dir) / PICTURE)


class _IntegrationsTracker:
    """A Trainer's integrations as a tracker."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._open: Tracker = NullTracker()

    @property
    def has_tables(self) -> bool:
        """Whether tables and pictures go anywhere."""
        return not isinstance(self._wandb(), NullTracker)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers."""
        trainer = self._trainer
        trainer.state.log_history.append({**metrics, "step": step})
        for callback in trainer.callback_handler.callbacks:
            kind = type(callback)
            if kind.__module__.startswith(_INTEGRATIONS) and kind.__name__ != _WANDB:
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(metrics), model=trainer.model)
        self._wandb().log(metrics, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table."""
        self._wandb().log_table(name, columns, rows)

    def log_image(self, name: str, path: Path) -> None:
        """Records a picture file."""
        self._wandb().log_image(name, path)

    def log_html(self, name: str, path: Path) -> None:
        """Records a page that stands for itself."""
        self._wandb().log_html(name, path)

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records a file or a directory."""
        self._wandb().log_artifact(name, artifact_type, path)

    def use_policy(self, reference: str, folder: Path | None) -> None:
        """Records which policy steers the run."""
        self._wandb().use_policy(reference, folder)

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Records final results."""
        self._wandb().set_summary(values)

    def finish(self, *, failed: bool = False) -> None:
        """Leaves the run to the Trainer."""

    def _wandb(self) -> Tracker:
        """The run that the Trainer's own integration has opened, on its first process."""
        names = [type(callback).__name__ for callback in self._trainer.callback_handler.callbacks]
        if isinstance(self._open, NullTracker) and _WANDB in names:
            self._open = open_run_tracker()
        return self._open
