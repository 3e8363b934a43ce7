"""NoisyQuadratic: Gymnasium's conventions, the reward's promises, and one lane like one environment."""

from __future__ import annotations

import json
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from llmrl_envs.array_state import pack_arrays, unpack_arrays
from llmrl_envs.errors import UserError
from llmrl_envs.interface.reward import RewardSpec, interval_reward
from llmrl_envs.noisy_quadratic import (
    NoisyQuadraticEnv,
    NoisyQuadraticVectorEnv,
    expected_losses,
    optimal_schedule,
)

SHORT = {"total_steps": (60, 150)}


def random_action(rng: np.random.Generator, mask: np.ndarray) -> int:
    return int(rng.choice(np.flatnonzero(mask)))


def play(env: gymnasium.Env, seed: int, choose) -> tuple[list[float], dict]:
    """Rewards of one episode and its last info; `choose(info)` gives the action."""
    _, info = env.reset(seed=seed)
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, truncated, info = env.step(choose(info))
        assert not truncated
        rewards.append(reward)
    return rewards, info


@pytest.mark.parametrize("actions", ["factors", "moves", "moves_only", "careful", "levels", "joint"])
def test_check_env_without_warning(actions: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("llmrl/NoisyQuadratic-v0", actions=actions).unwrapped)


def test_same_seed_same_actions_same_bits() -> None:
    traces = []
    for _ in range(2):
        env, rng = NoisyQuadraticEnv(SHORT), np.random.default_rng(0)
        trace = []
        obs, info = env.reset(seed=11)
        for _ in range(90):
            obs, reward, terminated, _, info = env.step(random_action(rng, info["action_mask"]))
            trace += [obs.tobytes(), reward, info["expected_loss"]]
            if terminated:
                obs, info = env.reset()
        traces.append(trace)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("actions", ["factors", "moves"])
def test_lanes_equal_single_environments(actions: str) -> None:
    lanes, steps = 6, 70
    rng = np.random.default_rng(5)
    vector = NoisyQuadraticVectorEnv(lanes, SHORT, actions=actions)
    singles = [NoisyQuadraticEnv(SHORT, actions=actions) for _ in range(lanes)]
    obs, infos = vector.reset(seed=40)
    single = [env.reset(seed=40 + lane) for lane, env in enumerate(singles)]
    finished = 0
    for _ in range(steps):
        np.testing.assert_allclose(obs, [pair[0] for pair in single], atol=1e-6)
        np.testing.assert_array_equal(infos["action_mask"], [pair[1]["action_mask"] for pair in single])
        chosen = np.array([random_action(rng, mask) for mask in infos["action_mask"]])
        obs, rewards, terminations, truncations, infos = vector.step(chosen)
        assert not truncations.any()
        for lane, env in enumerate(singles):
            last, reward, terminated, _, info = env.step(chosen[lane])
            assert reward == rewards[lane]
            assert terminated == terminations[lane]
            assert terminated == bool(infos.get("_final_obs", np.zeros(lanes, bool))[lane])
            if terminated:
                finished += 1
                np.testing.assert_allclose(infos["final_obs"][lane], last, atol=1e-6)
                assert infos["final_info"]["expected_loss"][lane] == info["expected_loss"]
                np.testing.assert_array_equal(infos["final_info"]["action_mask"][lane], info["action_mask"])
                last, info = env.reset()
            assert infos["expected_loss"][lane] == info["expected_loss"]
            single[lane] = (last, info)
    assert finished > lanes


