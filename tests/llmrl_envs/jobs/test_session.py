"""Sessions: one loop that is exact, repeatable, interruptible and hard to break."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.interface.statistics import TuningMode
from llmrl_envs.jobs.data import batch_indices
from llmrl_envs.jobs.losses import batch_loss
from llmrl_envs.jobs.parallel import SingleProcess
from llmrl_envs.jobs.reference import given_rate_schedule
from llmrl_envs.jobs.session import FineTuningSession, lower_half


def constant(job, learning_rate=3e-3, **changes):
    """A schedule of one rate that can still freeze and tighten."""
    settings = ScheduleSettings(base="constant", warmup_fraction=0.0, **changes)
    return Schedule(action_table("moves"), np.array([job.task.steps]), np.array([learning_rate]), settings)


def with_rate(schedule, learning_rate=3e-3):
    """Makes the default level mean this rate."""
    schedule.observe_norms(np.array([2.5e-3]), np.array([learning_rate]))
    return schedule


def rates(job, learning_rate=3e-3, **changes):
    return with_rate(constant(job, **changes), learning_rate)


def do(schedule, name):
    schedule.apply(np.array([schedule.table.names.index(name)]))


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def weights(session):
    return copies(session.job.loaded.trainable)


def moments(session, names):
    state = {name: session.optimizer.state.get(session.job.loaded.trainable[name], {}) for name in names}
    return {f"{name}.{key}": value.clone() for name, own in state.items() for key, value in own.items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def changed(first, second):
    return {name for name in first if not torch.equal(first[name], second[name])}


def run(job, intervals=(3, 4), *, seed=0, schedule=None, **arguments):
    """Trains; returns the session and the losses of all steps."""
    session = FineTuningSession(job, seed=seed, **arguments)
    schedule = schedule or rates(job)
    losses = [session.run_interval(count, schedule).loss[0] for count in intervals]
    return session, np.concatenate(losses)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), [("llama", "full"), ("bert", "full"), ("llama", "lora"), ("bert", "lora")])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(make_job, kind, mode):
    job = make_job(kind, mode=mode)
    first, losses = run(job, seed=3)
    found = weights(first)
    again, other_losses = run(job, (1, 6), seed=3)
    np.testing.assert_array_equal(losses, other_losses)
    assert_equal(found, weights(again))
    different, different_losses = run(job, seed=4)
    assert not np.array_equal(losses, different_losses)
    assert changed(found, weights(different))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_lowers_the_loss(make_job, kind):
    job = make_job(kind, steps=40)
    _, losses = run(job, (40,), schedule=rates(job, 1e-2))
    assert losses[-8:].mean() < 0.8 * losses[:8].mean()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_bad_batch_raises_the_loss_of_its_step_and_leaves_the_data_as_it_is(make_job, kind):
    """Trained first, so that there is something that it contradicts."""
    clean, bad = make_job(kind, steps=45), make_job(kind, steps=45, bad_batches=(41,))
    assert bad.data is clean.data
    (_, usual), (_, losses) = (run(job, (45,), schedule=rates(job, 1e-2, skip_outliers=False)) for job in (clean, bad))
    np.testing.assert_array_equal(losses[:41], usual[:41])
    assert losses[41] > 1.25 * usual[41]
    assert losses[42] != usual[42]


def raised(job, at=41, **arguments):
    """A session whose loss, and gradients with it, are three times what they were, at one step."""
    session = FineTuningSession(job, seed=5, **arguments)
    # Far from the largest scale, where no gradient overflows.
    session.precision.load_state_dict({"loss_scale": 16.0, "loss_scale_growth": 0.0})
    training_loss = session._passes.training_loss
    session._passes.training_loss = lambda model, batch: training_loss(model, batch) * (3 if session.step == at else 1)
    return session


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}, {"mode": "lora"}], ids=str)
def test_a_step_that_stands_out_is_not_taken(make_job, settings):
    """In a session that has come there, and in one that goes on from its snapshot."""
    job = make_job(steps=46, **settings)
    session = raised(job)
    session.run_interval(41, rates(job, 1e-2))
    before, snapshot = weights(session), session.snapshot()
    for attempt in (session, raised(job)):
        attempt.restore(snapshot)
        found = attempt.run_interval(1, rates(job, 1e-2))
        assert found.skipped.tolist() == [[True]]
        assert np.isnan(found.loss).all()
        assert_equal(weights(attempt), before)
        assert not attempt.run_interval(4, rates(job, 1e-2)).skipped.any()
        assert changed(weights(attempt), before)
    session.restore(snapshot)
    session.run_interval(1, rates(job, 1e-2, skip_outliers=False))
    assert changed(weights(session), before)


def test_a_usual_schedule_takes_every_step(make_job):
    job = make_job(steps=45)
    schedule = given_rate_schedule("constant", 45, 1e-2, 0.0)
    assert not raised(job).run_interval(45, schedule).skipped.any()


def test_accumulated_batches_equal_one_large_batch(make_job):
    """Completions differ in length, so a mean of the micro-batches' means would not."""
    small, large = make_job(batch_size=2, gradient_accumulation=4), make_job(batch_size=8)
    targets = large.data.train.num_target_tokens[batch_indices(len(large.data.train), 8, 0, 0)].reshape(4, 2).sum(1)
    assert len(set(targets.tolist())) > 1
    one, losses = run(small)
    accumulated = weights(one)
    other, other_losses = run(large)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(accumulated[name], tensor, rtol=1e-4, atol=1e-5)
    assert one.tokens_trained == other.tokens_trained


