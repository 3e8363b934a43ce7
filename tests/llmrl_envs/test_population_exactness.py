"""A population against single environments of the same seeds and actions, in float32 and in float64."""

import collections
import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.jobs import models, passes
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.population import rows
from llmrl_envs.jobs.population import training as population
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmrl.dqn.lanes import lane_info

TASK = {
    "name": "tiny", "data": {"train": "builtin:json", "max_examples": 80}, "steps": 14, "max_length": 16,
    "batch_size": 2, "validation_examples": 4, "learning_rate": 1e-3,
    "optimizer": {"weight_decay": 0.1, "max_grad_norm": 0.5},
}  # fmt: skip
LONGER = {**TASK, "name": "longer", "steps": 20, "batch_size": 3, "gradient_accumulation": 2, "max_length": 12}
LORA = {**TASK, "name": "adapters", "mode": "lora"}
AVERAGED = {"level_norm": "adapters", "reward": {"average_intervals": 0.5, "switch_cost": 0.01}}

TOLERANCE = 1e-4
SHAKEN_TOLERANCE, WILD_TOLERANCE = 1e-3, 1e-2
"""For jobs that lose what they had gained, and for those from rates 300 times too high: both multiply rounding errors,
by how much depends on the text that they read."""

EVERY_KIND = pytest.mark.parametrize(
    ("tasks", "arguments"),
    [([TASK], {}), ([LORA], {}), ([TASK, LONGER, LORA], AVERAGED)],
    ids=["full", "lora", "mixed"],
)


def relative(got, wanted, *, without=0):
    """Distance of two vectors, relative to the length of the second; without the numbers that differ most."""
    got, wanted = np.asarray(got, np.float64).ravel(), np.asarray(wanted, np.float64).ravel()
    distances = np.sort(np.abs(got - wanted))[: len(got) - without]
    return float(np.linalg.norm(distances) / (np.linalg.norm(wanted) + 1e-12))


def joined(parameters):
    return np.concatenate([np.asarray(parameters[name]).ravel() for name in sorted(parameters)])


class Tolerances:
    """What each lane may differ by from its single environment, by how its job has gone so far."""

    def __init__(self, lanes):
        self.lowest, self.shaken = np.full(lanes, np.inf), np.zeros(lanes, bool)

    def after(self, lane, info):
        """Takes in a job's newest validation loss."""
        loss = info["validation_loss"]
        self.shaken[lane] |= not loss <= self.lowest[lane]
        self.lowest[lane] = min(self.lowest[lane], loss)
        return self.of(lane, info)

    def of(self, lane, info):
        if info["given_rate"] > 10 * TASK["learning_rate"]:
            return WILD_TOLERANCE
        return SHAKEN_TOLERANCE if self.shaken[lane] else TOLERANCE

    def forget(self, lane):
        self.lowest[lane], self.shaken[lane] = np.inf, False


class Watched:
    """P single environments that restart at once, like the lanes of a population."""

    def __init__(self, num_envs, tasks, seed, library, **arguments):
        self.envs = [FineTuningEnv(tasks, library=JobLibrary("cpu"), **arguments) for _ in range(num_envs)]
        for env in self.envs:
            env._library.curves = library.curves
        self.last = [env.reset(seed=seed + lane) for lane, env in enumerate(self.envs)]

    def step(self, actions):
        """What came of an action in each: the last observation and info, and the weights before a restart."""
        found = []
        for lane, env in enumerate(self.envs):
            observation, reward, terminated, _, info = env.step(actions[lane])
            parameters = {name: p.detach().clone() for name, p in env._session._parameters.items()}
            self.last[lane] = env.reset() if terminated else (observation, info)
            found.append(
                SimpleNamespace(
                    observation=observation, reward=reward, terminated=terminated, info=info, parameters=parameters
                )
            )
        return found


class Compared:
    """What a lane and its single environment gave, job after job."""

    def __init__(self):
        self.pairs = {"observations": [], "rewards": [], "parameters": []}

    def add(self, got, single):
        self.pairs["observations"].append((got.observation, single.observation))
        self.pairs["rewards"].append((got.reward, single.reward))
        if not single.terminated:
            self.pairs["parameters"].append((joined(got.parameters), joined(single.parameters)))

    def errors(self):
        """Relative error of each as one vector over all decisions."""
        return {name: relative(*map(flattened, zip(*pairs, strict=True))) for name, pairs in self.pairs.items()}


