"""Checkpoints of a whole run: its counters, and the agent and the collector of every process.

Written by all processes into one folder that counts only when it is complete; read by the same number of processes
bit for bit, by another number with the experience divided anew and new episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.collector import Collector
from llmrl.dqn.interface import Agent
from llmrl.training.checkpoint import agent_folder, latest_checkpoint, read_state, save_together
from llmrl.training.processes import Processes


@dataclass(frozen=True)
class RunState:
    """What a run is, beside its agents; JSON values.

    Attributes:
        num_episodes: Finished, in all processes together.
        num_pretrained: Updates done on stored experience before the first decision.
        num_pretraining_checkpoints: Checkpoints written among these.
        metrics_offset: Bytes of metrics.jsonl.
        collectors: State of each process's collector.
        learner_metrics: Of the latest update.
        hold_result: Evaluation of holding, if it has been done.
        written: Unix time in seconds.
    """

    num_episodes: int
    num_pretrained: int
    num_pretraining_checkpoints: int
    metrics_offset: int
    collectors: list[dict[str, Any]]
    learner_metrics: dict[str, float]
    hold_result: dict[str, float] | None
    written: float


def save_run(directory: Path, number: int, state: RunState, agent: Agent, processes: Processes) -> None:
    """Writes checkpoint `number` together with the other processes.

    Raises:
        UserError: A process does not see the folder of the first: the run directory is not shared.
        OSError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    rank = processes.rank
    save_together(
        directory,
        number,
        vars(state),
        lambda folder: agent.save(agent_folder(folder, rank)),
        rank=rank,
        meet=processes.exchange,
    )


def load_run(directory: Path, agent: Agent, collector: Collector, processes: Processes) -> RunState | None:
    """Restores agent and collector from the newest whole checkpoint; its state, or None when there is none."""
    found = latest_checkpoint(directory) if processes.rank == 0 else None
    name = processes.gather(None if found is None else found[0].name)[0]
    if name is None:
        return None
    path = directory / name
    state = _state(read_state(path))
    num_before = len(state.collectors)
    if num_before == processes.num_processes:
        agent.load(agent_folder(path, processes.rank))
        collector.load_state_dict(state.collectors[processes.rank])
    elif isinstance(agent, DQNAgent):
        folders = [agent_folder(path, rank) for rank in range(num_before)]
        agent.load_shares(folders, rank=processes.rank, num_processes=processes.num_processes)
        collector.load_state_dict(_new_episodes(state.collectors, collector.num_envs, processes.rank))
    return state


def _state(values: dict[str, Any]) -> RunState:
    """The state in a checkpoint's file; the first version knew one process and no experience of earlier runs."""
    if "collector" in values:
        values["collectors"] = [values.pop("collector")]
    return RunState(**{"num_pretrained": 0, "num_pretraining_checkpoints": 0, **values})


def _new_episodes(collectors: list[dict[str, Any]], num_envs: int, rank: int) -> dict[str, Any]:
    """State of a collector that begins new episodes, with numbers that no process has used; the first counts on."""
    unused = max(collector["next_index"] for collector in collectors)
    return {
        "env_steps": sum(collector["env_steps"] for collector in collectors) if rank == 0 else 0,
        "index": (unused + np.arange(num_envs)).tolist(),
        "next_index": unused + num_envs,
        "return": [0.0] * num_envs,
        "length": [0] * num_envs,
        "lanes": None,
    }
