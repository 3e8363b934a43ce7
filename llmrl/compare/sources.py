"""Where the runs of a comparison come from when none are made: what the command line said, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from pydantic import ValidationError

from llmrl.compare.existing import read_runs
from llmrl.compare.runner import compare_runs
from llmrl.config import TrackingConfig
from llmrl.config_errors import combine_problems, problems_of
from llmrl.config_loading import apply_override
from llmrl.tracking.runs import RecordedRun, fetch_group


@dataclass(frozen=True)
class ExistingRuns:
    """The options of `llmrl compare` that name existing runs.

    Attributes:
        directories: Those of --from-runs.
        words: What else stands on the command line: further directories.
        project: entity/project of --from-wandb.
        group: That of --group.
    """

    directories: tuple[Path, ...]
    words: tuple[str, ...]
    project: str | None
    group: str | None


def compare_sources(
    source: ExistingRuns, *, output: Path, tracking: Sequence[str], others: Sequence[object]
) -> dict[str, Any]:
    """Compares existing runs and returns what `results.json` holds.

    Args:
        source: Which runs.
        output: Run directory, new or empty.
        tracking: Overrides `tracking.KEY=VALUE`.
        others: Options that say that runs are to be made, and must be None here.

    Raises:
        UserError: The options contradict each other, or the runs cannot be read or compared.
    """
    _check(source, others)
    return compare_runs(runs=_runs(source), output=output, tracking=_tracking_config(tracking))


def _check(source: ExistingRuns, others: Sequence[object]) -> None:
    if any(other is not None for other in others):
        raise UserError(
            "are runs made, or taken?",
            expected="--config and --policy, or one of --from-runs and --from-wandb",
            got="both",
        )
    if bool(source.directories) == bool(source.project):
        got = "both" if source.project else "neither"
        raise UserError("which runs?", expected="one of --from-runs and --from-wandb", got=got)
    if bool(source.project) != bool(source.group):
        missing = "--group" if source.project else "--from-wandb"
        raise UserError(
            "which runs?", expected="--from-wandb entity/project together with --group G", got=f"no {missing}"
        )
    if source.project and source.words:
        raise UserError("words that mean nothing here", expected="none beside --from-wandb", got=" ".join(source.words))


def _runs(source: ExistingRuns) -> list[RecordedRun]:
    if source.project and source.group:
        return fetch_group(source.project, source.group)
    return read_runs([*source.directories, *map(Path, source.words)])


def _tracking_config(overrides: Sequence[str]) -> TrackingConfig:
    data: dict[str, Any] = {}
    for override in overrides:
        apply_override(data, override)
    values = data.get("tracking", {})
    try:
        return TrackingConfig.model_validate(values)
    except ValidationError as error:
        problems = problems_of(error, TrackingConfig, values, source="command line", lines={})
        raise combine_problems(problems) from None
