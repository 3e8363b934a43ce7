"""The recorder's measurements against what the optimizer really did."""

import math

import numpy as np
import pytest
import torch
from llmrl_envs.interface import tensor_sums, updates
from llmrl_envs.interface.recorder import LowRankPair, StatisticsRecorder
from llmrl_envs.interface.statistics import TuningMode
from torch.nn import Parameter


class Job:
    """Random parameters with random gradients under AdamW."""

    def __init__(self, shapes, *, learning_rate=1e-2, dtype=torch.float32, seed=0, pairs=(), **optimizer):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        made = [self.random(shape) for shape in shapes]
        self.parameters = [Parameter(tensor) for tensor in made]
        self.parameters += [part for pair in pairs for part in (pair.a, pair.b)]
        self.learning_rate = learning_rate
        options = {"weight_decay": 0.0, "lr": learning_rate, **optimizer}
        self.optimizer = torch.optim.AdamW(self.parameters, **options)
        self.recorder = StatisticsRecorder(
            self.optimizer,
            device=torch.device("cpu"),
            mode=TuningMode.LORA if pairs else TuningMode.FULL,
            trainable_fraction=0.5,
            capacity_steps=16,
            pairs=pairs,
        )

    def random(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)

    def step(self, *, probe=True, loss=1.0, limit=1e9, frozen=()):
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None if index in frozen else self.random(parameter.shape)
        active = [p for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(active, limit)
        self.recorder.before_update(active, probe=probe)
        self.recorder.record_step(torch.tensor(loss), norm, learning_rate=self.learning_rate, max_gradient_norm=limit)
        before = [p.detach().clone() for p in self.parameters]
        self.optimizer.step()
        self.recorder.after_update(active, probe=probe)
        return before, float(norm)

    def collect(self, **arguments):
        return self.recorder.collect(step=3, total_steps=10, **arguments)


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "eps": 1e-2}, {"fused": True}], ids=str)
@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_update_norm_is_the_change_of_the_weights_at_rate_one(options, num_steps):
    job = Job([(5, 4), (7,)], **options)
    for _ in range(num_steps):
        before, _ = job.step()
    found = job.collect()
    matrix = job.parameters[0]
    change, weight = (matrix.detach() - before[0]).norm() / 1e-2, matrix.detach().norm()
    assert found.update_norm[0] == pytest.approx(float(change), rel=1e-4)
    assert found.weight_norm[0] == pytest.approx(float(weight), rel=1e-5)
    assert found.step_size[0] == pytest.approx(float(change / weight) * 1e-2, rel=1e-4)


def test_a_level_refers_to_matrices_however_large_the_gains_of_norm_layers_are():
    few, many = Job([(5, 4)]), Job([(5, 4), (7,)])
    with torch.no_grad():
        many.parameters[1].mul_(100.0)
    assert many.recorder.initial_norms(many.parameters) == pytest.approx(few.recorder.initial_norms(few.parameters))
    many.step()
    found = many.collect()
    assert found.weight_norm[0] == pytest.approx(float(many.parameters[0].detach().norm()), rel=1e-5)
    assert found.update_norm[0] == pytest.approx(math.sqrt(20), rel=1e-3)


def test_a_level_refers_to_vectors_where_nothing_else_is_trained():
    job = Job([(5,), (7,)])
    job.step()
    found = job.collect()
    assert found.weight_norm[0] == pytest.approx(float(flat(job.parameters).norm()), rel=1e-5)
    assert found.update_norm[0] == pytest.approx(math.sqrt(12), rel=1e-3)


def test_weight_decay_is_no_part_of_the_update():
    plain, decayed = Job([(5, 4)]), Job([(5, 4)], weight_decay=0.3)
    for job in (plain, decayed):
        job.step()
    assert decayed.collect().update_norm[0] == plain.collect().update_norm[0]


def test_the_step_size_is_a_mean_over_the_intervals_rates():
    job = Job([(5, 4)])
    job.step(probe=False)
    job.learning_rate = 3e-2
    job.step()
    found = job.collect()
    assert found.step_size[0] == pytest.approx(2e-2 * found.update_norm[0] / found.weight_norm[0], rel=1e-6)


