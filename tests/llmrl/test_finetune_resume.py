"""`llmrl finetune` that is killed and goes on: the same files as if it had not been.

Processes that are killed with -9 are forked from a fresh interpreter that runs this file as a program (see the end).
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from llmrl.cli import main
from llmrl.run_directory import read_jsonl

TASK = {
    "name": "tiny", "data": "builtin:json", "steps": 20, "batch_size": 3, "gradient_accumulation": 2, "max_length": 32,
    "validation_examples": 4, "test_examples": 4,
}  # fmt: skip
LORA = {"mode": "lora", "lora": {"dropout": 0.2}}
CASES = {"full": {}, "lora": LORA, "linear": {}, "half": {"precision": "fp16", **LORA}}
FEW = ("full", "lora")
STEPS = TASK["steps"]


def run_program(*words):
    found = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-3000:]


def outcome(run):
    """Everything that a run leaves, but how long it took."""
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    weights = sorted((run / "model").glob("*.safetensors"))
    assert weights
    return summary, (run / "schedule.jsonl").read_text(), [path.read_bytes() for path in weights]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two cases once whole, and once killed after step 10 and while the last checkpoint is written."""
    folder = tmp_path_factory.mktemp("killed")
    run_program(folder, "few")
    return folder


@pytest.mark.parametrize("case", FEW)
def test_a_job_that_is_killed_goes_on_as_if_it_had_not_been(runs, case):
    assert outcome(runs / f"{case}-cut") == outcome(runs / f"{case}-whole")
    rows = read_jsonl(runs / f"{case}-cut" / "schedule.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 12, 16]
    assert [row["step"] for row in rows if "rollback" in row["events"]] == [6, 12]


def test_no_more_than_two_checkpoints_are_kept(runs):
    assert sorted(path.name for path in (runs / "full-cut" / "checkpoints").iterdir()) == ["000000006", "000000007"]


@pytest.mark.slow
def test_a_job_that_is_killed_between_any_two_steps_goes_on_as_if_it_had_not_been(tmp_path):
    run_program(tmp_path, "everywhere")
    for case in CASES:
        for step in range(STEPS):
            assert outcome(tmp_path / f"{case}-{step}") == outcome(tmp_path / f"{case}-whole"), (case, step)


# -- one that was interrupted, and what may have happened to it since -------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "job.yaml"
    path.write_text(yaml.safe_dump({"task": TASK, "checkpoint_period_decisions": 1}))
    return path


def finetune(config, output, *words, steered=("--policy", "hold")):
    return main(["finetune", "--config", str(config), "--output", str(output), *steered, *words])


@pytest.fixture(scope="module")
def interrupted(config, tmp_path_factory):
    """A run directory after Ctrl-C at the tenth step; its checkpoints are of the third and the fourth decision."""
    from llmrl_envs.jobs.session import FineTuningSession

    run = tmp_path_factory.mktemp("interrupted") / "a run"
    with pytest.MonkeyPatch.context() as patch:
        train_step = FineTuningSession._train_step

        def interrupt(session, *arguments, **options):
            if session.step == 9:
                raise KeyboardInterrupt
            train_step(session, *arguments, **options)

        patch.setattr(FineTuningSession, "_train_step", interrupt)
        assert finetune(config, run, "--wandb", "offline") == 130
    return run


@pytest.fixture
def run(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "a run")


def read_run(file):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [record["history"]["item"] for record in map(json.loads, found) if record["type"] == "history"]
    return [row for row in rows if "llmrl/learning_rate" in row]


def test_control_c_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    def interrupt(**arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrl.finetune.finetune", interrupt)
    assert finetune(config, tmp_path / "a run", "seed=2") == 130
    told = capsys.readouterr().err
    assert f"llmrl finetune --config {config} --policy hold --output '{tmp_path / 'a run'}' --resume seed=2" in told


def test_the_run_of_weights_and_biases_goes_on_under_its_id_and_is_whole(config, run):
    assert finetune(config, run, "--resume", "--wandb", "offline") == 0
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    rows = read_run(files[-1])
    assert [row["train/global_step"] for row in rows] == [2, 4, 6, 8, 12, 16, 20]
    before = [row["train/global_step"] for row in read_run(files[0])]
    assert before == [2, 4, 6, 8]


def test_a_finished_job_ends_as_it_did(config, run):
    assert finetune(config, run, "--resume", "--wandb", "disabled") == 0
    before = outcome(run)
    assert finetune(config, run, "--resume", "--wandb", "disabled") == 0
    assert outcome(run) == before


@pytest.mark.parametrize(
    ("words", "steered", "told"),
    [
        (["seed=1"], ("--policy", "hold"), "seed: 0 before, 1 now"),
        (["task.steps=30"], ("--policy", "hold"), "task.steps: 20 before, 30 now"),
        (["learning_rate=0.1"], ("--policy", "hold"), "learning_rate: None before, 0.1 now"),
        (["task.mode=lora"], ("--policy", "hold"), "task.mode: full before, lora now"),
        ([], ("--schedule", "linear"), "steered_by.name: hold before, linear now"),
        ([], ("--policy", "default"), "steered_by.digest"),
    ],
)
def test_another_job_is_refused(config, run, capsys, words, steered, told):
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert finetune(config, run, "--resume", "--wandb", "disabled", *words, steered=steered) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_what_changes_no_number_may_change(config, run):
    words = ["save_model=false", "checkpoint_period_decisions=2", "tracking.tags=[again]"]
    assert finetune(config, run, "--resume", "--wandb", "disabled", *words) == 0
    assert not (run / "model").exists()


DAMAGES = {
    "a truncated tensor file": lambda c: os.truncate(c / "shared.safetensors", 1000),
    "an empty tensor file": lambda c: os.truncate(c / "process.0.safetensors", 0),
    "a missing tensor file": lambda c: (c / "shared.safetensors").unlink(),
    "a missing state": lambda c: (c / "state.json").unlink(),
    "a truncated state": lambda c: os.truncate(c / "state.json", 200),
    "missing arrays": lambda c: (c / "arrays.safetensors").unlink(),
    "a missing manifest": lambda c: (c / "manifest.json").unlink(),
    "a truncated manifest": lambda c: os.truncate(c / "manifest.json", 100),
    "an empty manifest": lambda c: (c / "manifest.json").write_text('{"format_version": 1, "files": {}}'),
    "another version": lambda c: (c / "manifest.json").write_text('{"format_version": 9, "files": {}}'),
    "a changed byte": lambda c: (c / "shared.safetensors").write_bytes(
        (c / "shared.safetensors").read_bytes()[:-1] + b"\x7f"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(config, run, capsys, damage):
    newest = run / "checkpoints" / "000000004"
    DAMAGES[damage](newest)
    assert finetune(config, run, "--resume", "--wandb", "disabled") == 2
    error = capsys.readouterr().err
    assert "the checkpoint is damaged" in error
    assert str(newest) in error
    assert "000000003" in error
    assert "Traceback" not in error


def test_without_the_damaged_one_the_job_goes_on_from_the_one_before(config, run, tmp_path):
    shutil.rmtree(run / "checkpoints" / "000000004")
    assert finetune(config, run, "--resume", "--wandb", "disabled") == 0
    assert finetune(config, tmp_path / "whole", "--wandb", "disabled") == 0
    assert outcome(run) == outcome(tmp_path / "whole")


def test_without_the_word_a_run_that_was_begun_is_not_touched(config, run, capsys):
    assert finetune(config, run, "--wandb", "disabled") == 2
    assert "--resume" in capsys.readouterr().err


def test_a_job_without_checkpoints_begins_again(config, tmp_path, capsys):
    words = ["--wandb", "disabled", "checkpoint_period_decisions=0"]
    assert finetune(config, tmp_path / "run", *words) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    before = outcome(tmp_path / "run")
    assert finetune(config, tmp_path / "run", "--resume", *words) == 0
    assert "from the beginning" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == before


# -- the program ------------------------------------------------------------------------------------------------------


def make_policy():
    import numpy as np

    from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

    actions = {0: "one_up", 4: "freeze", 6: "rollback", 8: "tighten", 12: "rollback"}

    class RollsBack(SchedulePolicy):
        """Uses every update choice, by the number of steps done."""

        def act(self, observation, mask):
            done = round(STEPS * float(observation[0, self.spec.names.index("progress")]))
            action = self.table.names.index(actions.get(done, "hold"))
            return PolicyDecision(np.array([action]), np.zeros(mask.shape, np.float32))

    hold = hold_policy()
    return RollsBack(hold.table, hold.spec, hold.settings, None)


def run_case(case, output, *, resume):
    from llmrl import finetune as module
    from llmrl.config import FinetuneConfig

    choose = module.choose_policy
    if case != "linear":
        module.choose_policy = lambda config, policy, schedule: (make_policy(), None)
    config = FinetuneConfig.model_validate(
        {"task": {**TASK, **CASES[case]}, "tracking": {"wandb": "disabled"}, "checkpoint_period_decisions": 1}
    )
    steering = {"schedule": "linear"} if case == "linear" else {"policy": "hold"}
    module.finetune(config=config, output=output, resume=resume, **steering)
    module.choose_policy = choose


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_forked(case, output, *, kill_at=None, resume=False):
    """Runs in a process of its own; `kill_at` is a step, or "checkpoint": in the middle of the last one."""
    child = os.fork()
    if child == 0:
        from llmrl_envs.jobs.session import FineTuningSession

        from llmrl.hosts import checkpoints

        train_step, save_file = FineTuningSession._train_step, checkpoints.save_file

        def step(session, *arguments, **options):
            train_step(session, *arguments, **options)
            if session.step - 1 == kill_at:
                die()

        def save(tensors, path):
            save_file(tensors, path)
            if kill_at == "checkpoint" and path.parent.name == ".000000007.part":
                die()

        FineTuningSession._train_step, checkpoints.save_file = step, save
        run_case(case, output, resume=resume)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == (0 if kill_at is None else signal.SIGKILL), (case, kill_at, status)


def program(folder, what):
    import torch

    torch.set_num_threads(1)
    for case in FEW if what == "few" else CASES:
        run_case(case, folder / f"{case}-whole", resume=False)  # here, so that forks find everything imported
        if what == "few":
            for number, kill_at in enumerate((9, "checkpoint", None)):
                run_forked(case, folder / f"{case}-cut", kill_at=kill_at, resume=number > 0)
        else:
            for step in range(STEPS):
                run_forked(case, folder / f"{case}-{step}", kill_at=step)
                run_forked(case, folder / f"{case}-{step}", resume=True)


if __name__ == "__main__":
    from pathlib import Path

    program(Path(sys.argv[1]), sys.argv[2])