def test_the_loss_of_a_step_is_the_mean_over_its_targets_before_it(make_job):
    job = make_job()
    session = FineTuningSession(job, seed=5)
    rows = batch_indices(len(job.data.train), 4, 5, 0)
    with torch.no_grad():
        sums = [
            float(batch_loss(job.loaded.model, job.data.train.collate([i]), classification=False).loss) for i in rows
        ]
    expected = sum(sums) / job.data.train.num_target_tokens[rows].sum()
    statistics = session.run_interval(1, rates(job))
    assert statistics.loss[0, 0] == pytest.approx(expected, rel=1e-5)
    assert statistics.step.tolist() == [1]
    assert session.tokens_trained == job.data.train.num_tokens[rows].sum()


def test_the_schedule_is_asked_for_every_steps_rate(make_job):
    job = make_job(steps=8)
    schedule = with_rate(Schedule(action_table("moves"), np.array([8]), np.array([1e-3])))
    session = FineTuningSession(job, seed=0)
    used = []
    session.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    session.run_interval(5, schedule)
    session.run_interval(3, schedule)
    assert used == [float(schedule.learning_rate(np.array([step]))[0]) for step in range(8)]


def test_measuring_changes_nothing(make_job):
    job = make_job("bert")
    measured = weights(run(job)[0])
    blind, losses = run(job, record=False)
    assert_equal(measured, weights(blind))
    assert len(losses) == 0
    assert blind.step == 7


@pytest.mark.parametrize("count", [0, 13])
def test_an_interval_past_the_budget_is_a_programming_error(make_job, count):
    with pytest.raises(ValueError, match=f"expected 1 to 12, got {count}"):
        FineTuningSession(make_job(), seed=0).run_interval(count, rates(make_job()))


def test_a_batch_smaller_than_the_number_of_processes_is_refused(make_job):
    class Five(SingleProcess):
        world_size = 5

    with pytest.raises(UserError, match="at least 5"):
        FineTuningSession(make_job(batch_size=4), seed=0, parallel=Five())


@pytest.mark.parametrize(("choices", "factor"), [((), 1.0), (("tighten",), 0.25), (("tighten", "tighten"), 1.0)])
def test_gradients_are_clipped_to_the_limit_and_tighter_on_demand(make_job, choices, factor):
    job = make_job(optimizer={"max_grad_norm": 1e-2})
    session, schedule = FineTuningSession(job, seed=0), rates(job)
    for choice in choices:
        do(schedule, choice)
    statistics = session.run_interval(1, schedule)
    momentum = [session.optimizer.state[p]["exp_avg"] for p in job.loaded.trainable.values()]
    norm = torch.cat([m.flatten() for m in momentum]).norm() / 0.1
    assert float(norm) == pytest.approx(1e-2 * factor, rel=1e-3)
    assert statistics.clipped.all()
    assert statistics.gradient_norm[0, 0] > 1e-2


def test_gradients_within_the_limit_are_left_alone(make_job):
    statistics = FineTuningSession(make_job(optimizer={"max_grad_norm": 1e3}), seed=0).run_interval(
        3, rates(make_job())
    )
    assert not statistics.clipped.any()


# -- steps that must not be taken -----------------------------------------------------------------------------------