def test_vector_conventions() -> None:
    env = gymnasium.make_vec("llmrl_envs:llmrl/NoisyQuadratic-v0", num_envs=3, distribution=SHORT)
    assert isinstance(env.unwrapped, NoisyQuadraticVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, infos = env.reset(seed=[3, None, 5])
    assert obs in env.observation_space
    assert obs.dtype == np.float32
    env.action_space.seed(0)
    hold, ended = env.unwrapped.table.hold, False
    while not ended:
        actions = np.full(3, hold)
        assert actions in env.action_space
        obs, rewards, terminations, truncations, infos = env.step(actions)
        assert obs in env.observation_space
        assert (rewards.dtype, terminations.dtype, truncations.dtype) == (np.float64, np.bool_, np.bool_)
        for key in ("action_mask", "expected_loss", "step"):
            assert infos[f"_{key}"].all()
        ended = bool(terminations.any())
        assert ("final_obs" in infos) == ended
    assert infos["step"][terminations].tolist() == [0] * int(terminations.sum())
    lane = int(np.flatnonzero(terminations)[0])
    assert infos["final_obs"][lane] in env.single_observation_space
    assert infos["final_info"]["_step"].tolist() == terminations.tolist()
    final_step = infos["final_info"]["step"][lane]
    assert final_step == infos["final_info"]["total_steps"][lane] or infos["final_info"]["diverged"][lane]
    env.close()


def test_what_was_returned_does_not_change_later() -> None:
    env = NoisyQuadraticVectorEnv(2, SHORT)
    first_obs, first_info = env.reset(seed=0)
    kept = first_obs.copy(), {name: value.copy() for name, value in first_info.items()}
    for _ in range(3):
        env.step(np.full(2, env.table.hold))
    np.testing.assert_array_equal(first_obs, kept[0])
    for name, value in kept[1].items():
        np.testing.assert_array_equal(first_info[name], value)


def test_the_return_telescopes_to_the_final_improvement() -> None:
    env = NoisyQuadraticEnv(SHORT, reward={"switch_cost": 0.01, "time_cost": 0.2})
    rng = np.random.default_rng(1)
    checked = 0
    for seed in range(12):
        _, start = env.reset(seed=seed)
        quadratic = env.quadratic
        rewards, info = play(env, seed, lambda info: random_action(rng, info["action_mask"]))
        if info["diverged"]:
            continue
        checked += 1
        drop = np.log(start["expected_loss"]) - np.log(info["expected_loss"])
        scale = np.log(quadratic.initial_loss[0]) - np.log(quadratic.reference_loss[0])
        assert info["score"] == pytest.approx(drop / scale)
        switches = round((drop / scale - 0.2 - sum(rewards)) / 0.01)
        assert 0 < switches <= len(rewards)
        assert sum(rewards) == pytest.approx(drop / scale - 0.2 - 0.01 * switches)
    assert checked > 4


def test_rewards_equal_those_of_a_real_job() -> None:
    costs = {"switch_cost": 0.02, "rollback_cost": 0.3, "time_cost": 0.1}
    spec = RewardSpec(**costs)
    env = NoisyQuadraticEnv(SHORT, actions="moves", reward=costs)
    names, rng = env.table.names, np.random.default_rng(2)
    _, info = env.reset(seed=4)
    scale = spec.scale(np.log(info["expected_loss"]), np.log(info["reference_loss"]))
    rollbacks, terminated = 0, False
    while not terminated:
        before = info
        action = random_action(rng, info["action_mask"])
        _, reward, terminated, _, info = env.step(action)
        rolled_back = names[action] == "rollback"
        rollbacks += rolled_back
        expected = interval_reward(
            spec,
            before=np.log(before["expected_loss"]),
            after=np.log(info["expected_loss"]),
            scale=scale,
            switched=names[action] in {"two_down", "one_down", "one_up", "two_up", "rollback"},
            rolled_back=rolled_back,
            budget_share=(info["step"] - before["step"]) / info["total_steps"],
        )
        assert reward == pytest.approx(expected)
    assert rollbacks > 0


def test_a_job_that_is_measured_at_its_end_is_paid_the_same_there() -> None:
    for rate_error in (0.0, 1.5):  # the second diverges with holding
        distribution = {**SHORT, "log10_rate_error": (rate_error, rate_error)}
        each, at_end = (
            play(NoisyQuadraticEnv(distribution, reward={"measured": name}), 3, lambda _: 3)
            for name in ("decisions", "end")
        )
        assert at_end[1]["score"] == each[1]["score"]
        assert at_end[0][:-1] == [0.0] * (len(each[0]) - 1)
        assert at_end[0][-1] == pytest.approx(sum(each[0]), abs=1e-12)


@pytest.mark.parametrize(
    "schedule", [{"decisions_per_job": 300}, {"decisions_per_job": 5, "early_decisions": False}], ids=str
)
def test_decisions_come_as_often_as_the_schedule_says(schedule) -> None:
    env = NoisyQuadraticEnv({"total_steps": (1200, 1200)}, schedule=schedule)
    rewards, info = play(env, 0, lambda info: env.table.hold)
    assert len(rewards) == {300: 302, 5: 5}[schedule["decisions_per_job"]]
    assert sum(rewards) == pytest.approx(info["score"], abs=1e-9)


def test_holding_the_reference_rate_returns_about_one() -> None:
    settings = {"log10_rate_error": (0.0, 0.0)}
    env = NoisyQuadraticEnv(settings, schedule={"warmup_fraction": 0.0})
    for seed in range(1, 6):
        rewards, info = play(env, seed, lambda _: env.table.hold)
        assert sum(rewards) == pytest.approx(1.0, abs=1e-4)
        assert info["expected_loss"] == pytest.approx(info["reference_loss"], rel=1e-4)


def test_no_schedule_of_the_environment_beats_the_optimum() -> None:
    env, rng = NoisyQuadraticEnv(SHORT), np.random.default_rng(0)
    for seed in range(6):
        env.reset(seed=seed)
        quadratic = env.quadratic
        best = expected_losses(quadratic, optimal_schedule(quadratic))[-1, 0]
        assert expected_losses(quadratic, env.optimal_schedule())[-1, 0] == best
        _, info = play(env, seed, lambda info: random_action(rng, info["action_mask"]))
        assert info["expected_loss"] > best


def test_a_starting_rate_far_too_high_diverges_below_everything_else() -> None:
    env = NoisyQuadraticEnv({"log10_rate_error": (1.5, 1.5)})
    rewards, info = play(env, 0, lambda _: env.table.hold)
    assert info["diverged"]
    assert info["step"] < info["total_steps"]
    assert info["score"] == pytest.approx(sum(rewards))
    # Diverged means up by twice the reference's improvement; the floor lies another such improvement below.
    assert sum(rewards) == pytest.approx(-3.0)
    assert np.isfinite(info["expected_loss"])


def test_levels_steer_the_relative_update_size() -> None:
    env = NoisyQuadraticEnv({"log10_rate_error": (1.5, 1.5), "log10_level_error": 0.0}, actions="moves_only")
    for seed in range(5):
        _, info = play(env, seed, lambda _: env.table.hold)
        # The given rate is thirty times too high and never used: the default level means about the right one.
        assert not info["diverged"]
        assert info["score"] > 0.5


def test_masks_name_what_has_meaning() -> None:
    env = NoisyQuadraticEnv(SHORT, actions="moves")
    names = env.table.names
    _, info = env.reset(seed=0)
    available = {name for name, free in zip(names, info["action_mask"], strict=True) if free}
    assert available == {"two_down", "one_down", "hold", "one_up", "two_up"}
    _, _, _, _, info = env.step(env.table.hold)
    available = {name for name, free in zip(names, info["action_mask"], strict=True) if free}
    assert "rollback" in available
    assert not available & {"freeze", "tighten"}
    held = env.step(names.index("freeze"))[4]
    assert names[held["action"]] == "hold"


@pytest.mark.parametrize("actions", ["factors", "moves"])
def test_a_stored_state_goes_on_bit_for_bit(actions: str) -> None:
    rng = np.random.default_rng(9)
    env = NoisyQuadraticVectorEnv(3, SHORT, actions=actions)
    _, infos = env.reset(seed=1)
    for _ in range(25):
        _, _, _, _, infos = env.step(np.array([random_action(rng, mask) for mask in infos["action_mask"]]))
    stored = json.dumps(env.state_dict(), allow_nan=False)
    again = NoisyQuadraticVectorEnv(3, SHORT, actions=actions)
    again.load_state_dict(json.loads(stored))
    for _ in range(40):
        chosen = np.array([random_action(rng, mask) for mask in infos["action_mask"]])
        first, second = env.step(chosen), again.step(chosen)
        for left, right in zip(first[:4], second[:4], strict=True):
            np.testing.assert_array_equal(left, right)
        infos = first[4]
        np.testing.assert_array_equal(infos["expected_loss"], second[4]["expected_loss"])


def test_a_single_environment_stores_its_state_too() -> None:
    env, again = NoisyQuadraticEnv(SHORT), NoisyQuadraticEnv(SHORT)
    env.reset(seed=3)
    for _ in range(4):
        env.step(env.table.hold)
    again.load_state_dict(json.loads(json.dumps(env.state_dict())))
    for _ in range(3):
        first, second = env.step(1), again.step(1)
        np.testing.assert_array_equal(first[0], second[0])
        assert first[1:4] == second[1:4]
    np.testing.assert_array_equal(env.reset()[0], again.reset()[0])
    assert env.quadratic.seed[0] == again.quadratic.seed[0]


def test_given_jobs_are_run_first() -> None:
    vector = NoisyQuadraticVectorEnv(4)
    vector.reset(seed=100)
    jobs = vector.quadratics
    single = NoisyQuadraticEnv()
    _, info = single.reset(seed=0, options={"quadratics": jobs[2:3]})
    assert info["given_rate"] == jobs.given_rate[2]
    vector.reset(seed=7, options={"quadratics": jobs})
    np.testing.assert_array_equal(vector.quadratics.seed, jobs.seed)
    with pytest.raises(ValueError, match="NoisyQuadratics of 1 jobs"):
        single.reset(options={"quadratics": jobs})
    with pytest.raises(ValueError, match="expected"):
        single.reset(options={"job": 1})


def test_jobs_withhold_feature_groups_and_show_the_loss_as_asked() -> None:
    def flags(**observation: object) -> dict[str, np.ndarray]:
        env = NoisyQuadraticVectorEnv(300, {**SHORT, "log10_rate_error": (0.0, 0.0)}, observation=observation)
        env.reset(seed=0)
        obs = env.step(np.full(300, env.table.hold))[0]
        return {name: obs[:, place] for place, name in enumerate(env.observation_spec.names) if name.startswith("has_")}

    shown = flags()
    assert {name: values.mean() for name, values in shown.items()} == {
        "has_loss": 1.0, "has_gradient": 1.0, "has_update": 1.0, "has_direction": 1.0, "has_validation": 0.0,
    }  # fmt: skip
    withheld = flags(feature_dropout=0.3, validation_visible=0.5)
    assert withheld["has_loss"].all()
    for name in ("has_gradient", "has_update", "has_direction"):
        assert withheld[name].mean() == pytest.approx(0.7, abs=0.1)
    assert withheld["has_validation"].mean() == pytest.approx(0.5, abs=0.1)
    assert not np.array_equal(withheld["has_gradient"], withheld["has_update"])


def test_render() -> None:
    env = NoisyQuadraticEnv(SHORT, render_mode="ansi")
    env.reset(seed=0)
    env.step(env.table.hold)
    assert "learning rate" in env.render()
    picture = NoisyQuadraticEnv(SHORT, render_mode="rgb_array")
    picture.reset(seed=0)
    picture.step(0)
    assert picture.render().dtype == np.uint8


def test_bad_input() -> None:
    env = NoisyQuadraticEnv(SHORT)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected int64\[1\] in \[0, 7\)"):
        env.step(7)
    play(env, 0, lambda _: env.table.hold)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    vector = NoisyQuadraticVectorEnv(2, SHORT)
    with pytest.raises(gymnasium.error.ResetNeeded):
        vector.step(np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="expected one for each of 2 lanes, got 3"):
        vector.reset(seed=[1, 2, 3])
    vector.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected int64\[2\]"):
        vector.step(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="expected 2 environments, got 1"):
        vector.load_state_dict(env.state_dict())
    for settings in ({"actions": "nonsense"}, {"reward": {"average_intervals": 0.5}}):
        with pytest.raises(UserError):
            NoisyQuadraticEnv(SHORT, **settings)
    with pytest.raises(ValueError, match="at least 1"):
        NoisyQuadraticVectorEnv(0)


def test_arrays_survive_packing() -> None:
    arrays = {"a": np.array([[np.nan, -np.inf, 1e-300]]), "b": np.array([True, False]), "c": np.zeros((0, 3), np.int8)}
    again = unpack_arrays(json.loads(json.dumps(pack_arrays(arrays), allow_nan=False)))
    for name, value in arrays.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)
    with pytest.raises(ValueError, match="dtype"):
        unpack_arrays({"x": {"dtype": "O", "shape": [1], "data": ""}})
