"""Summaries of losses and gradients, against a slow twin that knows one job and writes loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmrl_envs.interface.loss_tracker import LossTracker


class SlowTracker:
    """One job's features, written down as they are defined."""

    def __init__(self, total_steps):
        self.half_lives = [max(share * total_steps, 1.0) for share in (0.005, 0.015, 0.05, 0.12, 0.3)]
        self.averages, self.minima = [None] * 5, [math.inf] * 5
        self.last = None
        self.noise_sum = self.noise_weight = 0.0
        self.norms = []  # (weight, log norm) of all intervals so far
        self.slope, self.spike, self.gradient = 0.0, 0.0, [0.0] * 5

    def noise(self):
        return math.sqrt(self.noise_sum / max(self.noise_weight, 1.0)) + 1e-6

    def update(self, losses, norms, clipped, skipped):
        z_scores = []
        for loss in losses:
            if not math.isfinite(loss):
                continue
            log_loss = math.log(max(loss, 1e-12))
            if self.noise_weight > 0:
                z_scores.append((log_loss - math.log(max(self.averages[1], 1e-12))) / self.noise())
            for i, half_life in enumerate(self.half_lives):
                decay = 0.5 ** (1 / half_life)
                old = self.averages[i]
                self.averages[i] = loss if old is None else decay * old + (1 - decay) * loss
                self.minima[i] = min(self.minima[i], self.averages[i])
            if self.last is not None:
                self.noise_sum = 0.9 * self.noise_sum + 0.5 * (log_loss - self.last) ** 2
                self.noise_weight = 0.9 * self.noise_weight + 1
            self.last = log_loss
        self.spike = max(z_scores, default=0.0)
        self.slope = self._slope([(i, math.log(max(v, 1e-12))) for i, v in enumerate(losses) if math.isfinite(v)])
        self._gradients(norms, clipped, skipped)

    def _slope(self, points):
        if len(points) < 2:
            return 0.0
        x, y = np.array(points).T
        coefficient = np.polyfit(x - x.mean(), y, 1)[0]
        return coefficient / (self.noise() / math.sqrt(((x - x.mean()) ** 2).sum()))

    def _gradients(self, norms, clipped, skipped):
        kept = [n for n, s in zip(norms, skipped, strict=True) if math.isfinite(n) and not s]
        logs = [math.log(max(n, 1e-12)) for n in kept]
        trend = z_score = variation = 0.0
        if kept:
            variation = float(np.std(kept)) / max(float(np.mean(kept)), 1e-12)
        if kept and self.norms:
            weights, values = np.array(self.norms).T
            mean = np.average(values, weights=weights)
            deviation = math.sqrt(max(np.average((values - mean) ** 2, weights=weights), 1e-6))
            trend, z_score = float(np.mean(logs)) - mean, (logs[-1] - mean) / deviation
        count = max(len(norms), 1)
        self.gradient = [trend, z_score, variation, sum(clipped) / count, sum(skipped) / count]
        self.norms = [(w * 0.9 ** len(kept), v) for w, v in self.norms] + [(1.0, v) for v in logs]

    def ratios(self):
        found = []
        for i in range(4):
            if self.averages[0] is None:
                found.append(0.0)
                continue
            span = self.averages[i + 1] - self.minima[i]
            usable = abs(span) > 1e-9 * abs(self.averages[i + 1])
            ratio = (self.averages[i] - self.minima[i]) / span - 1 if usable else 0.0
            found.append(min(max(ratio, -1.0), 1.0))
        return found


LOSSES = st.one_of(st.floats(1e-3, 20.0), st.sampled_from([math.nan, math.inf, 0.0, 2.5]))
STEPS = st.lists(
    st.tuples(LOSSES, st.one_of(st.floats(1e-4, 1e3), st.sampled_from([math.nan, 1.0])), st.booleans()), max_size=8
)


@settings(max_examples=80, deadline=None)
@given(intervals=st.lists(STEPS, min_size=1, max_size=6), total_steps=st.integers(1, 800))
def test_features_agree_with_the_slow_twin(make_statistics, intervals, total_steps):
    fast, slow = LossTracker(1), SlowTracker(total_steps)
    for interval in intervals:
        loss, norm, clipped = (list(column) for column in zip(*interval, strict=True)) if interval else ([], [], [])
        statistics = make_statistics([loss], [norm], total_steps=total_steps, clipped=np.array([clipped], np.bool_))
        fast.update(statistics)
        slow.update(loss, norm, clipped, statistics.skipped[0])
        # Cancellation in the running sums leaves the z-score the least exact of all.
        close = {"rel": 1e-6, "abs": 1e-6}
        assert fast.noise()[0] == pytest.approx(slow.noise(), **close)
        assert fast.slope[0] == pytest.approx(slow.slope, **close)
        assert fast.spike[0] == pytest.approx(slow.spike, **close)
        assert fast.ratios()[0] == pytest.approx(slow.ratios(), **close)
        assert fast.gradient_features[0] == pytest.approx(slow.gradient, **close)
        if slow.averages[1] is None:
            assert np.isnan(fast.smoothed()[0])
        else:
            assert fast.smoothed()[0] == pytest.approx(slow.averages[1], **close)


