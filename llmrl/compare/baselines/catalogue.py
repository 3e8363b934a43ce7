"""The baselines by name, with their settings."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from llmrl.compare.baselines import hypergradient, rates, zclip
from llmrl.compare.baselines.hypergradient import HypergradientAdamW, hypergradient_adamw
from llmrl.compare.baselines.optimizers import PRODIGY_START, prodigy, prodigy_rate, schedule_free_adamw
from llmrl.compare.baselines.packages import require_package
from llmrl.compare.baselines.rates import FeedbackRates, FixedRates
from llmrl.compare.baselines.running import Baseline
from llmrl.compare.baselines.zclip import zclip_for


def make_baseline(name: str, warmup_fraction: float) -> Baseline:
    """A baseline.

    Args:
        name: One of `BASELINE_NAMES`.
        warmup_fraction: Share of the budget, for those that warm up.

    Raises:
        UserError: A package that it needs is not installed.
    """
    return _MAKERS[name](warmup_fraction)


def _plateau(warmup_fraction: float) -> Baseline:
    settings = {"factor": rates.PLATEAU_FACTOR, "patience": rates.PLATEAU_PATIENCE, "torch": torch.__version__}
    return _feedback("plateau", rates.plateau_rates, settings)


def _greedy(warmup_fraction: float) -> Baseline:
    return _feedback("greedy", rates.greedy_rates, {"transformers": version("transformers")})


def _greedy_bounded(warmup_fraction: float) -> Baseline:
    settings = {
        "factor": rates.GREEDY_FACTOR,
        "patience": rates.GREEDY_PATIENCE,
        "range": rates.GREEDY_RANGE,
        "transformers": version("transformers"),
    }
    return _feedback("greedy_bounded", rates.greedy_bounded_rates, settings)


def _feedback(name: str, make: Callable[[float], FeedbackRates], settings: dict[str, Any]) -> Baseline:
    return Baseline(lambda given, task: make(given), {"baseline": name, **settings})


def _hypergradient(warmup_fraction: float) -> Baseline:
    return Baseline(
        lambda given, task: FixedRates("constant", given, task.steps),
        {"baseline": "hypergradient", "hyper_rate": hypergradient.HYPER_RATE, "most_change": hypergradient.MOST_CHANGE},
        make_optimizer=lambda task: hypergradient_adamw,
        effective_rate=_hypergradient_rate,
    )


def _hypergradient_rate(optimizer: torch.optim.Optimizer) -> float:
    assert isinstance(optimizer, HypergradientAdamW)
    return float("nan") if optimizer.learning_rate is None else optimizer.learning_rate


def _schedule_free(warmup_fraction: float) -> Baseline:
    require_package("schedulefree", "schedule_free")
    return Baseline(
        lambda given, task: FixedRates("constant", given, task.steps),
        {"baseline": "schedule_free", "warmup_fraction": warmup_fraction, "schedulefree": version("schedulefree")},
        make_optimizer=lambda task: schedule_free_adamw(round(warmup_fraction * task.steps)),
        effective_rate=lambda optimizer: float(optimizer.param_groups[0]["scheduled_lr"]),
    )


def _prodigy(warmup_fraction: float) -> Baseline:
    require_package("prodigyopt", "prodigy")
    return Baseline(
        lambda given, task: FixedRates("cosine", 1.0, task.steps),
        {"baseline": "prodigy", "start": PRODIGY_START, "base": "cosine", "prodigyopt": version("prodigyopt")},
        make_optimizer=lambda task: prodigy(),
        effective_rate=prodigy_rate,
        depends_on_rate=False,
    )


def _zclip(warmup_fraction: float) -> Baseline:
    settings = {"decay": zclip.DECAY, "threshold": zclip.THRESHOLD, "warmup": [zclip.WARMUP_STEPS, zclip.WARMUP_SHARE]}
    return Baseline(
        lambda given, task: FixedRates("linear", given, task.steps, round(warmup_fraction * task.steps)),
        {"baseline": "zclip", "warmup_fraction": warmup_fraction, "base": "linear", **settings},
        make_clipper=zclip_for,
    )


_MAKERS: dict[str, Callable[[float], Baseline]] = {
    "plateau": _plateau,
    "greedy": _greedy,
    "greedy_bounded": _greedy_bounded,
    "hypergradient": _hypergradient,
    "schedule_free": _schedule_free,
    "prodigy": _prodigy,
    "zclip": _zclip,
}