def test_the_momentum_cosine_is_that_of_the_new_gradient_to_the_old_momentum():
    job = Job([(5, 4), (7,)])
    gradients = []
    for _ in range(3):
        job.step()
        gradients.append(flat(p.grad for p in job.parameters))
    momentum = 0.1 * (0.9 * gradients[0] + gradients[1])
    expected = float(torch.nn.functional.cosine_similarity(gradients[2], momentum, dim=0))
    assert job.collect().momentum_cosine[0] == pytest.approx(expected, abs=1e-5)


def test_repeated_and_reversed_gradients_have_cosines_of_one_and_minus_one():
    for sign in (1.0, -1.0):
        job = Job([(3,)])
        parameter = job.parameters[0]
        for factor in (1.0, sign):
            parameter.grad = torch.tensor([1.0, -2.0, 3.0]) * factor
            job.recorder.before_update([parameter], probe=True)
            job.recorder.record_step(torch.tensor(1.0), torch.tensor(1.0), learning_rate=0.1, max_gradient_norm=1.0)
            job.optimizer.step()
        assert job.collect().momentum_cosine[0] == pytest.approx(sign, abs=1e-6)


def test_the_signal_to_noise_is_one_for_a_constant_gradient_and_small_for_noise():
    job = Job([(2000,)])
    for _ in range(12):
        job.step()
    assert job.collect().signal_to_noise[0] < 0.4
    steady = Job([(3,)])
    for _ in range(4):
        steady.parameters[0].grad = torch.tensor([1.0, -2.0, 3.0])
        steady.optimizer.step()
        steady.recorder.after_update(steady.parameters, probe=True)
    steady.recorder.record_step(torch.tensor(1.0), torch.tensor(1.0), learning_rate=0.1, max_gradient_norm=1.0)
    assert steady.collect().signal_to_noise[0] == pytest.approx(1.0, abs=1e-4)


# -- low-rank adapters ----------------------------------------------------------------------------------------------


def low_rank_job(learning_rate=1e-6):
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for out, rank, width, scaling in ((6, 2, 5, 2.0), (4, 3, 7, 0.5)):
        a = Parameter(torch.randn(rank, width, generator=generator, dtype=torch.float64))
        b = Parameter(torch.randn(out, rank, generator=generator, dtype=torch.float64))
        pairs.append(LowRankPair(a, b, scaling, weight_norm=3.0 + out))
    return Job([(4, 2)], learning_rate=learning_rate, dtype=torch.float64, pairs=tuple(pairs)), pairs


def products(pairs):
    return [pair.scaling * (pair.b @ pair.a).detach().clone() for pair in pairs]


def test_the_update_norm_of_adapters_is_that_of_the_dense_change():
    job, pairs = low_rank_job()
    for _ in range(3):
        dense = products(pairs)
        before, _ = job.step()
    found = job.collect()
    changes = [new - old for new, old in zip(products(pairs), dense, strict=True)]
    changes.append(job.parameters[0].detach() - before[0])  # a plain parameter beside them, as a classifier's head
    assert found.update_norm[0] == pytest.approx(float(flat(changes).norm()) / 1e-6, rel=1e-4)
    weight = math.sqrt(9.0**2 + 7.0**2 + float(job.parameters[0].detach().square().sum()))
    assert found.weight_norm[0] == pytest.approx(weight, rel=1e-5)


def test_frozen_parameters_count_neither_in_the_update_nor_in_the_weights():
    job, pairs = low_rank_job()
    job.step()
    job.collect()
    dense = products(pairs)
    job.step(frozen=(0, 1, 2))  # the plain parameter and the first pair
    found = job.collect()
    change = products(pairs)[1] - dense[1]
    assert found.update_norm[0] == pytest.approx(float(change.norm()) / 1e-6, rel=1e-4)
    assert found.weight_norm[0] == pytest.approx(7.0, rel=1e-6)


# -- before the first step ------------------------------------------------------------------------------------------


def test_initial_norms_bound_the_first_update_of_plain_parameters():
    job = Job([(30, 40), (70,)], learning_rate=1e-3)
    update, weight = job.recorder.initial_norms(job.parameters)
    assert update == math.sqrt(1200)
    assert weight == pytest.approx(float(job.parameters[0].detach().norm()), rel=1e-6)
    job.step()
    assert job.collect().update_norm[0] == pytest.approx(update, rel=1e-3)


