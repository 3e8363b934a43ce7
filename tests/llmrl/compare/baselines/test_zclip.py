"""ZClip against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from llmrl_envs.jobs.task import FineTuningTask

from llmrl.compare.baselines.zclip import ZClip, zclip_for


def with_norm(norm):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.6, 0.8]) * norm
    return parameter


def clipped(clip, norm, limit=1e9):
    """Norm before and after."""
    parameter = with_norm(norm)
    before = float(clip([parameter], limit))
    return before, float(parameter.grad.norm())


def test_an_outlier_is_scaled_to_the_reciprocal_of_its_z_score():
    clip = ZClip(2, decay=0.9, threshold=2.0)
    assert [clipped(clip, norm)[1] for norm in (1.0, 3.0)] == pytest.approx([1.0, 3.0])
    assert (clip.mean, clip.variance) == pytest.approx((2.0, 1.0))
    # z = (10 - 2) / 1 = 8, limit = 2 + 2 * 1 / (8 / 2) = 2.5, which the averages take in.
    assert clipped(clip, 10.0) == pytest.approx((10.0, 2.5), rel=1e-5)
    assert clip.mean == pytest.approx(0.9 * 2.0 + 0.1 * 2.5)
    assert clip.variance == pytest.approx(0.9 * 1.0 + 0.1 * (2.5 - 2.05) ** 2, rel=1e-5)


def test_what_is_no_outlier_is_left_alone():
    clip = ZClip(2, decay=0.9, threshold=2.0)
    for norm in (1.0, 3.0, 3.9):
        assert clipped(clip, norm)[1] == pytest.approx(norm)
    assert clip.mean == pytest.approx(0.9 * 2.0 + 0.1 * 3.9)


def test_the_limit_of_the_job_holds_as_well():
    clip = ZClip(2)
    assert [clipped(clip, norm, limit=1.5)[1] for norm in (1.0, 3.0, 2.0)] == pytest.approx([1.0, 1.5, 1.5], rel=1e-5)
    assert clip.mean == pytest.approx(2.0)  # the averages are those of the norms before the limit


def test_norms_that_are_not_finite_leave_no_trace():
    clip = ZClip(1)
    clipped(clip, 2.0)
    assert math.isnan(clipped(clip, float("nan"))[0])
    assert (clip.mean, clip.variance) == (2.0, 0.0)


def test_it_equals_the_published_recurrence_on_random_norms():
    norms = np.random.default_rng(0).lognormal(sigma=0.6, size=300)
    clip, mean, variance = ZClip(25), norms[:25].mean(), norms[:25].var()
    for norm in norms[:25]:
        clip.limit_of(float(norm))
    for norm in norms[25:]:
        z_score = (norm - mean) / (math.sqrt(variance) + 1e-6)
        taken = mean + 2.5 * math.sqrt(variance) / (z_score / 2.5) if z_score > 2.5 else norm
        assert min(clip.limit_of(float(norm)), norm) == pytest.approx(taken)
        mean = 0.97 * mean + 0.03 * taken
        variance = 0.97 * variance + 0.03 * (taken - mean) ** 2
    assert (clip.mean, clip.variance) == pytest.approx((mean, variance))


@pytest.mark.parametrize(("steps", "expected"), [(8, 2), (60, 6), (1000, 25)])
def test_short_jobs_start_the_averages_sooner(steps, expected):
    clip = zclip_for(FineTuningTask.model_validate({"data": "builtin:json", "steps": steps}))
    for number in range(expected):
        assert math.isnan(clip.mean)
        clip.limit_of(1.0 + number)
    assert not math.isnan(clip.mean)
