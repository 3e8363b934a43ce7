"""Records a run with Weights & Biases.

Offline is the default and complete without an account; `wandb sync DIRECTORY` uploads such a run later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl_envs.errors import UserError

from llmrl.policy_reference import WANDB_PREFIX
from llmrl.run_directory import atomic_write_text, to_json_value
from llmrl.tracking.tracker import JobType, NullTracker, Tracker

if TYPE_CHECKING:
    from llmrl.config import TrackingConfig, WandbMode

_ENVIRONMENT_MODES: Mapping[str, WandbMode] = {
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "shared": "online",
    "disabled": "disabled",
}


STEP_METRIC = "train/global_step"
"""What the series of a fine-tuning job stand over; `Trainer` logs the same."""
_OWN_STEP_METRIC = "llmrl/step"
_JOB_SERIES = ("llmrl/*", "train/*", "validation/*")


class WandbTracker:
    """Records to a Weights & Biases run.

    Args:
        run: The run.
        owned: Whether the tracker opened it. A run that somebody else opened is not finished here, and numbers are
            logged beside theirs, because the run's own step is not ours.
        step_metric: The series that holds the step; None leaves it to the run's own step.
    """

    def __init__(self, run: Any, *, owned: bool, step_metric: str | None = STEP_METRIC) -> None:
        self.run = run
        self.owned = owned
        self._step_metric = step_metric
        if step_metric is not None:
            run.define_metric(step_metric, hidden=True)
            for series in _JOB_SERIES if owned else _JOB_SERIES[:1]:
                run.define_metric(series, step_metric=step_metric)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers."""
        values = {name: float(value) for name, value in metrics.items()}
        if self._step_metric is not None:
            values[self._step_metric] = step
        if self.owned:
            self.run.log(values, step=step)
        else:
            self.run.log(values)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table, with the numbers of the present step."""
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self.run.log({name: table}, commit=False)

    def log_image(self, name: str, path: Path) -> None:
        """Records a picture file, with the numbers of the present step."""
        import wandb

        self.run.log({name: wandb.Image(str(path))}, commit=False)

    def log_html(self, name: str, path: Path) -> None:
        """Records a page that stands for itself, with the numbers of the present step."""
        import wandb

        self.run.log({name: wandb.Html(str(path), inject=False)}, commit=False)

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records a file or a directory, as it is now."""
        self.run.log_artifact(_artifact(name, artifact_type, path))

    def use_policy(self, reference: str, folder: Path | None) -> None:
        """Records which policy steers the run: in its configuration, and online as an artifact that the run uses."""
        self.run.config.update(
            {"policy": {"reference": reference, "path": None if folder is None else str(folder)}}, allow_val_change=True
        )
        if self.run.offline or folder is None:
            return
        if reference.startswith(WANDB_PREFIX):
            self.run.use_artifact(reference.removeprefix(WANDB_PREFIX))
        else:
            self.run.use_artifact(_artifact("policy", "model", folder))

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Records final results."""
        self.run.summary.update(without_dots(values))

    def finish(self, *, failed: bool = False) -> None:
        """Ends a run that the tracker opened."""
        if self.owned:
            self.run.finish(exit_code=int(failed))


def _artifact(name: str, artifact_type: str, path: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), artifact_type)
    if path.is_dir():
        # Not add_dir, which prints whatever `silent` says.
        for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            artifact.add_file(str(file), name=file.relative_to(path).as_posix())
    else:
        artifact.add_file(str(path))
    return artifact


def open_run_tracker() -> Tracker:
    """A tracker that logs beside whoever has a Weights & Biases run open in this process; nothing where none is."""
    wandb = sys.modules.get("wandb")
    run = None if wandb is None else wandb.run
    return NullTracker() if run is None else WandbTracker(run, owned=False)


def make_wandb_tracker(
    tracking: TrackingConfig,
    job_type: JobType,
    run_directory: Path,
    config: Mapping[str, Any],
    resume_id: str | None = None,
) -> Tracker:
    """The Weights & Biases run that a configuration asks for. Of several processes only the first gets one.

    Args:
        tracking: Mode, project, group, name and tags.
        job_type: What the run is.
        run_directory: Gets the directory `wandb`, with the run's files and its id.
        config: The whole configuration, nested.
        resume_id: Continue the run of this id; not given: the run whose id the directory holds, or else a new one,
            whose id is that of WANDB_RUN_ID (an agent of a sweep sets it) or follows from configuration and directory.

    Raises:
        UserError: WANDB_MODE is set to something unknown, or an online run cannot be opened.
    """
    mode = resolve_wandb_mode(tracking)
    if mode == "disabled" or os.environ.get("RANK", "0") != "0":
        return NullTracker()
    import wandb

    if wandb.run is not None:
        wandb.run.config.update({"llmrl": without_dots(config)}, allow_val_change=True)
        shared_step = STEP_METRIC if job_type == "finetune" else _OWN_STEP_METRIC
        return WandbTracker(wandb.run, owned=False, step_metric=shared_step)
    files = run_directory / "wandb"
    files.mkdir(parents=True, exist_ok=True)
    # Artifacts wait for their upload in the run directory, not in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(files.resolve()))
    run_id, resumed = _run_id(files, resume_id, {**config, "tracking": None, "job_type": job_type})
    try:
        run = wandb.init(
            mode=mode,
            dir=str(run_directory),
            id=run_id,
            # A run that is begun anew replaces an earlier one of the same id.
            resume="allow" if mode == "online" and resumed else None,
            project=tracking.project,
            group=tracking.group or run_directory.name,
            name=tracking.name or run_directory.name,
            job_type=job_type,
            tags=list(tracking.tags),
            config=without_dots(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise UserError(
            "cannot open the Weights & Biases run",
            where="tracking.wandb",
            expected="`wandb login` and a network, or tracking.wandb: offline",
            got=str(error),
        ) from None
    return WandbTracker(run, owned=True, step_metric=STEP_METRIC if job_type == "finetune" else None)


def resolve_wandb_mode(tracking: TrackingConfig) -> WandbMode:
    """The mode that the configuration names, else that of WANDB_MODE, else offline.

    Raises:
        UserError: WANDB_MODE holds something unknown.
    """
    if tracking.wandb is not None:
        return tracking.wandb
    name = os.environ.get("WANDB_MODE", "offline").lower()
    if name not in _ENVIRONMENT_MODES:
        raise UserError(
            "unknown mode of Weights & Biases",
            where="environment variable WANDB_MODE",
            expected="offline, online or disabled",
            got=name,
        )
    return _ENVIRONMENT_MODES[name]


def without_dots(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with `_` for every dot in a key, at every depth: W&B reads a dot as nesting."""
    return {
        str(key).replace(".", "_"): without_dots(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }


def _run_id(files: Path, resume_id: str | None, identity: Mapping[str, Any]) -> tuple[str, bool]:
    """The run's id, and whether it was begun before.

    The id is kept in the run directory, so that a resumed run goes on as the same one. A new id follows from what the
    run is and where it is written: the same job made again in the same place is the same run.
    """
    path = files / "run-id.txt"
    if resume_id is None and path.is_file():
        resume_id = path.read_text(encoding="utf-8").strip()
    text = json.dumps([str(files.resolve()), to_json_value(identity)], sort_keys=True)
    run_id = resume_id or os.environ.get("WANDB_RUN_ID") or hashlib.sha256(text.encode()).hexdigest()[:12]
    atomic_write_text(path, run_id + "\n")
    return run_id, resume_id is not None
