"""`llmrl train` on a population: resumed exactly, sized to the memory, halved where it does not suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.population import memory
from llmrl_envs.jobs.population.session import PopulationSession
from llmrl_envs.jobs.population.training import PopulationTraining
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.config import TrainConfig
from llmrl.config_env import EnvConfig
from llmrl.dqn.collector import Collector
from llmrl.run_directory import read_jsonl
from llmrl.training import population
from llmrl.training.loop import train
from llmrl.training.setup import make_environment, schedule_language
from llmrl.training.state_arrays import join_arrays, split_arrays

TASK: dict[str, Any] = {
    "data": "builtin:json", "steps": 8, "batch_size": 2, "max_length": 16, "validation_examples": 4,
}  # fmt: skip


def env_config(**changes: Any) -> EnvConfig:
    return EnvConfig.model_validate({"tasks": {"tasks": [TASK], "num_seeds": 2}, "device": "cpu", **changes})


def make_config(**changes: Any) -> TrainConfig:
    lora = {**TASK, "mode": "lora", "steps": 12}
    values: dict[str, Any] = {
        "env": {"tasks": {"tasks": [TASK, lora], "num_seeds": 2}, "population": 3, "device": "cpu"},
        "agent": {"hidden_sizes": [16], "learning_starts": 8, "batch_size": 8, "gamma": 1.0, "n_step": 2},
        "training": {"decisions": 60, "checkpoint_period_episodes": 2, "evaluation_episodes": 1},
        "tracking": {"wandb": "disabled"},
    }
    return TrainConfig.model_validate(values | changes)


def test_a_population_that_is_interrupted_and_resumed_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config=make_config(), output=tmp_path / "whole")
    original, steps = Collector.step, 0

    def interrupted(self: Collector, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 13:
            raise KeyboardInterrupt
        return original(self, **named)

    monkeypatch.setattr(Collector, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config=make_config(), output=tmp_path / "torn")
    assert list((tmp_path / "torn" / "checkpoints").glob("*/arrays.safetensors"))
    train(config=make_config(), output=tmp_path / "torn", resume=True)
    names = ("config.json", "model.safetensors")
    policies = [[(tmp_path / run / "policy" / name).read_bytes() for name in names] for run in ("whole", "torn")]
    assert policies[0] == policies[1]
    rows = [read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("whole", "torn")]
    assert rows[0] == rows[1]
    assert sum(row["kind"] == "episode" for row in rows[0]) >= 6


def test_each_way_of_running_several_jobs_is_what_its_name_says() -> None:
    wanted = {"population": FineTuningVectorEnv, "sync": SyncVectorEnv, "async": AsyncVectorEnv}
    for vectorization, kind in wanted.items():
        env = make_environment(env_config(population=2, vectorization=vectorization))
        assert type(env) is kind
        language = schedule_language(env)
        assert language is not None
        assert language[0].name == "moves"
        env.close(**({"terminate": True} if kind is AsyncVectorEnv else {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": "auto", "vectorization": "sync"}, "population auto"),
        ({"population": 4, "vectorization": "sync", "groups": 2}, r"env\.groups"),
        ({"groups": 2}, r"env\.groups"),
        ({"population_workers": 2}, r"env\.population_workers"),
        ({"population": 4, "vectorization": "sync", "population_workers": 2}, r"env\.population_workers"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env_config(**changes)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_memory_grows_by_the_formula_with_every_job(mode: str) -> None:
    from llmrl_envs.jobs.task import FineTuningTask

    job = JobLibrary("cpu").job(FineTuningTask.model_validate({**TASK, "mode": mode}))
    session = PopulationSession(job, averaged=True)
    told = memory.job_memory(session, job, rolls_back=True, averaged=True)
    found = {}
    for count in (2, 6):
        members = [session.add(job, seed) for seed in range(count)]
        session.mark_best(members)
        rows = [session.stack.gradients, *session.rows.tensors().values(), *session._best._kept]
        held = sum(tensor[:count].numel() * tensor.element_size() for tensor in rows)
        for member in members:
            session.remove(member)
        found[count] = held + memory.measure_activations(session, job, count)
    assert (found[6] - found[2]) / 4 == pytest.approx(told.row + told.activations, rel=0.1)


def test_as_many_jobs_as_fit_into_the_memory() -> None:
    each = memory.JobMemory(row=60, reference=20, activations=20)
    assert memory.fitting_jobs(each, torch.device("cpu"), available=2000) == 16
    assert memory.fitting_jobs(each, torch.device("cpu"), available=50) == 1
    assert memory.fitting_jobs(each, torch.device("cpu"), available=10**9) == memory.MOST_JOBS["cpu"]


def test_an_automatic_population_is_made_and_halved_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(population, "free_bytes", lambda device: 10**12)
    monkeypatch.setitem(memory.MOST_JOBS, "cpu", 12)
    original = FineTuningVectorEnv.rehearse

    def rehearse(self: FineTuningVectorEnv) -> int:
        if self.num_envs > 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(self)

    monkeypatch.setattr(FineTuningVectorEnv, "rehearse", rehearse)
    env = make_environment(env_config(population="auto"))
    assert isinstance(env, FineTuningVectorEnv)
    assert env.num_envs == 3
    assert "12 jobs do not fit; going on with 6" in capsys.readouterr().err
    obs, _ = env.reset(seed=0)
    assert obs.shape[0] == 3


def test_a_pass_that_runs_out_of_memory_goes_on_in_halves_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = {"tasks": [TASK], "num_seeds": 4}
    plain = gymnasium.make_vec("llmrl_envs:llmrl/FineTuning-v0", num_envs=5, tasks=tasks, device="cpu")
    tight = gymnasium.make_vec("llmrl_envs:llmrl/FineTuning-v0", num_envs=5, tasks=tasks, device="cpu")
    wanted = [plain.reset(seed=0)[0], plain.step(np.full(5, 2))[0]]
    found = [tight.reset(seed=0)[0]]
    original = PopulationTraining._backward

    def crowded(self: PopulationTraining, sequences: Any, shares: Any, start: int) -> Any:
        losses = original(self, sequences, shares, start)
        if len(shares) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(PopulationTraining, "_backward", crowded)
    found.append(tight.step(np.full(5, 2))[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert "out of memory with 5 jobs in one pass; going on with 2" in caplog.text


def test_arrays_leave_a_state_and_come_back() -> None:
    state = {"a": [1, np.arange(3)], "b": {"c": np.zeros((0, 2), np.bool_), "d": "text"}}
    values, arrays = split_arrays(state)
    joined = join_arrays(values, arrays)
    assert joined["b"]["c"].shape == (0, 2)
    assert joined["a"][1].tolist() == [0, 1, 2]
    assert joined["b"]["d"] == "text"


def test_a_population_that_learns_from_logs_first_has_checkpoints_before_its_first_decision(tmp_path: Path) -> None:
    first = make_config(training={"decisions": 24, "checkpoint_period_episodes": 2, "evaluation_episodes": 1})
    train(config=first, output=tmp_path / "first")
    values = first.model_dump(mode="json", by_alias=True, exclude={"agent": {"seed"}})
    values["agent"] |= {"experience": [str(tmp_path / "first")], "pretrain_updates": 20}
    train(config=TrainConfig.model_validate(values), output=tmp_path / "second")
    kinds = [row["kind"] for row in read_jsonl(tmp_path / "second" / "metrics.jsonl")]
    assert kinds.index("pretraining") < kinds.index("episode")
