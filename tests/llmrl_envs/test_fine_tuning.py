"""llmrl/FineTuning-v0: Gymnasium's conventions, exact repetition, and rewards that mean what they say."""

import math
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from llmrl_envs.errors import UserError
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.interface.base_schedule import decision_intervals
from llmrl_envs.interface.observation import GROUPS, FeatureGroup
from llmrl_envs.jobs import loading
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import SampledTask, TaskDistribution

TASK = {
    "name": "tiny", "data": {"train": "builtin:json", "max_examples": 80}, "steps": 16, "max_length": 16,
    "batch_size": 2, "validation_examples": 4, "learning_rate": 1e-3,
}  # fmt: skip
OTHER = {**TASK, "name": "adapters", "mode": "lora", "steps": 12}
ID = "llmrl_envs:llmrl/FineTuning-v0"


@pytest.fixture(scope="module")
def library():
    return JobLibrary("cpu")


@pytest.fixture
def make_env(library):
    """An environment over one tiny task of one seed; its model and its reference are made once for all tests."""

    def make(tasks=(TASK,), *, distribution=None, **arguments):
        tasks = {"tasks": list(tasks), "num_seeds": 1, **(distribution or {})}
        return FineTuningEnv(tasks, device="cpu", library=library, **arguments)

    return make


def play(env, choose=None, *, seed=0, options=None):
    """One episode; returns observations, rewards and infos, those of the reset included."""
    observation, info = env.reset(seed=seed, options=options)
    observations, rewards, infos, terminated = [observation], [], [info], False
    while not terminated:
        action = env.table.hold if choose is None else choose(infos[-1])
        observation, reward, terminated, truncated, info = env.step(action)
        assert truncated is False
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
    return np.array(observations), rewards, infos


def at_random(seed=0):
    rng = np.random.default_rng(seed)
    return lambda info: rng.choice(np.flatnonzero(info["action_mask"]))


def named(env, observation):
    return dict(zip(env.observation_spec.names, observation.tolist(), strict=True))


# -- conventions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", ["moves", "factors"])
def test_the_environment_checker_is_content_without_a_warning(actions, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks = {"tasks": [{**TASK, "steps": 4}], "num_seeds": 1}
        env = gymnasium.make(ID, tasks=tasks, actions=actions, device="cpu")
        check_env(env.unwrapped)
        env.close()


def test_an_episode_ends_with_the_budget_and_announces_it(make_env):
    env = make_env()
    observations, _, infos = play(env, at_random())
    assert len(observations) == 1 + len(decision_intervals(16))
    assert [info["step"] for info in infos] == [0, *np.cumsum(decision_intervals(16))]
    assert named(env, observations[-1])["progress"] == 1.0
    assert all(env.observation_space.contains(observation) for observation in observations)


def test_steps_outside_an_episode_are_refused(make_env):
    env = make_env()
    with pytest.raises(ValueError, match=r"expected reset\(\) before step"):
        env.step(0)
    play(env)
    with pytest.raises(ValueError, match=r"expected reset\(\) after the end"):
        env.step(0)
    env.reset()
    env.step(2)
    with pytest.raises(ValueError, match=r"in \[0, 9\), got array\(\[9\]\)"):
        env.step(9)


def test_what_cannot_be_configured_is_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match="unknown action table"):
        FineTuningEnv(actions="move")
    with pytest.raises(UserError, match=r"schedule\.warmup_fraction"):
        FineTuningEnv(schedule={"warmup_fraction": 2.0})
    with pytest.raises(UserError, match=r"reward\.average_intervals"):
        FineTuningEnv(reward={"average_intervals": 2.0})
    with pytest.raises(ValueError, match="render_mode"):
        FineTuningEnv(render_mode="video")


# -- repetition -----------------------------------------------------------------------------------------------------


