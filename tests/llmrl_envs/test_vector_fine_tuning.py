"""The population as a vector environment: Gymnasium's conventions; test_population_exactness.py has its numbers."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import SampledTask
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.dqn.lanes import lane_info

TASK = {
    "name": "tiny", "data": {"train": "builtin:json", "max_examples": 80}, "steps": 14, "max_length": 16,
    "batch_size": 2, "validation_examples": 4, "learning_rate": 1e-3,
    "optimizer": {"weight_decay": 0.1, "max_grad_norm": 0.5},
}  # fmt: skip
LONGER = {**TASK, "name": "longer", "steps": 20, "batch_size": 3, "gradient_accumulation": 2, "max_length": 12}
LORA = {**TASK, "name": "adapters", "mode": "lora"}
ID = "llmrl_envs:llmrl/FineTuning-v0"


@pytest.fixture(scope="module")
def library():
    return JobLibrary("cpu")


def tasks_of(*tasks, **distribution):
    return {"tasks": list(tasks), "num_seeds": 2, **distribution}


def small(library, lanes=3, *tasks, distribution=None, **arguments):
    distribution = tasks_of(*(tasks or (TASK,)), **(distribution or {}))
    return FineTuningVectorEnv(lanes, distribution, device="cpu", library=library, **arguments)


def play(env, decisions, *, seed=0, reset=True):
    """Random available actions; everything that was returned."""
    rng, trace = np.random.default_rng(seed), []
    if reset:
        obs, infos = env.reset(seed=seed)
        trace.append((obs.tobytes(), repr(infos)))
        mask = infos["action_mask"]
    else:
        mask = env._episodes.info()["action_mask"]
    for _ in range(decisions):
        result = env.step(np.array([rng.choice(np.flatnonzero(row)) for row in mask]))
        mask = result[4]["action_mask"]
        trace.append((result[0].tobytes(), result[1].tobytes(), result[2].tobytes(), repr(result[4])))
    return trace


def test_gymnasium_makes_it_by_default_and_processes_on_demand():
    tasks = tasks_of({**TASK, "steps": 4})
    env = gymnasium.make_vec(ID, num_envs=2, tasks=tasks, device="cpu")
    assert isinstance(env.unwrapped, FineTuningVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    processes = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="async", tasks=tasks, device="cpu")
    assert isinstance(processes, gymnasium.vector.AsyncVectorEnv)
    assert processes.single_observation_space == env.single_observation_space
    processes.close(terminate=True)


def test_it_keeps_to_the_conventions_of_vector_environments(library):
    env = small(library)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(3, np.int64))
    obs, infos = env.reset(seed=[3, None, 5])
    assert obs in env.observation_space
    assert obs.dtype == np.float32
    kept = obs.copy(), {name: value.copy() for name, value in infos.items()}
    hold, ended, steps = env.table.hold, False, 0
    while not ended:
        actions = np.full(3, hold)
        assert actions in env.action_space
        later, rewards, terminations, truncations, new_infos = env.step(actions)
        assert later in env.observation_space
        assert (rewards.dtype, terminations.dtype, truncations.dtype) == (np.float64, np.bool_, np.bool_)
        assert all(new_infos[f"_{key}"].all() for key in ("action_mask", "validation_loss", "events"))
        ended, steps = bool(terminations.any()), steps + 1
        assert ("final_obs" in new_infos) == ended
    assert new_infos["step"][terminations].tolist() == [0] * int(terminations.sum())
    lane = int(np.flatnonzero(terminations)[0])
    assert new_infos["final_obs"][lane] in env.single_observation_space
    assert new_infos["final_info"]["step"][lane] == TASK["steps"]
    assert lane_info(new_infos["final_info"], lane)["task"] == "tiny"
    np.testing.assert_array_equal(obs, kept[0])
    for name, value in kept[1].items():
        np.testing.assert_array_equal(infos[name], value)
    with pytest.raises(ValueError, match=r"expected int64\[3\]"):
        env.step(np.zeros(2, np.int64))
    env.close()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(3, np.int64))


def test_fresh_environments_repeat_each_other_bit_for_bit(library):
    distribution = {"steps_range": [6, 12]}
    first = play(small(library, 3, TASK, LORA, distribution=distribution), 9, seed=4)
    used = small(JobLibrary("cpu"), 3, TASK, LORA, distribution=distribution)
    play(used, 5, seed=9)
    torch.manual_seed(7)
    assert play(used, 9, seed=4) == first


def test_going_on_from_a_saved_state_equals_never_having_stopped(library):
    def make(library):
        reward = {"average_intervals": 0.5}
        distribution = {"steps_range": [6, 16]}
        return small(library, 3, TASK, LORA, LONGER, distribution=distribution, reward=reward)

    env = make(library)
    play(env, 13, seed=2)
    saved = env.state_dict()
    expected = play(env, 14, seed=6, reset=False)
    fresh = make(JobLibrary("cpu"))
    fresh.load_state_dict(saved)
    assert play(fresh, 14, seed=6, reset=False) == expected
    with pytest.raises(ValueError, match="expected 2 environments, got 3"):
        small(library, 2).load_state_dict(saved)


def test_decisions_come_as_often_as_the_schedule_says(library):
    schedule = {"decisions_per_job": 3, "early_decisions": False}
    single = gymnasium.make(ID, tasks=tasks_of(TASK), device="cpu", schedule=schedule)
    env = small(library, 2, TASK, schedule=schedule)
    job = SampledTask(env.tasks.tasks[0], 0, 1e-3, 0)
    single.reset(options={"job": job})
    env.reset(options={"jobs": [job, job]})
    rewards, over = [], False
    while not over:
        _, reward, over, _, info = single.step(env.table.hold)
        _, of_lanes, terminations, _, _ = env.step(np.full(2, env.table.hold))
        assert terminations.tolist() == [over, over]
        rewards.append(reward)
        assert of_lanes == pytest.approx([reward, reward], rel=1e-3, abs=1e-3)
    assert info["step"] == TASK["steps"]
    assert len(rewards) == 3


def test_jobs_can_be_given(library):
    env = small(library, 2)
    task = env.tasks.tasks[0].with_steps(6)
    jobs = [SampledTask(task, 0, 0.01, 0), SampledTask(task.with_steps(4), 0, 0.02, 1)]
    _, infos = env.reset(options={"jobs": jobs})
    assert infos["given_rate"].tolist() == [0.01, 0.02]
    assert infos["total_steps"].tolist() == [6, 4]
    assert infos["seed"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="2 SampledTasks"):
        env.reset(options={"jobs": jobs[:1]})


# -- groups ---------------------------------------------------------------------------------------------------------


def test_a_group_shares_its_job_and_the_first_lane_holds(library):
    env = small(
        library,
        6,
        TASK,
        {**TASK, "name": "other", "data": "builtin:email"},
        groups=3,
        reward={"divergence_margin": 50.0},
    )
    _, infos = env.reset(seed=1)
    hold, restarts = env.table.hold, 0
    for _ in range(16):
        for first in (0, 3):
            for key in ("task", "seed", "given_rate", "total_steps", "step"):
                assert len(set(infos[key][first : first + 3].tolist())) == 1
            assert np.flatnonzero(infos["action_mask"][first]).tolist() == [hold]
        _, _, terminations, _, infos = env.step(np.array([0, 3, hold, 0, hold, 4]))
        assert infos["action"][[0, 3]].tolist() in ([hold, hold], [-1, -1])
        restarts += int(terminations.sum())
    assert restarts >= 12


def test_a_job_that_diverged_begins_its_groups_job_again(library):
    env = small(library, 2, groups=2)
    env.reset(seed=1)
    env.step(np.full(2, env.table.hold))
    env._episodes._lane(1).account.initial_log_loss = -10.0
    _, _, terminations, _, infos = env.step(np.full(2, env.table.hold))
    assert terminations.tolist() == [False, True]
    assert infos["final_info"]["diverged"][1]
    assert infos["step"].tolist() == [4, 0]
    assert [len(set(infos[key].tolist())) for key in ("seed", "given_rate", "task")] == [1, 1, 1]


def test_members_of_a_group_with_the_same_actions_do_the_same(library):
    env = small(library, 2, groups=2)
    env.reset(seed=3)
    for _ in range(5):
        obs, rewards, *_ = env.step(np.full(2, env.table.hold))
        np.testing.assert_allclose(obs[0], obs[1], atol=1e-5)
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_measured_at_the_end_alone_the_return_is_the_gain_over_the_member_that_holds(library):
    env = small(library, 3, groups=3, reward={"baseline": "hold", "measured": "end"})
    plain = small(library, 3, groups=3)
    for one in (env, plain):
        one.reset(seed=3)
    terminated, returns = np.zeros(3, np.bool_), np.zeros(3)
    while not terminated.any():
        actions = np.array([0, env.table.hold, 4])
        _, rewards, terminated, _, infos = env.step(actions)
        _, _, _, _, wanted = plain.step(actions)
        assert terminated.all() or not rewards.any()
        returns += rewards
    scores = wanted["final_info"]["score"]
    np.testing.assert_allclose(infos["final_info"]["score"], scores, atol=1e-5)
    np.testing.assert_allclose(returns, scores - scores[0], atol=1e-5)
    assert abs(returns[2]) > 1e-3


def test_a_group_starts_where_its_job_says_and_holds_there(library):
    env = small(library, 2, {**TASK, "name": "moved"}, groups=2)
    env.tasks = env.tasks.model_copy(update={"start_moves": (3,)})
    env.settings = dataclasses.replace(env.settings, tasks=env.tasks)
    _, infos = env.reset(seed=3)
    levels = env.table.levels
    wanted = levels[env.table.default_level + 3]
    assert infos["level"].tolist() == [wanted, wanted]
    _, _, _, _, infos = env.step(np.array([0, 0]))
    assert infos["level"].tolist() == [wanted, levels[env.table.default_level + 1]]


def test_holding_is_no_baseline_without_groups_and_no_loss_is_shown_that_is_not_measured(library):
    with pytest.raises(UserError, match=r"reward\.baseline"):
        small(library, 2, reward={"baseline": "hold", "measured": "end"}).reset(seed=0)
    with pytest.raises(UserError, match="validation_visible"):
        small(library, 2, observation={"validation_visible": 0.5}, reward={"measured": "end"})


def test_a_group_that_does_not_divide_the_population_is_refused():
    with pytest.raises(UserError, match="divisor of 4"):
        FineTuningVectorEnv(4, tasks_of(TASK), groups=3)
