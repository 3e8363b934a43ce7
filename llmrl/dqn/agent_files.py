"""Reading and writing the files of a saved agent: JSON and safetensors, nothing that can run code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def write_json(path: Path, state: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1))
    os.replace(part, path)


def read_json(path: Path, *, version: int, agent: str) -> dict[str, Any]:
    """Reads the state of an agent.

    Raises:
        ValueError: The file is missing, no JSON, of another agent, or of a version that is not known.
    """
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the JSON state of an agent, got {error}") from error
    if not isinstance(state, dict) or state.get("agent") != agent:
        got = state.get("agent") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: expected the state of a {agent!r} agent, got {got!r}")
    if state.get("format_version") != version:
        raise ValueError(f"{path}: expected format_version {version}, got {state.get('format_version')!r}")
    return state


@contextmanager
def restoring(directory: Path) -> Iterator[None]:
    """Whatever a saved state lacks, or holds of another kind, becomes a ValueError that names the folder."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{directory}: expected the whole state of an agent, got {error!r}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        return load_file(path)  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
