"""The table of the README, made from results.json, and the targets that it tells."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config_loading import load_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    import results_table
    import results_targets
finally:
    sys.path.pop(0)


def entry(iqm, low, high, failures, better=None):
    return {
        "iqm": iqm, "ci_low": low, "ci_high": high, "failures": failures, "num_runs": 12,
        "probability_of_improvement": better,
    }  # fmt: skip


def advantage(value, low, high, worst=-0.01):
    return {"iqm": {"value": value, "ci_low": low, "ci_high": high}, "worst": worst}


RIVALS = ("linear", "cosine", "greedy", "plateau", "schedule_free", "prodigy", "zclip")
RESULTS = {
    "rows": [{"task": task, "seed": seed} for task in "ab" for seed in (0, 1, 2)],
    "aggregate": {
        "policy": {"wrong": entry(1.01, 1.0, 1.02, 0, 0.94), "stress": entry(0.9, None, None, 1, 0.5)},
        "linear": {"wrong": entry(0.5, 0.4, 0.6, 3, 0.5), "stress": entry(0.9, 0.8, 1.0, 2, 0.5)},
        "zclip": {"stress": entry(0.9, 0.8, 1.0, 2, 0.6)},
    },
    "paired": {
        "regimes": {
            "wrong": {"hold": advantage(0.02, 0.01, 0.03), "search_5": advantage(0.0, -0.02, 0.02)},
            "stress": {"linear": advantage(0.0, -0.01, 0.01, worst=-0.5)},
        }
    },
    "improvement": {
        "wrong": {"policy": {name: {"probability": 0.9, "ci_low": 0.8, "ci_high": 1.0} for name in RIVALS}}
    },
}


TRANSFER = "the first three again: "
LARGER, LONGER = TRANSFER + "models three times larger", TRANSFER + "budgets three times longer"


def whole_results(scores, methods=("policy", "hold", *RIVALS)):
    """Two tasks of a larger model, one of them long; `scores` are the policy's, everybody else has 0.9."""
    rows, tasks = [], []
    for name, score in scores.items():
        long = name == "long"
        tasks.append({"name": name, "model": "/m/stories3m-hf", "steps": 480 if long else 80, "mode": "full"})
        for method in methods:
            own = score if method == "policy" else 0.9
            rows.append(
                {
                    "task": name, "method": method, "regime": "wrong", "seed": 0, "learning_rate_factor": 0.1,
                    "score": own, "loss_test": 2.0 - own, "diverged": False, "accuracy_test": None,
                    "target_reached": None, "cost": 1.0,
                }
            )  # fmt: skip
    return {**RESULTS, "rows": rows, "settings": {"tasks": tasks}}


def target_line(readme, beginning):
    return next(line for line in readme.read_text().split("\n") if line.startswith(f"| {beginning}"))


def write(tmp_path, results, text="# Title\n<!-- results -->\nold\n<!-- end of results -->\nrest\n"):
    readme, source = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text(text)
    source.write_text(json.dumps(results))
    return results_table.main([str(source), "--readme", str(readme)]), readme


def test_the_table_has_a_row_for_every_method_and_target(tmp_path):
    code, readme = write(tmp_path, RESULTS)
    assert code == 0
    told = readme.read_text()
    assert told.startswith("# Title\n<!-- results -->\n2 tasks, 3 seeds")
    assert told.endswith("<!-- end of results -->\nrest\n")
    assert "\nold\n" not in told
    assert "| method | wrong rate | stress | failures |" in told
    assert "| policy | 1.01 [1.00, 1.02] (94%) | 0.90 (50%) | 1 of 24 |" in told
    assert "| linear | 0.50 [0.40, 0.60] | 0.90 [0.80, 1.00] | 5 of 24 |" in told
    assert "| zclip |  | 0.90 [0.80, 1.00] (60%) | 2 of 12 |" in told
    met = [line.split("|")[3].strip() for line in told.split("| met |\n|---|---|---|\n")[1].split("\n")[:7]]
    assert met == ["yes", "yes", "yes", "", "**no**", "**no**", "**no**"]
    assert "not measured: paired regimes tuned" in told


