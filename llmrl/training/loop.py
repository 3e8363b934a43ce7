"""The training loop: one decision after another, and at the end of episodes a look, a row and a checkpoint.

Run directory: config.yaml, metrics.jsonl (a row an episode and an evaluation), checkpoints/, policy/,
learning_curve.png, wandb/. A run that is killed and resumed ends with the same policy, bit for bit on a CPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary

from llmrl.config import FINE_TUNING_ID, TrainConfig
from llmrl.config_loading import config_to_yaml, load_config
from llmrl.dqn.collector import Collector, Episode
from llmrl.hosts.accelerate import launched_processes
from llmrl.run_directory import JsonlWriter, atomic_write_text, create_run_directory, read_jsonl
from llmrl.tracking import Tracker, make_tracker
from llmrl.training.checkpoint import latest_checkpoint, save_checkpoint
from llmrl.training.curves import draw_learning_curve
from llmrl.training.demonstrations import Demonstrator
from llmrl.training.evaluation import EvaluationResult, evaluate
from llmrl.training.export import TrainedAgent, export_policy_folder
from llmrl.training.setup import make_agent, make_environment, make_single_environment, schedule_language
from llmrl.training.status import TrainingStatus

CONFIG_FILE, METRICS_FILE, CHECKPOINTS, POLICY = "config.yaml", "metrics.jsonl", "checkpoints", "policy"


def train(
    *, config: TrainConfig, output: Path, resume: bool = False, wandb_mode: str | None = None
) -> dict[str, float]:
    """Learns a policy and writes it to OUTPUT/policy.

    Args:
        config: What to learn, where and how long.
        output: Run directory; new or empty unless `resume`.
        resume: Go on from the last good checkpoint in it, if there is one.
        wandb_mode: Replaces `tracking.wandb`.

    Returns:
        The final evaluation: `episode_return`, `score`, `diverged`.

    Raises:
        UserError: Bad input, or a run directory of another configuration.
    """
    if launched_processes() > 1:
        raise UserError(
            "training runs in one process", expected="llmrl train ...", got=f"{launched_processes()} processes"
        )
    if wandb_mode is not None:
        tracking = config.tracking.model_copy(update={"wandb": wandb_mode})
        config = config.model_copy(update={"tracking": tracking})
    create_run_directory(output, resume=resume)
    _write_config(config, output)
    run = TrainingRun(config, output)
    if resume:
        run.resume()
    return run.run()


def _write_config(config: TrainConfig, output: Path) -> None:
    """Stores the configuration; one that is there already may differ in the run's length and tracking alone."""
    path = output / CONFIG_FILE
    if path.exists():
        before = load_config("train", path, [])
        changed = [name for name in ("seed", "env", "agent") if getattr(before, name) != getattr(config, name)]
        if changed:
            raise UserError(
                "the run directory belongs to another configuration",
                where=str(path),
                expected="the same seed, env and agent, or another --output",
                got=f"changes in {', '.join(changed)}",
            )
    atomic_write_text(path, config_to_yaml(config))


