"""Trackers that accelerate knows, through its own interface."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from llmrl_envs.errors import UserError
from matplotlib.image import imsave
from numpy import zeros

from llmrl.cli import main
from llmrl.config import TrackerName, TrackingConfig
from llmrl.tracking import WandbTracker, make_tracker
from llmrl.tracking.accelerate_tracker import AccelerateTracker, start_tracker, trackers_of


class NotingTracker(GeneralTracker):
    """A tracker as accelerate wants it, with pictures and tables; keeps what it is given."""

    name = "noting"
    requires_logging_directory = False

    def __init__(self, run_name: str = "") -> None:
        super().__init__()
        self.run_name = run_name
        self.calls: list[tuple[str, Any, int | None]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values, None))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append(("log", values, step))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append(("images", {name: images[0].shape for name, images in values.items()}, step))

    def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        self.calls.append(("table", (name, columns, data), step))

    def finish(self) -> None:
        self.calls.append(("finish", None, None))


def test_the_configuration_offers_what_accelerate_knows() -> None:
    assert set(get_args(TrackerName)) == set(LOGGER_TYPE_TO_CLASS) - {"wandb"}


def test_everything_arrives_at_its_step(tmp_path: Path) -> None:
    imsave(tmp_path / "plot.png", zeros((4, 6)))
    noting = NotingTracker()
    tracker = AccelerateTracker(noting, owned=True)
    tracker.log({"llmrl/action": 2}, step=5)
    tracker.log_image("llmrl/schedule", tmp_path / "plot.png")
    tracker.log_table("llmrl/decisions", ["step"], [[5]])
    tracker.set_summary({"loss": {"test": 1.5}, "method": "hold"})
    tracker.finish()
    assert noting.calls == [
        ("log", {"llmrl/action": 2.0}, 5),
        ("images", {"llmrl/schedule": (4, 6, 3)}, 5),
        ("table", ("llmrl/decisions", ["step"], [[5]]), 5),
        ("log", {"summary/loss/test": 1.5}, 5),
        ("finish", None, None),
    ]


def test_a_tracker_without_pictures_and_tables_gets_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As trackio's is in accelerate."""
    monkeypatch.delattr(NotingTracker, "log_images")
    monkeypatch.delattr(NotingTracker, "log_table")
    noting = NotingTracker()
    tracker = AccelerateTracker(noting, owned=False)
    tracker.log_image("picture", tmp_path / "plot.png")
    tracker.log_table("table", ["a", "b"], [[1, 2]])
    tracker.log_html("page", tmp_path / "report.html")
    tracker.finish()
    assert [values for _, values, _ in noting.calls] == [
        {"picture": str(tmp_path / "plot.png")},
        {"table": "| a | b |\n| --- | --- |\n| 1 | 2 |"},
        {"page": str(tmp_path / "report.html")},
    ]


def test_a_tracker_is_started_with_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", NotingTracker)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["trackio"])
    tracker = start_tracker("trackio", tmp_path, "my-project", {"task": {"steps": 3, "name": None}})
    assert tracker.tracker.run_name == "my-project"
    assert tracker.tracker.calls == [("config", {"task/steps": 3}, None)]


def test_a_raw_loop_logs_beside_its_own_trackers() -> None:
    run = SimpleNamespace(define_metric=lambda *names, **options: None)
    noting = NotingTracker()
    accelerator = SimpleNamespace(trackers=[SimpleNamespace(name="wandb", tracker=run), noting])
    group: Any = trackers_of(accelerator)
    assert isinstance(group.trackers[0], WandbTracker)
    group.trackers[1].log({"x": 1}, step=1)
    group.trackers[1].finish()
    assert noting.calls == [("log", {"x": 1.0}, 1)], "somebody else finishes it"


def test_an_unknown_tracker_is_a_mistake_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("task: {data: 'builtin:json', steps: 12}\n")
    words = ["finetune", "--config", str(config), "--output", str(tmp_path / "run"), "--policy", "hold"]
    assert main([*words, "--trackers", "tensorbord"]) == 2
    told = capsys.readouterr().err
    assert "tracking.trackers.0" in told
    assert "'tensorboard'" in told
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    tracking = TrackingConfig(wandb="disabled", trackers=("trackio",))
    with pytest.raises(UserError, match="pip install trackio"):
        make_tracker(tracking, "finetune", tmp_path, {})


def test_a_tracker_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: NotingTracker) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(NotingTracker, "start", refuse)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", NotingTracker)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(UserError, match="no server"):
        start_tracker("mlflow", tmp_path, "project", {})


def test_only_the_first_process_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    make_tracker(TrackingConfig(wandb="offline", trackers=("tensorboard",)), "finetune", tmp_path, {})
    assert list(tmp_path.iterdir()) == []
