"""Experience of earlier runs: where it lies, whether it means the same, and into the replay with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.replay_storage import MANIFEST, StoredReplay
from llmrl.training.checkpoint import AGENT, CHECKPOINTS, latest_checkpoint

REPLAY = "replay"


@dataclass(frozen=True)
class TakenExperience:
    """What was taken from one folder, by this process.

    Attributes:
        path: The folder.
        num_stored: Transitions in it.
        num_taken: Those that were put into the replay of this process.
    """

    path: Path
    num_stored: int
    num_taken: int


def take_experience(
    agent: DQNAgent, paths: tuple[str, ...], *, rank: int = 0, num_processes: int = 1
) -> list[TakenExperience]:
    """Merges the experience of earlier runs into an agent's replay, in the order in which they are named.

    Args:
        agent: The agent.
        paths: Run directories, checkpoints, or replay folders.
        rank: Which share this process takes; unbroken runs stay whole.
        num_processes: Processes that divide the experience among them.

    Raises:
        UserError: Nothing is there, it is damaged from its beginning, or it means something else.
    """
    folders = [folder for path in paths for folder in replay_folders(Path(path))]
    stored = [_open(folder) for folder in folders]
    for replay in stored:
        _check_means_the_same(agent, replay)
    reports = [agent.replay.merge(replay, rank=rank, num_processes=num_processes) for replay in stored]
    taken = [
        TakenExperience(folder, report.num_stored, report.num_loaded)
        for folder, report in zip(folders, reports, strict=True)
    ]
    if folders and not len(agent.replay):
        raise UserError(
            "there is not enough experience for every process",
            expected=f"at least {num_processes} episodes",
            got=f"{sum(report.num_stored for report in reports)} transitions",
            where="agent.experience",
        )
    return taken


def replay_folders(path: Path) -> list[Path]:
    """The replay folders that a path stands for.

    Args:
        path: A run directory (its newest whole checkpoint), a checkpoint, an agent's folder, or a replay folder.

    Raises:
        UserError: It is none of these, or the run has no checkpoint or no replay.
    """
    if (path / CHECKPOINTS).is_dir():
        found = latest_checkpoint(path / CHECKPOINTS)
        if found is None:
            raise _missing("the run has no whole checkpoint", path, "a run that got as far as its first checkpoint")
        path = found[0]
    folders = sorted(path.glob(f"{AGENT}*/{REPLAY}"))
    if folders:
        return folders
    if (path / REPLAY / MANIFEST).is_file():
        return [path / REPLAY]
    if (path / MANIFEST).is_file() and not (path / AGENT).exists():
        return [path]
    raise _missing("no stored experience", path, "a run directory of a dqn agent, or a replay folder")


def _open(folder: Path) -> StoredReplay:
    try:
        return StoredReplay(folder)
    except ValueError as error:
        raise UserError("stored experience cannot be read", where="agent.experience", got=str(error)) from error


def _check_means_the_same(agent: DQNAgent, stored: StoredReplay) -> None:
    """Compares what observations and actions mean, and their shapes, naming the first thing that differs."""
    spec = agent.replay.spec
    shapes = {"obs_shape": list(spec.obs_shape), "obs_dtype": spec.obs_dtype.name, "num_actions": spec.num_actions}
    own = {"metadata": agent.replay.metadata, "spec": shapes}
    pairs: dict[str, tuple[Any, Any]] = {}
    for part, name in (("metadata", "{} hash"), ("spec", "{}")):
        expected, got = own[part], stored.about.get(part) or {}
        for key in sorted(expected.keys() | got.keys()):
            pairs[name.format(key)] = expected.get(key), got.get(key)
    for name, (expected, got) in pairs.items():
        if expected != got:
            raise UserError(
                f"the experience means something else: another {name}",
                where=f"agent.experience, {stored.path}",
                expected=str(expected),
                got=got,
            )


def _missing(what: str, path: Path, expected: str) -> UserError:
    return UserError(what, where=f"agent.experience, {path}", expected=expected)
