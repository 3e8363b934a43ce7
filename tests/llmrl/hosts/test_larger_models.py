"""Every host tells the schedule how large its model is, and models beyond those that were measured get lower rates."""

import numpy as np
import pytest
import torch
from llmrl_envs.builtin import builtin_model_path
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.interface import job_scale
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv
from transformers import AutoModelForCausalLM

from llmrl import ScheduleController
from llmrl.hosts.job import run_job
from llmrl.policy import SchedulePolicy, hold_policy


def of_loop(library, task):
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ScheduleController(hold_policy()).attach(model, optimizer, total_steps=24)
    return optimizer.param_groups[0]["lr"]


def of_finetune(library, task):
    return run_job(library.job(task), hold_policy(), learning_rate=1e-5, seed=3).records[0].learning_rate


def of_environment(library, task):
    env = FineTuningEnv({"tasks": [task]}, library=library)
    env.reset(seed=0)
    return env._schedule.peak_rate()[0]


def of_population(library, task):
    env = FineTuningVectorEnv(2, {"tasks": [task]}, library=library, device="cpu")
    env.reset(seed=0)
    rates = env._episodes_now()._steering.schedule.peak_rate()
    assert rates[0] == rates[1]
    return rates[0]


@pytest.mark.parametrize("host", [of_loop, of_finetune, of_environment, of_population])
def test_a_model_four_times_as_large_as_any_that_was_measured_gets_half_the_rate(
    host, library, task_settings, monkeypatch
):
    from llmrl_envs.jobs.task import FineTuningTask

    task = FineTuningTask.model_validate(task_settings)
    usual = host(library, task)
    size = library.job(task).loaded.num_parameters
    monkeypatch.setattr(job_scale, "LARGEST_LANGUAGE_MODEL", size / 4)
    np.testing.assert_allclose(host(library, task), usual / 2, rtol=0.02)


@pytest.mark.parametrize(("largest", "holds"), [(1.0, True), (1e9, False)])
def test_the_default_policy_holds_on_a_larger_model_in_every_host(library, task_settings, monkeypatch, largest, holds):
    from llmrl_envs.jobs.task import FineTuningTask

    monkeypatch.setattr(job_scale, "LARGEST_LANGUAGE_MODEL", largest)
    policy = SchedulePolicy.from_pretrained("default")
    controller = ScheduleController(policy)
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    controller.attach(model, torch.optim.AdamW(model.parameters(), lr=1e-5), total_steps=24)
    assert (controller.job.loop.policy is not policy) == holds
    assert (controller.job.loop.schedule.settings.base == "linear") == holds
    job = library.job(FineTuningTask.model_validate(task_settings))
    records = run_job(job, policy, learning_rate=1e-5, seed=3).records
    names = [record.decision.action_name for record in records]
    assert names[0] == "lean"
    assert ("cooldown" not in names) == holds
    if holds:
        assert set(names[1:]) == {"hold"}
