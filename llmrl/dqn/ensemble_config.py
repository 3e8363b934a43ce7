"""Shape of an ensemble of Q-networks, and which of the two shapes a stored configuration is; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar

from pydantic import Field

from llmrl.dqn.config import NetworkConfig

Value = TypeVar("Value")

MOST_MEMBERS = 100


class EnsembleConfig(NetworkConfig):
    """Several Q-networks of one shape that are asked together; the fields of `NetworkConfig` are those of each."""

    num_members: int = Field(ge=2, le=MOST_MEMBERS, description="networks")
    lower_bound: float = Field(
        default=0.0,
        ge=0,
        description="standard deviations over the members that an action's value lies below their mean",
    )

    @property
    def member(self) -> NetworkConfig:
        """Shape of one network."""
        return NetworkConfig(**{name: getattr(self, name) for name in NetworkConfig.model_fields})


def member_prefix(index: int) -> str:
    """What stands before the names of a member's tensors."""
    return f"members.{index}."


def member_tensors(tensors: Mapping[str, Value], index: int) -> dict[str, Value]:
    """What belongs to a member, by the names that its network gives."""
    prefix = member_prefix(index)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read_network_config(text: str) -> NetworkConfig:
    """The configuration that `model_dump_json` of either shape wrote.

    Raises:
        ValueError: It is no JSON, or not such a configuration.
    """
    found = json.loads(text)
    is_ensemble = isinstance(found, dict) and "num_members" in found
    return (EnsembleConfig if is_ensemble else NetworkConfig).model_validate(found)