class TrainingRun:
    """Everything that a training holds while it runs.

    Args:
        config: The configuration.
        output: An existing run directory.
    """

    def __init__(self, config: TrainConfig, output: Path) -> None:
        self.config = config
        self.output = output
        self._library = JobLibrary(config.env.device) if config.env.id == FINE_TUNING_ID else None
        self.env = make_environment(config.env, self._library)
        self._evaluation_env = make_single_environment(config.env, self._library)
        self.agent = make_agent(config, self.env)
        self.collector = Collector(self.env, self.agent, seed=config.seed)
        self.num_episodes = 0
        self._hold_result: EvaluationResult | None = None
        self._metrics = JsonlWriter(output / METRICS_FILE)
        self._learner_metrics: dict[str, float] = {}

    # -- running --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Trains to the configured number of decisions, and returns the final evaluation."""
        config = self.config
        self._metrics_start()
        tracker = make_tracker(config.tracking, "train-policy", self.output, config.model_dump(mode="json"))
        decisions = config.training.decisions
        with TrainingStatus(decisions, is_schedule=schedule_language(self.env) is not None) as status:
            while self.collector.env_steps < decisions:
                for episode in self._step():
                    self._finish_episode(episode, tracker, status)
                status.update(self.collector.env_steps, self._epsilon(), self._learner_metrics.get("loss"))
        final = self._evaluate(tracker, final=True)
        self._finish(final, tracker)
        return final

    def _metrics_start(self) -> None:
        if self._metrics.offset == 0:
            self._metrics.write({"kind": "start", "decisions": 0, "seed": self.config.seed})

    def _step(self) -> list[Episode]:
        demonstrating = self.num_episodes < self.config.training.demonstrations
        self.collector.agent = self._demonstrator() if demonstrating else self.agent
        episodes = self.collector.step()
        metrics = self.agent.learn()
        if metrics is not None:
            self._learner_metrics = metrics
        return episodes

    def _demonstrator(self) -> Demonstrator:
        if not isinstance(self.collector.agent, Demonstrator) or self.collector.at_episode_boundary:
            language = schedule_language(self.env)
            if language is None:
                raise UserError("this environment has no demonstrations", expected="0", where="training.demonstrations")
            rng = np.random.default_rng([self.config.seed, 11, self.num_episodes])
            return Demonstrator(self.agent, *language, self.collector.num_envs, rng)
        return self.collector.agent

    def _epsilon(self) -> float:
        return float(getattr(self.agent, "epsilon", 0.0))

    def _finish_episode(self, episode: Episode, tracker: Tracker, status: TrainingStatus) -> None:
        self.num_episodes += 1
        row = self._episode_row(episode)
        self._metrics.write(row)
        charts = {
            "charts/episodic_return": row["return"],
            "charts/episodic_length": row["length"],
            "charts/score": row["score"],
            "charts/epsilon": row["epsilon"],
            **{f"losses/{name}": value for name, value in self._learner_metrics.items()},
        }
        numbers = {name: value for name, value in charts.items() if value is not None and np.isfinite(value)}
        tracker.log(numbers, step=self.collector.env_steps)
        status.episode(self.num_episodes, row["return"], row["score"])
        training = self.config.training
        period = training.evaluation_period_episodes
        if period and self.num_episodes % period == 0:
            result = self._evaluate(tracker, final=False)
            status.evaluation(result["score"])
        boundary = self.collector.at_episode_boundary or isinstance(self.env, VectorEnv)
        if self.num_episodes % training.checkpoint_period_episodes == 0 and boundary:
            self.checkpoint()

    def _episode_row(self, episode: Episode) -> dict[str, Any]:
        info = episode.info
        facts: dict[str, Any] = {
            name: info[name] for name in ("task", "given_rate", "total_steps", "diverged") if name in info
        }
        return {
            "kind": "episode",
            "episode": self.num_episodes,
            "decisions": self.collector.env_steps,
            "return": episode.episode_return,
            "length": episode.length,
            "score": float(info.get("score", episode.episode_return)),
            "epsilon": self._epsilon(),
            "learner_steps": self.agent.learner_steps,
            "learner": dict(self._learner_metrics),
            **facts,
        }

    def _evaluate(self, tracker: Tracker, *, final: bool) -> dict[str, float]:
        """Greedy episodes; for schedules beside holding on the same jobs."""
        num_episodes, seed = self.config.training.evaluation_episodes, self.config.seed
        env = self._evaluation_env
        result = evaluate(
            env,
            lambda obs, mask: self.agent.act(obs, mask, explore=False),
            seed=seed,
            num_episodes=num_episodes,
        )
        values = dict(vars(result))
        if (language := schedule_language(env)) is not None:
            hold = language[0].hold
            if self._hold_result is None:
                self._hold_result = evaluate(
                    env, lambda obs, mask: np.array([hold]), seed=seed, num_episodes=num_episodes
                )
            values["hold_score"] = self._hold_result.score
        row = {"kind": "final_evaluation" if final else "evaluation", "episode": self.num_episodes}
        self._metrics.write({**row, "decisions": self.collector.env_steps, **values})
        tracker.log({f"evaluation/{k}": v for k, v in values.items()}, step=self.collector.env_steps)
        return values

    def _finish(self, final: dict[str, float], tracker: Tracker) -> None:
        folder = export_policy_folder(
            TrainedAgent(self.config, self.env, self.agent, self.num_episodes, final), self.output / POLICY
        )
        picture = self.output / "learning_curve.png"
        draw_learning_curve(read_jsonl(self.output / METRICS_FILE)).savefig(picture)
        tracker.log_image("learning_curve", picture)
        tracker.log_artifact("policy", "model", folder)
        tracker.set_summary(final)
        tracker.finish()
        self._metrics.close()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint(self) -> Path:
        """Writes a checkpoint of the whole run."""
        state = {
            "num_episodes": self.num_episodes,
            "metrics_offset": self._metrics.offset,
            "collector": self.collector.state_dict(),
            "learner_metrics": self._learner_metrics,
            "hold_result": vars(self._hold_result) if self._hold_result else None,
            "written": time.time(),
        }
        number = self.num_episodes
        return save_checkpoint(
            self.output / CHECKPOINTS, number, state, lambda folder: self.agent.save(folder / "agent")
        )

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint; without one the run begins anew."""
        found = latest_checkpoint(self.output / CHECKPOINTS)
        if found is None:
            self._metrics.truncate_to(0)
            return
        path, state = found
        self.agent.load(path / "agent")
        self.num_episodes = state["num_episodes"]
        self._learner_metrics = state["learner_metrics"]
        self._hold_result = EvaluationResult(**state["hold_result"]) if state["hold_result"] else None
        self.collector.load_state_dict(state["collector"])
        self._metrics.truncate_to(state["metrics_offset"])
