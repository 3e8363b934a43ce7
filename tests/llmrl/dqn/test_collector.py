from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.collector import Collector
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.lanes import episode_seed

NUM_ACTIONS = 3


class Corridor(gymnasium.Env):
    """Counts up from a random start; observation [start, step]. An episode ends after `length` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(NUM_ACTIONS)

    def __init__(self, length=4, truncates=False):
        self.length = length
        self.truncates = truncates
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.start, self.time = float(self.np_random.integers(1000)), 0
        return self._obs(), self._info()

    def step(self, action):
        self.time += 1
        over = self.time == self.length
        reward = 10.0 * int(action) + self.time
        return self._obs(), reward, over and not self.truncates, over and self.truncates, self._info()

    def _obs(self):
        return np.array([self.start, self.time], dtype=np.float32)

    def _info(self):
        mask = np.ones(NUM_ACTIONS, dtype=np.int8)
        mask[self.time % NUM_ACTIONS] = 0  # differs from step to step
        return {"action_mask": mask, "time": self.time}


class Unmasked(Corridor):
    def _info(self):
        return {}


class Resumable(Corridor):
    def state_dict(self):
        return {"start": self.start, "time": self.time, "generator": self.np_random.bit_generator.state}

    def load_state_dict(self, state):
        self.start, self.time = state["start"], state["time"]
        self.np_random.bit_generator.state = state["generator"]


class ScriptedAgent:
    """Takes the lowest available action and remembers every transition of every lane."""

    def __init__(self):
        self.transitions = {}
        self.num_ends = 0
        self.explored = []

    def act(self, obs, mask, *, explore):
        assert obs.dtype in (np.float32, np.uint8)
        assert mask.dtype == np.bool_
        assert mask.any(axis=1).all()
        self.explored.append(explore)
        return mask.argmax(axis=1)

    def observe(self, obs, action, reward, terminated, truncated, next_obs, mask, next_mask, valid=None):
        for lane in range(len(obs)):
            if valid is None or valid[lane]:
                self.transitions.setdefault(lane, []).append(
                    (
                        obs[lane].tolist(),
                        int(action[lane]),
                        float(reward[lane]),
                        bool(terminated[lane]),
                        bool(truncated[lane]),
                        next_obs[lane].tolist(),
                        mask[lane].tolist(),
                        next_mask[lane].tolist(),
                    )
                )

    def end_episodes(self):
        self.num_ends += 1


def vector(mode, makers):
    return SyncVectorEnv(makers, autoreset_mode=mode)


def collect(env, num_steps, seed=0):
    agent = ScriptedAgent()
    collector = Collector(env, agent, seed=seed)
    episodes = [episode for _ in range(num_steps) for episode in collector.step()]
    return agent, collector, episodes


LANES = [lambda: Corridor(4), lambda: Corridor(7, truncates=True), lambda: Corridor(1), lambda: Corridor(5)]


def assert_lane(transitions, length, truncates):
    """Every transition is what the corridor does, and the last one of an episode shows its final observation."""
    start, time = None, 0
    for obs, action, reward, terminated, truncated, next_obs, mask, next_mask in transitions:
        start = obs[0] if time == 0 else start
        assert obs == [start, time]
        assert next_obs == [start, time + 1]
        assert mask == [a != time % NUM_ACTIONS for a in range(NUM_ACTIONS)]
        assert next_mask == [a != (time + 1) % NUM_ACTIONS for a in range(NUM_ACTIONS)]
        assert reward == 10.0 * action + time + 1
        over = time + 1 == length
        assert (terminated, truncated) == (over and not truncates, over and truncates)
        time = 0 if over else time + 1


@pytest.mark.parametrize("mode", AutoresetMode)
def test_transitions_of_a_vector_environment_are_right_in_every_autoreset_mode(mode):
    agent, _, _ = collect(vector(mode, LANES), 40)
    for lane, (length, truncates) in enumerate([(4, False), (7, True), (1, False), (5, False)]):
        assert_lane(agent.transitions[lane], length, truncates)
        assert len(agent.transitions[lane]) >= 20


def test_all_autoreset_modes_give_the_same_transitions():
    stories = [collect(vector(mode, LANES), 60)[0].transitions for mode in AutoresetMode]
    for lane in range(len(LANES)):
        num = min(len(story[lane]) for story in stories)
        assert num >= 30
        assert stories[0][lane][:num] == stories[1][lane][:num] == stories[2][lane][:num]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_all_autoreset_modes_report_the_same_episodes(mode):
    _, collector, episodes = collect(vector(mode, LANES), 30)
    assert {(e.environment, e.length, e.terminated, e.truncated) for e in episodes} == {
        (0, 4, True, False),
        (1, 7, False, True),
        (2, 1, True, False),
        (3, 5, True, False),
    }
    assert all(episode.info["time"] == episode.length for episode in episodes)
    assert sorted(episode.index for episode in episodes) == sorted(set(episode.index for episode in episodes))
    one = next(episode for episode in episodes if episode.environment == 2)
    assert one.episode_return == 11.0  # action 1, since 0 is masked at first
    started = collector.env_steps - sum(episode.length for episode in episodes)
    assert 0 <= started < 4 + 7 + 1 + 5


@pytest.mark.parametrize("truncates", [False, True])
def test_transitions_of_a_single_environment(truncates):
    agent, collector, episodes = collect(Corridor(4, truncates=truncates), 18)
    assert_lane(agent.transitions[0], 4, truncates)
    assert (collector.env_steps, len(episodes), collector.at_episode_boundary) == (18, 4, False)
    assert episodes[1].index == 1
    assert episodes[1].episode_return == 11 + 2 + 3 + 14  # masked are action 0, 1, 2 and again 0
    assert episodes[1].info["time"] == 4


def test_episodes_of_a_single_environment_have_seeds_of_their_own():
    env = Corridor(2)
    collect(env, 6, seed=5)
    assert env.seeds == [episode_seed(5, index) for index in range(3)]
    assert len(set(env.seeds)) == 3


@pytest.mark.parametrize("mode", AutoresetMode)
def test_without_masks_every_action_is_available(mode):
    agent, _, _ = collect(vector(mode, [Unmasked] * 2), 20)
    assert all(step[6] == step[7] == [True] * NUM_ACTIONS for step in agent.transitions[0])
    agent, _, _ = collect(Unmasked(), 20)
    assert all(step[6] == step[7] == [True] * NUM_ACTIONS for step in agent.transitions[0])


def test_what_was_observed_does_not_change_later():
    class Reusing(Corridor):
        buffer = np.zeros(2, dtype=np.float32)

        def _obs(self):
            self.buffer[:] = self.start, self.time
            return self.buffer

    agent, _, _ = collect(Reusing(4), 12)
    assert_lane(agent.transitions[0], 4, truncates=False)


def test_real_environments_agree_across_modes():
    stories = []
    for mode in AutoresetMode:
        env = gymnasium.make_vec(
            "CartPole-v1", num_envs=3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
        )
        stories.append(collect(env, 120, seed=3)[0].transitions)
    for lane in range(3):
        num = min(len(story[lane]) for story in stories)
        assert stories[0][lane][:num] == stories[1][lane][:num] == stories[2][lane][:num]


def test_images_stay_bytes_and_other_observations_become_float32():
    class Screen(Corridor):
        observation_space = spaces.Box(0, 255, (1, 4, 4), np.uint8)

        def _obs(self):
            return np.full((1, 4, 4), self.time, dtype=np.uint8)

    class Double(Corridor):
        def _obs(self):
            return np.array([self.start, self.time])

    seen = []

    class Agent(ScriptedAgent):
        def act(self, obs, mask, *, explore):
            seen.append((obs.dtype, obs.shape))
            return super().act(obs, mask, explore=explore)

    for env in (Screen(), Double()):
        Collector(env, Agent(), seed=0).step()
    assert seen == [(np.uint8, (1, 1, 4, 4)), (np.float32, (1, 2))]


def test_exploring_is_passed_on():
    agent = ScriptedAgent()
    collector = Collector(Corridor(), agent, seed=0)
    collector.step()
    collector.step(explore=False)
    assert agent.explored == [True, False]


# -- going on from a saved state --------------------------------------------------------------------------------------


def resume(make_env, num_before, num_after, seed=0):
    """Transitions after a restart, and of the same steps without one."""
    through = collect(make_env(), num_before + num_after, seed)[0].transitions
    _, collector, _ = collect(make_env(), num_before, seed)
    state = json.loads(json.dumps(collector.state_dict()))
    agent = ScriptedAgent()
    resumed = Collector(make_env(), agent, seed=seed)
    resumed.load_state_dict(state)
    for _ in range(num_after):
        resumed.step()
    lanes = range(len(through))
    return (
        agent,
        [agent.transitions[lane] for lane in lanes],
        [through[lane][-len(agent.transitions[lane]) :] for lane in lanes],
    )


def test_a_single_environment_resumes_between_two_episodes():
    agent, got, want = resume(Corridor, 8, 10)
    assert got == want
    assert agent.num_ends == 0


def test_an_environment_that_knows_its_state_resumes_anywhere():
    agent, got, want = resume(Resumable, 6, 10)
    assert got == want
    assert agent.num_ends == 0


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("num_before", [4, 6])
def test_a_vector_environment_that_knows_its_state_resumes_anywhere(mode, num_before):
    class Vector(SyncVectorEnv):
        def state_dict(self):
            return {"envs": [env.state_dict() for env in self.envs], "resetting": self._autoreset_envs.tolist()}

        def load_state_dict(self, state):
            for env, saved in zip(self.envs, state["envs"], strict=True):
                env.load_state_dict(saved)
            self._autoreset_envs = np.array(state["resetting"])
            self._env_obs = [env._obs() for env in self.envs]

    agent, got, want = resume(
        lambda: Vector([lambda: Resumable(4), lambda: Resumable(3)], autoreset_mode=mode), num_before, 12
    )
    assert got == want
    assert agent.num_ends == 0


def test_an_environment_that_cannot_tell_begins_its_episode_anew_and_says_so():
    agent, got, _ = resume(Corridor, 6, 4)
    assert agent.num_ends == 1
    assert_lane(got[0], 4, truncates=False)


def test_at_an_episode_boundary_there_is_nothing_but_a_number_to_save():
    _, collector, _ = collect(Corridor(4), 8)
    assert collector.at_episode_boundary
    assert collector.state_dict() == {
        "env_steps": 8,
        "index": [2],
        "next_index": 3,
        "return": [0.0],
        "length": [0],
        "lanes": {"in_episode": [False]},
    }


# -- bad input --------------------------------------------------------------------------------------------------------


def test_only_discrete_actions_from_zero_are_taken():
    env = Corridor()
    for space in (spaces.Box(0, 1, (2,)), spaces.Discrete(3, start=1)):
        env.action_space = space
        with pytest.raises(ValueError, match=r"action space: expected Discrete\(A\) that starts at 0, got"):
            Collector(env, ScriptedAgent(), seed=0)


def test_a_vector_environment_must_say_how_it_resets():
    env = vector(AutoresetMode.SAME_STEP, [Corridor])
    env.metadata = {}
    with pytest.raises(ValueError, match="expected metadata\\['autoreset_mode'\\]"):
        Collector(env, ScriptedAgent(), seed=0)


def test_the_state_of_other_environments_is_refused():
    state = Collector(Corridor(), ScriptedAgent(), seed=0).state_dict()
    collector = Collector(vector(AutoresetMode.SAME_STEP, [Corridor] * 2), ScriptedAgent(), seed=0)
    with pytest.raises(ValueError, match="expected 2 environments, got 1"):
        collector.load_state_dict(state)


def test_a_state_within_an_episode_needs_an_environment_that_can_take_it():
    _, collector, _ = collect(Resumable(4), 6)
    with pytest.raises(ValueError, match="expected an environment with load_state_dict"):
        Collector(Corridor(), ScriptedAgent(), seed=0).load_state_dict(collector.state_dict())


class Broken(Corridor):
    """An environment whose third step brings something that cannot be learned from."""

    def __init__(self, **values):
        super().__init__(length=9)
        self.values = values

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.time < 3:
            return obs, reward, terminated, truncated, info
        info = {"action_mask": self.values.get("mask", info["action_mask"])}
        return self.values.get("obs", obs), self.values.get("reward", reward), terminated, truncated, info


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"obs": np.array([0.0, np.nan])}, "next_obs: expected finite numbers, got nan"),
        ({"reward": np.nan}, "reward: expected finite numbers, got nan"),
        ({"mask": np.zeros(NUM_ACTIONS, dtype=np.int8)}, "next_mask: expected at least one available action"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_when_it_comes(lanes, values, message):
    broken = Broken(**values)
    env = broken if lanes == 1 else vector(AutoresetMode.NEXT_STEP, [Corridor, lambda: broken])
    config = DQNConfig(hidden_sizes=(4,), replay_capacity=20, learning_starts=20)
    agent = DQNAgent(config, num_envs=lanes, obs_shape=(2,), num_actions=NUM_ACTIONS)
    collector = Collector(env, agent, seed=0)
    collector.step()
    collector.step()
    with pytest.raises(ValueError, match=message):
        collector.step()
    assert agent.env_steps == len(agent.replay) == 2 * lanes
