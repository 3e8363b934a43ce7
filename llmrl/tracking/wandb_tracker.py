"""Records a run with Weights & Biases.

Offline is the default and complete without an account; `wandb sync DIRECTORY` uploads such a run later.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl_envs.errors import UserError

from llmrl.run_directory import atomic_write_text
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


class WandbTracker:
    """Records to a Weights & Biases run.

    Args:
        run: The run.
        owned: Whether the tracker opened it. A run that somebody else opened is not finished here, and numbers are
            logged beside theirs: the step becomes the metric `llmrl/step`, because the run's own step is not ours.
    """

    def __init__(self, run: Any, *, owned: bool) -> None:
        self.run = run
        self.owned = owned

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers."""
        values = {name: float(value) for name, value in metrics.items()}
        if self.owned:
            self.run.log(values, step=step)
        else:
            self.run.log({**values, "llmrl/step": step})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table, with the numbers of the present step."""
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self.run.log({name: table}, commit=False)

    def log_image(self, name: str, path: Path) -> None:
        """Records a picture file, with the numbers of the present step."""
        import wandb

        self.run.log({name: wandb.Image(str(path))}, commit=False)

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records a file or a directory, as it is now."""
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), artifact_type)
        if path.is_dir():
            # Not add_dir, which prints whatever `silent` says.
            for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
                artifact.add_file(str(file), name=file.relative_to(path).as_posix())
        else:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Records final results."""
        self.run.summary.update(without_dots(values))

    def finish(self, *, failed: bool = False) -> None:
        """Ends a run that the tracker opened."""
        if self.owned:
            self.run.finish(exit_code=int(failed))


def make_tracker(
    tracking: TrackingConfig,
    job_type: JobType,
    run_directory: Path,
    config: Mapping[str, Any],
    resume_id: str | None = None,
) -> Tracker:
    """The tracker that a configuration asks for. Of several processes only the first gets one that records.

    Args:
        tracking: Mode, project, group, name and tags.
        job_type: What the run is.
        run_directory: Gets the directory `wandb`, with the run's files and its id.
        config: The whole configuration, nested.
        resume_id: Continue the run of this id; not given: the run whose id the directory holds, or else a new one.

    Raises:
        UserError: WANDB_MODE is set to something unknown, or an online run cannot be opened.
    """
    mode = resolve_wandb_mode(tracking)
    if mode == "disabled" or os.environ.get("RANK", "0") != "0":
        return NullTracker()
    import wandb

    if wandb.run is not None:
        wandb.run.config.update({"llmrl": without_dots(config)}, allow_val_change=True)
        return WandbTracker(wandb.run, owned=False)
    files = run_directory / "wandb"
    files.mkdir(parents=True, exist_ok=True)
    # Artifacts wait for their upload in the run directory, not in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(files.resolve()))
    try:
        run = wandb.init(
            mode=mode,
            dir=str(run_directory),
            id=_run_id(files, resume_id),
            resume="allow" if mode == "online" else None,
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
    return WandbTracker(run, owned=True)


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


def _run_id(files: Path, resume_id: str | None) -> str:
    """The run's id, kept in the run directory so that a resumed run goes on as the same one."""
    path = files / "run-id.txt"
    if resume_id is None and path.is_file():
        resume_id = path.read_text(encoding="utf-8").strip()
    run_id = resume_id or secrets.token_hex(4)
    atomic_write_text(path, run_id + "\n")
    return run_id
