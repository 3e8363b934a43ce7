"""Which steps stand out: against the same rule written out for one job, number by number."""

import math
import statistics

import numpy as np
import pytest
import torch
from llmrl_envs.interface.outliers import (
    FIRST_STEPS,
    LEAST_STEPS,
    MEMORY,
    MOST_IN_A_ROW,
    MULTIPLE,
    RATIO,
    OutlierSteps,
)

CPU = torch.device("cpu")


def written_out(losses):
    """Whether each step stands out: one job, plain numbers."""
    found, taken, mean, variance, in_a_row = [], [], 0.0, 0.0, 0
    # The first loss has no difference to one before, so there is one difference less than there are losses.
    for loss in losses:
        if not math.isfinite(loss):
            found.append(False)
            continue
        first = statistics.fmean(taken[:FIRST_STEPS]) if taken else 0.0
        far = loss > mean + MULTIPLE * math.sqrt(variance) and loss > RATIO * first > 0.0
        found.append(len(taken) >= LEAST_STEPS and in_a_row < MOST_IN_A_ROW and far)
        in_a_row = in_a_row + 1 if found[-1] else 0
        if found[-1]:
            continue
        mean += max(1 / (len(taken) + 1), 1 / MEMORY) * (loss - mean)
        if taken:
            variance += max(1 / len(taken), 1 / MEMORY) * ((loss - taken[-1]) ** 2 / 2 - variance)
        taken.append(loss)
    return found


def judged(losses):
    judge = OutlierSteps(1, CPU)
    return [bool(judge.judge(torch.tensor([loss]))[0]) for loss in losses]


def job(seed, steps=80, bad=()):
    """Losses of a job that learns, with batches that do not belong to it."""
    rng = np.random.default_rng(seed)
    losses = 4.0 - 2.0 * np.linspace(0.0, 1.0, steps) + 0.1 * rng.standard_normal(steps)
    losses[list(bad)] = 7.0
    return losses.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_steps_are_judged_as_by_the_rule_written_out(seed):
    rng = np.random.default_rng(seed)
    losses = np.array(job(seed, bad=(30, 31, 50))) + rng.choice([0.0, 0.5, 3.0], 80, p=[0.9, 0.08, 0.02])
    losses[rng.integers(0, 80, 4)] = [math.nan, math.inf, math.nan, -math.inf]
    assert judged(losses.tolist()) == written_out(losses.tolist())


def test_bad_batches_are_found_and_nothing_else_is():
    bad = (24, 25, 26, 60)
    assert [step for step, found in enumerate(judged(job(0, bad=bad))) if found] == list(bad)


def test_a_job_is_not_judged_before_its_losses_are_known():
    losses = job(0, bad=(0, 1, LEAST_STEPS - 1))
    assert not any(judged(losses))


def test_a_hard_example_late_in_a_job_is_learned_from():
    losses = job(0)
    losses[70] = 5.0  # far above its neighbours, and a quarter above the first losses
    assert not any(judged(losses))


def test_a_classifier_that_begins_to_tell_classes_apart_learns_on():
    """At chance there is hardly any noise, and of a sudden there is."""
    rng = np.random.default_rng(0)
    losses = 0.69 + np.concatenate([0.01 * rng.standard_normal(12), 0.15 * rng.standard_normal(30)])
    assert max(losses[12:]) > 0.69 + 20 * 0.01
    assert not any(judged(losses.tolist()))


def test_losses_around_zero_are_not_judged():
    losses = (0.001 * np.random.default_rng(0).standard_normal(60)).tolist()
    losses[0:3], losses[40] = [0.0, 0.0, 0.0], 9.0
    assert not any(judged(losses))


def test_a_job_that_is_elsewhere_goes_on_from_there():
    losses = job(0, steps=40) + [7.0] * 30
    found = judged(losses)
    assert found[40:45] == [True] * MOST_IN_A_ROW
    assert not any(found[45:])


def test_what_is_not_finite_is_no_outlier_and_tells_nothing():
    losses = job(0, bad=(30,))
    without = judged(losses)
    assert judged([*losses[:30], math.nan, math.inf, *losses[30:]]) == [*without[:30], False, False, *without[30:]]


def test_rows_know_nothing_of_each_other():
    jobs = [job(seed, bad=(20 + seed,)) for seed in range(3)]
    together = OutlierSteps(4, CPU)
    found = []
    for step in range(80):
        row = torch.tensor([losses[step] for losses in jobs])
        found.append(together.judge(row, slice(1, 4)).tolist())
    assert np.array(found).T.tolist() == [judged(losses) for losses in jobs]
    assert not together.state[0].any()
    together.forget(2)
    assert not together.state[2].any()
    assert together.state[[1, 3], OutlierSteps.NAMES.index("count")].tolist() == [79.0, 79.0]


def test_a_job_goes_on_from_values_and_those_of_earlier_versions_know_nothing():
    losses = job(1, bad=(40, 41))
    first, second, third = (OutlierSteps(1, CPU) for _ in range(3))
    for loss in losses[:41]:
        first.judge(torch.tensor([loss]))
    second.load_values({"step": 41, **first.values()})
    assert torch.equal(first.state, second.state)
    third.load_values({"step": 41})
    assert not third.state.any()
