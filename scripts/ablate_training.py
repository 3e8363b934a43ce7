#!/usr/bin/env python
"""One change of a policy's training at a time: what reward, returns, actions and schedule are worth.

    python scripts/ablate_training.py --config configs/train/quickstart.yaml --seeds 3 --output ablation

Each row is `llmrl train` with the configuration and one change, from the same seeds, judged by its greedy policy: score
on sixteen jobs that are the same in all rows, the improvement of the validation loss over that of linear decay from the
default rate. Holding is scored beside it. A row with a first stage begins with what a training on noisy quadratics saw;
an ensemble joins the base's policies of three seeds. Differences to the base are taken seed by seed. Runs lie in the
output directory and are not repeated, nor is what an interrupted one has done. `ablation.json` there holds {config,
first_seed, rows} with rows as those of `ablate_dqn.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_dqn import summary, table

from llmrl.config import TrainConfig
from llmrl.config_loading import load_config
from llmrl.policy_ensemble import ensemble_policy
from llmrl.training.evaluation import evaluate_policy

JOBS = ("env.population=16", "training.evaluation_period_episodes=0", "training.evaluation_episodes=16",
        "tracking.wandb=disabled")  # fmt: skip
GRADIENTS = "gradient_*,clipped_share,skipped_share,momentum_cosine,log10_signal_to_noise"
STANDARDISED = "agent.normalize_obs=true"
ROWS: dict[str, tuple[str, ...]] = {
    "base": (),
    "loss of averaged weights, half an interval": ("env.reward.average_intervals=0.5",),
    "loss of averaged weights, one interval": ("env.reward.average_intervals=1.0",),
    "no reference in the reward": ("env.reward.baseline=none",),
    "no cost of a switch": ("env.reward.switch_cost=0.0",),
    "n_step 1": ("agent.n_step=1",),
    "Monte-Carlo returns": ("agent.n_step=12",),
    "myopic (gamma 0)": ("agent.gamma=0.0", "agent.n_step=1"),
    "fine moves": ("env.actions=careful", "agent.default_action=3"),
    "moves and update choices": ("env.actions=moves",),
    "moves with update choices, jointly": ("env.actions=joint",),
    "absolute levels": ("env.actions=levels", "agent.default_action=4"),
    "factors on the given rate": ("env.actions=factors", "agent.default_action=3"),
    "constant base": ("env.schedule.base=constant",),
    "cosine base": ("env.schedule.base=cosine",),
    "start at the given rate": ("env.schedule.start=given",),
    "level final after 15 %": ("env.schedule.cooldown_progress=0.15",),
    "one decision seen": ("env.observation.stack=1",),
    "24 demonstrations": ("training.demonstrations=24",),
    "no margin": ("agent.default_action_margin=0.0",),
    "quantile head": ("agent.head=quantile",),
    "quantile head, lower half": ("agent.head=quantile", "agent.cvar_level=0.5"),
    "standardised observations": (STANDARDISED,),
    "the same, no losses seen": (STANDARDISED, "agent.ignored_features=[loss_*]"),
    "the same, no gradients seen": (STANDARDISED, f"agent.ignored_features=[{GRADIENTS}]"),
    "the same, no measurements seen": (STANDARDISED, f"agent.ignored_features=[loss_*,log10_step_size,{GRADIENTS}]"),
    "groups of eight jobs": ("env.groups=8",),
    "one data order": ("env.tasks.num_seeds=1",),
    "about 5 decisions": ("env.schedule.decisions_per_job=5",),
    "no early decisions": ("env.schedule.early_decisions=false",),
    "about 5 decisions, none early": ("env.schedule.decisions_per_job=5", "env.schedule.early_decisions=false"),
}  # fmt: skip
FIRST_STAGE = Path(__file__).parents[1] / "configs" / "train" / "quadratics.yaml"
PRETRAINING = "agent.pretrain_updates=4800"
FIRST_STAGES: dict[str, tuple[str, ...]] = {
    "noisy quadratics first, 1,200 decisions": (),
    "noisy quadratics first, 6,000 decisions": ("training.decisions=6000",),
}
"""Rows that begin with the experience of a training by FIRST_STAGE with these changes."""
ENSEMBLES = {
    "three networks, their mean": 0.0,
    "three networks, half a deviation below": 0.5,
    "three networks, one deviation below": 1.0,
}
"""Rows of the base's policies together: standard deviations below their mean."""
MEMBER_SEEDS = (0, 1000, 2000)
"""Added to a seed for the members of its ensemble; the first one is the base's own run."""