@contextmanager
def broken(job, call, how):
    """Breaks the model's forward (or its gradient) in the given call of it."""
    calls = iter(range(1000))

    def forward_hook(module, arguments, output):
        if next(calls) != call:
            return
        if how == "nan":
            output.logits = output.logits * float("nan")
        elif how == "impossible target":  # an infinite loss with finite gradients
            impossible = torch.zeros(output.logits.shape[-1])
            impossible[4 + 30 :] = float("-inf")
            output.logits = output.logits + impossible
        else:
            output.logits.register_hook(lambda gradient: gradient * float("inf"))

    handle = job.loaded.model.register_forward_hook(forward_hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["nan", "impossible target", "infinite gradient"])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation": 2}, {"precision": "fp16"}], ids=str)
def test_a_step_that_is_not_finite_is_skipped_and_counted(make_job, how, settings):
    job = make_job(**settings, batch_size=4 // settings.get("gradient_accumulation", 1))
    session, schedule = FineTuningSession(job, seed=0), rates(job)
    session.run_interval(2, schedule)
    before, names = weights(session), tuple(job.loaded.trainable)
    state = moments(session, names)
    with broken(job, 1 % job.task.gradient_accumulation, how):
        statistics = session.run_interval(1, schedule)
    assert statistics.skipped.tolist() == [[True]]
    assert_equal(before, weights(session))
    assert_equal(state, moments(session, names))
    after = session.run_interval(1, schedule)
    assert after.step.tolist() == [4]
    assert not after.skipped.any()
    assert changed(before, weights(session))


def test_a_first_step_that_is_not_finite_leaves_the_update_unknown(make_job):
    job = make_job()
    session = FineTuningSession(job, seed=0)
    with broken(job, 0, "nan"):
        statistics = session.run_interval(1, rates(job))
    assert np.isnan(statistics.step_size).all()
    assert_equal(weights(session), job.initial)


# -- freezing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), [("llama", "full"), ("llama", "lora"), ("bert", "full")])
def test_a_frozen_lower_half_stays_bit_for_bit_with_its_moments_while_the_rest_trains(make_job, kind, mode):
    job = make_job(kind, mode=mode, optimizer={"weight_decay": 0.1})
    session, schedule = FineTuningSession(job, seed=0), rates(job)
    lower = set(lower_half(tuple(job.loaded.trainable)))
    upper = set(job.loaded.trainable) - lower
    assert lower
    assert upper
    session.run_interval(3, schedule)
    before, state = weights(session), moments(session, lower)
    do(schedule, "freeze")
    statistics = session.run_interval(3, schedule)
    assert changed(before, weights(session)) == upper
    assert_equal(state, moments(session, lower))
    assert np.isfinite(statistics.step_size).all()
    do(schedule, "freeze")
    before = weights(session)
    session.run_interval(1, schedule)
    assert changed(before, weights(session)) == upper | lower


def test_a_job_frozen_from_the_start_trains_the_rest_and_can_be_kept(make_job):
    job = make_job()
    session, schedule = FineTuningSession(job, seed=0), rates(job)
    do(schedule, "freeze")
    session.run_interval(2, schedule)
    lower = lower_half(tuple(job.loaded.trainable))
    assert moments(session, lower) == {}
    snapshot = session.snapshot()
    do(schedule, "freeze")
    session.run_interval(2, schedule)
    session.restore(snapshot)
    assert moments(session, lower) == {}


def test_the_sizes_of_a_frozen_jobs_steps_are_those_of_the_rest(make_job):
    """Norms under LoRA count the adapted weights of the trained adapters alone, as for plain weights."""
    job = make_job(mode="lora")
    session, schedule = FineTuningSession(job, seed=0), rates(job)
    whole = session.run_interval(1, schedule).weight_norm[0]
    do(schedule, "freeze")
    half = session.run_interval(1, schedule).weight_norm[0]
    assert half == pytest.approx(whole / 2**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.embed_tokens.weight", "model.layers.0.a", "model.layers.1.a", "model.norm.weight", "lm_head.weight"],
         {"model.embed_tokens.weight", "model.layers.0.a"}),
        (["t.wte.weight", "t.wpe.weight", *(f"t.h.{i}.b" for i in range(5))],
         {"t.wte.weight", "t.wpe.weight", "t.h.0.b", "t.h.1.b"}),
        ([f"base_model.model.bert.encoder.layer.{i}.q.lora_A.weight" for i in range(12)],
         {f"base_model.model.bert.encoder.layer.{i}.q.lora_A.weight" for i in range(6)}),
        (["gpt_neox.embed_in.weight", "gpt_neox.layers.0.a", "gpt_neox.layers.1.a", "embed_out.weight"],
         {"gpt_neox.embed_in.weight", "gpt_neox.layers.0.a"}),
        (["transformer.wte.weight", "transformer.h.0.a"], set()),
        (["a.weight", "b.weight"], set()),
    ],
)  # fmt: skip
def test_the_lower_half_of_a_model(names, expected):
    assert set(lower_half(names)) == expected