def test_jobs_of_different_interval_lengths_side_by_side_equal_jobs_alone(make_statistics):
    rng = np.random.default_rng(0)
    together, alone = LossTracker(2), [LossTracker(1), LossTracker(1)]
    for counts in ((4, 2), (1, 6), (0, 3), (5, 5)):
        loss, norm = rng.uniform(0.5, 4.0, (2, max(counts))), rng.uniform(0.1, 3.0, (2, max(counts)))
        together.update(make_statistics(loss, norm, num_steps=np.array(counts)))
        for lane, count in enumerate(counts):
            alone[lane].update(make_statistics(loss[[lane], :count], norm[[lane], :count]))
    state = together.state_dict()
    for lane in range(2):
        for name, value in alone[lane].state_dict().items():
            np.testing.assert_allclose(state[name][[lane]], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_falling_loss_has_negative_ratios_and_slope_a_rising_one_positive(make_statistics):
    rng = np.random.default_rng(0)
    trend = np.linspace(0.0, 1.0, 40)
    for direction in (-1, 1):
        tracker = LossTracker(1)
        losses = np.exp(1.0 + direction * trend + rng.normal(0.0, 0.01, 40))
        for start in range(0, 40, 10):
            tracker.update(make_statistics(losses[start : start + 10]))
        assert np.all(np.sign(tracker.ratios()[0]) == direction)
        assert np.sign(tracker.slope[0]) == direction
        assert abs(tracker.slope[0]) > 5.0


def test_the_slope_of_pure_noise_is_about_a_standard_normal(make_statistics):
    rng = np.random.default_rng(1)
    tracker = LossTracker(500)
    for _ in range(5):
        tracker.update(make_statistics(np.exp(rng.normal(0.0, 0.1, (500, 12)))))
    assert abs(tracker.slope.mean()) < 0.2
    assert 0.8 < tracker.slope.std() < 1.4
    assert np.median(tracker.noise()) == pytest.approx(0.1, rel=0.1)


def test_a_spike_stands_out_and_is_gone_an_interval_later(make_statistics):
    rng = np.random.default_rng(2)
    tracker = LossTracker(1)
    losses = np.exp(rng.normal(0.0, 0.05, 40))
    losses[25] *= 2.0
    spikes = []
    for start in range(0, 40, 10):
        tracker.update(make_statistics(losses[start : start + 10]))
        spikes.append(tracker.spike[0])
    assert spikes[2] > 8.0
    assert max(spikes[1], spikes[3]) < 5.0


def test_a_job_that_has_just_begun_shows_no_spike(make_statistics):
    tracker = LossTracker(1)
    tracker.update(make_statistics([2.0, 2.01]))
    assert tracker.spike[0] == 0.0


def test_a_growing_gradient_shows_in_trend_and_last_value(make_statistics):
    rng = np.random.default_rng(3)
    tracker = LossTracker(1)
    tracker.update(make_statistics([1.0] * 20, np.exp(rng.normal(0.0, 0.1, 20))))
    tracker.update(make_statistics([1.0] * 5, [3.0] * 5, clipped=np.array([[True, True, False, False, False]])))
    trend, last, variation, clipped, skipped = tracker.gradient_features[0]
    assert trend == pytest.approx(math.log(3.0), abs=0.1)
    assert last > 5.0
    assert variation == pytest.approx(0.0, abs=1e-9)
    assert (clipped, skipped) == (0.4, 0.0)


def test_only_the_lanes_that_start_anew_are_forgotten(make_statistics):
    rng = np.random.default_rng(4)
    tracker, fresh = LossTracker(3), LossTracker(1)
    first, second = rng.uniform(1.0, 2.0, (2, 3, 6))
    tracker.update(make_statistics(first))
    before = tracker.state_dict()
    tracker.reset(np.array([1]))
    after = tracker.state_dict()
    for name in before:
        np.testing.assert_array_equal(after[name][[0, 2]], before[name][[0, 2]])
    tracker.update(make_statistics(second))
    fresh.update(make_statistics(second[[1]]))
    for name, value in fresh.state_dict().items():
        np.testing.assert_array_equal(tracker.state_dict()[name][[1]], value)


def test_a_restored_tracker_goes_on_as_if_never_interrupted(make_statistics):
    rng = np.random.default_rng(5)
    first, second = LossTracker(2), LossTracker(2)
    first.update(make_statistics(rng.uniform(1.0, 2.0, (2, 5))))
    second.load_state_dict(first.state_dict())
    interval = make_statistics(rng.uniform(1.0, 2.0, (2, 5)))
    first.update(interval)
    second.update(interval)
    for name, value in first.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], value)