def test_initial_norms_foresee_the_first_update_of_adapters():
    """B is zero at first, so the weight changes by scaling * u_B @ A, with u_B of random signs."""
    generator = torch.Generator().manual_seed(1)
    a = Parameter(torch.randn(4, 60, generator=generator))
    pair = LowRankPair(a, Parameter(torch.zeros(400, 4)), scaling=2.0, weight_norm=11.0)
    job = Job([], pairs=(pair,))
    update, weight = job.recorder.initial_norms(job.parameters)
    assert weight == pytest.approx(11.0)
    before = pair.b.detach().clone()
    job.step()
    u_b = (pair.b.detach() - before) / 1e-2
    assert update == pytest.approx(float((2.0 * u_b @ a.detach()).norm()), rel=0.1)


# -- the interval ---------------------------------------------------------------------------------------------------


def test_an_interval_reports_each_step_as_it_was():
    job = Job([(5,)])
    norms = [job.step(probe=False, loss=2.0)[1], job.step(probe=False, loss=float("nan"))[1]]
    norms += [job.step(probe=False, loss=1.5, limit=0.1)[1], job.step(loss=float("inf"))[1]]
    found = job.collect(validation_loss=0.7)
    np.testing.assert_allclose(found.loss[0], [2.0, np.nan, 1.5, np.nan])
    np.testing.assert_allclose(found.gradient_norm[0], [norms[0], np.nan, norms[2], np.nan], rtol=1e-6)
    assert found.skipped[0].tolist() == [False, True, False, True]
    assert found.clipped[0].tolist() == [False, False, True, False]
    assert (found.step[0], found.total_steps[0], found.num_steps[0]) == (3, 10, 4)
    assert (found.validation_loss[0], found.mode[0], found.trainable_fraction[0]) == (0.7, TuningMode.FULL, 0.5)


@pytest.mark.parametrize("loss", [2.0, 1e-30, float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [None, 0.0, 3.5, float("nan"), float("-inf")])
def test_a_step_is_noted_on_a_device_as_on_a_cpu(loss, norm):
    job = Job([(5,)])
    told = None if norm is None else torch.tensor(norm)
    on_device = job.recorder._note_on_device(0, torch.tensor(loss), told)
    on_cpu = job.recorder._note_on_cpu(1, float(torch.tensor(loss)), norm)
    assert bool(on_device) is on_cpu is (math.isfinite(loss) and (norm is None or math.isfinite(norm)))
    first, second = job.recorder._steps[:2]
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("outlying", [False, True])
@pytest.mark.parametrize("loss", [2.0, float("nan")])
def test_a_step_that_stands_out_is_noted_on_a_device_as_on_a_cpu(loss, outlying):
    job = Job([(5,)])
    on_device = job.recorder._note_on_device(0, torch.tensor(loss), torch.tensor(1.0), torch.tensor(outlying))
    on_cpu = job.recorder._note_on_cpu(1, loss, 1.0, torch.tensor(outlying))
    assert bool(on_device) is on_cpu is (math.isfinite(loss) and not outlying)
    torch.testing.assert_close(*job.recorder._steps[:2], rtol=0.0, atol=0.0, equal_nan=True)


def test_an_interval_starts_empty():
    job = Job([(5,)])
    job.step()
    job.collect()
    job.step(probe=False, loss=3.0)
    found = job.collect()
    assert found.loss.tolist() == [[3.0]]
    for name in ("update_norm", "weight_norm", "step_size", "momentum_cosine", "signal_to_noise", "validation_loss"):
        assert np.isnan(getattr(found, name)).all(), name


def test_more_steps_than_an_interval_holds_are_a_programming_error():
    job = Job([(5,)])
    for _ in range(16):
        job.step(probe=False)
    with pytest.raises(ValueError, match="at most 16 steps"):
        job.step(probe=False)


def test_values_are_averaged_over_the_processes():
    job = Job([(5,)])
    job.step(loss=2.0)
    found = job.collect(reduce=lambda tensor: (tensor + 2 * tensor) / 2)
    assert found.loss.tolist() == [[3.0]]


def test_an_optimizer_without_moments_leaves_the_update_unknown():
    parameter = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    recorder = StatisticsRecorder(
        optimizer, device=torch.device("cpu"), mode=TuningMode.FULL, trainable_fraction=1.0, capacity_steps=4
    )
    parameter.grad = torch.ones(3)
    recorder.before_update([parameter], probe=True)
    recorder.record_step(torch.tensor(1.0), torch.tensor(1.0), learning_rate=0.1, max_gradient_norm=1.0)
    optimizer.step()
    recorder.after_update([parameter], probe=True)
    found = recorder.collect(step=1, total_steps=4)
    assert found.loss.tolist() == [[1.0]]
    for name in ("update_norm", "step_size", "momentum_cosine", "signal_to_noise"):
        assert np.isnan(getattr(found, name)).all(), name


def test_measuring_leaves_weights_gradients_and_moments_alone():
    measured, blind = Job([(5, 4), (7,)]), Job([(5, 4), (7,)])
    for _ in range(3):
        measured.step(probe=True)
        blind.step(probe=False)
    for one, other in zip(measured.parameters, blind.parameters, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)
        for name, value in measured.optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(blind.optimizer.state[other][name]))


