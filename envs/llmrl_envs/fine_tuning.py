"""`llmrl/FineTuning-v0`: an episode is one fine-tuning job, a step one decision interval of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from llmrl_envs.fine_tuning_settings import DEFAULT_TASKS, FineTuningSettings
from llmrl_envs.interface.account import EpisodeAccount
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.statistics import TrainingStatistics
from llmrl_envs.interface.steering import Steering, SteeringUpdate
from llmrl_envs.jobs.loading import Job, JobLibrary
from llmrl_envs.jobs.reference import ReferenceCurves
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import SampledTask, TaskDistribution
from llmrl_envs.rendering import ScheduleHistory, close_window, render_history

__all__ = ["DEFAULT_TASKS", "FineTuningEnv"]


class FineTuningEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Fine-tunes a Hugging Face model; the actions make its learning-rate and update schedule.

    Observation: float32[O], see `ObservationSpec`. Action: an index into the action table; one that `action_mask`
    rules out counts as holding. Reward: the scaled drop of the validation log-loss (`RewardSpec`); the return of an
    episode is its final improvement in units of the reference's, a linear decay from the task's default rate.

    An episode terminates at the end of its budget, which progress in the observation announces, or when the job
    diverges. It never truncates.

    `info` has `action_mask` (int8[A]), the validation loss, the interval's events, and the rate of the next step as it
    would be under holding.

    Args:
        tasks: A `TaskDistribution`, or the mapping that makes one.
        actions: Name of the action table.
        observation: `stack`; `feature_dropout`, the probability that a job withholds a feature group; and
            `validation_visible`, the probability that it shows the validation loss to the policy.
        reward: Arguments of `RewardSpec`.
        schedule: Arguments of `ScheduleSettings`.
        level_norm: "effective" or "adapters", see `FineTuningSession`.
        device: "auto", or a torch device name.
        render_mode: "rgb_array", "human" or "ansi".
        library: Loaded models and data to share with other environments of the process.

    Example:
        >>> env = gymnasium.make("llmrl_envs:llmrl/FineTuning-v0")  # doctest: +SKIP
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium declares it so
        "render_modes": ["rgb_array", "human", "ansi"],
        "render_fps": 4,
    }

    def __init__(
        self,
        tasks: TaskDistribution | Mapping[str, Any] | None = None,
        *,
        actions: str = "moves",
        observation: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        level_norm: str = "effective",
        device: str = "auto",
        render_mode: str | None = None,
        library: JobLibrary | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode: expected one of {self.metadata['render_modes']}, got {render_mode!r}")
        self.render_mode = render_mode
        self.settings = FineTuningSettings.make(tasks, actions, observation, reward, schedule)
        self.tasks = self.settings.tasks
        self.table = self.settings.table
        self.observation_spec = self.settings.observation_spec
        self.reward_spec = self.settings.reward_spec
        self.schedule_settings = self.settings.schedule
        self._level_norm = level_norm
        self._device = device
        self._library = library
        self._references: ReferenceCurves | None = None
        self._session: FineTuningSession | None = None
        self.observation_space, self.action_space = self.settings.spaces()

    # -- gymnasium ------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts a job drawn from the task distribution.

        Args:
            seed: Seeds the draws of this and the following episodes.
            options: `job`: a `SampledTask` to run instead of drawing one.
        """
        super().reset(seed=seed)
        drawn = self.settings.draw(self.np_random, _given_job(options))
        self._shows_validation = drawn.shows_validation
        observation = self._begin(drawn.sampled, drawn.hidden)
        return observation, self._info({}, carried_out=-1)

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Carries out an action and trains for one decision interval."""
        session = self._session_now()
        if self._account.is_over:
            raise ValueError("step: expected reset() after the end of an episode, got another action")
        before = self._toggles()
        carried_out, rollback = self._steering.apply(np.array([int(action)]))
        switched, rolled_back = self._toggles() != before, bool(rollback[0])
        if rolled_back:
            session.roll_back()
        statistics = session.run_interval(self._account.num_steps, self._schedule)
        # Read now: what the interval measured changes the rate that the level means.
        rate = float(self._schedule.learning_rate(statistics.step - 1)[0])
        log_loss = self._measure()
        shown = _with_validation(statistics, log_loss) if self._shows_validation else statistics
        update = self._steering.observe(shown)
        self._keep_best(update)
        reward = self._account.settle(log_loss, switched=switched, rolled_back=rolled_back)
        self._record(statistics, log_loss, rate, int(carried_out[0]))
        if self.render_mode == "human":
            self.render()
        events = {
            "rollback": rolled_back,
            "fallback": bool(update.fell_back[0]),
            "skipped_steps": int(statistics.skipped.sum()),
        }
        info = self._info(events, carried_out=int(carried_out[0]))
        return update.observation[0], reward, self._account.is_over, False, info

    def render(self) -> Any:
        """Draws loss and learning rate so far: uint8[H, W, 3], text, or a window."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs a render_mode: gymnasium.make(..., render_mode='rgb_array')")
            return None
        self._session_now()
        return render_history(self._history, self.render_mode)

    def close(self) -> None:
        """Lets go of models and data, and closes the window."""
        if self.render_mode == "human":
            close_window()
        self._session = self._references = self._library = None

    # -- the job --------------------------------------------------------------------------------------------------

    def _begin(self, sampled: SampledTask, hidden: NDArray[np.bool_]) -> NDArray[np.float32]:
        if self._library is None:
            self._library = JobLibrary(self._device)
        if self._references is None:
            self._references = ReferenceCurves(self._library.curves)
        job = self._library.job(sampled.task)
        self.sampled = sampled
        reference = self._references.curve(
            job, sampled.seed, measured=self.reward_spec.measured, settings=self.schedule_settings
        )
        intervals = self.schedule_settings.intervals(sampled.task.steps)
        self._account = EpisodeAccount(self.reward_spec, reference, intervals)
        self._session = self._new_session(job, sampled)
        self._schedule = Schedule(
            self.table,
            np.array([sampled.task.steps]),
            np.array([sampled.learning_rate]),
            self.schedule_settings,
            self._session.capabilities,
        )
        self._schedule.start_at(np.array([sampled.start_move]))
        self._steering = Steering(self.observation_spec, self._schedule)
        self._history = ScheduleHistory(self.table.names, sampled.task.name, sampled.task.steps)
        update, weight = self._session.initial_norms()
        statistics = self._session.initial_statistics()
        norms = np.array([update]), np.array([weight])
        size = job.loaded.num_parameters
        observation = self._steering.begin(statistics, *norms, hidden[None, :], job.label_nats, size)
        first: NDArray[np.float32] = observation[0]
        return first

    def _toggles(self) -> tuple[int, ...]:
        schedule = self._schedule
        return tuple(int(of[0]) for of in (schedule.level, schedule.frozen, schedule.tight, schedule.leaning))

    def _new_session(self, job: Job, sampled: SampledTask) -> FineTuningSession:
        average_steps = self.reward_spec.average_steps(self._account.intervals)
        return FineTuningSession(job, seed=sampled.seed, average_steps=average_steps, level_norm=self._level_norm)

    def _session_now(self) -> FineTuningSession:
        if self._session is None:
            raise ValueError("expected reset() before step() or render(), got neither")
        return self._session

    def _measure(self) -> float:
        """Log validation loss that the reward is made of; the deployed weights count at the end."""
        if self.reward_spec.measured == "end" and not self._account.is_last:
            return self._account.log_loss
        averaged = self.reward_spec.average_intervals > 0 and not self._account.is_last
        loss = self._session_now().evaluate("validation", averaged=averaged).loss
        return math.log(max(loss, 1e-12)) if math.isfinite(loss) else math.inf

    def _keep_best(self, update: SteeringUpdate) -> None:
        if update.at_best[0]:
            self._session_now().mark_best()
            self._schedule.has_snapshot[:] = True

    def _record(self, statistics: TrainingStatistics, log_loss: float, rate: float, action: int) -> None:
        valid = statistics.loss[0][np.isfinite(statistics.loss[0])]
        self._history.append(
            step=int(statistics.step[0]),
            train_loss=float(valid.mean()) if len(valid) else math.nan,
            validation_loss=math.exp(min(log_loss, 50.0)),
            learning_rate=rate,
            action=action,
        )

    def _info(self, events: Mapping[str, Any], carried_out: int) -> dict[str, Any]:
        """Facts of the interval: finite numbers only, and nothing that differs between two equal runs."""
        return {
            "action_mask": self._schedule.mask()[0].astype(np.int8),
            "action": carried_out,
            "task": self.sampled.task.name,
            "step": int(self._schedule.step[0]),
            "total_steps": self.sampled.task.steps,
            "seed": self.sampled.seed,
            "given_rate": self.sampled.learning_rate,
            "learning_rate": float(self._schedule.learning_rate(self._schedule.step)[0]),
            "level": float(self._schedule.level_value()[0]),
            "validation_loss": self._account.validation_loss,
            "score": self._account.score,
            "diverged": self._account.diverged,
            "events": dict(events),
        }


def _given_job(options: Mapping[str, Any] | None) -> SampledTask | None:
    """The job that `reset` was asked for, if it was."""
    unknown = set(options or {}) - {"job"}
    job = (options or {}).get("job")
    if unknown or not (job is None or isinstance(job, SampledTask)):
        raise ValueError(f"options: expected at most 'job', a SampledTask, got {options!r}")
    return job


def _with_validation(statistics: TrainingStatistics, log_loss: float) -> TrainingStatistics:
    return TrainingStatistics(**{**vars(statistics), "validation_loss": np.array([math.exp(min(log_loss, 50.0))])})