def test_two_fresh_environments_repeat_each_other_bit_for_bit():
    traces = []
    for fork in range(2):
        torch.manual_seed(fork)
        env = FineTuningEnv(
            {"tasks": [TASK, OTHER], "num_seeds": 3},
            device="cpu",
            observation={"feature_dropout": 0.2, "validation_visible": 0.5},
            reward={"average_intervals": 0.5},
        )
        choose, trace = at_random(5), []
        for episode in range(3):
            observations, rewards, infos = play(env, choose, seed=11 if episode == 0 else None)
            trace.append((observations.tobytes(), rewards, [repr(info) for info in infos]))
        traces.append(trace)
    assert traces[0] == traces[1]
    assert traces[0][0] != traces[0][1]


def test_an_episode_does_not_depend_on_the_one_before(make_env):
    first = play(make_env(), at_random(), seed=3)
    env = make_env()
    play(env, at_random(7), seed=8)
    second = play(env, at_random(), seed=3)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("masked", ["rollback", "cooldown"])
def test_a_masked_action_counts_as_holding(make_env, masked):
    env = make_env()
    found = []
    for name in (masked, "hold"):
        _, info = env.reset(seed=0)
        assert info["action_mask"][env.table.names.index(masked)] == 0
        observation, reward, _, _, info = env.step(env.table.names.index(name))
        found.append((observation.tobytes(), reward, repr(info)))
        assert info["action"] == env.table.hold
    assert found[0] == found[1]


def test_actions_matter(make_env):
    env = make_env()
    results = {
        name: play(env, lambda _, n=name: env.table.names.index(n))[1] for name in ("one_down", "hold", "freeze")
    }
    assert len({tuple(rewards) for rewards in results.values()}) == 3


def test_a_second_reset_loads_nothing(monkeypatch):
    loads = []
    for name in ("load_model", "load_task_data"):
        original = getattr(loading, name)
        monkeypatch.setattr(
            loading, name, lambda *a, _name=name, _original=original, **k: loads.append(_name) or _original(*a, **k)
        )
    env = FineTuningEnv({"tasks": [TASK]}, device="cpu")
    assert loads == []
    env.reset(seed=0)
    assert sorted(loads) == ["load_model", "load_task_data"]
    env.step(2)
    env.reset()
    play(env)
    assert len(loads) == 2
    env.close()
    with pytest.raises(ValueError, match="reset"):
        env.step(0)
    env.reset()
    assert len(loads) == 4


# -- jobs -----------------------------------------------------------------------------------------------------------


def test_a_job_can_be_given(make_env):
    env = make_env()
    task = env.tasks.tasks[0].with_steps(6)
    _, _, infos = play(env, options={"job": SampledTask(task, 0, 0.0123, 5)})
    facts = {name: infos[0][name] for name in ("task", "total_steps", "given_rate", "seed")}
    assert facts == {"task": "tiny", "total_steps": 6, "given_rate": 0.0123, "seed": 5}
    assert infos[-1]["step"] == 6


@pytest.mark.parametrize("options", [{"jobs": None}, {"job": "tiny"}])
def test_options_that_mean_nothing_are_refused(make_env, options):
    with pytest.raises(ValueError, match="options: expected at most 'job'"):
        make_env().reset(options=options)


def test_jobs_are_drawn_from_the_distribution(make_env):
    tasks = tuple({**task, "steps": 2} for task in (TASK, OTHER))
    env = make_env(tasks, distribution={"num_seeds": 4})
    env.reset(seed=0)
    drawn = [env.reset()[1] for _ in range(12)]
    assert {info["task"] for info in drawn} == {"tiny", "adapters"}
    assert len({info["seed"] for info in drawn}) > 2
    ratios = [info["given_rate"] / 1e-3 for info in drawn]
    assert 1.0 in ratios
    assert len(set(ratios)) > 4
    again = make_env(tasks, distribution={"num_seeds": 4})
    again.reset(seed=0)
    assert [again.reset()[1]["given_rate"] for _ in range(12)] == [info["given_rate"] for info in drawn]


