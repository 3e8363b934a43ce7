from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from llmrl_envs.errors import UserError
from matplotlib.image import imsave
from numpy import zeros

from llmrl.config import TrackingConfig
from llmrl.tracking import (
    NullTracker,
    WandbTracker,
    make_tracker,
    open_run_tracker,
    resolve_wandb_mode,
    without_dots,
)

ReadBack = Callable[[Path], dict[str, list[dict[str, Any]]]]
OFFLINE = TrackingConfig(wandb="offline", project="tests", group="experiment", tags=("fast",), name="one")


def test_an_offline_run_is_complete(tmp_path: Path, read_back: ReadBack, capfd: pytest.CaptureFixture[str]) -> None:
    run_directory = tmp_path / "run"
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    imsave(tmp_path / "plot.png", zeros((4, 4)))

    tracker = make_tracker(OFFLINE, "train-policy", run_directory, {"agent": {"n_step": 3}, "fields": {"a.b": 1}})
    tracker.log({"losses/td_loss": 0.5}, step=10)
    tracker.log_table("comparison", ["method", "score"], [["hold", 0.9], ["linear", None]])
    tracker.log_image("curve", tmp_path / "plot.png")
    (tmp_path / "report.html").write_text("<p>all of it</p>")
    tracker.log_html("report", tmp_path / "report.html")
    tracker.log({"losses/td_loss": 0.25}, step=10)
    tracker.log({"losses/td_loss": 0.125}, step=20)
    tracker.log_artifact("policy of one", "policy", policy)
    tracker.set_summary({"score": {"iqm": 0.95}})
    tracker.finish()

    records = read_back(run_directory)
    run = records["run"][0]
    assert run["project"] == "tests"
    assert run["run_group"] == "experiment"
    assert run["job_type"] == "train-policy"
    assert run["tags"] == ["fast"]
    config = run["config"]["update"]
    assert config["agent"] == {"n_step": 3}
    assert config["fields"] == {"a_b": 1}
    history = [record["item"] for record in records["history"]]
    assert [(row["_step"], row["losses/td_loss"]) for row in history] == [(10, 0.25), (20, 0.125)]
    assert history[0]["comparison._type"] == "table-file"
    assert history[0]["curve._type"] == "image-file"
    assert history[0]["report._type"] == "html-file"
    (kept,) = run_directory.rglob("report*.html")
    assert kept.read_text() == "<p>all of it</p>"
    assert {record["type"] for record in records["artifact"]} >= {"policy", "run_table"}
    assert {"score": {"iqm": 0.95}} in [record.get("update") for record in records["summary"]]
    assert records["exit"] == [{}] or records["exit"][0].get("exit_code", 0) == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_failed_run_is_marked(tmp_path: Path, read_back: ReadBack) -> None:
    tracker = make_tracker(OFFLINE, "finetune", tmp_path, {})
    tracker.finish(failed=True)
    assert read_back(tmp_path)["exit"][0]["exit_code"] == 1


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        tracker = make_tracker(OFFLINE, "train-policy", tmp_path / "one", {})
        assert isinstance(tracker, WandbTracker)
        ids.append(tracker.run.id)
        tracker.finish()
    other = make_tracker(OFFLINE, "train-policy", tmp_path / "two", {})
    assert isinstance(other, WandbTracker)
    given = make_tracker(OFFLINE, "train-policy", tmp_path / "two", {}, resume_id="mine")
    assert ids[0] == ids[1]
    assert other.run.id != ids[0]
    assert isinstance(given, WandbTracker)
    assert given.run.id == other.run.id, "an open run is reused"
    other.finish()
    chosen = make_tracker(OFFLINE, "train-policy", tmp_path / "three", {}, resume_id="mine")
    assert isinstance(chosen, WandbTracker)
    assert chosen.run.id == "mine"


def test_an_open_run_is_reused_and_left_open(tmp_path: Path, read_back: ReadBack) -> None:
    host = wandb.init(mode="offline", dir=str(tmp_path), config={"batch": 8}, settings=wandb.Settings(silent=True))
    host.log({"train/loss": 2.0})
    tracker = make_tracker(OFFLINE, "finetune", tmp_path / "ours", {"task": {"steps": 5}})
    tracker.log({"level": 0.5}, step=3)
    tracker.finish()
    assert wandb.run is host
    host.log({"train/loss": 1.0})
    assert host.config["batch"] == 8
    assert host.config["llmrl"] == {"task": {"steps": 5}}
    host.finish()
    assert not (tmp_path / "ours").exists()
    rows = [record["item"] for record in read_back(tmp_path)["history"]]
    seen = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    assert seen == [{"train/loss": 2.0}, {"level": 0.5, "train/global_step": 3}, {"train/loss": 1.0}]


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(TrackingConfig(wandb="disabled"), "compare", tmp_path / "run", {})
    tracker.log({"x": 1.0}, step=0)
    tracker.finish()
    assert isinstance(tracker, NullTracker)
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert isinstance(make_tracker(OFFLINE, "finetune", tmp_path, {}), NullTracker)


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, None, "offline"),
        (None, "online", "online"),
        (None, "dryrun", "offline"),
        (None, "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "nonsense", "disabled"),
    ],
)
def test_the_configuration_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, configured: Any, environment: str | None, expected: str
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert resolve_wandb_mode(TrackingConfig(wandb=configured)) == expected


