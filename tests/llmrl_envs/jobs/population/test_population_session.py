"""Jobs that share a stack stay strangers: shapes, budgets, failures, dropout and places of their own."""

import math

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.population import evaluation
from llmrl_envs.jobs.population import training as module
from llmrl_envs.jobs.population.batches import collate_rows, place_rows
from llmrl_envs.jobs.population.losses import LaneLosses
from llmrl_envs.jobs.population.members import IntervalPlan
from llmrl_envs.jobs.population.passes import PassWidth
from llmrl_envs.jobs.population.session import PopulationSession


def plan(member, steps=2, rate=1e-3, **arguments):
    return IntervalPlan(member, np.full(steps, rate), 1.0, **arguments)


def flat(population, member):
    return torch.cat([p.reshape(-1) for p in population.parameters(member).values()]).clone()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_job_does_not_depend_on_its_neighbours_their_shapes_or_its_place(make_job, mode):
    job = make_job("llama", mode=mode)
    alone = PopulationSession(job)
    member = alone.add(job, 4)
    for steps in (2, 3):
        wanted = alone.run_interval([plan(member, steps)])[0]
    crowd = PopulationSession(job)
    strangers = [
        crowd.add(make_job("llama", mode=mode, batch_size=2, max_length=12), 1),
        crowd.add(make_job("llama", mode=mode, gradient_accumulation=2), 2),
        crowd.add(job, 3),
    ]
    mine = crowd.add(job, 4)
    crowd.run_interval([plan(strangers[0], 4), plan(mine, 2), plan(strangers[2], 1)])
    crowd.remove(strangers[2])
    late = crowd.add(job, 9)
    results = crowd.run_interval([plan(late, 5), plan(strangers[1], 2), plan(mine, 3)])
    np.testing.assert_allclose(results[2].loss, wanted.loss, rtol=1e-5)
    assert results[2].update_norm == pytest.approx(wanted.update_norm, rel=1e-3)
    distance = (flat(crowd, mine) - flat(alone, member)).norm() / flat(alone, member).norm()
    assert distance < 1e-4
    assert [m.step for m in (strangers[0], strangers[1], mine, late)] == [4, 2, 5, 5]
    losses = crowd.evaluate([late, mine], "validation")
    assert losses[1].loss == pytest.approx(alone.evaluate([member], "validation")[0].loss, rel=1e-5)


def test_a_job_whose_weights_are_not_finite_reaches_no_other(make_job):
    job = make_job("llama")
    population = PopulationSession(job)
    sick, sound = population.add(job, 0), population.add(job, 1)
    with torch.no_grad():
        population.stack.weights[sick.row] = float("nan")
    results = population.run_interval([plan(sick), plan(sound)])
    assert np.isnan(results[0].loss).all()
    assert np.isfinite(results[1].loss).all()
    assert flat(population, sound).isfinite().all()
    first, second = population.evaluate([sick, sound], "validation")
    assert math.isnan(first.loss)
    assert math.isfinite(second.loss)
    fresh = PopulationSession(job)
    same = fresh.add(job, 1)
    fresh.run_interval([plan(same)])
    torch.testing.assert_close(flat(population, sound), flat(fresh, same), rtol=1e-4, atol=1e-6)


def test_a_skipped_step_changes_no_weight_and_counts_as_none(make_job, monkeypatch):
    job = make_job("llama")
    population = PopulationSession(job)
    members = [population.add(job, seed) for seed in (0, 1)]
    before = [flat(population, member) for member in members]
    original = module.sequence_losses

    def first_is_infinite(*arguments, **named):
        found = original(*arguments, **named)
        return LaneLosses(found.loss + torch.tensor([math.inf, 0.0]), found.correct)

    monkeypatch.setattr(module, "sequence_losses", first_is_infinite)
    results = population.run_interval([plan(member) for member in members])
    assert torch.equal(flat(population, members[0]), before[0])
    assert not torch.equal(flat(population, members[1]), before[1])
    assert population.rows.optimizer.steps[members[0].row].tolist() == [0.0, 0.0]
    assert population.rows.optimizer.steps[members[1].row].tolist() == [2.0, 2.0]
    assert math.isnan(results[0].update_norm)
    assert population.stack.gradients.abs().max() == 0.0


def test_a_rollback_takes_weights_and_moments_of_that_job_back(make_job):
    job = make_job("llama")
    population = PopulationSession(job)
    first, second = population.add(job, 0), population.add(job, 1)
    with pytest.raises(ValueError, match="expected a best state"):
        population.roll_back([first])
    population.run_interval([plan(first, 1), plan(second, 3)])  # the longer one goes first: rows change places
    population.mark_best([first])
    kept, moments = flat(population, first), population.rows.optimizer.exp_avg[first.row].clone()
    population.run_interval([plan(first, 3), plan(second, 1)])
    moved = flat(population, second)
    population.roll_back([first])
    assert torch.equal(flat(population, first), kept)
    assert torch.equal(population.rows.optimizer.exp_avg[first.row], moments)
    assert torch.equal(flat(population, second), moved)
    assert first.step == 4