def test_holding_starts_from_the_same_level_whatever_rate_was_given(make_env):
    env = make_env()
    task = env.tasks.tasks[0]
    found = [play(env, options={"job": SampledTask(task, 0, rate, 1)})[1] for rate in (1e-7, 1.0)]
    assert found[0] == found[1]


def test_a_job_may_start_at_its_given_rate(make_env):
    env = make_env(schedule={"start": "given", "warmup_fraction": 0.0})
    task = env.tasks.tasks[0]
    _, info = env.reset(options={"job": SampledTask(task, 0, 1e-4, 1)})
    assert info["learning_rate"] == pytest.approx(1e-4, rel=1e-9)
    assert info["level"] != pytest.approx(2.5e-3, rel=0.1)


def test_the_update_is_as_large_as_the_level_says(make_env):
    """Once the norms have been measured, ||dtheta|| / ||theta|| of the next interval is level * base."""
    env = make_env(({**TASK, "steps": 40},), schedule={"base": "constant", "warmup_fraction": 0.0})
    observations, _, infos = play(env)
    for info, observation in list(zip(infos, observations, strict=True))[6:]:
        assert 10 ** (named(env, observation)["log10_step_size"] - 4) == pytest.approx(info["level"], rel=0.3)


# -- rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average_intervals", [0.0, 0.5])
def test_the_return_is_the_final_improvement_of_the_deployed_weights(make_env, average_intervals):
    env = make_env(reward={"average_intervals": average_intervals})
    _, rewards, infos = play(env, at_random(2))
    initial, final = infos[0]["validation_loss"], infos[-1]["validation_loss"]
    assert sum(rewards) == pytest.approx(infos[-1]["score"], abs=1e-9)
    assert env._session.evaluate("validation").loss == pytest.approx(final, rel=1e-9)
    scale = max(math.log(initial) - env._account._reference[-1], 0.02)
    assert infos[-1]["score"] == pytest.approx((math.log(initial) - math.log(final)) / scale, abs=1e-9)


def reference_like(make_env, **reward):
    return make_env(
        ({**TASK, "steps": 60, "batch_size": 4, "learning_rate": 3e-4},),
        actions="factors",
        distribution={"default_rate_probability": 1.0},
        reward=reward,
    )


def test_the_reference_run_itself_scores_one(make_env):
    _, rewards, infos = play(reference_like(make_env, minimum_scale=1e-6))
    assert infos[-1]["validation_loss"] < infos[0]["validation_loss"]
    assert sum(rewards) == pytest.approx(1.0, abs=1e-9)


def test_against_the_reference_every_step_of_itself_is_worth_nothing(make_env):
    _, rewards, _ = play(reference_like(make_env, baseline="reference"))
    assert rewards == pytest.approx([0.0] * len(rewards), abs=1e-12)


def test_costs_are_charged_for_what_was_done(make_env):
    actions = ["one_up", "hold", "freeze", "two_up"]

    def choose(info):
        return env.table.names.index(actions[len(seen)] if len(seen) < len(actions) else "hold")

    found = []
    for reward in ({}, {"switch_cost": 0.25, "time_cost": 0.5}):
        env = make_env(reward=reward)
        _, info = env.reset(seed=0)
        seen, terminated = [], False
        while not terminated:
            _, value, terminated, _, info = env.step(choose(info))
            seen.append(value)
        found.append(seen)
    costs = np.subtract(*found)
    shares = 0.5 * np.array(decision_intervals(16)) / 16
    expected = shares + np.array([0.25, 0.0, 0.25, 0.25] + [0.0] * (len(shares) - 4))
    assert costs == pytest.approx(expected, abs=1e-9)


