"""What is compared: policies, hold, usual schedules and published methods, all run through the same session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from llmrl_envs.interface.action import LevelUnit
from llmrl_envs.interface.schedule_settings import ScheduleSettings

from llmrl.compare.baselines import population, search
from llmrl.compare.baselines.catalogue import make_baseline
from llmrl.compare.baselines.leaning_policy import LeaningPolicy
from llmrl.compare.baselines.packages import require_package
from llmrl.compare.baselines.random_policy import RandomPolicy
from llmrl.compare.baselines.running import Baseline
from llmrl.compare.cache import Fingerprints
from llmrl.compare.names import (
    BASELINE_NAMES,
    BEST_CONSTANT,
    HOLD_LEAN,
    POPULATION_MEMBERS,
    RANDOM,
    SCHEDULE_NAMES,
    SEARCH_TRIALS,
)
from llmrl.compare.names import LINEAR as LINEAR
from llmrl.compare.names import POLICY as POLICY
from llmrl.config import CompareConfig
from llmrl.decisions import Validations
from llmrl.hosts.job import named_schedule
from llmrl.policy import HOLD, SchedulePolicy, hold_policy


@dataclass(frozen=True, eq=False)
class Method:
    """One way to choose a job's learning rates.

    Attributes:
        name: What the configuration calls it.
        digest: Identifies what it does: equal digests, equal runs.
        depends_on_rate: Whether the given learning rate changes anything; where not, one run stands for every start.
        description: Its settings, for results and readers.
    """

    name: str
    digest: str
    depends_on_rate: bool
    description: Mapping[str, Any]

    @property
    def num_jobs(self) -> int:
        """Jobs that one result takes."""
        return 1


@dataclass(frozen=True, eq=False)
class PolicyMethod(Method):
    """A policy, or a usual schedule, which is a policy that holds a factor of one.

    Attributes:
        policy: Chooses the actions.
        settings: The base that the levels multiply, and where the level starts.
        guarded: Fall back to linear decay when the job loses too much. Usual schedules run as they are.
        guard_validates: It looks at the validation loss for that, too.
    """

    policy: SchedulePolicy
    settings: ScheduleSettings
    guarded: bool
    guard_validates: bool = True

    @property
    def validations(self) -> Validations:
        """When a job measures its validation loss."""
        return "guard" if self.guarded and self.guard_validates else "never"

    @property
    def replaced_settings(self) -> ScheduleSettings | None:
        """Settings that replace the policy's own; None where they are its own: where it holds, it has others."""
        return None if self.settings == self.policy.settings else self.settings

    def policy_for(self, seed: int) -> SchedulePolicy:
        """The policy of a run; one that draws random numbers begins them anew."""
        return self.policy.seeded(seed) if isinstance(self.policy, RandomPolicy) else self.policy


@dataclass(frozen=True, eq=False)
class BaselineMethod(Method):
    """A published method that is no function of the step.

    Attributes:
        baseline: What it does.
    """

    baseline: Baseline


@dataclass(frozen=True, eq=False)
class SearchMethod(Method):
    """A search for the learning rate of linear decay.

    Attributes:
        num_trials: Jobs that it trains.
    """

    num_trials: int

    @property
    def num_jobs(self) -> int:
        """Jobs that one result takes."""
        return self.num_trials


@dataclass(frozen=True, eq=False)
class PopulationMethod(Method):
    """Population-based training.

    Attributes:
        num_members: Jobs that it trains side by side.
        warmup_fraction: Share of the budget.
    """

    num_members: int
    warmup_fraction: float

    @property
    def num_jobs(self) -> int:
        """Jobs that one result takes."""
        return self.num_members


@dataclass(frozen=True, eq=False)
class BestLevelMethod(Method):
    """The best of the controller's levels, each held for the whole job; chosen once for all tasks and seeds.

    Attributes:
        levels: The controller at each level.
    """

    levels: tuple[PolicyMethod, ...]

    @property
    def num_jobs(self) -> int:
        """Jobs that one result takes."""
        return len(self.levels)


def resolve_methods(config: CompareConfig, policy: str) -> dict[str, Method]:
    """Loads what the configuration names, in its order.

    Args:
        config: `methods` holds names or paths of policies. The policy of the command line is compared in any case,
            first if it is not listed.
        policy: Folder, Hub id, "default" or "hold".

    Raises:
        UserError: A policy cannot be loaded, or a method needs a package that is not installed.
    """
    names = config.methods if POLICY in config.methods else (POLICY, *config.methods)
    return {name: _make(name, policy, config) for name in names}


def sweep_method(config: CompareConfig) -> PolicyMethod:
    """Linear-to-zero, whose best rate scores 1."""
    return _schedule(LINEAR, config)