# -- snapshots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}, {"mode": "lora", "lora": {"dropout": 0.3}}], ids=str)
def test_going_back_to_a_snapshot_equals_never_having_left(make_job, settings):
    """With dropout, averaged weights and a change of direction in between."""
    job = make_job("bert", **settings)
    session = FineTuningSession(job, seed=1, average_steps=3.0)
    assert not np.array_equal(*_two_losses_of_one_batch(job, session))
    session.run_interval(4, rates(job))
    snapshot = session.snapshot()
    expected = _the_rest(session, rates(job))
    for detour in (rates(job, 1e-1), rates(job, 1e-4)):
        session.restore(snapshot)
        session.run_interval(5, detour)
        session.evaluate("validation", averaged=True)
    session.restore(snapshot)
    assert session.step == 4
    found = _the_rest(session, rates(job))
    np.testing.assert_array_equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert found[2:] == expected[2:]


def _two_losses_of_one_batch(job, session):
    """Dropout makes them differ."""
    rows = job.data.train.collate(np.arange(4))
    session._model.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return [batch_loss(job.loaded.model, rows, classification=True).loss.numpy() for _ in range(2)]


def _the_rest(session, schedule):
    losses = np.concatenate([session.run_interval(count, schedule).loss[0] for count in (3, 5)])
    evaluations = session.evaluate("test"), session.evaluate("validation", averaged=True)
    return losses, weights(session), evaluations, session.tokens_trained, session.step


def test_a_fresh_session_goes_on_from_the_snapshot_of_another(make_job):
    job = make_job("bert")
    session = FineTuningSession(job, seed=1)
    session.run_interval(4, rates(job))
    snapshot = session.snapshot()
    expected = session.run_interval(8, rates(job)).loss
    found = weights(session)
    other = FineTuningSession(job, seed=1)
    other.restore(snapshot)
    np.testing.assert_array_equal(other.run_interval(8, rates(job)).loss, expected)
    assert_equal(weights(other), found)


def test_a_snapshot_remembers_the_loss_scale_and_a_rollback_keeps_the_present_one(make_job):
    job = make_job(precision="fp16")
    session = FineTuningSession(job, seed=0)
    session.run_interval(2, rates(job))
    session.mark_best()
    snapshot, scale = session.snapshot(), session.precision.state_dict()
    with broken(job, 0, "infinite gradient"):
        session.run_interval(1, rates(job))
    lower = session.precision.state_dict()
    assert lower["loss_scale"] == scale["loss_scale"] / 2
    session.roll_back()
    assert session.precision.state_dict() == lower
    session.restore(snapshot)
    assert session.precision.state_dict() == scale


def test_a_snapshot_remembers_what_a_rollback_returned_to(make_job):
    job = make_job()
    session = FineTuningSession(job, seed=0)
    session.run_interval(2, rates(job))
    session.mark_best()
    best = weights(session)
    session.run_interval(2, rates(job))
    snapshot = session.snapshot()
    session.mark_best()
    session.restore(snapshot)
    session.roll_back()
    assert_equal(weights(session), best)


def test_a_rollback_takes_weights_and_moments_back_and_moves_on_in_the_data(make_job):
    job = make_job()
    session = FineTuningSession(job, seed=0)
    session.run_interval(2, rates(job))
    best, state, names = weights(session), moments(session, job.loaded.trainable), tuple(job.loaded.trainable)
    session.mark_best()
    session.run_interval(3, rates(job, 1e-1))
    tokens = session.tokens_trained
    session.roll_back()
    assert_equal(weights(session), best)
    assert_equal(moments(session, names), state)
    assert (session.step, session.tokens_trained) == (5, tokens)
    rows = batch_indices(len(job.data.train), 4, 0, 5)
    with torch.no_grad():
        loss = float(batch_loss(job.loaded.model, job.data.train.collate(rows), classification=False).loss)
    expected = loss / job.data.train.num_target_tokens[rows].sum()
    assert session.run_interval(1, rates(job)).loss[0, 0] == pytest.approx(expected, rel=1e-5)