@dataclass(frozen=True)
class Ablation:
    """Where runs lie and what they are made from.

    Attributes:
        config: The base configuration.
        output: Directory of the runs.
    """

    config: Path
    output: Path

    def row(self, name: str, seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Score of a row's greedy policy, and the changes that make the row."""
        if name in ENSEMBLES:
            return self._ensemble(ENSEMBLES[name], seed), (f"lower_bound={ENSEMBLES[name]:g}",)
        place = [*ROWS, *FIRST_STAGES].index(name)
        folder = self.output / f"{place}-{seed}"
        if name in ROWS:
            return train(self.config, folder, seed, (*JOBS, *ROWS[name])), ROWS[name]
        first = self.output / f"{place}-{seed}-first"
        train(FIRST_STAGE, first, seed, ("tracking.wandb=disabled", *FIRST_STAGES[name]))
        changes = (f"agent.experience=[{first}]", PRETRAINING)
        return train(self.config, folder, seed, (*JOBS, *changes)), (*FIRST_STAGES[name], PRETRAINING)

    def _ensemble(self, lower_bound: float, seed: int) -> dict[str, Any]:
        folders = [self.output / f"0-{seed + more}" for more in MEMBER_SEEDS]
        members = [
            train(self.config, folder, seed + more, (*JOBS, *ROWS["base"]))
            for folder, more in zip(folders, MEMBER_SEEDS, strict=True)
        ]
        config = load_config("train", self.config, [f"seed={seed}", *JOBS])
        assert isinstance(config, TrainConfig)
        policy = ensemble_policy([str(folder / "policy") for folder in folders], lower_bound)
        found = evaluate_policy(config, policy)
        return {"return": found.score, "hold": members[0]["hold"], "diverged": found.diverged}


def train(config: Path, folder: Path, seed: int, changes: tuple[str, ...]) -> dict[str, Any]:
    """One run, or what is left of it: its greedy policy's score."""
    results = folder / "policy" / "config.json"
    if not results.is_file():
        command = [sys.executable, "-m", "llmrl", "train", "--config", str(config), "--output", str(folder)]
        resume = ["--resume"] if folder.is_dir() else []
        done = subprocess.run(
            [*command, *resume, f"seed={seed}", *changes],
            check=False,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            sys.exit(done.returncode)  # it has said what was wrong
    found = json.loads(results.read_text(encoding="utf-8"))["provenance"]["results"]
    return {"return": found["score"], "hold": found["hold_score"], "diverged": found["diverged"]}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/train/quickstart.yaml"))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds count from here")
    names = [*ROWS, *FIRST_STAGES, *ENSEMBLES]
    parser.add_argument("--only", nargs="*", choices=sorted(names), metavar="NAME", help="these rows, and the base")
    parser.add_argument("--output", type=Path, required=True, help="directory")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"expected at least one seed, got {options.seeds}")
    report: dict[str, Any] = {"config": str(options.config), "first_seed": options.first_seed, "rows": []}
    ablation = Ablation(options.config, options.output)
    for name in names:
        if options.only and name not in ("base", *options.only):
            continue
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        found = [ablation.row(name, seed) for seed in seeds]
        runs, changes = [run for run, _ in found], found[0][1]
        base = report["rows"][0]["returns"] if report["rows"] else [run["return"] for run in runs]
        report["rows"].append(summary(name, {"overrides": list(changes)}, runs, base))
        print(json.dumps(report["rows"][-1]), flush=True)
        text = json.dumps(report, indent=1) + "\n"
        (options.output / "ablation.json").write_text(text, encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
