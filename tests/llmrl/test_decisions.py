"""The controller sees and does in a job what the environment sees and does in training."""

from __future__ import annotations

import numpy as np
import pytest
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask, SampledTask

from llmrl.decisions import DecisionLoop
from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

TASK = FineTuningTask.model_validate(
    {
        "data": "builtin:json",
        "steps": 24,
        "batch_size": 2,
        "max_length": 32,
        "validation_examples": 4,
        "test_examples": 4,
    }
)
ACTIONS = [2, 3, 3, 5, 6, 7, 0, 2]


class Scripted(SchedulePolicy):
    """Takes a list of actions one after the other."""

    def __init__(self, actions: list[int]) -> None:
        hold = hold_policy()
        super().__init__(hold.table, hold.spec, hold.settings, None)
        self.script = iter(actions)

    def act(self, observation: np.ndarray, mask: np.ndarray) -> PolicyDecision:
        return PolicyDecision(np.array([next(self.script)]), np.zeros((1, self.table.num_actions), np.float32))


def test_a_job_and_the_environment_agree_number_by_number() -> None:
    env = FineTuningEnv({"tasks": [TASK]})
    sampled = SampledTask(TASK, 0, 1e-5, 3)
    seen = [env.reset(options={"job": sampled})[0]]
    rates = []
    for action in ACTIONS:
        observation, _, terminated, _, _ = env.step(action)
        seen.append(observation)
        rates.append(env._history.learning_rates[-1])
    assert terminated

    session = FineTuningSession(JobLibrary().job(TASK), seed=3)
    controller = DecisionLoop(Scripted(ACTIONS), total_steps=TASK.steps, given_rate=1e-5)
    controller.begin(session.initial_statistics(), *session.initial_norms())
    for index in range(len(ACTIONS)):
        decision = controller.decide()
        np.testing.assert_array_equal(decision.observation, seen[index])
        if decision.rollback:
            session.roll_back()
        statistics = session.run_interval(controller.interval, controller.schedule)
        assert controller.learning_rate(session.step - 1) == rates[index]
        if controller.observe(statistics).at_best[0]:
            session.mark_best()
            controller.schedule.has_snapshot[:] = True
    assert controller.decisions_left == 0


def test_a_restored_controller_decides_as_the_saved_one() -> None:
    session = FineTuningSession(JobLibrary().job(TASK), seed=0)
    first, second = (DecisionLoop(hold_policy(), total_steps=TASK.steps, given_rate=1e-5) for _ in range(2))
    first.begin(session.initial_statistics(), *session.initial_norms())
    first.decide()
    first.observe(session.run_interval(first.interval, first.schedule))
    second.load_state_dict(first.state_dict())
    ours, theirs = first.decide(), second.decide()
    np.testing.assert_array_equal(ours.observation, theirs.observation)
    assert (ours.index, ours.step, ours.action) == (theirs.index, theirs.step, theirs.action)
    assert first.learning_rate(5) == second.learning_rate(5)


def test_the_first_process_decides_for_all() -> None:
    controller = DecisionLoop(hold_policy(), total_steps=TASK.steps, given_rate=1e-5, agree=lambda action: action + 1)
    session = FineTuningSession(JobLibrary().job(TASK), seed=0)
    controller.begin(session.initial_statistics(), *session.initial_norms())
    assert controller.decide().action_name == "one_up"


def test_deciding_before_the_job_began_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="has begun"):
        DecisionLoop(hold_policy(), total_steps=10, given_rate=1e-5).decide()


def test_decisions_come_as_often_as_the_policy_was_trained_with() -> None:
    policy = hold_policy(ScheduleSettings(decisions_per_job=5, early_decisions=False))
    assert DecisionLoop(policy, total_steps=100, given_rate=1e-5).intervals == (20,) * 5
    other = ScheduleSettings(decisions_per_job=2, early_decisions=False)
    assert DecisionLoop(policy, total_steps=100, given_rate=1e-5, settings=other).intervals == (50, 50)
    assert DecisionLoop(policy, total_steps=100, given_rate=1e-5, first_step=40).intervals == (12,) * 5


def test_intervals_must_fill_the_budget() -> None:
    with pytest.raises(ValueError, match="add up to 10"):
        DecisionLoop(hold_policy(), total_steps=10, given_rate=1e-5, intervals=(4, 4))
