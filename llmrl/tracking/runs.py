"""Reads runs back from Weights & Biases."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from llmrl_envs.errors import UserError

_PROJECT = re.compile(r"^[\w.-]+/[\w.-]+$")
_OFFLINE_MODES = frozenset({"offline", "dryrun", "disabled"})


@dataclass(frozen=True)
class RecordedRun:
    """One run as it was recorded.

    Attributes:
        label: Its name and id, for messages.
        state: "finished", "running", "crashed", ...
        config: Its configuration, nested.
        summary: Its final results.
    """

    label: str
    state: str
    config: dict[str, Any]
    summary: dict[str, Any]


def fetch_group(project: str, group: str) -> list[RecordedRun]:
    """The runs of a group, oldest first.

    Args:
        project: entity/project.
        group: The group.

    Raises:
        UserError: The project is not written so, cannot be reached, or has no such group.
    """
    where = f"--from-wandb {project} --group {group}"
    if not _PROJECT.match(project):
        raise UserError("not the name of a project", where="--from-wandb", expected="entity/project", got=project)
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in _OFFLINE_MODES:
        raise _unreachable(where, f"WANDB_MODE={mode}")
    import wandb

    try:
        found = wandb.Api().runs(project, filters={"group": group}, order="+created_at", lazy=False)
        runs = [_recorded(run) for run in found]
    except Exception as error:  # the client raises many kinds, all of which mean: not to be had
        told = (str(error).splitlines() or [""])[0]
        raise _unreachable(where, f"{type(error).__name__}: {told}") from error
    if not runs:
        raise UserError("no run of that group", where=where, expected="the group of finished runs", got="none")
    return runs


def _recorded(run: Any) -> RecordedRun:
    config = dict(run.config)
    # Beside somebody else's run the configuration stands in a section of its own.
    own = config.get("llmrl")
    return RecordedRun(
        label=f"{run.name} ({run.id})",
        state=str(run.state),
        config=dict(own) if isinstance(own, dict) else config,
        summary=dict(run.summary_metrics),
    )


def _unreachable(where: str, why: str) -> UserError:
    return UserError(
        "the runs cannot be read",
        where=where,
        expected="`wandb login` and a network, and WANDB_MODE not offline; or --from-runs with the run directories",
        got=why,
    )
