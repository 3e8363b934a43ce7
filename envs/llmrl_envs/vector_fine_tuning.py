"""`llmrl/FineTuning-v0` as a native vector environment: P fine-tuning jobs in one forward and backward pass.

Equal to P `FineTuningEnv`s of the same seeds and actions up to the rounding of float32; docs/population.md says what is
exact. A lane whose job ends begins a newly drawn one in the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.errors import UserError
from llmrl_envs.fine_tuning_settings import DrawnJob, FineTuningSettings
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import FineTuningTask, SampledTask, TaskDistribution
from llmrl_envs.population_episodes import PopulationEpisodes, StepResult

Info = dict[str, Any]


class FineTuningVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """P fine-tuning jobs side by side.

    Observations, actions, rewards and infos are those of `FineTuningEnv`, with a leading dimension P.

    A lane whose episode ends begins the next one in the same step (`AutoresetMode.SAME_STEP`): the observation is then
    the new episode's first, and `info["final_obs"]`, `info["final_info"]` hold the last of the old one.

    Args:
        num_envs: P.
        tasks: As for `FineTuningEnv`, like the following ones.
        actions: Name of the action table.
        observation: `stack`, `feature_dropout`, `validation_visible`.
        reward: Arguments of `RewardSpec`.
        schedule: Arguments of `ScheduleSettings`.
        level_norm: "effective" or "adapters".
        device: "auto", or a torch device name.
        library: Loaded models and data to share with other environments of the process.
        groups: Lanes that share task, given rate, seed, data order and withheld features: each run of so many
            neighbours is a group, and its first lane a reference that always holds. P must be a multiple. 1: no groups.

    Raises:
        UserError: A setting is out of range, or `groups` does not divide P.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        tasks: TaskDistribution | Mapping[str, Any] | None = None,
        *,
        actions: str = "moves",
        observation: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        level_norm: str = "effective",
        device: str = "auto",
        library: JobLibrary | None = None,
        groups: int = 1,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        if groups < 1 or num_envs % groups:
            raise UserError(
                "the population cannot be cut into groups",
                expected=f"a divisor of {num_envs}, the number of jobs",
                got=groups,
                where="groups",
            )
        self.num_envs = num_envs
        self.group_size = groups
        self.settings = FineTuningSettings.make(tasks, actions, observation, reward, schedule)
        self.tasks = self.settings.tasks
        self.table = self.settings.table
        self.observation_spec = self.settings.observation_spec
        self.reward_spec = self.settings.reward_spec
        self.schedule_settings = self.settings.schedule
        self.single_observation_space, self.single_action_space = self.settings.spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._level_norm = level_norm
        self._device = device
        self._library = library
        self._generators: list[np.random.Generator] = []
        self._upcoming: list[list[DrawnJob]] = [[] for _ in range(num_envs)]
        self._episodes: PopulationEpisodes | None = None
        self._running = False

    # -- gymnasium ------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], Info]:
        """Starts new jobs in all lanes.

        Args:
            seed: Lane i is seeded with seed + i, or with the i-th of a sequence; None goes on with the generators.
            options: `jobs`: a `SampledTask` for each lane, to run first instead of drawing them.
        """
        super().reset(seed=int(seed) if isinstance(seed, int | np.integer) else None)
        given = _given_jobs(options, self.num_envs)
        if self._seed_lanes(seed) or given is not None:
            self._upcoming = [[] for _ in range(self.num_envs)]
        episodes = self._episodes_now()
        episodes.clear(self._dropout_seed(seed))
        lanes = list(range(self.num_envs))
        drawn = [self._draw(lane, None if given is None else given[lane]) for lane in lanes]
        if given is None:
            drawn = [drawn[lane - lane % self.group_size] for lane in lanes]
        obs = self._begin(lanes, drawn)
        self._running = True
        return obs, _with_masks(episodes.info(), np.ones(self.num_envs, np.bool_))

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
        episodes = self._episodes_now()
        result = episodes.step(np.asarray(actions))
        everywhere = np.ones(self.num_envs, np.bool_)
        info = self._finish(result) if result.terminated.any() else {}
        info |= _with_masks(episodes.info(), everywhere)
        info["events"] = _with_masks(result.events, everywhere)
        info["_events"] = everywhere.copy()
        return result.obs, result.reward, result.terminated, np.zeros(self.num_envs, np.bool_), info

    def close_extras(self, **kwargs: Any) -> None:
        """Lets go of models and data."""
        self._episodes = self._library = None
        self._running = False

    def parameters(self, lane: int) -> dict[str, Tensor]:
        """The trained parameters of a lane's job by name, as views that the next step changes."""
        return self._episodes_now().parameters(lane)

    def rehearse(self) -> int:
        """Runs one step of P jobs of every task, then forgets them; how many jobs went through a model at once.

        Raises:
            torch.OutOfMemoryError: Not even the jobs' own memory is there.
        """
        widths = [self._episodes_now().rehearse(task) for task in self.tasks.tasks]
        self._running = False
        return min(widths)

    # -- lanes ----------------------------------------------------------------------------------------------------

    def _finish(self, result: StepResult) -> Info:
        """Sets aside what the ended lanes showed last and begins their next jobs, in `result.obs` too."""
        ended = result.terminated
        lanes = [int(lane) for lane in np.flatnonzero(ended)]
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in lanes:
            final_obs[lane] = result.obs[lane].copy()
        final_info = _with_masks(self._episodes_now().info(), ended)
        final_info["events"] = _with_masks({name: value.copy() for name, value in result.events.items()}, ended)
        final_info["_events"] = ended.copy()
        for lane in lanes:
            for values in result.events.values():
                values[lane] = 0
        result.obs[lanes] = self._begin(lanes, self._successors(lanes))
        return {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": final_info,
            "_final_info": ended.copy(),
        }

    def _successors(self, lanes: list[int]) -> list[DrawnJob]:
        """The next jobs of lanes: a reference draws its group's, the others take the one that it is on."""
        found: dict[int, DrawnJob] = {}
        for lane in lanes:
            first = lane - lane % self.group_size
            if lane == first:
                found[lane] = self._draw(lane)
            else:
                found[lane] = found[first] if first in found else self._episodes_now().drawn(first)
        return [found[lane] for lane in lanes]

    def _draw(self, lane: int, job: SampledTask | None = None) -> DrawnJob:
        if job is None and self._upcoming[lane]:
            return self._upcoming[lane].pop(0)
        return self.settings.draw(self._generators[lane], job)

    def _begin(self, lanes: list[int], drawn: list[DrawnJob]) -> NDArray[np.float32]:
        """Begins jobs; where a reference run is missing, those of every lane's next job are made with it."""
        episodes = self._episodes_now()
        if episodes.lacks_reference(drawn):
            for lane in range(0, self.num_envs, self.group_size):
                if not self._upcoming[lane]:
                    self._upcoming[lane].append(self.settings.draw(self._generators[lane]))
            episodes.make_references([*drawn, *(jobs[0] for jobs in self._upcoming if jobs)])
        return episodes.begin(lanes, drawn)

    def _episodes_now(self) -> PopulationEpisodes:
        if self._episodes is None:
            if self._library is None:
                self._library = JobLibrary(self._device)
            self._episodes = PopulationEpisodes(
                self.num_envs, self.settings, self._library, level_norm=self._level_norm, group_size=self.group_size
            )
        return self._episodes

    def _seed_lanes(self, seed: int | Sequence[int | None] | None) -> bool:
        """Seeds the lanes' generators; whether there are new ones."""
        if seed is None and self._generators:
            return False
        if seed is None or isinstance(seed, int | np.integer):
            seeds: list[int | None] = [None if seed is None else int(seed) + lane for lane in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: expected one for each of {self.num_envs} lanes, got {len(seeds)}")
        self._generators = [seeding.np_random(lane_seed)[0] for lane_seed in seeds]
        return True

    def _dropout_seed(self, seed: int | Sequence[int | None] | None) -> int:
        if isinstance(seed, int | np.integer):
            return int(seed)
        return 0 if seed is None else sum(lane_seed or 0 for lane_seed in seed)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following steps and episodes depend on: JSON values and NumPy arrays."""
        return {
            "generators": [generator.bit_generator.state for generator in self._generators],
            "upcoming": [[_drawn_state(drawn) for drawn in jobs] for jobs in self._upcoming],
            "episodes": self._episodes_now().state_dict(_drawn_state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called, bit for bit on a CPU with the same number of threads."""
        if len(state["generators"]) != self.num_envs:
            raise ValueError(f"state: expected {self.num_envs} environments, got {len(state['generators'])}")
        self._seed_lanes(0)
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = saved
        self._upcoming = [[_drawn_from(saved) for saved in jobs] for jobs in state["upcoming"]]
        self._episodes_now().load_state_dict(state["episodes"], _drawn_from)
        self._running = True


def _given_jobs(options: Mapping[str, Any] | None, num_envs: int) -> list[SampledTask] | None:
    if not options:
        return None
    jobs = options.get("jobs")
    fits = isinstance(jobs, list | tuple) and len(jobs) == num_envs and all(isinstance(j, SampledTask) for j in jobs)
    if set(options) != {"jobs"} or not fits:
        raise ValueError(f"options: expected at most 'jobs', {num_envs} SampledTasks, got {options!r}")
    return list(jobs)  # type: ignore[arg-type]


def _with_masks(facts: Info, lanes: NDArray[np.bool_]) -> Info:
    """Gymnasium's convention for vector infos: beside each key, `_key` says which lanes have it."""
    return {name: value for key, fact in facts.items() for name, value in ((key, fact), (f"_{key}", lanes.copy()))}


def _drawn_state(drawn: DrawnJob) -> dict[str, Any]:
    sampled = drawn.sampled
    return {
        "task": sampled.task.model_dump(mode="json"),
        "task_index": sampled.task_index,
        "learning_rate": sampled.learning_rate,
        "seed": sampled.seed,
        "start_move": sampled.start_move,
        "hidden": drawn.hidden.tolist(),
        "shows_validation": drawn.shows_validation,
    }


def _drawn_from(state: Mapping[str, Any]) -> DrawnJob:
    task = FineTuningTask.model_validate(state["task"])
    rate, seed, start_move = float(state["learning_rate"]), int(state["seed"]), int(state["start_move"])
    sampled = SampledTask(task, int(state["task_index"]), rate, seed, start_move)
    return DrawnJob(sampled, np.array(state["hidden"], np.bool_), bool(state["shows_validation"]))