@pytest.mark.parametrize("full_core", [1, 2**60])
def test_evaluation_shows_each_job_the_weights_that_it_asks_for(make_job, monkeypatch, full_core):
    """Also after rows have changed places and made room, when earlier views of them are of no use any more."""
    monkeypatch.setattr(evaluation, "FULL_CORE_TOKENS", full_core)
    job = make_job("llama")
    population = PopulationSession(job, averaged=True)
    members = [population.add(job, seed, average_steps=2.0) for seed in (0, 1)]
    population.run_interval([plan(member, 3, rate=1e-2) for member in members])
    deployed = [e.loss for e in population.evaluate(members, "validation")]
    averaged = [e.loss for e in population.evaluate(members, "validation", [True, True])]
    assert min(abs(a - d) for a, d in zip(averaged, deployed, strict=True)) > 1e-4
    mixed = [e.loss for e in population.evaluate(members, "validation", [False, True])]
    assert mixed == pytest.approx([deployed[0], averaged[1]], rel=1e-5)
    third = population.add(job, 2)
    population.run_interval([plan(third, 5)])
    assert third.row == 0
    assert [e.loss for e in population.evaluate(members, "validation")] == pytest.approx(deployed, rel=1e-5)
    population.remove(members[0])
    assert population.evaluate([members[1]], "validation")[0].loss == pytest.approx(deployed[1], rel=1e-5)


def test_dropout_repeats_itself_and_leaves_the_global_generator_alone(make_job):
    job = make_job("bert", max_length=20)
    found = []
    for fork in (0, 1):
        torch.manual_seed(fork)
        state = torch.random.get_rng_state()
        population = PopulationSession(job)
        population.reseed(5)
        members = [population.add(job, 3) for _ in range(2)]
        population.run_interval([plan(member) for member in members])
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append([flat(population, member) for member in members])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[0][1])  # the same job twice, under different masks


def test_an_unknown_norm_of_a_level_is_refused(make_job):
    with pytest.raises(UserError, match="level_norm"):
        PopulationSession(make_job("llama"), level_norm="other")


def test_rows_of_several_jobs_are_padded_and_cut_to_the_longest(make_job):
    split = make_job("llama").data.train
    order = np.argsort(split.num_tokens)
    short, long = (collate_rows(split, rows) for rows in (order[:2], order[-2:]))
    placed = place_rows((2, 3), [((0, slice(2)), short), ((1, slice(2)), long)])
    assert placed.tokens.shape == (2, 3, int(split.num_tokens.max()))
    assert (placed.targets[:, 2] == -100).all()
    cut = placed[0, slice(2)]
    assert cut.tokens.shape[-1] == split.num_tokens[order[:2]].max()
    assert torch.equal(cut.tokens, short.tokens)
    assert "attention_mask" in placed[slice(2), slice(2)].inputs()
    same = collate_rows(split, np.array([order[0], order[0]]))
    assert "attention_mask" not in same.inputs()


def test_one_job_that_does_not_fit_raises():
    width = PassWidth()

    def never():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        width.attempt(4, never, lambda: None)
    assert width.most == 1
    with pytest.raises(RuntimeError, match="something else"):
        width.attempt(4, lambda: (_ for _ in ()).throw(RuntimeError("something else")), lambda: None)


def test_bfloat16_trains_close_to_float32(make_job):
    found = []
    for precision in ("fp32", "bf16"):
        job = make_job("llama", precision=precision)
        population = PopulationSession(job)
        members = [population.add(job, seed) for seed in (0, 1)]
        found.append(population.run_interval([plan(member, 4) for member in members])[1])
    np.testing.assert_allclose(found[1].loss, found[0].loss, rtol=0.02)
    assert found[1].gradient_norm[0] == pytest.approx(found[0].gradient_norm[0], rel=0.05)


def test_float16_scales_losses_and_skips_only_the_job_that_overflows(make_job):
    job = make_job("llama", precision="fp16")
    population = PopulationSession(job)
    members = [population.add(job, seed) for seed in (0, 1)]
    population.rows.scales.state[members[0].row, 0] = 1e30
    results = population.run_interval([plan(member, 1) for member in members])
    assert not np.isfinite(results[0].gradient_norm[0])
    assert np.isfinite(results[1].gradient_norm[0])
    assert population.rows.scales.state[:2, 0].tolist() == [pytest.approx(5e29), 65536.0]
    assert population.rows.scales.state[:2, 1].tolist() == [0.0, 1.0]