def test_a_rollback_turns_the_jobs_generators_back(make_job):
    session = FineTuningSession(make_job("bert"), seed=0)
    session.run_interval(2, rates(session.job))
    session.mark_best()
    kept = session.snapshot().random_state
    session.run_interval(3, rates(session.job))
    assert not torch.equal(session.snapshot().random_state["cpu"], kept["cpu"])
    session.roll_back()
    assert torch.equal(session.snapshot().random_state["cpu"], kept["cpu"])
    assert session.step == 5


def test_rolling_back_to_nothing_is_a_programming_error(make_job):
    with pytest.raises(ValueError, match="mark_best"):
        FineTuningSession(make_job(), seed=0).roll_back()


# -- isolation ------------------------------------------------------------------------------------------------------


def test_training_neither_uses_nor_moves_the_global_generators(make_job):
    job = make_job("bert")
    _, expected = run(job)
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    session, losses = run(job)
    session.evaluate("test")
    np.testing.assert_array_equal(losses, expected)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_a_session_starts_from_the_loaded_weights_whatever_ran_before(make_job):
    job = make_job("bert")
    first = FineTuningSession(job, seed=0)
    initial = weights(first), first.evaluate("test")
    first.run_interval(6, rates(job, 1e-1))
    assert changed(initial[0], weights(first))
    again = FineTuningSession(job, seed=0)
    assert_equal(weights(again), initial[0])
    assert again.evaluate("test") == initial[1]
    assert all(parameter.grad is None for parameter in job.loaded.trainable.values())


def test_jobs_that_share_a_model_do_not_influence_each_other(make_job):
    job, other = make_job(), make_job(steps=20, batch_size=3, optimizer={"weight_decay": 0.1})
    assert job.loaded.model is other.loaded.model
    session, losses = run(job)
    alone = weights(session), session.evaluate("test")
    run(other, (20,), schedule=rates(other, 1e-1), seed=7)
    session, again = run(job)
    np.testing.assert_array_equal(losses, again)
    assert_equal(weights(session), alone[0])
    assert session.evaluate("test") == alone[1]


# -- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_the_targets_of_the_subset(make_job):
    job = make_job(validation_examples=5)
    session = FineTuningSession(job, seed=0)
    rows = np.concatenate(job.subset("validation"))
    assert len(rows) == 5
    with torch.no_grad():
        split = job.data.validation
        sums = [float(batch_loss(job.loaded.model, split.collate([i]), classification=False).loss) for i in rows]
    found = session.evaluate("validation")
    assert found.loss == pytest.approx(sum(sums) / split.num_target_tokens[rows].sum(), rel=1e-5)
    assert found.accuracy is None
    assert found.num_targets == split.num_target_tokens[rows].sum()
    assert found.num_tokens == split.num_tokens[rows].sum()


def test_accuracy_is_the_share_of_classes_hit(make_job):
    job = make_job("bert")
    session, _ = run(job, (12,), schedule=rates(job, 1e-2))
    rows = np.concatenate(job.subset("test"))
    batch = job.data.test.collate(rows)
    job.loaded.model.eval()
    with torch.no_grad():
        logits = job.loaded.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    found = session.evaluate("test")
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == batch["labels"]).float().mean()))
    assert found.num_targets == len(rows)


def test_evaluating_changes_nothing_not_even_dropout(make_job):
    job = make_job("bert")
    _, undisturbed = run(job, (2, 2, 3))
    expected = weights(run(job, (2, 2, 3))[0])
    session, losses = FineTuningSession(job, seed=0, average_steps=2.0), []
    for count in (2, 2, 3):
        first = session.evaluate("test")
        assert session.evaluate("test") == first
        session.evaluate("validation", averaged=True)
        losses.append(session.run_interval(count, rates(job)).loss[0])
    np.testing.assert_array_equal(np.concatenate(losses), undisturbed)
    assert_equal(weights(session), expected)


