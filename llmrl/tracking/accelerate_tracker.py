"""Records a run with any tracker that accelerate knows: tensorboard, trackio, mlflow and others.

Their files lie in the run directory where they keep files. Series, pictures and tables are the same as with Weights &
Biases; a tracker without pictures gets the path of the file as text, one without tables a Markdown table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError

from llmrl.tracking.tracker import Tracker, TrackerGroup
from llmrl.tracking.wandb_tracker import WandbTracker, without_dots

FOLDER = "trackers"


class AccelerateTracker:
    """Records to one of accelerate's trackers.

    Args:
        tracker: The tracker, started.
        owned: Whether it was started here; one that somebody else started is not finished here.
    """

    def __init__(self, tracker: Any, *, owned: bool) -> None:
        self.tracker = tracker
        self.owned = owned
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers."""
        self._step = step
        self.tracker.log({name: float(value) for name, value in metrics.items()}, step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table, at the present step."""
        if hasattr(self.tracker, "log_table"):
            self.tracker.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=self._step)
        else:
            self.tracker.log({name: _markdown(columns, rows)}, step=self._step)

    def log_image(self, name: str, path: Path) -> None:
        """Records a picture file, at the present step."""
        if not hasattr(self.tracker, "log_images"):
            self.tracker.log({name: str(path)}, step=self._step)
            return
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        # Tensorboard alone takes a batch, and wants to be told where its channels are.
        if self.tracker.name == "tensorboard":
            self.tracker.log_images({name: pixels[None]}, step=self._step, dataformats="NHWC")
        else:
            self.tracker.log_images({name: [pixels]}, step=self._step)

    def log_html(self, name: str, path: Path) -> None:
        """Records where a page lies."""
        self.tracker.log({name: str(path)}, step=self._step)

    def log_artifact(self, name: str, artifact_type: str, path: Path) -> None:
        """Records where a file or a directory lies."""
        self.tracker.log({f"{artifact_type}/{name}": str(path)}, step=self._step)

    def use_policy(self, reference: str, folder: Path | None) -> None:
        """Records which policy steers the run, as text."""
        where = "" if folder is None else f" in {folder}"
        self.tracker.log({"llmrl/policy": f"{reference}{where}"}, step=self._step)

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Records the numbers among the final results, under `summary/`."""
        numbers = {name: value for name, value in flatten(values).items() if isinstance(value, int | float)}
        self.tracker.log({f"summary/{name}": float(value) for name, value in numbers.items()}, step=self._step)

    def finish(self, *, failed: bool = False) -> None:
        """Ends a record that was begun here."""
        if self.owned:
            self.tracker.finish()


def start_tracker(name: str, run_directory: Path, project: str, config: Mapping[str, Any]) -> AccelerateTracker:
    """Starts one of accelerate's trackers.

    Args:
        name: What accelerate calls it.
        run_directory: Gets the folder `trackers`, where the tracker keeps its files.
        project: Project that the run belongs to.
        config: The whole configuration, nested.

    Raises:
        UserError: accelerate does not know it, its package is not installed, or it cannot be started.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(set(LOGGER_TYPE_TO_CLASS) - {"wandb"}))
        raise UserError("unknown tracker", expected=f"one of {known}", got=repr(name), where="tracking.trackers")
    if name not in {str(kind) for kind in get_available_trackers()}:
        raise UserError(
            "the tracker's package is not installed",
            expected=f"pip install {name}",
            got=name,
            where="tracking.trackers",
        )
    PartialState()  # accelerate's trackers ask it which process they are in
    kind = LOGGER_TYPE_TO_CLASS[name]
    try:
        if kind.requires_logging_directory:
            folder = run_directory / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            tracker = kind(name, logging_dir=str(folder))
        else:
            tracker = kind(project)
        tracker.start()
        tracker.store_init_configuration(flatten(without_dots(config)))
    except Exception as error:  # every tracker raises its own kinds
        raise UserError(
            "the tracker cannot be started",
            where=f"tracking.trackers: {name}",
            expected="what its own documentation asks for (account, server, files)",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return AccelerateTracker(tracker, owned=True)


def trackers_of(accelerator: Any) -> Tracker:
    """The trackers that a raw loop gave to `Accelerator.init_trackers`, to log a controller's decisions beside it."""
    return TrackerGroup(
        [
            WandbTracker(tracker.tracker, owned=False)
            if tracker.name == "wandb"
            else AccelerateTracker(tracker, owned=False)
            for tracker in accelerator.trackers
        ]
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested values as one level with `/` between names; lists become text, what is None is left out.

    >>> flatten({"task": {"steps": 3, "name": None}, "tags": ["a"]})
    {'task/steps': 3, 'tags': "['a']"}
    """
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
