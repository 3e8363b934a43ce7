import json
import sys
import time
from pathlib import Path

import accelerate
import pytest
import torch
from llmrl_envs.interface.base_schedule import decision_intervals
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.saved_tensors import counted_saved_tensors

from llmrl.cli import main
from llmrl.config import TrackingConfig
from llmrl.config_loading import load_config
from llmrl.doctor import _asked_processes, describe_trial, machine, processes, versions, weights_and_biases
from llmrl.dry_run import TaskTrial, estimate_seconds, population_of, tasks_of, try_task

TASK = """
task:
  name: tried
  data: {train: TRAIN, validation: VALIDATION, test: VALIDATION}
  steps: 40
  batch_size: 2
  gradient_accumulation: 2
  max_length: 16
  validation_examples: 4
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    for name, count in (("train", 40), ("validation", 8)):
        rows = [json.dumps({"text": f"the answer to question {index} is {index * index}"}) for index in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    text = TASK.replace("TRAIN", str(tmp_path / "train.jsonl")).replace(
        "VALIDATION", str(tmp_path / "validation.jsonl")
    )
    path = tmp_path / "finetune.yaml"
    path.write_text(text)
    return path


def test_versions_are_those_of_the_imported_packages() -> None:
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["accelerate"] == accelerate.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_machine_tells_the_device_that_auto_takes() -> None:
    found = machine()
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["torch threads"] == str(torch.get_num_threads())
    assert "(auto)" in found["precision"]


def test_fewer_processes_than_asked_for_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    state = accelerate.Accelerator(cpu=True).state
    monkeypatch.setattr("llmrl.doctor._asked_processes", lambda: 2)
    found = processes(state)
    assert (found["started"], found["asked for"]) == ("1", "2")
    assert "--multi_gpu" in found["warning"]
    monkeypatch.setattr("llmrl.doctor._asked_processes", lambda: 1)
    assert "warning" not in processes(state)


@pytest.mark.parametrize("words", ["--num_processes 3", "--num_processes=3", "--num-processes 3"])
def test_the_launchers_words_are_read(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    command = f"python\0accelerate\0launch\0--cpu\0{words}\0-m\0llmrl".replace(" ", "\0").encode()
    monkeypatch.setattr(Path, "read_bytes", lambda path: command)
    assert _asked_processes() == 3


def test_wandb_and_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert weights_and_biases(TrackingConfig(), tmp_path)["mode"] == "disabled"
    assert weights_and_biases(TrackingConfig(wandb="online"), tmp_path)["mode"] == "online"
    assert weights_and_biases(TrackingConfig(), tmp_path)["working directory"] == "writable"
    assert "not writable" in weights_and_biases(TrackingConfig(), tmp_path / "missing")["working directory"]


def test_saved_tensors_are_counted_once_and_freed() -> None:
    x = torch.ones(10, requires_grad=True)
    with counted_saved_tensors(set()) as peak:
        (x * x).sum().backward()
        assert peak == [40], "x is kept twice, in one storage of 10 float32"
        y = torch.ones(1000, requires_grad=True)
        (y * y).sum().backward()
        assert peak == [4000], "the first 40 bytes are free again"
    with counted_saved_tensors({x.untyped_storage().data_ptr()}) as peak:
        (x * x).sum().backward()
        assert peak == [0], "parameters are counted elsewhere"


def test_a_trial_measures_the_configured_job(config_file: Path) -> None:
    config = load_config("finetune", config_file)
    trial = try_task(config.task, JobLibrary("cpu"))
    assert trial.name == "tried"
    assert trial.batch_shapes["input_ids"][0] == 2
    assert trial.batch_shapes["input_ids"][1] <= 16
    assert trial.num_decisions == len(decision_intervals(40))
    assert trial.num_trained == trial.num_parameters
    assert trial.memory_bytes["parameters"] == 4 * trial.num_parameters
    assert trial.memory_bytes["moments"] == 2 * trial.memory_bytes["gradients"] == 8 * trial.num_trained
    assert trial.memory_bytes["activations"] > 0
    assert 4 <= trial.tokens_per_step <= 2 * 2 * 16
    assert trial.job_seconds == pytest.approx(40 * trial.seconds_per_step)
    assert estimate_seconds(config, (trial,)) == pytest.approx(trial.job_seconds)


def test_activations_grow_with_the_batch(config_file: Path) -> None:
    library = JobLibrary("cpu")
    small = load_config("finetune", config_file).task
    large = load_config("finetune", config_file, ["task.batch_size=8"]).task
    needed = [try_task(task, library).memory_bytes["activations"] for task in (small, large)]
    assert needed[1] > 2 * needed[0]


def trial_of(seconds: float, decisions: int) -> TaskTrial:
    return TaskTrial("t", "fp32", {}, 0.0, 1, 1, {}, decisions, 0.0, 0.5, seconds)


def test_estimates_count_every_run(tmp_path: Path) -> None:
    compare = tmp_path / "compare.yaml"
    compare.write_text("tasks: [{data: a}]\nmethods: [policy, linear, cosine]\nlearning_rate_factors: [1, 3, 9]\n")
    config = load_config("compare", compare, ["seeds=2", "oracle_factors=[1, 2, 4, 8]", "workers=2", "tuned=false"])
    # The policy once, cosine from 3 rates, linear decay from 1, 2, 3, 4, 8, 9; 2 seeds, 3 s each, on 2 processes.
    assert estimate_seconds(config, (trial_of(3.0, 10),)) == pytest.approx((1 + 3 + 6) * 2 * 3.0 / 2)
    given = load_config("compare", compare, ["seeds=2", "oracle_factors=[1, 2]", "schedule.start=given", "tuned=false"])
    assert estimate_seconds(given, (trial_of(3.0, 10),)) == pytest.approx((3 + 3 + 4) * 2 * 3.0)
    # The tuned rate is one more start for cosine; a task of the regime of stress has a start for each and its sweep.
    more = load_config("compare", compare, ["seeds=1", "oracle_factors=[1, 2]", "stress_tasks=[{name: s, data: a}]"])
    trials = (trial_of(3.0, 10), trial_of(5.0, 10))
    assert estimate_seconds(more, trials) == pytest.approx((1 + 4 + 4) * 3.0 + (1 + 1 + 2) * 5.0)

    train = tmp_path / "train.yaml"
    train.write_text("env: {tasks: {tasks: [{data: a}], num_seeds: 2}}\n")
    overrides = ["training.decisions=100", "training.evaluation_period_episodes=5", "training.evaluation_episodes=3"]
    config = load_config("train", train, overrides)
    # 10 episodes, 3 evaluations of 3 episodes, 2 references; each 3 s and 11 validation passes of 0.5 s.
    assert estimate_seconds(config, (trial_of(3.0, 10),)) == pytest.approx((10 + 9 + 2) * (3.0 + 11 * 0.5))


def test_a_population_is_timed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        "env: {device: cpu, population: 6, population_workers: 3, tasks: {tasks: [{data: 'builtin:json', steps: 8, "
        "batch_size: 2, max_length: 16, validation_examples: 4}]}}\n"
    )
    config, library = load_config("train", path), JobLibrary("cpu")
    assert population_of(config, library) == (6, 3)
    assert population_of(load_config("train", path, ["env.population=1", "env.population_workers=auto"]), library) == (
        1,
        1,
    )
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: 12.0 * next(clock))
    (task,) = tasks_of(config)
    trial = try_task(task, library, *population_of(config, library))
    # One worker's part takes 12 s for three steps of all six jobs, and 12 s for their validation.
    assert (trial.seconds_per_step, trial.seconds_per_evaluation) == (12.0 / 3 / 6, 12.0 / 6)
    assert trial.job_seconds == pytest.approx(8 * trial.seconds_per_step)
    assert describe_trial(trial)["at once"] == "6 jobs in 3 processes; times are a job's share"


def test_another_environment_has_no_task_to_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("env: {id: CartPole-v1}\n")
    assert tasks_of(load_config("train", path)) == ()
    assert main(["doctor", "--config", str(path)]) == 0
    assert "another environment" in capsys.readouterr().out


def test_the_command_reports_on_the_job(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["doctor", "--config", str(config_file), "task.steps=20"]) == 0
    printed = capsys.readouterr().out
    for expected in ("torch", "Processes", "Task tried", "tokens per step", "memory", "Estimated time"):
        assert expected in printed


def test_a_job_that_cannot_run_says_why(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", str(config_file), "task.data=missing.jsonl"]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