def test_transfer_asks_all_three_questions_of_some_tasks(tmp_path):
    code, readme = write(tmp_path, whole_results({"short": 1.2, "long": 1.1}))
    assert code == 0
    line = target_line(readme, LARGER)
    assert "2 tasks: 1.15 [1.10, 1.20]; above hold +0.250 [+0.200, +0.300]; hardest is linear: 1.00" in line
    assert line.endswith("| yes |")


def test_transfer_is_missed_where_one_question_is(tmp_path):
    _, readme = write(tmp_path, whole_results({"short": 1.2, "long": 0.8}))
    assert target_line(readme, LARGER).endswith("| **no** |")


def test_transfer_says_what_was_not_measured(tmp_path):
    _, readme = write(tmp_path, whole_results({"short": 1.2, "long": 1.1}, ("policy", "hold", "linear")))
    assert "not measured: cosine, greedy, plateau" in target_line(readme, LARGER)
    _, readme = write(tmp_path, whole_results({"short": 1.2}))
    assert "not measured: such tasks" in target_line(readme, LONGER)
    assert "not measured: such tasks" in target_line(readme, TRANSFER + "LoRA")


def test_the_recipe_is_paid_back_by_searches_that_are_not_made(tmp_path):
    compute = {"policy": {"seconds_per_job": 10.0}, "search_5": {"seconds_per_job": 51.0}}
    _, readme = write(tmp_path, {**RESULTS, "compute": compute})
    line = target_line(readme, "training recipe")
    assert "42 minutes; paid back after 123 jobs of 10 s on one core" in line
    assert line.endswith("| yes |")


def test_what_training_saw_is_what_its_configuration_says():
    config = load_config("train", ROOT / "configs" / "train" / "default_experience.yaml", [])
    assert config.env.tasks.steps_range[1] == results_targets.TRAINED_STEPS
    sizes = re.findall(r"-(\d+)k-", " ".join(task.model for task in config.env.tasks.tasks))
    assert max(map(int, sizes)) * 1e3 == results_targets.TRAINED_PARAMETERS


def test_writing_it_twice_changes_nothing(tmp_path):
    _, readme = write(tmp_path, RESULTS)
    once = readme.read_text()
    _, readme = write(tmp_path, RESULTS, once)
    assert readme.read_text() == once


def test_a_readme_without_markers_is_left_alone(tmp_path, capsys):
    code, readme = write(tmp_path, RESULTS, "# Title\n")
    assert code == 2
    assert "<!-- results -->" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"


def test_the_script_asks_for_its_two_folders():
    found = subprocess.run([str(ROOT / "scripts" / "reproduce_results.sh")], capture_output=True, text=True)
    assert found.returncode == 2
    assert "MODELS_DIR DATA_DIR" in found.stderr


@pytest.mark.slow
def test_one_command_makes_table_and_figure(tmp_path):
    """With the built-in model in place of the others, and the controller that has learned nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- end of results -->\n")
    settings = {"POLICY": "hold", "README": str(tmp_path / "README.md"), "RUN": str(tmp_path / "run")}
    task = "{name: json, data: 'builtin:json', steps: 10, max_length: 32, validation_examples: 8, test_examples: 8}"
    words = [
        f"tasks=[{task}]",
        "stress_tasks=[]",
        "methods=[policy, linear]",
        "learning_rate_factors=[1]",
        "oracle_factors=[1]",
        "seeds=1",
        "workers=1",
    ]
    command = [str(ROOT / "scripts" / "reproduce_results.sh"), str(tmp_path), str(tmp_path), *words]
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **settings, "NO_ENVIRONMENT": "1", "WANDB_MODE": "disabled"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert "| policy |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs" / "results.png").stat().st_size > 1000