def test_an_unknown_environment_mode_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE"):
        resolve_wandb_mode(TrackingConfig())


def test_an_online_run_without_a_way_there_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="wandb login") as caught:
        make_tracker(TrackingConfig(wandb="online"), "finetune", tmp_path, {})
    assert "api_key not configured" in str(caught.value)


def test_dots_disappear_at_every_depth() -> None:
    assert without_dots({"a.b": {"c.d": [1], "e": {"f.g": 2}}}) == {"a_b": {"c_d": [1], "e": {"f_g": 2}}}


def test_no_other_file_imports_wandb() -> None:
    root = Path(__file__).parents[3]
    users = [
        path.relative_to(root).as_posix()
        for folder in ("llmrl", "envs")
        for path in (root / folder).rglob("*.py")
        if "import wandb" in path.read_text(encoding="utf-8")
    ]
    assert {Path(user).parent.as_posix() for user in users} == {"llmrl/tracking"}


def test_an_id_follows_from_what_the_run_is_and_where(tmp_path: Path) -> None:
    def run_id(folder: str, config: dict[str, Any], job_type: Any = "finetune", project: str = "a") -> str:
        tracker = make_tracker(TrackingConfig(wandb="offline", project=project), job_type, tmp_path / folder, config)
        assert isinstance(tracker, WandbTracker)
        tracker.finish()
        (tmp_path / folder / "wandb" / "run-id.txt").unlink()
        return str(tracker.run.id)

    first = run_id("one", {"seed": 0, "tracking": {"tags": ["x"]}})
    assert run_id("one", {"seed": 0, "tracking": {"tags": ["y"]}}) == first, "made again, the same run"
    assert (
        len({first, run_id("two", {"seed": 0}), run_id("one", {"seed": 1}), run_id("one", {"seed": 0}, "compare")}) == 4
    )


def test_the_agent_of_a_sweep_gives_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "sweeprun")
    tracker = make_tracker(OFFLINE, "train-policy", tmp_path, {})
    assert isinstance(tracker, WandbTracker)
    assert tracker.run.id == "sweeprun"


class FakeRun:
    """Notes what an online run is asked for."""

    offline = False

    def __init__(self) -> None:
        self.used: list[Any] = []
        self.updates: list[dict[str, Any]] = []
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.updates.append(values))

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact)

    def define_metric(self, name: str, **options: Any) -> None:
        """Takes anything."""


def test_online_a_policy_is_an_artifact_that_the_run_uses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = FakeRun()
    tracker = WandbTracker(run, owned=True)
    tracker.use_policy("wandb:team/project/policy:v3", tmp_path)
    tracker.use_policy("runs/mine", tmp_path)
    tracker.use_policy("hold", None)
    assert run.used[0] == "team/project/policy:v3", "the lineage points to the artifact itself"
    assert isinstance(run.used[1], wandb.Artifact)
    assert list(run.used[1].manifest.entries) == ["config.json"]
    assert len(run.used) == 2
    assert run.updates[1] == {"policy": {"reference": "runs/mine", "path": str(tmp_path)}}


def test_offline_a_policy_is_a_path(tmp_path: Path, read_back: ReadBack) -> None:
    tracker = make_tracker(OFFLINE, "finetune", tmp_path / "run", {})
    tracker.use_policy("runs/mine", tmp_path)
    tracker.finish()
    records = read_back(tmp_path / "run")
    assert {"policy": {"reference": "runs/mine", "path": str(tmp_path)}} in [r.get("update") for r in records["config"]]
    assert "artifact" not in records


def test_without_an_open_run_nothing_is_recorded() -> None:
    assert isinstance(open_run_tracker(), NullTracker)


def test_beside_an_open_run_numbers_stand_over_the_trainers_step(tmp_path: Path, read_back: ReadBack) -> None:
    host = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    open_run_tracker().log({"llmrl/learning_rate": 0.5}, step=7)
    host.finish()
    records = read_back(tmp_path)
    (row,) = (record["item"] for record in records["history"])
    assert (row["llmrl/learning_rate"], row["train/global_step"]) == (0.5, 7)
    assert {"glob_name": "llmrl/*", "step_metric": "train/global_step"}.items() <= records["metric"][1].items()