def _make(name: str, policy: str, config: CompareConfig) -> Method:
    if name in SCHEDULE_NAMES:
        return _schedule(name, config)
    if name in BASELINE_NAMES:
        baseline = make_baseline(name, _warmup_fraction(config))
        settings = dict(baseline.settings)
        return BaselineMethod(name, _hash(settings), baseline.depends_on_rate, settings, baseline)
    if name in SEARCH_TRIALS:
        return _search(name, config)
    if name in POPULATION_MEMBERS:
        return _population(name, config)
    if name == BEST_CONSTANT:
        return _best_level(config)
    return _policy(name, policy if name in (POLICY, RANDOM) else name, config)


def _warmup_fraction(config: CompareConfig) -> float:
    return (config.schedule or ScheduleSettings()).warmup_fraction


def _schedule(name: str, config: CompareConfig) -> PolicyMethod:
    chosen = named_schedule(name, _warmup_fraction(config))
    return _steered(name, chosen, chosen.settings, guarded=False)


def _policy(name: str, source: str, config: CompareConfig) -> PolicyMethod:
    if source == HOLD:
        chosen = hold_policy(config.schedule)
    elif name == HOLD_LEAN:
        chosen = LeaningPolicy(config.schedule)
    else:
        chosen = SchedulePolicy.from_pretrained(source, where="methods" if name == source else "--policy")
    if name == RANDOM:
        chosen = RandomPolicy(chosen, seed=0)
    settings = _guarding(config.schedule or chosen.settings, config)
    return _steered(name, chosen, settings, guarded=True, validates=config.guard_validates)


def _guarding(settings: ScheduleSettings, config: CompareConfig) -> ScheduleSettings:
    """The settings, as far as the comparison lets guards skip steps."""
    return settings if config.guard_skips else replace(settings, skip_outliers=False)


def _steered(
    name: str, policy: SchedulePolicy, settings: ScheduleSettings, *, guarded: bool, validates: bool = True
) -> PolicyMethod:
    """A level of relative update size that starts at its default has no use for the given rate."""
    depends_on_rate = policy.table.unit is not LevelUnit.RELATIVE_UPDATE or settings.start == "given"
    description = {"actions": policy.table.name, "schedule": settings.identity(), "guarded": guarded}
    description |= {} if validates else {"guard_validates": False}
    digest = _policy_digest(policy, settings, guarded=guarded, validates=validates)
    return PolicyMethod(name, digest, depends_on_rate, description, policy, settings, guarded, validates)


def _search(name: str, config: CompareConfig) -> SearchMethod:
    require_package("optuna", name)
    trials = {"linear": sweep_method(config).digest, "num_trials": SEARCH_TRIALS[name], "range": search.SEARCH_RANGE}
    settings = {"sampler": "TPE", "num_startup_trials": search.NUM_STARTUP_TRIALS, "optuna": version("optuna")}
    return SearchMethod(name, _hash({**trials, **settings}), True, {**trials, **settings}, SEARCH_TRIALS[name])


def _population(name: str, config: CompareConfig) -> PopulationMethod:
    settings = {
        "num_members": POPULATION_MEMBERS[name],
        "num_rounds": population.NUM_ROUNDS,
        "perturbations": list(population.PERTURBATIONS),
        "range": population.START_RANGE,
        "warmup_fraction": _warmup_fraction(config),
    }
    members, warmup = POPULATION_MEMBERS[name], _warmup_fraction(config)
    return PopulationMethod(name, _hash(settings), True, settings, members, warmup)


def _best_level(config: CompareConfig) -> BestLevelMethod:
    """Its digest holds all tasks and seeds, since the level is chosen over all of them."""
    settings = replace(config.schedule or ScheduleSettings(), start="default")
    hold = hold_policy(_guarding(settings, config))
    levels = []
    for place in range(len(hold.table.levels)):
        table = replace(hold.table, default_level=place)
        policy = SchedulePolicy(table, hold.spec, hold.settings, None, hold.provenance)
        levels.append(
            _steered(f"{BEST_CONSTANT} {place}", policy, hold.settings, guarded=True, validates=config.guard_validates)
        )
    fingerprints = Fingerprints()
    tasks = [[task.model_dump(mode="json"), fingerprints.of_task(task)] for task in config.tasks]
    content = {"levels": [level.digest for level in levels], "tasks": tasks, "seeds": list(config.seeds)}
    description = {"levels": list(hold.table.levels), "schedule": hold.settings.identity()}
    return BestLevelMethod(BEST_CONSTANT, _hash(content), False, description, tuple(levels))


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _policy_digest(policy: SchedulePolicy, settings: ScheduleSettings, *, guarded: bool, validates: bool) -> str:
    """Hash of everything about a policy that changes a run; its name and provenance do not."""
    description = {
        "actions": policy.table.hash,
        "observation": policy.spec.hash,
        "settings": settings.identity(),
        "guarded": guarded,
        "network": None if policy.network is None else policy.network.config.model_dump(mode="json"),
    }
    if not validates:
        description["guard_validates"] = False
    if isinstance(policy, RandomPolicy):
        description["random"] = True
    if isinstance(policy, LeaningPolicy):
        description["leans"] = True
    if policy.holds_on:
        description["holds_on"] = list(policy.holds_on)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    weights = {} if policy.network is None else policy.network.state_dict()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
