"""Writes what a training learned as a policy folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl_envs.jobs.task import TaskDistribution

import llmrl
from llmrl.config import TrainConfig
from llmrl.config_loading import load_config
from llmrl.dqn.interface import Agent
from llmrl.dqn.network_file import load_network
from llmrl.policy import SchedulePolicy
from llmrl.training.setup import Environment, schedule_language

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class TrainedAgent:
    """An agent with what is known of its training.

    Attributes:
        config: The configuration that it was trained with.
        env: The environment that it was trained in.
        agent: The agent.
        num_episodes: Episodes finished.
        final: The final evaluation.
    """

    config: TrainConfig
    env: Environment
    agent: Agent
    num_episodes: int
    final: dict[str, float]


def export_policy_folder(trained: TrainedAgent, folder: Path) -> Path:
    """Writes the policy, replacing an earlier one only when the new one is complete.

    A policy that steers jobs becomes a `SchedulePolicy` folder; for any other environment, or an agent without a
    network, the folder holds the agent itself.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    language = schedule_language(trained.env)
    export: Any = getattr(trained.agent, "export_network", None)
    if export is None:
        trained.agent.save(part)
    else:
        export(part / "model.safetensors")
        if language is not None:
            network = load_network(part / "model.safetensors")
            table, spec, settings = language
            holds_on = trained.config.training.holds_on
            SchedulePolicy(table, spec, settings, network, _provenance(trained), holds_on).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def _provenance(trained: TrainedAgent) -> dict[str, Any]:
    """What the policy was trained on: facts that two equal runs agree on."""
    config = trained.config
    values: dict[str, Any] = {
        "name": config.agent.name,
        "llmrl_version": llmrl.__version__,
        "seed": config.seed,
        "environment": config.env.id,
        "decisions": trained.agent.env_steps,
        "episodes": trained.num_episodes,
        "learner_steps": trained.agent.learner_steps,
        "agent": config.agent.model_dump(mode="json", exclude_defaults=True),
        "reward": dict(vars(config.env.reward)),
        "results": {name: round(value, 6) for name, value in trained.final.items()},
    }
    if config.env.tasks is not None:
        # Who learns from logs alone takes no decision: the tasks are those that it is evaluated on.
        values["tasks" if config.training.decisions else "evaluated_on"] = _facts(config.env.tasks)
        values["learning_rate_log10_range"] = list(config.env.tasks.learning_rate_log10_range)
    experience = [found for path in config.agent.experience if (found := _experience_facts(Path(path)))]
    return values | ({"experience": experience} if experience else {})


def _facts(tasks: TaskDistribution) -> list[dict[str, Any]]:
    shared = tasks.steps_range
    return [
        {
            "name": task.name,
            "objective": task.objective,
            "model": task.model,
            "data": task.data.train,
            "mode": task.mode,
            "steps": list(shared) if shared else task.steps,
        }
        for task in tasks.tasks
    ]


def _experience_facts(run: Path) -> dict[str, Any]:
    """What an earlier run was collected on; nothing where only its replay is there."""
    if not (run / CONFIG_FILE).is_file():
        return {}
    earlier = load_config("train", run / CONFIG_FILE)
    tasks = {} if earlier.env.tasks is None else {"tasks": _facts(earlier.env.tasks)}
    return {"run": run.name, "seed": earlier.seed, "decisions": earlier.training.decisions, **tasks}