def test_a_host_that_tells_no_gradient_norm_skips_no_step():
    """Neither the norm nor anything made of it is known; the step was taken."""
    job = Job([(5,)])
    for loss in (2.0, float("inf")):
        job.recorder.record_step(torch.tensor(loss), None, learning_rate=1e-2, max_gradient_norm=1.0)
    found = job.collect()
    assert found.skipped.tolist() == [[False, True]]
    assert not found.clipped.any()
    assert np.isnan(found.gradient_norm).all()
    assert found.loss[0, 0] == 2.0


@pytest.mark.parametrize("factors", [(1.0, 1.0), (10.0, 1.0), (0.0, 3.0)], ids=str)
def test_groups_with_rates_of_their_own_add_up_to_the_change_of_the_weights(factors):
    generator = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((4, 3), (7, 2))]
    groups = [{"params": [p], "lr": 1e-3 * f} for p, f in zip(parameters, factors, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    recorder = StatisticsRecorder(
        optimizer, device=torch.device("cpu"), mode=TuningMode.FULL, trainable_fraction=1.0, capacity_steps=4,
        multipliers=factors,
    )  # fmt: skip
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    before = flat(parameters)
    recorder.record_step(torch.tensor(1.0), torch.tensor(1.0), learning_rate=1e-3, max_gradient_norm=1.0)
    optimizer.step()
    recorder.after_update(parameters, probe=True)
    moved = (flat(parameters) - before).norm() / 1e-3
    assert recorder.collect(step=1, total_steps=4).update_norm[0] == pytest.approx(float(moved), rel=1e-5)


def test_the_change_of_the_weights_and_adams_moments_measure_the_same_update():
    found = []
    for source in ("moments", "difference"):
        job = Job([(5, 4), (7,)], dtype=torch.float64)
        job.recorder._source = source
        for _ in range(3):
            for p in job.parameters:
                p.grad = job.random(p.shape)
            job.recorder.before_update(job.parameters, probe=True, learning_rate=job.learning_rate)
            job.recorder.record_step(
                torch.tensor(1.0), torch.tensor(1.0), learning_rate=job.learning_rate, max_gradient_norm=1.0
            )
            job.optimizer.step()
            job.recorder.after_update(job.parameters, probe=True)
        found.append(job.collect())
    assert found[0].update_norm[0] == pytest.approx(found[1].update_norm[0], rel=1e-4)
    assert found[0].weight_norm[0] == pytest.approx(found[1].weight_norm[0], rel=1e-6)


def test_a_restored_recorder_goes_on_within_the_interval():
    whole, first, second = (Job([(5,)]) for _ in range(3))
    whole.step(loss=1.0, probe=False)
    first.step(loss=1.0, probe=False)
    second.recorder.load_state_dict(first.recorder.state_dict())
    for job in (whole, second):
        job.recorder.record_step(torch.tensor(2.0), torch.tensor(3.0), learning_rate=1e-2, max_gradient_norm=1.0)
    ours, theirs = second.collect(), whole.collect()
    assert ours.loss.tolist() == theirs.loss.tolist() == [[1.0, 2.0]]
    assert ours.gradient_norm.tolist() == theirs.gradient_norm.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_added_up_in_full(dtype):
    """The squares of a thousand weights of ten overflow float16, and stand still in bfloat16."""
    parameter = Parameter(torch.full((1000,), 10.0, dtype=dtype))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, eps=1e-4, weight_decay=0.0)
    recorder = StatisticsRecorder(
        optimizer, device=torch.device("cpu"), mode=TuningMode.FULL, trainable_fraction=1.0, capacity_steps=4
    )
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        recorder.before_update([parameter], probe=True)
        recorder.record_step(torch.tensor(1.0), torch.tensor(1.0), learning_rate=1e-3, max_gradient_norm=1.0)
        optimizer.step()
        recorder.after_update([parameter], probe=True)
    found = recorder.collect(step=2, total_steps=4)
    assert found.weight_norm[0] == pytest.approx(10.0 * 1000**0.5, rel=0.01)
    assert found.update_norm[0] == pytest.approx(1000**0.5, rel=0.05)
    assert found.momentum_cosine[0] == pytest.approx(1.0, abs=0.01)


# -- a slow twin ----------------------------------------------------------------------------------------------------


def slow_statistics(parameters, optimizer, multipliers, momenta):
    """||u|| and ||theta|| of matrices, cosine and signal-to-noise of all, coordinate by coordinate in float64."""
    updates, means, variances = [], [], []
    for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
        for parameter in group["params"]:
            state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
            mean = state["exp_avg"].double() / (1 - beta1 ** float(state["step"]))
            variance = state["exp_avg_sq"].double() / (1 - beta2 ** float(state["step"]))
            if parameter.ndim >= 2:
                updates.append(multiplier * mean / (variance.sqrt() + group["eps"]))
            means.append(mean)
            variances.append(variance)
    gradient, momentum = flat(p.grad for p in parameters), flat(momenta)
    return {
        "update_norm": flat(updates).norm(),
        "weight_norm": flat(p for p in parameters if p.ndim >= 2).norm(),
        "momentum_cosine": gradient @ momentum / (gradient.norm() * momentum.norm()),
        "signal_to_noise": flat(means).norm() / flat(variances).sum().sqrt(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_all_measurements_are_those_of_a_slow_twin(dtype, fused, on_device, monkeypatch):
    """Over several pieces, groups with moments of their own, parameters stepped unequally often, and rows of zeros."""
    if on_device:
        for module in (tensor_sums, updates):
            monkeypatch.setattr(module, "cpu_array", lambda tensor: None)
    job = Job([(700, 900), (7,), (300, 40), (1,)], dtype=dtype)
    first, second = job.parameters[:2], job.parameters[2:]
    job.optimizer = torch.optim.AdamW(
        [{"params": first}, {"params": second, "betas": (0.8, 0.95), "eps": 1e-3}], lr=1e-2, fused=fused
    )
    multipliers = (1.0, 0.25)
    job.recorder = StatisticsRecorder(
        job.optimizer, device=torch.device("cpu"), mode=TuningMode.FULL, trainable_fraction=1.0, capacity_steps=4,
        multipliers=multipliers,
    )  # fmt: skip
    for step in range(4):
        for index, parameter in enumerate(job.parameters):
            parameter.grad = None if index == 3 and step == 0 else job.random(parameter.shape).mul_(10.0 ** -(2 * step))
        job.parameters[0].grad[300:500] = 0.0
        job.recorder.before_update(job.parameters, probe=step == 3)
        if step == 3:
            momenta = [job.optimizer.state[p]["exp_avg"].clone() for p in job.parameters]
        job.recorder.record_step(torch.tensor(1.0), None, learning_rate=1e-2, max_gradient_norm=1.0)
        job.optimizer.step()
        job.recorder.after_update(job.parameters, probe=step == 3)
    expected = slow_statistics(job.parameters, job.optimizer, multipliers, momenta)
    found = job.collect()
    for name, value in expected.items():
        assert getattr(found, name)[0] == pytest.approx(float(value), rel=2e-6, abs=2e-7), name
