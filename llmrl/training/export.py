"""Writes what a training learned as a policy folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmrl
from llmrl.dqn.network_file import load_network
from llmrl.policy import SchedulePolicy
from llmrl.training.setup import schedule_language

if TYPE_CHECKING:
    from llmrl.training.loop import TrainingRun


def export_policy_folder(run: TrainingRun, final: dict[str, float], folder: Path) -> Path:
    """Writes the policy, replacing an earlier one only when the new one is complete.

    A policy that steers jobs becomes a `SchedulePolicy` folder; for any other environment, or an agent without a
    network, the folder holds the agent itself.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    language = schedule_language(run.env)
    export: Any = getattr(run.agent, "export_network", None)
    if export is None:
        run.agent.save(part)
    else:
        export(part / "model.safetensors")
        if language is not None:
            network = load_network(part / "model.safetensors")
            table, spec, settings = language
            SchedulePolicy(table, spec, settings, network, _provenance(run, final)).save(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def _provenance(run: TrainingRun, final: dict[str, float]) -> dict[str, Any]:
    """What the policy was trained on: facts that two equal runs agree on."""
    config = run.config
    values: dict[str, Any] = {
        "name": config.agent.name,
        "llmrl_version": llmrl.__version__,
        "seed": config.seed,
        "environment": config.env.id,
        "decisions": run.collector.env_steps,
        "episodes": run.num_episodes,
        "learner_steps": run.agent.learner_steps,
        "agent": config.agent.model_dump(mode="json", exclude_defaults=True),
        "reward": dict(vars(config.env.reward)),
        "results": {name: round(value, 6) for name, value in final.items()},
    }
    if config.env.tasks is not None:
        values["tasks"] = [
            {"name": task.name, "model": task.model, "data": task.data.train, "mode": task.mode, "steps": task.steps}
            for task in config.env.tasks.tasks
        ]
        values["learning_rate_log10_range"] = list(config.env.tasks.learning_rate_log10_range)
    return values
