"""`llmrl/NoisyQuadratic-v0`: fine-tuning played on noisy quadratics, whose best schedule is known.

An episode is one job drawn from `QuadraticDistribution`, a step one decision interval of it. Observations, action
tables, schedule and guards are those of a real job (`llmrl_envs.interface`); expected losses are exact, so the reward
has no noise, and `optimal_schedule` says what the best possible schedule would have reached.

>>> import gymnasium
>>> env = gymnasium.make("llmrl_envs:llmrl/NoisyQuadratic-v0")
>>> obs, info = env.reset(seed=0)
>>> terminated = False
>>> while not terminated:
...     obs, reward, terminated, truncated, info = env.step(env.unwrapped.table.hold)
>>> bool(info["expected_loss"] > info["reference_loss"])
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, SupportsInt

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from llmrl_envs.array_state import pack_arrays, unpack_arrays
from llmrl_envs.interface.statistics import Floats, TrainingStatistics
from llmrl_envs.quadratic.episodes import QuadraticEpisodes
from llmrl_envs.quadratic.model import NoisyQuadratics, QuadraticDistribution, draw_quadratics, expected_losses
from llmrl_envs.quadratic.optimum import optimal_schedule, optimal_schedules
from llmrl_envs.rendering import ScheduleHistory, render_history

__all__ = [
    "NoisyQuadraticEnv",
    "NoisyQuadraticVectorEnv",
    "NoisyQuadratics",
    "QuadraticDistribution",
    "expected_losses",
    "optimal_schedule",
    "optimal_schedules",
]

Info = dict[str, Any]


class NoisyQuadraticEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """One job after the other.

    Observation: float32[O], see `ObservationSpec`. Action: an index into the action table; one that `action_mask`
    rules out counts as holding. Freezing and clipping have no meaning here and are never available. Reward: the drop
    of the logarithm of the expected loss over the interval, scaled so that the return of an episode is 1 when it ends
    where the best linear decay would have ended. An episode terminates at the end of its budget, which progress in
    the observation announces, or when the job diverges. It never truncates.

    `info` has `action_mask` (int8[A]), `expected_loss`, `reference_loss`, `score`, `diverged`, the rate and the level.

    Args:
        distribution: A `QuadraticDistribution`, or the mapping that makes one.
        actions: Name of the action table.
        observation: `stack`; `feature_dropout`, the probability that a job withholds a feature group; and
            `validation_visible`, the probability that it shows its expected loss as a validation loss.
        reward: Arguments of `RewardSpec`; the loss is exact, so averaging and a baseline are refused.
        schedule: Arguments of `ScheduleSettings`.
        render_mode: "rgb_array" or "ansi".
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}  # type: ignore[misc]

    def __init__(
        self,
        distribution: QuadraticDistribution | Mapping[str, Any] | None = None,
        *,
        actions: str = "factors",
        observation: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode: expected one of {self.metadata['render_modes']}, got {render_mode!r}")
        self.render_mode = render_mode
        self.distribution = _distribution(distribution)
        self._episodes = QuadraticEpisodes(1, self.distribution, actions, observation, reward, schedule)
        self.table = self._episodes.table
        self.observation_spec = self._episodes.observation_spec
        self.schedule_settings = self._episodes.schedule_settings
        self.observation_space, self.action_space = _spaces(self._episodes)
        self._running = False
        self._history: ScheduleHistory | None = None

    @property
    def quadratic(self) -> NoisyQuadratics:
        """The present job; a copy."""
        return self._episodes.jobs.quadratics[:]

    def optimal_schedule(self) -> Floats:  # [T]
        """Learning rates with the lowest expected final loss of the present job."""
        return optimal_schedule(self.quadratic)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], Info]:
        """Starts a job drawn from the distribution.

        Args:
            seed: Seeds the draws of this and the following jobs.
            options: `quadratics`: a `NoisyQuadratics` of one job, to run instead of drawing one.
        """
        super().reset(seed=seed)
        drawn = draw_quadratics(self.distribution, [self.np_random])
        obs = self._episodes.begin(np.arange(1), _from_options(options, 1) or drawn)
        self._running = True
        self._history = None
        if self.render_mode is not None:
            budget = int(self._episodes.jobs.quadratics.total_steps[0])
            self._history = ScheduleHistory(self.table.names, "noisy quadratic", budget)
        return obs[0], self._info()

    def step(self, action: SupportsInt) -> tuple[NDArray[np.float32], float, bool, bool, Info]:
        """Carries out an action and trains for one decision interval.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset, or after an episode ended.
            ValueError: The action is not in the table.
        """
        if not self._running:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is running")
        result = self._episodes.step(np.array([int(action)]))
        terminated = bool(result.terminated[0])
        self._running = not terminated
        info = self._info()
        self._record(result.statistics, info)
        return result.obs[0], float(result.reward[0]), terminated, False, info

    def render(self) -> Any:
        """Draws loss and learning rate so far: uint8[H, W, 3] or text; None without a render mode."""
        if self.render_mode is None or self._history is None:
            return None
        return render_history(self._history, self.render_mode)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following steps and episodes depend on, as JSON values."""
        return _state(self._episodes, [self.np_random]) | {"running": self._running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called; a picture begins anew."""
        _load_state(state, self._episodes, [self.np_random])
        self._running = bool(state["running"])
        self._history = None

    def _info(self) -> Info:
        facts = self._episodes.info()
        return {name: value[0].copy() if value.ndim > 1 else value[0].item() for name, value in facts.items()}

    def _record(self, statistics: TrainingStatistics, info: Info) -> None:
        if self._history is None:
            return
        self._history.append(
            step=info["step"],
            train_loss=float(np.nanmean(statistics.loss[0])),
            validation_loss=info["expected_loss"],
            learning_rate=info["learning_rate"],
            action=info["action"],
        )


class NoisyQuadraticVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """E jobs side by side in one pass of array operations; the same as E single environments.

    A lane whose episode ends begins the next one in the same step (`AutoresetMode.SAME_STEP`): the observation is then
    the new episode's first, and `info["final_obs"]`, `info["final_info"]` hold the last of the old one.

    Args:
        num_envs: E.
        distribution: As for `NoisyQuadraticEnv`, like the other arguments.
        actions: Name of the action table.
        observation: `stack`, `feature_dropout`, `validation_visible`.
        reward: Arguments of `RewardSpec`.
        schedule: Arguments of `ScheduleSettings`.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        distribution: QuadraticDistribution | Mapping[str, Any] | None = None,
        *,
        actions: str = "factors",
        observation: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        self.num_envs = num_envs
        self.distribution = _distribution(distribution)
        self._episodes = QuadraticEpisodes(num_envs, self.distribution, actions, observation, reward, schedule)
        self.table = self._episodes.table
        self.observation_spec = self._episodes.observation_spec
        self.schedule_settings = self._episodes.schedule_settings
        self.single_observation_space, self.single_action_space = _spaces(self._episodes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator] = []
        self._running = False

    @property
    def quadratics(self) -> NoisyQuadratics:
        """The present jobs; a copy."""
        return self._episodes.jobs.quadratics[:]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], Info]:
        """Starts new jobs in all lanes.

        Args:
            seed: Lane i is seeded with seed + i, or with the i-th of a sequence; None goes on with the generators.
            options: `quadratics`: a `NoisyQuadratics` of E jobs, to run first instead of drawing them.
        """
        super().reset(seed=int(seed) if isinstance(seed, int | np.integer) else None)
        self._seed_lanes(seed)
        lanes = np.arange(self.num_envs)
        drawn = draw_quadratics(self.distribution, self._generators)
        obs = self._episodes.begin(lanes, _from_options(options, self.num_envs) or drawn)
        self._running = True
        return obs, _with_masks(self._episodes.info(), np.ones(self.num_envs, np.bool_))

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], Info]:
        """Carries out one action in each lane, trains for one decision interval, begins anew where one has ended.

        Raises:
            gymnasium.error.ResetNeeded: Before the first reset.
            ValueError: There is not one action of the table for each lane.
        """
        if not self._running:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is running")
        result = self._episodes.step(np.asarray(actions))
        info: Info = {}
        if result.terminated.any():
            info = self._finish(result.obs, result.terminated)
        info |= _with_masks(self._episodes.info(), np.ones(self.num_envs, np.bool_))
        return result.obs, result.reward, result.terminated, np.zeros(self.num_envs, np.bool_), info

    def _finish(self, obs: NDArray[np.float32], terminated: NDArray[np.bool_]) -> Info:
        """Sets aside what the ended lanes showed last and begins their next jobs, in `obs` too."""
        final_obs = np.full(self.num_envs, None, dtype=object)
        lanes = np.flatnonzero(terminated)
        for lane in lanes:
            final_obs[lane] = obs[lane].copy()
        final_info = _with_masks(self._episodes.info(), terminated)
        quadratics = draw_quadratics(self.distribution, [self._generators[lane] for lane in lanes])
        obs[lanes] = self._episodes.begin(lanes, quadratics)
        return {
            "final_obs": final_obs,
            "_final_obs": terminated.copy(),
            "final_info": final_info,
            "_final_info": terminated.copy(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following steps and episodes depend on, as JSON values."""
        return _state(self._episodes, self._generators)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called."""
        self._seed_lanes(None)
        _load_state(state, self._episodes, self._generators)
        self._running = True

    def _seed_lanes(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None and self._generators:
            return
        if seed is None or isinstance(seed, int | np.integer):
            seeds: list[int | None] = [None if seed is None else int(seed) + lane for lane in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: expected one for each of {self.num_envs} lanes, got {len(seeds)}")
        self._generators = [seeding.np_random(lane_seed)[0] for lane_seed in seeds]


def _distribution(given: QuadraticDistribution | Mapping[str, Any] | None) -> QuadraticDistribution:
    return given if isinstance(given, QuadraticDistribution) else QuadraticDistribution(**(given or {}))


def _spaces(episodes: QuadraticEpisodes) -> tuple[gymnasium.Space[NDArray[np.float32]], spaces.Discrete]:
    low, high = episodes.observation_spec.bounds()
    return spaces.Box(low, high, dtype=np.float32), spaces.Discrete(episodes.table.num_actions)


def _from_options(options: Mapping[str, Any] | None, num_envs: int) -> NoisyQuadratics | None:
    if not options:
        return None
    given = options.get("quadratics")
    if set(options) != {"quadratics"} or not isinstance(given, NoisyQuadratics) or len(given) != num_envs:
        got = f"{sorted(options)} with {len(given)} jobs" if isinstance(given, NoisyQuadratics) else repr(options)
        raise ValueError(f"options: expected {{'quadratics': NoisyQuadratics of {num_envs} jobs}}, got {got}")
    return given


def _with_masks(facts: Info, lanes: NDArray[np.bool_]) -> Info:
    """Gymnasium's convention for vector infos: beside each key, `_key` says which lanes have it."""
    return {name: value for key, fact in facts.items() for name, value in ((key, fact), (f"_{key}", lanes.copy()))}


def _state(episodes: QuadraticEpisodes, generators: Sequence[np.random.Generator]) -> dict[str, Any]:
    states = [generator.bit_generator.state for generator in generators]
    return {"arrays": pack_arrays(episodes.state_dict()), "generators": states}


def _load_state(
    state: Mapping[str, Any], episodes: QuadraticEpisodes, generators: Sequence[np.random.Generator]
) -> None:
    if len(state["generators"]) != len(generators):
        raise ValueError(f"state: expected {len(generators)} environments, got {len(state['generators'])}")
    episodes.load_state_dict(unpack_arrays(state["arrays"]))
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.bit_generator.state = saved
