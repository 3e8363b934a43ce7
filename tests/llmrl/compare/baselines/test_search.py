"""Searches, populations and the choice of a level: who is tried, who is chosen, what is counted."""

import math
import sys

import numpy as np
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary

from llmrl.compare.baselines.population import Member, exploit_and_explore, run_population, starting_rates
from llmrl.compare.baselines.search import best_trial, combine_trials, search_learning_rate
from llmrl.compare.cache import CurvePoint, RunResult
from llmrl.compare.level_choice import choose_level


def result(validation, *, before=4.0, test=1.0):
    curve = (CurvePoint(0, before), CurvePoint(8, validation))
    return RunResult(
        loss_initial=4.0, loss_test=test, accuracy_test=None, diverged=False, seconds=2.0, tokens_trained=100,
        tokens_evaluated=0, curve=curve, tokens_measured=20, peak_memory_bytes=5, events={"spikes": 1},
    )  # fmt: skip


def search(num_trials, seed=0, best=1e-2):
    rates = []

    def train(rate):
        rates.append(rate)
        return result(1.0 + math.log10(rate / best) ** 2)

    search_learning_rate(train, learning_rate=1e-3, num_trials=num_trials, seed=seed)
    return rates


def test_a_shorter_search_is_the_beginning_of_a_longer_one():
    rates = search(10)
    assert search(5) == rates[:5]
    assert search(2) == rates[:2]
    assert search(5, seed=1) != rates[:5]


def test_it_tries_the_given_rate_first_and_comes_near_the_best():
    for seed in range(4):
        rates = search(10, seed)
        assert rates[0] == 1e-3
        assert all(1e-3 / 30 <= rate <= 3.0001e-2 for rate in rates)
        assert min(abs(math.log10(rate / 1e-2)) for rate in rates) < 0.4


def test_losses_that_are_not_finite_are_no_obstacle():
    rates = []
    search_learning_rate(lambda rate: rates.append(rate) or result(None), learning_rate=1.0, num_trials=5, seed=0)
    assert len(set(rates)) == 5


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="optuna: pip install"):
        search(2)


def test_the_best_on_validation_is_deployed_and_all_is_counted():
    trials = [result(2.0, test=0.1), result(None), result(1.5, test=3.0)]
    assert best_trial(trials) == 2
    found = combine_trials(trials, best_trial(trials))
    assert (found.loss_test, found.curve, found.num_trials) == (3.0, trials[2].curve, 3)
    assert (found.seconds, found.tokens_trained, found.events) == (6.0, 300, {"spikes": 3})
    assert (found.tokens_evaluated, found.tokens_measured) == (30, 30)  # one evaluation of each is the search's own


def test_the_level_is_the_best_on_average_and_large_losses_do_not_outweigh():
    large = [result(80.0, before=100.0), result(79.0, before=100.0), result(70.0, before=100.0)]
    small = [result(1.0), result(2.0), result(3.9)]
    assert choose_level([large, small]) == 0
    assert choose_level([large, large, large, small]) == 2 - 2 * (3 * math.log(80 / 70) < math.log(3.9))
    assert choose_level([[result(None), result(2.0)], [result(0.1), result(3.0)]]) == 1


def test_a_population_starts_at_the_given_rate_and_in_every_part_of_the_range():
    rates = starting_rates(1e-3, 4, np.random.default_rng(0))
    assert rates[0] == 1e-3
    places = [math.log(rate / 1e-3) / math.log(30) for rate in rates[1:]]
    assert -1 <= places[0] <= -1 / 3 <= places[1] <= 1 / 3 <= places[2] <= 1


def test_the_worst_takes_over_the_best():
    members = [Member(rate, state, loss) for rate, state, loss in ((1.0, "a", 3.0), (2.0, "b", 1.0), (3.0, "c", 9.0),
                                                                   (4.0, "d", 2.0))]  # fmt: skip
    changed = exploit_and_explore(members, np.random.default_rng(0))
    assert changed[:2] + changed[3:] == members[:2] + members[3:]
    assert (changed[2].state, changed[2].rate) in (("b", 1.6), ("b", 2.4))
    equal = [Member(1.0, "a", 1.0)] * 4
    assert exploit_and_explore(equal, np.random.default_rng(0)) == equal


def test_a_population_learns_counts_everything_and_repeats_itself(make_config):
    job = JobLibrary("cpu").job(make_config().tasks[0])
    steps: list[int] = []
    settings = {"num_members": 4, "learning_rate": 1e-3, "warmup_fraction": 0.0}
    first = run_population(job, seed=2, on_step=steps.append, **settings)
    again = run_population(job, seed=2, **settings)
    assert first.final == again.final
    assert first.curve == again.curve
    assert first.final.loss < first.initial.loss
    assert steps == list(range(1, 33))
    assert [point.step for point in first.curve] == list(range(9))
    # Eight rounds of one step, four members each; every member sees the same batches.
    assert first.tokens_trained % 4 == 0
    assert first.tokens_evaluated == 8 * 4 * first.tokens_measured
    assert {point.learning_rate for point in first.curve[1:]} != {1e-3}
