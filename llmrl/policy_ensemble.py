"""Several policies that were learned alike as one: it acts on the mean of their values, or on a lower bound of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError

from llmrl.dqn.ensemble import join_networks
from llmrl.dqn.ensemble_config import MOST_MEMBERS
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy
from llmrl.run_directory import create_run_directory

_WHERE = "policy ensemble"
_SAME: dict[str, Callable[[SchedulePolicy], Any]] = {
    "actions": lambda policy: policy.table.hash,
    "observation": lambda policy: policy.spec.hash,
    "schedule": lambda policy: policy.settings.identity(),
    "shape of the network": lambda policy: None if policy.network is None else policy.network.config,
}


def ensemble_policy(sources: Sequence[str], lower_bound: float) -> SchedulePolicy:
    """A policy of several; it holds wherever one of them does.

    Args:
        sources: References to two or more policies whose actions, observations, schedules and networks have the same
            shapes: those of several seeds of one configuration.
        lower_bound: Standard deviations over the members that an action's value lies below their mean; 0 for the mean.

    Raises:
        UserError: There are fewer or too many, one is not a single network, or they do not fit each other.
    """
    if not 2 <= len(sources) <= MOST_MEMBERS:
        raise UserError("not an ensemble", expected=f"2 to {MOST_MEMBERS} policies", got=len(sources), where=_WHERE)
    if not (math.isfinite(lower_bound) and lower_bound >= 0.0):
        raise UserError("no lower bound", expected="a number of at least 0", got=lower_bound, where="--lower-bound")
    policies = [SchedulePolicy.from_pretrained(source, where=_WHERE) for source in sources]
    networks = [_network(policy, source) for policy, source in zip(policies, sources, strict=True)]
    first = policies[0]
    for policy, source in zip(policies[1:], sources[1:], strict=True):
        for name, value in _SAME.items():
            if value(policy) != value(first):
                raise UserError(
                    f"policies do not fit each other: another {name}",
                    expected=f"{value(first)}, as of {sources[0]}",
                    got=value(policy),
                    where=f"{_WHERE}, {source}",
                )
    provenance = {**_provenance(policies), "name": "ensemble", "lower_bound": lower_bound}
    holds_on = dict.fromkeys(kind for policy in policies for kind in policy.holds_on)
    network = join_networks(networks, lower_bound)
    return SchedulePolicy(first.table, first.spec, first.settings, network, provenance, tuple(holds_on))


def _provenance(policies: Sequence[SchedulePolicy]) -> dict[str, Any]:
    """What all members have in common once, and of each what is its own."""
    first, *others = (policy.provenance for policy in policies)
    common = {key for key in first if all(key in other and other[key] == first[key] for other in others)}
    members = [
        {"digest": policy.digest, **{key: value for key, value in policy.provenance.items() if key not in common}}
        for policy in policies
    ]
    return {**{key: value for key, value in first.items() if key in common}, "members": members}


def _network(policy: SchedulePolicy, source: str) -> QNetwork:
    if not isinstance(policy.network, QNetwork):
        got = "it holds" if policy.network is None else "an ensemble"
        raise UserError("not a policy of one network", expected="a policy from `llmrl train`", got=got, where=source)
    return policy.network


def write_ensemble(sources: Sequence[str], output: Path, *, lower_bound: float) -> Path:
    """Writes the policy that `ensemble_policy` makes to a new or empty directory, and returns it.

    Raises:
        UserError: As `ensemble_policy`, or the directory is not empty.
    """
    policy = ensemble_policy(sources, lower_bound)
    create_run_directory(output)
    policy.save_pretrained(output)
    return output
