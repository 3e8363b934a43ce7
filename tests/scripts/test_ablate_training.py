"""The rows of the training's ablation are valid, each changes something, and a file lists them."""

import json
import sys
from pathlib import Path

import pytest

from llmrl.config_loading import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    """The script, importable as it is when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ablate_training

    yield ablate_training
    for name in ("ablate_training", "ablate_dqn", "solve", "problems", "known_optima", "playing", "catch"):
        sys.modules.pop(name, None)


def test_rows_are_valid_trainings_that_differ_from_each_other(script):
    path = ROOT / "configs" / "train" / "quickstart.yaml"
    found = [load_config("train", path, [*script.JOBS, *changes]) for changes in script.ROWS.values()]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_rows_are_trained_once_and_listed(script, tmp_path, monkeypatch, capsys):
    short = ("training.decisions=24", "training.evaluation_episodes=1", "tracking.wandb=disabled")
    monkeypatch.setattr(script, "JOBS", short)
    config, output = ROOT / "configs" / "train" / "smoke.yaml", tmp_path / "ablation"
    reports, trained = [], []
    for _ in range(2):
        script.main(["--config", str(config), "--seeds", "1", "--only", "n_step 1", "--output", str(output)])
        reports.append(json.loads((output / "ablation.json").read_text()))
        trained.append([path.stat().st_mtime_ns for path in sorted(output.glob("*/policy/model.safetensors"))])
    first, again = ([row["returns"] for row in report["rows"]] for report in reports)
    assert first == again
    assert [row["name"] for row in reports[1]["rows"]] == ["base", "n_step 1"]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 2
    assert reports[1]["rows"][1]["difference"] == pytest.approx(again[1][0] - again[0][0])
    assert "| base |" in capsys.readouterr().out


def test_an_ensemble_joins_the_bases_of_several_seeds(script, tmp_path, monkeypatch):
    short = ("training.decisions=24", "training.evaluation_episodes=1", "tracking.wandb=disabled")
    monkeypatch.setattr(script, "JOBS", short)
    monkeypatch.setattr(script, "MEMBER_SEEDS", (0, 1))
    config, output = ROOT / "configs" / "train" / "smoke.yaml", tmp_path / "ablation"
    row = "three networks, one deviation below"
    script.main(["--config", str(config), "--seeds", "1", "--only", row, "--output", str(output)])
    base, joined = json.loads((output / "ablation.json").read_text())["rows"]
    assert sorted(path.name for path in output.iterdir()) == ["0-0", "0-1", "ablation.json"]
    assert joined["changes"] == {"overrides": ["lower_bound=1"]}
    assert joined["details"]["hold"] == base["details"]["hold"]


def test_a_first_stage_means_what_the_second_one_means(script):
    first, second = (
        load_config("train", path, []) for path in (script.FIRST_STAGE, ROOT / "configs" / "train" / "quickstart.yaml")
    )
    assert (first.env.actions, first.env.observation) == (second.env.actions, second.env.observation)
    assert first.env.schedule == second.env.schedule
