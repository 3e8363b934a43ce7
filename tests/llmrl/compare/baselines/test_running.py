"""Whole jobs of the baselines: what they share with policies, and that they are what their libraries do."""

import sys

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.session import FineTuningSession

from llmrl.compare.baselines.catalogue import make_baseline
from llmrl.compare.baselines.optimizers import schedule_free_adamw
from llmrl.compare.baselines.rates import FixedRates
from llmrl.compare.baselines.running import Baseline, run_baseline
from llmrl.compare.names import BASELINE_NAMES
from llmrl.hosts.job import named_schedule, run_job

WARMUP = 0.25


@pytest.fixture(scope="module")
def job(make_config):
    return JobLibrary("cpu").job(make_config().tasks[0])


def run(job, name, rate=1e-2, seed=1, curve_points=0):
    return run_baseline(job, make_baseline(name, WARMUP), learning_rate=rate, seed=seed, curve_points=curve_points)


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_it_trains_repeats_itself_and_does_not_notice_its_curve(job, name):
    first, again, measured = run(job, name), run(job, name), run(job, name, curve_points=4)
    assert first.final.loss < first.initial.loss
    assert first.final == again.final == measured.final
    assert first.initial == run_job(job, named_schedule("linear", 0.0), learning_rate=1e-2, seed=1).initial
    assert measured.curve[-1].step == job.task.steps
    assert measured.tokens_trained == first.tokens_trained > 0
    assert measured.tokens_evaluated == first.tokens_evaluated
    assert (first.tokens_evaluated > 0) is (name in ("plateau", "greedy", "greedy_bounded"))


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_the_given_rate_matters_where_it_is_said_to(job, name):
    depends = run(job, name, 1e-2).final != run(job, name, 3e-3).final
    assert make_baseline(name, WARMUP).depends_on_rate is depends


def test_a_fixed_shape_is_the_usual_schedule_to_the_bit(job):
    baseline = Baseline(lambda given, task: FixedRates("cosine", given, task.steps, 2), {})
    for rate in (1e-2, 1e-1):
        found = run_baseline(job, baseline, learning_rate=rate, seed=3)
        usual = run_job(job, named_schedule("cosine", 0.25), learning_rate=rate, seed=3, guarded=False)
        assert found.final == usual.final
        assert found.events == usual.events


def test_zclip_without_outliers_is_linear_decay(job):
    usual = run_job(job, named_schedule("linear", WARMUP), learning_rate=1e-2, seed=1, guarded=False)
    assert run(job, "zclip").final.loss == pytest.approx(usual.final.loss, rel=0.05)


def test_rates_of_the_record_are_those_of_the_optimizer(job):
    assert [point.learning_rate for point in run(job, "schedule_free", curve_points=4).curve] == [
        None, 1e-2, 1e-2, 1e-2, 1e-2,
    ]  # fmt: skip
    rates = [point.learning_rate for point in run(job, "prodigy", curve_points=4).curve[1:]]
    assert 1e-5 <= rates[0] < 1.0
    rates = [point.learning_rate for point in run(job, "hypergradient", curve_points=4).curve[1:]]
    assert len(set(rates)) > 1


def test_a_schedule_free_job_equals_the_package_in_a_loop_of_ones_own(job):
    schedulefree = pytest.importorskip("schedulefree")
    result = run(job, "schedule_free")
    session = FineTuningSession(job, seed=1)  # for its batches and its initial weights
    session.optimizer = schedulefree.AdamWScheduleFree(session.job.loaded.trainable.values(), lr=1e-2, warmup_steps=2)
    session.optimizer.train()
    for _ in range(job.task.steps):
        session._accumulate_gradients()
        torch.nn.utils.clip_grad_norm_(session.job.loaded.trainable.values(), 1.0)
        session.optimizer.step()
        session.optimizer.zero_grad()
        session.step += 1
    session.optimizer.eval()
    deployed = torch.cat([p.detach().flatten().clone() for p in job.loaded.trainable.values()])
    found = session.evaluate("test")
    assert found.loss == pytest.approx(result.final.loss, rel=1e-6)
    assert torch.equal(torch.cat([p.detach().flatten() for p in job.loaded.trainable.values()]), deployed)


def test_evaluation_sees_deployed_weights_and_gives_those_of_training_back(job):
    session = FineTuningSession(job, seed=0, optimizer=schedule_free_adamw(0))
    session.run_interval(4, FixedRates("constant", 1e-2, 8))
    before = [p.detach().clone() for p in job.loaded.trainable.values()]
    evaluated = session.evaluate("validation").loss
    assert all(torch.equal(p, old) for p, old in zip(job.loaded.trainable.values(), before, strict=True))
    assert all(group["train_mode"] for group in session.optimizer.param_groups)
    session.optimizer.eval()
    assert any(not torch.equal(p, old) for p, old in zip(job.loaded.trainable.values(), before, strict=True))
    assert session.evaluate("validation").loss == evaluated


def test_another_optimizer_is_not_measured_and_not_snapshot(job):
    session = FineTuningSession(job, seed=0, optimizer=schedule_free_adamw(0))
    statistics = session.run_interval(2, FixedRates("constant", 1e-2, 8))
    assert np.isfinite(statistics.loss).all()
    assert np.isnan(statistics.update_norm).all()
    with pytest.raises(ValueError, match="AdamW"):
        session.snapshot()


@pytest.mark.parametrize(("name", "package"), [("schedule_free", "schedulefree"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_told(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"(?s){name}.*{package}: pip install 'llmrl\[baselines\]'"):
        make_baseline(name, 0.0)
