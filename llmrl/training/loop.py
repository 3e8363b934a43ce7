"""The training loop: one decision after another, and at the end of episodes a look, a row and a checkpoint.

Run directory: config.yaml, metrics.jsonl (a row an episode and an evaluation), checkpoints/, policy/,
learning_curve.png, wandb/. A run that is killed and resumed ends with the same policy, bit for bit on a CPU.

Under `accelerate launch` every process runs this loop with environments and a replay of its own; what all agree on
(decisions, episodes, what is due) follows from what they tell each other after each step. See `processes.py`.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.vector_fine_tuning import FineTuningVectorEnv

from llmrl.config import TrainConfig
from llmrl.config_env import FINE_TUNING_ID, EnvConfig
from llmrl.config_loading import config_to_yaml, load_config
from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.collector import Collector, Episode
from llmrl.failures import print_message
from llmrl.run_directory import atomic_write_text, create_run_directory
from llmrl.training.checkpoint import CHECKPOINTS
from llmrl.training.decay_times import DecayTimes
from llmrl.training.demonstrations import Demonstrator
from llmrl.training.evaluation import Evaluator
from llmrl.training.experience import take_experience
from llmrl.training.export import CONFIG_FILE, TrainedAgent, export_policy_folder
from llmrl.training.neighbours import NeighbourLevels
from llmrl.training.processes import OneProcess, Processes, join_processes, process_device, process_seed
from llmrl.training.recording import Recorder, episode_facts, loss_charts
from llmrl.training.resuming import RunState, load_run, save_run
from llmrl.training.setup import make_agent, make_environment, make_evaluation_environment, schedule_language
from llmrl.training.sharing import check_equal, learner_digest

POLICY = "policy"
PRETRAINING_PARTS = 10  # rows and checkpoints of the updates on stored experience
UPDATES_BETWEEN_MEETINGS = 100  # after which a signal to stop is noticed


def train(
    *, config: TrainConfig, output: Path, resume: bool = False, wandb_mode: str | None = None
) -> dict[str, float]:
    """Learns a policy and writes it to OUTPUT/policy; in several processes where a launcher started them.

    Args:
        config: What to learn, where and how long.
        output: Run directory; new or empty unless `resume`.
        resume: Go on from the last good checkpoint in it, if there is one.
        wandb_mode: Replaces `tracking.wandb`.

    Returns:
        The final evaluation: `episode_return`, `score`, `diverged`.

    Raises:
        UserError: Bad input, a run directory of another configuration, or another process that failed or is gone.
    """
    if wandb_mode is not None:
        tracking = config.tracking.model_copy(update={"wandb": wandb_mode})
        config = config.model_copy(update={"tracking": tracking})
    with join_processes(config.training.process_timeout_seconds) as processes:
        processes.first(lambda: _prepare(config, output, resume=resume))
        run = TrainingRun(config, output, processes)
        try:
            if resume:
                run.resume()
            return run.run()
        finally:
            run.close()


def _prepare(config: TrainConfig, output: Path, *, resume: bool) -> None:
    """Makes the run directory; one that is there already may differ in the run's length and tracking alone."""
    create_run_directory(output, resume=resume)
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
        processes: Those that learn together; not given: this one alone.

    Attributes:
        decisions: Taken so far, in all processes together.
        num_episodes: Finished so far, in all processes together.
    """

    def __init__(self, config: TrainConfig, output: Path, processes: Processes | None = None) -> None:
        self.config = config
        self.output = output
        self.processes = processes or OneProcess()
        rank = self.processes.rank
        env_config = _own_devices(config.env)
        self._library = JobLibrary(env_config.device) if config.env.id == FINE_TUNING_ID else None
        num_evaluated = config.training.evaluation_episodes
        self.env = make_environment(env_config, self._library, num_evaluated=num_evaluated)
        self.agent = make_agent(config, self.env, self.processes)
        self._evaluator = Evaluator(
            make_evaluation_environment(env_config, self.env, self._library, num_evaluated),
            self.agent,
            seed=config.seed,
            num_episodes=num_evaluated,
        )
        self.collector = Collector(self.env, self.agent, seed=process_seed(config.seed, rank))
        self.decisions = 0
        self.num_episodes = 0
        self.num_pretrained = 0
        self._num_pretraining_checkpoints = 0
        self._has_experience = False
        self._evaluation_due = self._checkpoint_due = False
        self._all_ready = self._first_ready = True
        self._learner_metrics: dict[str, float] = {}
        is_schedule = schedule_language(self.env) is not None
        self.recorder = Recorder(config, output, is_schedule=is_schedule, enabled=rank == 0)

    def close(self) -> None:
        """Ends the workers of populations."""
        for env in (self.env, self._evaluator.env):
            if isinstance(env, FineTuningVectorEnv):
                env.close()

    # -- running --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Trains to the configured number of decisions, and returns the final evaluation."""
        self.recorder.start()
        with self.recorder.status as status:
            self._take_experience()
            self._pretrain()
            while self.decisions < self.config.training.decisions:
                for episode in self._step():
                    self._record_episode(episode)
                self._do_what_is_due()
                status.update(self.decisions, self._epsilon(), self._learner_metrics.get("loss"))
        return self._finish()

    def _step(self) -> list[dict[str, Any]]:
        """One step of every environment and the updates that follow from it; the episodes that ended, everywhere."""
        demonstrating = self.num_episodes < self.config.training.demonstrations
        self.collector.agent = self._demonstrator() if demonstrating else self.agent
        # Whoever is between two episodes waits there for a checkpoint that is due.
        episodes = [] if self._checkpoint_due and self._ready else self.collector.step()
        told = self.processes.exchange(self.collector.env_steps, self._ready, len(episodes))
        self.decisions = int(told[:, 0].sum())
        self._all_ready, self._first_ready = bool(told[:, 1].all()), bool(told[0, 1])
        with self.processes.inseparable():
            self._learn()
        own = [self._facts(episode) for episode in episodes]
        return list(itertools.chain(*self.processes.gather(own))) if told[:, 2].any() else []

    @property
    def _ready(self) -> bool:
        """Whether a checkpoint made now could be resumed exactly; a vector environment saves its own state."""
        return self.collector.at_episode_boundary or isinstance(self.env, VectorEnv)

    def _learn(self) -> None:
        if isinstance(self.agent, DQNAgent):
            self.agent.env_steps = self.decisions  # of all processes, so that all do the same updates
        metrics = self.agent.learn()
        if metrics is not None:
            self._learner_metrics = metrics

    def _demonstrator(self) -> Demonstrator | NeighbourLevels | DecayTimes:
        present = self.collector.agent
        if not isinstance(present, Demonstrator | NeighbourLevels | DecayTimes) or self.collector.at_episode_boundary:
            language = schedule_language(self.env)
            if language is None:
                raise UserError("this environment has no demonstrations", expected="0", where="training.demonstrations")
            seed = process_seed(self.config.seed, self.processes.rank)
            rng = np.random.default_rng([seed, 11, self.num_episodes])
            table, spec, schedule = language
            num_envs = self.collector.num_envs
            if self.config.training.demonstrator == "neighbours":
                return NeighbourLevels(self.agent, table, spec, num_envs, schedule.cooldown_progress, rng)
            if self.config.training.demonstrator == "decay_times":
                return DecayTimes(self.agent, table, spec, num_envs, schedule.base)
            return Demonstrator(self.agent, table, spec, schedule, num_envs, rng)
        return present

    def _epsilon(self) -> float:
        return float(getattr(self.agent, "epsilon", 0.0))

    # -- experience of earlier runs -------------------------------------------------------------------------------

    def _take_experience(self) -> None:
        """Fills the replay with what earlier runs saw; once, since checkpoints hold it from then on."""
        if self._has_experience or not isinstance(self.agent, DQNAgent):
            return
        rank, num_processes = self.processes.rank, self.processes.num_processes
        own = take_experience(self.agent, self.config.agent.experience, rank=rank, num_processes=num_processes)
        for shares in zip(*self.processes.gather([vars(taken) for taken in own]), strict=True):
            transitions = sum(share["num_taken"] for share in shares)
            first = shares[0]
            row = {"path": str(first["path"]), "stored": first["num_stored"], "transitions": transitions}
            self.recorder.row({"kind": "experience", **row})
        self._has_experience = True

    def _pretrain(self) -> None:
        """The updates on stored experience that come before the first decision; with checkpoints in between."""
        total = self.config.agent.pretrain_updates
        if self.num_pretrained >= total or not isinstance(self.agent, DQNAgent):
            return
        part = -(-total // PRETRAINING_PARTS)
        updates = self.agent.learn_from_log(total - self.num_pretrained)
        while self.num_pretrained < total:
            with self.processes.inseparable():
                self._learner_metrics = next(updates)
            self.num_pretrained += 1
            if self.num_pretrained % UPDATES_BETWEEN_MEETINGS == 0:
                self.processes.exchange()
                self.recorder.status.pretraining(self.num_pretrained, total, self._learner_metrics["loss"])
            if self.num_pretrained % part == 0 or self.num_pretrained == total:
                self._record_pretraining()
                self._num_pretraining_checkpoints += 1
                self.checkpoint()
        self.recorder.status.pretraining(total, total, self._learner_metrics["loss"])

    def _record_pretraining(self) -> None:
        row = {"kind": "pretraining", "learner_steps": self.agent.learner_steps, "learner": dict(self._learner_metrics)}
        self.recorder.row(row)
        self.recorder.chart(loss_charts(self._learner_metrics), self._chart_step)

    # -- what is told ---------------------------------------------------------------------------------------------

    @property
    def _chart_step(self) -> int:
        """Place on the tracker's axis, which must not run backwards: updates on stored experience, then decisions."""
        return self.num_pretrained + self.decisions

    def _facts(self, episode: Episode) -> dict[str, Any]:
        process = {"process": self.processes.rank} if self.processes.num_processes > 1 else {}
        return episode_facts(episode) | process

    def _record_episode(self, facts: dict[str, Any]) -> None:
        """Counts an episode and tells of it; notes what is due after it."""
        self.num_episodes += 1
        training = self.config.training
        evaluation_period = training.evaluation_period_episodes
        self._evaluation_due |= bool(evaluation_period) and self.num_episodes % evaluation_period == 0
        self._checkpoint_due |= self.num_episodes % training.checkpoint_period_episodes == 0
        progress = {
            "epsilon": self._epsilon(),
            "learner_steps": self.agent.learner_steps,
            "learner": dict(self._learner_metrics),
        }
        counted = {"episode": self.num_episodes, "decisions": self.decisions}
        self.recorder.episode({**counted, **facts, **progress}, self._chart_step)

    def _do_what_is_due(self) -> None:
        # The evaluation uses the first process's model, so that it has to wait for the end of an episode there.
        if self._evaluation_due and self._first_ready:
            self._evaluation_due = False
            if self.processes.rank == 0:
                self.recorder.status.evaluation(self._evaluate(final=False)["score"])
        if self._checkpoint_due and self._all_ready:
            self._checkpoint_due = False
            self.checkpoint()

    def _evaluate(self, *, final: bool) -> dict[str, float]:
        values = self._evaluator.evaluate()
        row = {"kind": "final_evaluation" if final else "evaluation", "episode": self.num_episodes}
        self.recorder.row({**row, "decisions": self.decisions, **values})
        self.recorder.chart({f"evaluation/{k}": v for k, v in values.items()}, self._chart_step)
        return values

    def _finish(self) -> dict[str, float]:
        """Evaluates, writes the policy and closes the records in the first process; the same result in all."""
        self._check_equal()
        final: dict[str, float] = {}
        if self.processes.rank == 0:
            final = self._evaluate(final=True)
            trained = TrainedAgent(self.config, self.env, self.agent, self.num_episodes, final)
            self.recorder.finish(export_policy_folder(trained, self.output / POLICY), final)
        self.processes.exchange()
        result: dict[str, float] = self.processes.gather(final)[0]
        return result

    def _check_equal(self) -> None:
        """Makes sure that all processes hold the same network, and notes what it is."""
        if self.processes.num_processes > 1 and isinstance(self.agent, DQNAgent):
            digests = self.processes.gather(learner_digest(self.agent))
            check_equal(digests)
            self.recorder.row({"kind": "processes", "decisions": self.decisions, "digests": digests})

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Writes a checkpoint of the whole run, of all processes."""
        self._check_equal()
        state = RunState(
            num_episodes=self.num_episodes,
            num_pretrained=self.num_pretrained,
            num_pretraining_checkpoints=self._num_pretraining_checkpoints,
            metrics_offset=self.recorder.offset,
            collectors=self.processes.gather(self.collector.state_dict()),
            learner_metrics=self._learner_metrics,
            hold_result=self._evaluator.hold_state(),
            written=time.time(),
        )
        number = self.num_episodes + self._num_pretraining_checkpoints
        save_run(self.output / CHECKPOINTS, number, state, self.agent, self.processes)

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint; without one the run begins anew."""
        state = load_run(self.output / CHECKPOINTS, self.agent, self.collector, self.processes)
        if state is None:
            self.recorder.truncate_to(0)
            return
        self._has_experience = True
        self.num_episodes = state.num_episodes
        self.num_pretrained = state.num_pretrained
        self._num_pretraining_checkpoints = state.num_pretraining_checkpoints
        self.decisions = sum(int(collector["env_steps"]) for collector in state.collectors)
        self._learner_metrics = state.learner_metrics
        self._evaluator.load_hold_state(state.hold_result)
        self.recorder.truncate_to(state.metrics_offset)
        before, now = len(state.collectors), self.processes.num_processes
        if before != now:
            self.recorder.row({"kind": "resumed", "processes_before": before, "processes": now})
            text = f"the checkpoint is of {before} process(es), now there are {now}: experience divided, episodes new"
            print_message("resumed", text, style="yellow")


def _own_devices(config: EnvConfig) -> EnvConfig:
    """The environment of this process, on its own GPU where several have one each."""
    if config.id != FINE_TUNING_ID:
        return config
    return config.model_copy(update={"device": process_device(config.device)})
