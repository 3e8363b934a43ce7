"""A population in worker processes: the same jobs as in one, saved and resumed exactly, and what can go wrong."""

import os
import signal

import gymnasium
import numpy as np
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import SampledTask
from llmrl_envs.population_workers import worker_lanes
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.dqn.lanes import lane_info

TASK = {
    "name": "tiny", "data": {"train": "builtin:json", "max_examples": 80}, "steps": 14, "max_length": 16,
    "batch_size": 2, "validation_examples": 4, "learning_rate": 1e-3,
}  # fmt: skip
LORA = {**TASK, "name": "adapters", "mode": "lora"}
EXACT = ("action_mask", "action", "task", "step", "total_steps", "seed", "given_rate", "diverged")


def make(workers, library=None, **arguments):
    tasks = {"tasks": [TASK, LORA], "num_seeds": 2, "steps_range": [6, 16], "learning_rate_log10_range": [-1.0, 2.5]}
    named = {"observation": {"feature_dropout": 0.2}, "schedule": {"start": "given"}, **arguments}
    return FineTuningVectorEnv(6, tasks, device="cpu", library=library, workers=workers, groups=2, **named)


@pytest.fixture(scope="module")
def parallel():
    env = make(2)
    yield env
    env.close()


@pytest.fixture(scope="module")
def library():
    return JobLibrary("cpu")


@pytest.fixture
def single(library):
    return make(1, library)


def choose(rng, infos):
    return np.array([rng.choice(np.flatnonzero(mask)) for mask in infos["action_mask"]])


def play(env, infos, decisions, seed=0):
    """Everything that random available actions bring."""
    rng, trace = np.random.default_rng(seed), []
    for _ in range(decisions):
        obs, rewards, terminations, _, infos = env.step(choose(rng, infos))
        trace.append((obs.tobytes(), rewards.tobytes(), terminations.tobytes(), repr(infos)))
    return trace, infos


def test_the_jobs_are_those_of_one_process(parallel, single):
    (obs, infos), (wanted_obs, wanted) = parallel.reset(seed=5), single.reset(seed=5)
    assert (parallel.num_workers, single.num_workers) == (2, 1)
    rng, ended = np.random.default_rng(1), 0
    for _ in range(24):
        np.testing.assert_allclose(obs, wanted_obs, rtol=1e-4, atol=1e-4)
        for key in EXACT:
            np.testing.assert_array_equal(infos[key], wanted[key])
        actions = choose(rng, infos)
        obs, rewards, terminations, truncations, infos = parallel.step(actions)
        wanted_obs, wanted_rewards, wanted_terminations, _, wanted = single.step(actions)
        np.testing.assert_array_equal(terminations, wanted_terminations)
        np.testing.assert_allclose(rewards, wanted_rewards, rtol=1e-4, atol=1e-4)
        assert not truncations.any()
        for lane in np.flatnonzero(terminations):
            last, wanted_last = (lane_info(found["final_info"], int(lane)) for found in (infos, wanted))
            assert last["events"] == wanted_last["events"]
            assert last["score"] == pytest.approx(wanted_last["score"], rel=1e-2, abs=1e-4)
            ended += 1
        for lane in np.flatnonzero(~terminations):
            mine, other = parallel.parameters(int(lane)), single.parameters(int(lane))
            assert mine.keys() == other.keys()
            for name, value in other.items():
                assert float((mine[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-12
    assert ended >= 8


def test_going_on_from_a_saved_state_equals_never_having_stopped(parallel, single):
    _, infos = parallel.reset(seed=2)
    _, infos = play(parallel, infos, 9)
    saved = parallel.state_dict()
    expected, _ = play(parallel, infos, 12, seed=7)
    parallel.load_state_dict(saved)
    assert play(parallel, infos, 12, seed=7)[0] == expected
    # Where the cores are other ones, the number of workers is that of the state.
    single.load_state_dict(saved)
    assert single.num_workers == 2
    assert play(single, infos, 12, seed=7)[0] == expected
    single.close()


def test_a_state_of_one_process_goes_on_in_one_process(single):
    _, infos = single.reset(seed=2)
    saved = single.state_dict()
    other = make(3, single._library)
    other.load_state_dict(saved)
    assert other.num_workers == 1
    assert play(other, infos, 3)[0] == play(single, infos, 3)[0]


def test_a_mistake_in_a_task_is_told_as_in_one_process(parallel):
    task = parallel.tasks.tasks[0].model_copy(update={"model": "no/such-folder"})
    with pytest.raises(UserError) as wanted:
        JobLibrary("cpu").job(task)
    with pytest.raises(UserError) as caught:
        parallel.reset(options={"jobs": [SampledTask(task, 0, 0.01, 0)] * 6})
    assert str(caught.value) == str(wanted.value)
    parallel.reset(seed=0)


def test_ctrl_c_in_a_step_leaves_workers_that_can_be_reset(parallel, monkeypatch):
    obs, infos = parallel.reset(seed=4)
    worker = parallel._episodes._workers[0]
    original = type(worker).answer

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(worker), "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel.step(choose(np.random.default_rng(0), infos))
    monkeypatch.setattr(type(worker), "answer", original)
    np.testing.assert_array_equal(parallel.reset(seed=4)[0], obs)


def test_actions_of_another_shape_are_refused(parallel):
    parallel.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected int64\[6\]"):
        parallel.step(np.zeros(5, np.int64))


def test_a_killed_worker_is_told_about(parallel):
    _, infos = parallel.reset(seed=0)
    os.kill(parallel._episodes._workers[1].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"(?s)a worker process of the population is gone.*exit code -9"):
        parallel.step(choose(np.random.default_rng(0), infos))
    parallel.close()
    with pytest.raises(gymnasium.error.ResetNeeded):
        parallel.step(np.zeros(6, np.int64))


@pytest.mark.parametrize(
    ("lanes", "group_size", "workers", "expected"),
    [(16, 1, 2, [0, 8]), (7, 1, 3, [0, 2, 4]), (12, 3, 3, [0, 3, 6]), (12, 4, 2, [0, 4])],
)
def test_workers_get_whole_groups(lanes, group_size, workers, expected):
    assert worker_lanes(lanes, group_size, workers) == expected


def test_lanes_that_do_not_restart_rest(single, library):
    env = make(1, library, restarts=False)
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED
    (obs, infos), (wanted_obs, _) = env.reset(seed=3), single.reset(seed=3)
    np.testing.assert_array_equal(obs, wanted_obs)
    over, last = np.zeros(6, np.bool_), {}
    hold = np.full(6, env.table.hold)
    while not over.all():
        obs, rewards, terminations, _, infos = env.step(hold)
        _, single_rewards, *_ = single.step(hold)
        going = ~over
        np.testing.assert_allclose(rewards[going], single_rewards[going], rtol=1e-3, atol=1e-4)
        assert not rewards[over].any()
        assert terminations[over].all()
        for lane, score in last.items():
            assert infos["score"][lane] == score
        over |= terminations
        last = {int(lane): infos["score"][lane] for lane in np.flatnonzero(over)}
        assert "final_obs" not in infos
    assert len(set(infos["total_steps"].tolist())) > 1


@pytest.mark.parametrize("workers", [0, 4, "many"])
def test_workers_that_cannot_be_are_refused_when_the_environment_is_made(workers):
    with pytest.raises(UserError, match="1 to 3, the number of groups, or auto"):
        make(workers)