# -- divergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "at_once"), [(30.0, True), (1e30, True), (1e-3, False)])
def test_a_job_that_diverges_ends_below_every_other(make_env, rate, at_once):
    env = make_env(({**TASK, "steps": 40},), actions="factors")
    job = SampledTask(env.tasks.tasks[0], 0, rate, 0)
    _, rewards, infos = play(env, lambda _: env.table.names.index("quadruple"), options={"job": job})
    last = infos[-1]
    assert last["diverged"]
    assert (len(rewards) == 1) == at_once
    assert last["step"] < 40
    assert [info["diverged"] for info in infos[:-1]] == [False] * (len(infos) - 1)
    floor = env.reward_spec.floor(env._account.scale, len(decision_intervals(40)))
    assert sum(rewards) == last["score"] == pytest.approx(floor)
    # The worst that an episode can do without diverging is to end just at the limit.
    assert floor < -env.reward_spec.divergence_rise(env._account.scale) / env._account.scale
    _, rewards, infos = play(env, options={"job": SampledTask(env.tasks.tasks[0], 0, 1e-3, 0)})
    assert sum(rewards) > floor
    assert not infos[-1]["diverged"]


def assert_plain(value, path="info"):
    """Finite numbers, texts and small arrays, nested."""
    if isinstance(value, dict):
        for name, inner in value.items():
            assert_plain(inner, f"{path}.{name}")
    elif isinstance(value, np.ndarray):
        assert np.isfinite(value).all(), path
    else:
        assert type(value) in (int, float, bool, str), f"{path}: {type(value)}"
        assert not isinstance(value, float) or math.isfinite(value), path


@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_info_is_finite_whatever_happens(make_env, rate):
    env = make_env(actions="factors")
    _, rewards, infos = play(env, options={"job": SampledTask(env.tasks.tasks[0], 0, rate, 0)})
    for info in infos:
        assert_plain(info)
    assert all(type(reward) is float and math.isfinite(reward) for reward in rewards)


def test_a_step_that_is_not_finite_is_an_outcome_not_an_error(make_env):
    env = make_env()
    _, info = env.reset(seed=0)
    calls = iter(range(10**6))

    def poison(module, arguments, output):
        if module.training and next(calls) == 1:
            output.logits = output.logits * float("nan")

    handle = env._session.job.loaded.model.register_forward_hook(poison)
    try:
        observation, reward, terminated, _, info = env.step(env.table.hold)
    finally:
        handle.remove()
    assert info["events"]["skipped_steps"] == 1
    assert named(env, observation)["skipped_share"] == 0.5
    assert math.isfinite(reward)
    assert not terminated


# -- update choices -------------------------------------------------------------------------------------------------


def test_a_rollback_returns_to_the_best_weights_and_is_used_up(make_env):
    env = make_env(({**TASK, "steps": 40},), schedule={"rollbacks": 1})
    rollback = env.table.names.index("rollback")
    _, info = env.reset(seed=0)
    parameters = env._session.job.loaded.trainable

    def is_best():
        best = env._session._best
        return best is None or all(torch.equal(p, best.tensors[f"parameter.{n}"]) for n, p in parameters.items())

    while not info["action_mask"][rollback] or is_best():
        action = "one_up" if info["action_mask"][env.table.names.index("one_up")] else "hold"
        _, _, terminated, _, info = env.step(env.table.names.index(action))
        assert not terminated
    best, level = env._session._best, info["level"]
    weights = {}
    original = env._session.run_interval

    def watched(*arguments):
        weights.update({name: parameter.detach().clone() for name, parameter in parameters.items()})
        return original(*arguments)

    env._session.run_interval = watched
    _, _, _, _, info = env.step(rollback)
    assert info["events"]["rollback"]
    assert info["level"] == pytest.approx(level / 1.7)
    assert info["action_mask"][rollback] == 0
    assert all(torch.equal(weights[name], best.tensors[f"parameter.{name}"]) for name in parameters)


def test_a_table_without_rollback_keeps_no_snapshot(make_env):
    env = make_env(actions="moves_only")
    play(env)
    assert env._session._best is None


