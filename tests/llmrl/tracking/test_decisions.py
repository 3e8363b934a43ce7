"""A job's decisions in the trackers: series over the trainer's step, a table, a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from llmrl.cli import main
from llmrl.config import TrackingConfig
from llmrl.run_directory import read_jsonl
from llmrl.tracking import DecisionLog, make_tracker
from llmrl.tracking.decisions import TABLE_COLUMNS, decision_series, decision_table, schedule_history

ReadBack = Callable[[Path], dict[str, list[dict[str, Any]]]]
ROW = {
    "decision": 3,
    "step": 6,
    "action": "one_up",
    "learning_rate": 2e-4,
    "train_loss": 1.5,
    "validation_loss": None,
    "events": {"rollback": True, "skipped_steps": 2, "spike": 1},
    "step_after": 10,
    "q_values": {"hold": 0.5, "one_up": 0.75},
    "mask": {"hold": True, "one_up": True},
    "observation": {"progress": 0.1, "progress_tanh_0.03": 0.6, "level": 0.25, "level@1": 0.0, "last_hold": 1.0},
}


def test_series_of_a_decision() -> None:
    assert decision_series(ROW) == {
        "llmrl/decision": 3.0,
        "llmrl/action": 1.0,
        "llmrl/learning_rate": 2e-4,
        "llmrl/train_loss": 1.5,
        "llmrl/q/hold": 0.5,
        "llmrl/q/one_up": 0.75,
        "llmrl/observation/progress": 0.1,
        "llmrl/observation/level": 0.25,
        "llmrl/event_rollback": 1.0,
        "llmrl/event_fallback": 0.0,
        "llmrl/event_skipped_steps": 2.0,
        "llmrl/event_spike": 1.0,
    }


def test_a_host_may_tell_no_more_than_step_action_and_rate() -> None:
    series = decision_series({"step": 4, "action": "hold", "learning_rate": float("inf")})
    names = ("rollback", "fallback", "spike", "skipped_steps")
    assert series == {f"llmrl/event_{name}": 0.0 for name in names}


def test_names_have_no_dots() -> None:
    row = {"step": 0, "action": "level_0.0025", "learning_rate": 1.0, "q_values": {"level_0.0025": 1.0}}
    assert "llmrl/q/level_0_0025" in decision_series(row)


def test_lines_of_the_table() -> None:
    (line,) = decision_table([ROW])
    assert dict(zip(TABLE_COLUMNS, line, strict=True)) | {"validation_loss": None} == {
        "decision": 3,
        "step": 6,
        "action": "one_up",
        "learning_rate": 2e-4,
        "train_loss": 1.5,
        "validation_loss": None,
        "events": "rollback, skipped_steps, spike",
    }


def test_history_of_a_job() -> None:
    history = schedule_history([ROW, {**ROW, "action": "hold", "step_after": 14}], title="job", total_steps=20)
    assert history.action_names == ("hold", "one_up")
    assert (history.steps, history.actions) == ([10, 14], [1, 0])


def test_a_job_without_decisions_draws_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(TrackingConfig(wandb="disabled"), "finetune", tmp_path, {})
    DecisionLog(tracker, title="job", total_steps=5).finish(tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short job of the built-in model, recorded by Weights & Biases and by tensorboard."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "job.yaml"
    config.write_text("task: {name: short, data: 'builtin:json', steps: 12, batch_size: 2, max_length: 32}\n")
    words = ["finetune", "--config", str(config), "--output", str(folder / "run"), "--policy", "hold"]
    tracking = ["--wandb", "offline", "--trackers", "tensorboard", "tracking.group=experiment", "tracking.tags=[short]"]
    assert main([*words, *tracking, "save_model=false"]) == 0
    return folder / "run"


def test_an_offline_job_is_complete(job: Path, read_back: ReadBack) -> None:
    records = read_back(job)
    run = records["run"][0]
    assert (run["run_group"], run["job_type"], run["tags"]) == ("experiment", "finetune", ["short"])
    assert run["run_id"] == (job / "wandb" / "run-id.txt").read_text().strip()
    metrics = {record.get("glob_name"): record.get("step_metric") for record in records["metric"]}
    assert metrics["llmrl/*"] == "train/global_step"
    rows = read_jsonl(job / "schedule.jsonl")
    history = [record["item"] for record in records["history"]]
    assert [item["train/global_step"] for item in history] == [row["step_after"] for row in rows]
    assert [item["llmrl/learning_rate"] for item in history] == [row["learning_rate"] for row in rows]
    assert [item["validation/loss"] for item in history] == [row["validation_loss"] for row in rows]
    assert history[-1]["llmrl/decisions._type"] == "table-file"
    assert history[-1]["llmrl/schedule._type"] == "image-file"
    (table,) = job.glob("wandb/offline-run-*/files/media/table/llmrl/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(TABLE_COLUMNS)
    assert [line[2] for line in content["data"]] == [row["action"] for row in rows]
    assert imread(job / "schedule.png").std() > 0.01


def test_tensorboard_gets_the_same_series(job: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job / "trackers" / "tensorboard"))
    events.Reload()
    rows = read_jsonl(job / "schedule.jsonl")
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in decision_series(row).items():
            wanted.setdefault(name, []).append((row["step_after"], value))
    tags = events.Tags()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in wanted}
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6)
    assert "llmrl/schedule" in tags["images"]
    assert "llmrl/decisions/text_summary" in tags["tensors"]
    assert events.Scalars("summary/loss_test")[0].value == pytest.approx(
        json.loads((job / "summary.json").read_text())["loss_test"], rel=1e-6
    )