def flattened(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def chosen_actions(rng, masks, decision, names):
    """At random, with many freezes and rollbacks among them."""
    actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
    for lane, mask in enumerate(masks):
        for wanted, now in (("freeze", decision % 7 == 2), ("rollback", decision % 5 == 4)):
            if now and mask[names.index(wanted)] and lane % 2:
                actions[lane] = names.index(wanted)
    return actions


def both(tasks, arguments, *, lanes=3, seed=12, decisions=60):
    """Yields the lane, what it gave, what its single environment gave, and that one's info before the action.

    Terminations, masks and events are equal throughout, and everything that can happen to a job has happened.
    """
    library = JobLibrary("cpu")  # of its own: reference curves of poisoned jobs are not those of others
    # A third of the jobs keep a given rate that is 300 times too high, and diverge.
    distribution = {
        "tasks": tasks, "num_seeds": 2, "learning_rate_log10_range": [2.5, 2.5], "default_rate_probability": 0.7,
    }  # fmt: skip
    arguments = arguments | {
        "observation": {"feature_dropout": 0.2, "validation_visible": 0.5},
        "schedule": {"start": "given"},
        "device": "cpu",
    }
    vector = FineTuningVectorEnv(lanes, distribution, library=library, **arguments)
    obs, infos = vector.reset(seed=seed)
    singles = Watched(lanes, distribution, seed, library, **arguments)
    rng, seen, names = np.random.default_rng(3), collections.Counter(), vector.table.names
    for decision in range(decisions):
        before, first = [info for _, info in singles.last], [observation for observation, _ in singles.last]
        np.testing.assert_array_equal(infos["action_mask"], [info["action_mask"] for info in before])
        actions = chosen_actions(rng, infos["action_mask"], decision, names)
        started = obs
        obs, rewards, terminations, _, infos = vector.step(actions)
        for lane, single in enumerate(singles.step(actions)):
            assert single.terminated == terminations[lane]
            mine = lane_info(infos["final_info"] if single.terminated else infos, lane)
            assert mine["events"] == single.info["events"]
            seen.update(rollback=int(mine["events"]["rollback"]), skipped=int(mine["events"]["skipped_steps"]))
            seen.update(diverged=bool(mine["diverged"]), finished=single.terminated and not single.info["diverged"])
            seen.update(freeze=names[mine["action"]] == "freeze")
            single.started = first[lane]
            got = SimpleNamespace(
                started=started[lane],
                observation=infos["final_obs"][lane] if single.terminated else obs[lane],
                reward=rewards[lane],
                info=mine,
                parameters=None if single.terminated else vector.parameters(lane),
            )
            yield lane, got, single, before[lane]
    assert min(seen[name] for name in ("rollback", "skipped", "diverged", "finished", "freeze")) >= 2


@pytest.fixture
def poisoned(monkeypatch):
    """Training batches with a sequence that begins with a space have an infinite loss with finite gradients."""
    space = 32
    batch_loss, sequence_losses = passes.batch_loss, population.sequence_losses

    def of_batch(model, batch, **arguments):
        found = batch_loss(model, batch, **arguments)
        bad = torch.is_grad_enabled() and bool((batch["input_ids"][:, 0] == space).any())
        return dataclasses.replace(found, loss=found.loss + (math.inf if bad else 0.0))

    def of_sequences(model, sequences, **arguments):
        found = sequence_losses(model, sequences, **arguments)
        bad = (sequences.tokens[..., 0] == space).any(dim=-1) & torch.is_grad_enabled()
        return dataclasses.replace(found, loss=found.loss + torch.where(bad, math.inf, 0.0))

    monkeypatch.setattr(passes, "batch_loss", of_batch)
    monkeypatch.setattr(population, "sequence_losses", of_sequences)


@pytest.fixture
def doubled(monkeypatch):
    """Jobs in float64, their norms too, which Llama computes in float32 whatever it is given."""
    load_weights = models._load_weights

    def load(*arguments):
        torch.set_default_dtype(torch.float32)
        try:
            return load_weights(*arguments).double()
        finally:
            torch.set_default_dtype(torch.float64)

    def normalised(module, x):
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    monkeypatch.setattr(models, "_load_weights", load)
    monkeypatch.setattr(LlamaRMSNorm, "forward", normalised)
    # torch's fused step takes its factors in float32.
    monkeypatch.setattr(rows, "PopulationAdamW", functools.partial(rows.PopulationAdamW, by_row=False))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("poisoned")
@EVERY_KIND
def test_lanes_equal_single_environments(tasks, arguments):
    """Sixty decisions with freezes, rollbacks, skipped steps, diverging jobs and restarts among them."""
    tolerances, steady, lanes = Tolerances(3), 0, collections.defaultdict(Compared)
    for lane, got, single, before in both(tasks, arguments):
        lanes[lane, TOLERANCE].add(got, single)
        if tolerances.of(lane, before) < WILD_TOLERANCE:
            lanes[lane, SHAKEN_TOLERANCE].add(got, single)  # whose rewards are not large
        allowed = tolerances.of(lane, before)
        np.testing.assert_allclose(got.started, single.started, rtol=allowed, atol=allowed)
        allowed = tolerances.after(lane, single.info)
        np.testing.assert_allclose(got.observation, single.observation, rtol=allowed, atol=allowed)
        # A difference of two losses in units of a gain that may be a hundredth of one of them.
        assert got.reward == pytest.approx(single.reward, rel=allowed, abs=10 * allowed)
        assert got.info["validation_loss"] == pytest.approx(single.info["validation_loss"], rel=allowed)
        if single.terminated:
            tolerances.forget(lane)
            continue
        assert set(got.parameters) == set(single.parameters)
        assert relative(joined(got.parameters), joined(single.parameters)) <= allowed
        # Adam's first step has the size of the rate even where a gradient is zero but for rounding.
        for name, value in single.parameters.items():
            assert relative(got.parameters[name], value, without=2) <= allowed, name
        steady += allowed == TOLERANCE
    assert steady >= 20
    for (lane, allowed), compared in lanes.items():
        assert max(compared.errors().values()) <= allowed, (lane, allowed, compared.errors())


@pytest.mark.usefixtures("poisoned", "doubled")
@EVERY_KIND
def test_in_double_precision_nothing_is_left_of_the_differences(tasks, arguments):
    """The same jobs, those that fly apart included: what float32 leaves between them is rounding."""
    for _, got, single, _ in both(tasks, arguments):
        # Observations are float32.
        np.testing.assert_allclose(got.started, single.started, rtol=3e-7, atol=3e-7)
        np.testing.assert_allclose(got.observation, single.observation, rtol=3e-7, atol=3e-7)
        assert got.reward == pytest.approx(single.reward, rel=1e-6, abs=1e-6)
        assert got.info["validation_loss"] == pytest.approx(single.info["validation_loss"], rel=1e-7)
        for name, value in ({} if single.terminated else single.parameters).items():
            torch.testing.assert_close(
                got.parameters[name], value, rtol=0.0, atol=1e-8 * float(value.abs().max()), msg=name
            )


def seen_where_lanes_equal(tasks, arguments):
    """Random actions in three lanes and their single environments; how often lanes leant, and steps were skipped."""
    library, seen = JobLibrary("cpu"), collections.Counter()
    distribution, arguments = {"tasks": tasks, "num_seeds": 2}, {**arguments, "device": "cpu"}
    vector = FineTuningVectorEnv(3, distribution, library=library, **arguments)
    _, infos = vector.reset(seed=7)
    singles = Watched(3, distribution, 7, library, **arguments)
    rng = np.random.default_rng(5)
    for _ in range(24):
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in infos["action_mask"]])
        obs, rewards, _, _, infos = vector.step(actions)
        seen.update(leaning=int(vector._episodes._steering.schedule.leaning.sum()))
        for lane, single in enumerate(singles.step(actions)):
            mine = lane_info(infos["final_info"] if single.terminated else infos, lane)
            assert mine["events"] == single.info["events"]
            seen.update(skipped=int(mine["events"]["skipped_steps"]))
            observation = infos["final_obs"][lane] if single.terminated else obs[lane]
            np.testing.assert_allclose(observation, single.observation, rtol=TOLERANCE, atol=TOLERANCE)
            assert rewards[lane] == pytest.approx(single.reward, rel=TOLERANCE, abs=10 * TOLERANCE)
            if not single.terminated:
                own, wanted = (joined(p) for p in (vector.parameters(lane), single.parameters))
                assert relative(own, wanted) <= TOLERANCE
    return seen


@EVERY_KIND
def test_lanes_that_lean_on_their_gradients_equal_single_environments(tasks, arguments):
    assert seen_where_lanes_equal(tasks, {**arguments, "actions": "lean"})["leaning"] >= 20


@EVERY_KIND
def test_lanes_skip_the_batches_that_stand_out_as_single_environments_do(tasks, arguments):
    # Large enough for losses that hardly vary from step to step.
    spoiled = [{**task, "batch_size": 8, "max_length": 32, "bad_batches": (7, 8, 12)} for task in tasks]
    assert seen_where_lanes_equal(spoiled, {**arguments, "actions": "lean"})["skipped"] >= 12
    taken = {**arguments, "actions": "lean", "schedule": {"skip_outliers": False}}
    assert seen_where_lanes_equal(spoiled, taken)["skipped"] == 0