def test_freezing_keeps_the_lower_half(make_env):
    env = make_env()
    env.reset(seed=0)
    parameters = env._session.job.loaded.trainable
    env.step(env.table.names.index("freeze"))
    initial = env._session.job.initial
    same = {name for name, parameter in parameters.items() if torch.equal(parameter, initial[name])}
    assert same == set(env._session._lower_half)
    assert same


# -- what the policy sees -------------------------------------------------------------------------------------------


def test_validation_is_hidden_unless_it_is_to_be_seen(make_env):
    for visible in (0.0, 1.0):
        env = make_env(observation={"validation_visible": visible})
        observations, _, _ = play(env)
        assert named(env, observations[0])["has_validation"] == 0.0  # nothing was measured yet
        shown = [named(env, observation)["has_validation"] for observation in observations[1:]]
        assert shown == [visible] * len(shown)
        assert any(named(env, o)["generalisation_gap"] for o in observations) == bool(visible)


def test_whether_the_policy_sees_validation_changes_nothing_else(make_env):
    blind, seeing = (make_env(observation={"validation_visible": visible}) for visible in (0.0, 1.0))
    first, second = play(blind), play(seeing)
    assert first[1] == second[1]
    names = blind.observation_spec.names
    features = blind.observation_spec.features
    others = [
        i for i, feature in enumerate(features)
        if feature.group is not FeatureGroup.VALIDATION and names[i] != "has_validation"
    ]  # fmt: skip
    np.testing.assert_array_equal(first[0][:, others], second[0][:, others])


def test_feature_groups_are_dropped_for_whole_episodes_but_losses_never(make_env):
    env = make_env(({**TASK, "steps": 4},), observation={"feature_dropout": 0.5})
    shown = {group: [] for group in GROUPS}
    env.reset(seed=0)
    for _ in range(14):
        observations, _, _ = play(env, seed=None)
        for group in GROUPS:
            flags = {named(env, observation)[f"has_{group}"] for observation in observations[1:]}
            assert len(flags) == 1
            shown[group].append(flags.pop())
    assert set(shown[FeatureGroup.LOSS]) == {1.0}
    for group in (FeatureGroup.GRADIENT, FeatureGroup.UPDATE, FeatureGroup.DIRECTION):
        assert set(shown[group]) == {0.0, 1.0}


def test_dropping_features_leaves_the_job_alone(make_env):
    whole = play(make_env(), at_random())
    env = make_env(observation={"feature_dropout": 1.0, "stack": 2})
    dropped = play(env, at_random())
    assert whole[1] == dropped[1]
    assert named(env, dropped[0][-1])["has_gradient"] == 0.0
    assert env.observation_space.shape == (env.observation_spec.size,)


# -- pictures -------------------------------------------------------------------------------------------------------


def test_render_modes(make_env):
    env = make_env(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(3)
    after = env.render()
    assert (after.shape, after.dtype) == ((600, 700, 3), np.uint8)
    assert not np.array_equal(before, after)
    env = make_env(render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == "tiny: step 0/16"
    env.step(env.table.names.index("one_up"))
    assert env.render().startswith("tiny: step 2/16, last action one_up\nloss ")


def test_a_human_sees_every_step_in_a_window_until_the_end(make_env):
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    env = make_env(render_mode="human")
    env.reset(seed=0)
    env.step(2)
    assert pyplot.get_figlabels() == ["llmrl"]
    env.close()
    assert pyplot.get_figlabels() == []


def test_the_picture_has_the_rates_that_were_used(make_env):
    env = make_env()
    env.reset(seed=0)
    used = []
    env._session.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    for action in (3, 2, 1, 2):
        env.step(action)
    assert env._history.learning_rates == used[1::2]


def test_rendering_without_a_mode_says_what_to_do(make_env):
    env = make_env()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


def test_tasks_may_be_a_distribution(library):
    tasks = TaskDistribution.model_validate({"tasks": [{**TASK, "steps": 2}], "num_seeds": 1})
    env = FineTuningEnv(tasks, device="cpu", library=library)
    assert env.reset(seed=0)[1]["seed"] == 0
