"""Reference runs: a linear decay from the default rate, run once for each task and seed."""

import math

import numpy as np
import pytest
import torch
from llmrl_envs.interface.base_schedule import decision_intervals
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs import reference
from llmrl_envs.jobs.reference import ReferenceCurves, given_rate_schedule
from llmrl_envs.jobs.session import FineTuningSession


@pytest.fixture
def num_runs(monkeypatch):
    """Counts reference runs."""
    runs = []
    original = reference._run_reference
    monkeypatch.setattr(
        reference, "_run_reference", lambda job, seed, *rest: runs.append(seed) or original(job, seed, *rest)
    )
    return runs


def test_a_usual_schedule_is_its_base_times_the_rate():
    schedule = given_rate_schedule("linear", 12, 1e-3, 2 / 12)
    found = [float(schedule.learning_rate(np.array([step]))[0]) for step in range(13)]
    expected = [1 / 3, 2 / 3, *(1 - step / 10 for step in range(11))]
    assert found == pytest.approx([1e-3 * factor for factor in expected], abs=1e-12)


def test_a_curve_is_the_validation_log_loss_of_a_linear_decay_at_every_decision(make_job):
    job = make_job(steps=15)
    curve = ReferenceCurves({}).curve(job, seed=2)
    session = FineTuningSession(job, seed=2)
    schedule = given_rate_schedule("linear", 15, job.task.learning_rate, 0.05)
    expected = [session.evaluate("validation").loss]
    for count in decision_intervals(15):
        session.run_interval(count, schedule)
        expected.append(session.evaluate("validation").loss)
    assert curve == tuple(math.log(loss) for loss in expected)


def test_each_task_and_seed_runs_once_whatever_the_task_is_called(make_job, num_runs):
    kept = {}
    curves = ReferenceCurves(kept)
    first = curves.curve(make_job(steps=4), 0)
    assert curves.curve(make_job(steps=4, name="another"), 0) == first
    assert ReferenceCurves(kept).curve(make_job(steps=4, test_examples=3), 0) == first
    assert num_runs == [0]
    assert curves.curve(make_job(steps=4), 1) != first
    assert curves.curve(make_job(steps=4, learning_rate=1e-2), 0) != first
    assert num_runs == [0, 1, 0]


def test_a_curve_has_the_times_of_the_decisions(make_job, num_runs):
    curves, settings = ReferenceCurves({}), ScheduleSettings(decisions_per_job=3, early_decisions=False)
    usual = curves.curve(make_job(steps=15), 0)
    seldom = curves.curve(make_job(steps=15), 0, settings=settings)
    assert settings.intervals(15) == (5, 5, 5)
    assert len(seldom) == 4
    assert (seldom[0], seldom[-1]) == (usual[0], usual[-1])
    assert num_runs == [0, 0]


def test_a_default_rate_that_destroys_the_model_counts_as_no_improvement(make_job):
    job = make_job(steps=8, learning_rate=1e30)
    curve = ReferenceCurves({}).curve(job, 0)
    assert all(math.isfinite(value) for value in curve)
    assert curve[-1] == curve[0]


def test_a_reference_leaves_the_global_generator_alone(make_job):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ReferenceCurves({}).curve(make_job("bert", steps=4), 0)
    assert torch.equal(torch.get_rng_state(), before)
