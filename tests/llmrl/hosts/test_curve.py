"""Learning curves beside a job: where their points lie, and that the job does not notice them."""

import math
import sys

import pytest
import torch
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask

from llmrl.hosts.job import named_schedule, run_job
from llmrl.hosts.memory import PeakMemory
from llmrl.policy import hold_policy

TASK = {
    "data": "builtin:json", "steps": 24, "batch_size": 2, "max_length": 32, "mode": "lora",
    "lora": {"dropout": 0.2}, "validation_examples": 4, "test_examples": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def job():
    return JobLibrary("cpu").job(FineTuningTask.model_validate(TASK))


@pytest.mark.parametrize("policy", [hold_policy(), named_schedule("cosine", 0.1)], ids=["hold", "cosine"])
def test_a_curve_changes_no_bit_of_the_job(job, policy):
    plain, measured = (run_job(job, policy, learning_rate=1e-3, seed=1, curve_points=points) for points in (0, 20))
    assert measured.final == plain.final
    assert [record.learning_rate for record in measured.records] == [record.learning_rate for record in plain.records]
    assert [record.train_loss for record in measured.records] == [record.train_loss for record in plain.records]
    assert (measured.tokens_trained, measured.tokens_evaluated) == (plain.tokens_trained, 0)
    assert (plain.curve, plain.tokens_measured) == ((), 0)
    assert measured.events == plain.events


def test_points_lie_from_before_training_to_the_end(job):
    result = run_job(job, named_schedule("constant", 0.0), learning_rate=1e-3, seed=0, curve_points=4)
    assert [point.step for point in result.curve] == [0, 6, 12, 20, 24]
    first, *others = result.curve
    untrained = FineTuningSession(job, seed=0).evaluate("validation")
    assert (first.loss_validation, first.loss_train, first.learning_rate) == (untrained.loss, None, None)
    assert all(point.learning_rate == 1e-3 for point in others)
    assert result.tokens_measured == 5 * untrained.num_tokens
    early = [record.train_loss for record in result.records if record.step <= 6]
    assert others[0].loss_train == pytest.approx(sum(early) / len(early))


def test_what_is_not_finite_is_left_out(job):
    result = run_job(job, named_schedule("constant", 0.0), learning_rate=1e30, seed=0, curve_points=4)
    assert not math.isfinite(result.final.loss)
    assert result.curve[-1].loss_validation is None
    assert result.curve[-1].loss_train is None
    assert result.events["skipped_steps"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak")
def test_peak_memory_is_that_since_it_was_made():
    torch.zeros(64 * 2**20, dtype=torch.uint8).fill_(1)
    memory = PeakMemory(torch.device("cpu"))
    before = memory.read_bytes()
    torch.zeros(32 * 2**20, dtype=torch.uint8).fill_(1)
    assert memory.read_bytes() - before > 24 * 2**20
