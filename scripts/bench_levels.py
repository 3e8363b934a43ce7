"""How far one level carries: constant relative update sizes against tuned rates, task by task.

    python scripts/bench_levels.py --config configs/compare/levels.yaml --output levels.json [--quick]
    python scripts/bench_levels.py --config configs/compare/bases.yaml --output bases.json \
        --bases linear cosine polynomial wsd wsd_40 --factors 0.588 1 1.7 --rates 1e-3
    python scripts/bench_levels.py --config configs/compare/bases.yaml --output decays.json \
        --cooldowns 0.05 0.2 0.4 0.6 0.8 --factors 1 --rates 1e-3

Every task of the file (a comparison's `tasks`) is run with linear decay at several learning rates and by holding each
of several levels over each of several base schedules, full or LoRA as the task says; LoRA over the linear base with
both norms that a level can refer to. `--cooldowns` adds linear decays that begin after a share of the budget, at the
first decision from there on. Reported is the final validation loss, nats per target. The rates that a held level led
to are reported beside it.

Writes {machine, versions, rows, ratios}; a ratio is the default level's gain over the best linear decay's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import describe_machine, describe_versions, write_report
from llmrl_envs.interface.action import DEFAULT_RELATIVE_UPDATE, action_table
from llmrl_envs.interface.base_schedule import BASE_NAMES, BaseName, decision_intervals
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import Job, JobLibrary
from llmrl_envs.jobs.reference import given_rate_schedule
from llmrl_envs.jobs.session import FineTuningSession

from llmrl.config import CompareConfig
from llmrl.config_loading import load_config

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LEVEL_FACTORS = (1 / 8, 1 / 3, 1.0, 3.0, 8.0)


def linear_loss(job: Job, rate: float, warmup: float, seed: int) -> float:
    """Final validation loss of linear decay from a rate."""
    session = FineTuningSession(job, seed=seed, record=False)
    schedule = given_rate_schedule("linear", job.task.steps, rate, warmup)
    for num_steps in decision_intervals(job.task.steps):
        session.run_interval(num_steps, schedule)
    return session.evaluate("validation").loss


def held_loss(
    job: Job, level: float, norm: str, settings: ScheduleSettings, seed: int, cooldown: float = math.inf
) -> tuple[float, float]:
    """Final validation loss of holding a level, and the peak rate that it meant at the end.

    Args:
        job: What is trained.
        level: What is held, at most until the cooldown.
        norm: What the level refers to.
        settings: Base schedule and warm-up.
        seed: Of the job.
        cooldown: Share of the budget from which the rate falls to zero; infinity leaves it to the base.
    """
    session = FineTuningSession(job, seed=seed, level_norm=norm)
    table = dataclasses.replace(action_table("decay"), levels=(level, 2 * level), default_level=0)
    schedule = Schedule(table, np.array([job.task.steps]), np.array([1.0]), settings)
    if norm == "effective":
        schedule.observe_job(np.array([int(job.mode)]), job.label_nats, job.loaded.num_parameters)
    update, weight = session.initial_norms()
    schedule.observe_norms(np.array([update]), np.array([weight]))
    for num_steps in decision_intervals(job.task.steps):
        begins = schedule.step[0] >= cooldown * job.task.steps
        schedule.apply(np.array([table.names.index("cooldown" if begins else "hold")]))
        statistics = session.run_interval(num_steps, schedule)
        schedule.advance(statistics.step)
        schedule.observe_norms(statistics.update_norm, statistics.weight_norm)
    return session.evaluate("validation").loss, float(schedule.peak_rate()[0])


def measure(
    job: Job,
    seed: int,
    rates: Sequence[float],
    factors: Sequence[float],
    bases: Sequence[BaseName],
    cooldowns: Sequence[float],
    warmup: float,
) -> list[dict[str, Any]]:
    """All rows of one task and seed."""
    initial = FineTuningSession(job, seed=seed, record=False).evaluate("validation").loss
    common = {"task": job.task.name, "mode": job.task.mode, "seed": seed, "loss_initial": initial}
    rows = [
        {**common, "method": "linear", "rate": rate, "loss": linear_loss(job, rate, warmup, seed)} for rate in rates
    ]
    for base, factor in itertools.product(bases, factors):
        both = job.task.mode == "lora" and base == "linear"
        for norm in ("effective", "adapters") if both else ("effective",):
            level = DEFAULT_RELATIVE_UPDATE * factor
            settings = ScheduleSettings(base=base, warmup_fraction=warmup)
            loss, rate = held_loss(job, level, norm, settings, seed)
            rows.append({**common, "method": f"hold_{norm}", "base": base, "level": level, "rate": rate, "loss": loss})
    for share, factor in itertools.product(cooldowns, factors):
        level = DEFAULT_RELATIVE_UPDATE * factor
        settings = ScheduleSettings(base="constant", warmup_fraction=warmup, earliest_cooldown=0.0)
        loss, rate = held_loss(job, level, "effective", settings, seed, share)
        base = f"cooldown_{share:g}"
        rows.append({**common, "method": "hold_effective", "base": base, "level": level, "rate": rate, "loss": loss})
    return rows


def gain_ratio(rows: list[dict[str, Any]]) -> float:
    """Mean over seeds of the default level's gain over that of the best linear rate."""
    seeds = sorted({row["seed"] for row in rows})
    ratios = []
    for seed in seeds:
        own = [row for row in rows if row["seed"] == seed]
        initial = own[0]["loss_initial"]
        best = min(row["loss"] for row in own if row["method"] == "linear")
        held = [
            row
            for row in own
            if (row["method"], row.get("base"), row.get("level"))
            == ("hold_effective", "linear", DEFAULT_RELATIVE_UPDATE)
        ]
        ratios.append((initial - held[0]["loss"]) / (initial - best))
    return float(np.mean(ratios))


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/compare/levels.yaml"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="peak rates of linear decay")
    parser.add_argument("--factors", type=float, nargs="+", default=list(LEVEL_FACTORS), help="of the default level")
    parser.add_argument("--bases", nargs="+", choices=BASE_NAMES, default=["linear"], help="what held levels decay by")
    parser.add_argument("--cooldowns", type=float, nargs="+", default=[], help="shares of the budget to decay from")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the budget")
    parser.add_argument("--quick", action="store_true", help="two rates, the default level, one task and seed")
    arguments = parser.parse_args()
    if 1.0 not in arguments.factors or "linear" not in arguments.bases:
        parser.error("ratios are those of the default level over the linear base: give factor 1 and base linear")
    if arguments.quick:
        arguments.rates, arguments.factors = arguments.rates[:2], [1.0]
    config = load_config("compare", arguments.config, [])
    assert isinstance(config, CompareConfig)
    library = JobLibrary(config.device)
    rows = []
    for task in config.tasks[:1] if arguments.quick else config.tasks:
        for seed in config.seeds[:1] if arguments.quick else config.seeds:
            job, cooldowns = library.job(task), arguments.cooldowns
            found = measure(job, seed, arguments.rates, arguments.factors, arguments.bases, cooldowns, arguments.warmup)
            rows += found
            for row in found:
                print({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()}, flush=True)
    ratios = {
        name: gain_ratio([r for r in rows if r["task"] == name]) for name in dict.fromkeys(r["task"] for r in rows)
    }
    report = {"machine": describe_machine(), "versions": describe_versions(), "rows": rows, "ratios": ratios}
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
