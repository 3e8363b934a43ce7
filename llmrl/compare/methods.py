"""What is compared: policies, hold, and the usual schedules, all run through the same loop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch
from llmrl_envs.interface.action import LevelUnit
from llmrl_envs.interface.schedule import BASE_NAMES, ScheduleSettings

from llmrl.config import CompareConfig
from llmrl.hosts.job import named_schedule
from llmrl.policy import HOLD, SchedulePolicy, hold_policy

POLICY, LINEAR = "policy", "linear"


@dataclass(frozen=True, eq=False)
class Method:
    """One way to choose a job's learning rates.

    Attributes:
        name: What the configuration calls it.
        policy: Chooses the actions; a usual schedule is a policy that holds a factor of one.
        settings: The base that the levels multiply, and where the level starts.
        guarded: Fall back to linear decay when the job loses too much. Usual schedules run as they are.
        digest: Identifies what it does: equal digests, equal runs.
    """

    name: str
    policy: SchedulePolicy
    settings: ScheduleSettings
    guarded: bool
    digest: str

    @property
    def depends_on_rate(self) -> bool:
        """Whether the given learning rate changes anything.

        A level of relative update size that starts at its default has no use for the given rate, so one run stands
        for every starting rate.
        """
        return self.policy.table.unit is not LevelUnit.RELATIVE_UPDATE or self.settings.start == "given"


def resolve_methods(config: CompareConfig, policy: str) -> dict[str, Method]:
    """Loads what the configuration names, in its order.

    Args:
        config: `methods` holds names or paths of policies. The policy of the command line is compared in any case,
            first if it is not listed.
        policy: Folder, Hub id, "default" or "hold".

    Raises:
        UserError: A policy cannot be loaded.
    """
    names = config.methods if POLICY in config.methods else (POLICY, *config.methods)
    return {name: _make(name, policy if name == POLICY else name, config) for name in names}


def sweep_method(config: CompareConfig) -> Method:
    """Linear-to-zero, whose best rate scores 1."""
    return _make(LINEAR, LINEAR, config)


def _make(name: str, source: str, config: CompareConfig) -> Method:
    if name in BASE_NAMES:
        chosen = named_schedule(name, (config.schedule or ScheduleSettings()).warmup_fraction)
        settings = chosen.settings
    else:
        chosen = (
            hold_policy(config.schedule)
            if source == HOLD
            else SchedulePolicy.from_pretrained(source, where="--policy" if name == POLICY else "methods")
        )
        settings = config.schedule or chosen.settings
    guarded = name not in BASE_NAMES
    return Method(name, chosen, settings, guarded, _digest(chosen, settings, guarded=guarded))


def _digest(policy: SchedulePolicy, settings: ScheduleSettings, *, guarded: bool) -> str:
    """Hash of everything about a policy that changes a run; its name and provenance do not."""
    description = {
        "actions": policy.table.hash,
        "observation": policy.spec.hash,
        "settings": asdict(settings),
        "guarded": guarded,
        "network": None if policy.network is None else policy.network.config.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    weights = {} if policy.network is None else policy.network.state_dict()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