def test_averaged_weights_are_an_exponential_average_over_the_steps(make_job):
    job = make_job()
    session = FineTuningSession(job, seed=0, average_steps=2.0)
    average = weights(session)
    for _ in range(5):
        session.run_interval(1, rates(job))
        for name, tensor in weights(session).items():
            average[name] = average[name] + (1.0 - np.exp(-1 / 2)) * (tensor - average[name])
    deployed, found = weights(session), session.evaluate("validation", averaged=True)
    assert_equal(deployed, weights(session))
    assert found.loss != session.evaluate("validation").loss
    with torch.no_grad():
        for name, parameter in job.loaded.trainable.items():
            parameter.copy_(average[name])
    assert session.evaluate("validation").loss == pytest.approx(found.loss, rel=1e-6)


def test_averaged_weights_that_nobody_keeps_cannot_be_evaluated(make_job):
    with pytest.raises(ValueError, match="average_steps > 0"):
        FineTuningSession(make_job(), seed=0).evaluate("validation", averaged=True)


# -- precision and modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_full_and_keeps_full_weights(make_job, precision):
    _, expected = run(make_job())
    session, losses = run(make_job(precision=precision))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert not np.array_equal(losses, expected)
    assert {tensor.dtype for tensor in weights(session).values()} == {torch.float32}
    assert session.evaluate("test").loss == pytest.approx(losses[-1], rel=0.5)


def test_lora_trains_the_adapters_alone(make_job):
    job = make_job(mode="lora")
    base = {n: p for n, p in job.loaded.model.named_parameters() if n not in job.loaded.trainable}
    before = copies(base)
    session = FineTuningSession(job, seed=0)
    initial = weights(session)
    statistics = session.run_interval(4, rates(job))
    assert changed(initial, weights(session)) == set(initial)
    assert all("lora_" in name for name in initial)
    assert_equal(before, copies(base))
    assert statistics.mode.tolist() == [TuningMode.LORA]
    assert statistics.trainable_fraction[0] == pytest.approx(job.loaded.trainable_fraction)


def test_levels_of_lora_refer_to_the_adapted_weights_or_to_the_adapters(make_job):
    job = make_job(mode="lora")
    adapted = [m.base_layer.weight for m in job.loaded.model.modules() if hasattr(m, "lora_A")]
    adapted_norm = float(torch.cat([w.flatten() for w in adapted]).norm())
    effective = FineTuningSession(job, seed=0).run_interval(2, rates(job))
    assert effective.weight_norm[0] == pytest.approx(adapted_norm, rel=1e-5)
    session = FineTuningSession(job, seed=0, level_norm="adapters")
    adapters = session.run_interval(2, rates(job))
    own = float(torch.cat([p.detach().flatten() for p in job.loaded.trainable.values()]).norm())
    assert adapters.weight_norm[0] == pytest.approx(own, rel=1e-5)
    assert adapters.update_norm[0] != pytest.approx(effective.update_norm[0], rel=0.01)


def test_what_is_known_before_the_first_step(make_job):
    job = make_job()
    session = FineTuningSession(job, seed=0)
    statistics = session.initial_statistics()
    assert (statistics.step.tolist(), statistics.total_steps.tolist()) == ([0], [12])
    assert statistics.loss.shape == (1, 0)
    update, weight = session.initial_norms()
    matrices = [p for p in job.initial.values() if p.ndim >= 2]
    assert update == pytest.approx(sum(p.numel() for p in matrices) ** 0.5)
    assert weight == pytest.approx(float(torch.cat([p.flatten() for p in matrices]).norm()), rel=1e-5)
    first = session.run_interval(1, rates(job))
    assert 0.5 * update < first.update_norm[0] <= update * 1.001


def test_only_choices_that_change_the_job_are_offered(make_job):
    assert FineTuningSession(make_job(), seed=0).capabilities == frozenset(UpdateChoice)
    single_layer = FineTuningSession(make_job("gpt2"), seed=0)
    assert single_layer.capabilities == frozenset(UpdateChoice) - {UpdateChoice.FREEZE}
    unlimited = FineTuningSession(make_job(optimizer={"max_grad_norm": float("inf")}), seed=0)
    assert unlimited.capabilities == frozenset(UpdateChoice) - {UpdateChoice.TIGHTEN}
    assert not unlimited.run_interval(2, rates(unlimited.job)).clipped.any()


def test_an_unknown_norm_is_refused(make_job):
    with pytest.raises(UserError, match="effective or adapters"):
        FineTuningSession(make_job(), seed=0, level_norm="efective")
