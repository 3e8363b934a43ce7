"""A learning-rate search: several jobs with linear decay, the rate of each proposed by Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llmrl.compare.baselines.packages import require_package
from llmrl.compare.cache import RunResult

SEARCH_RANGE = 30.0
NUM_STARTUP_TRIALS = 3
_WORST = 1e9


def search_learning_rate(
    train: Callable[[float], RunResult], *, learning_rate: float, num_trials: int, seed: int
) -> list[RunResult]:
    """Tries the given rate and then those that the sampler proposes, log-uniform within a factor of 30 of it.

    The proposals follow from the seed and from the validation losses before, so a shorter search is the beginning of a
    longer one. The sampler is Optuna's (Akiba et al. 2019, https://arxiv.org/abs/1907.10902) tree-structured Parzen
    estimator (Bergstra et al. 2011), which here looks at the losses after three trials in place of ten.

    Args:
        train: Trains a job at a rate to the end of its budget.
        learning_rate: The given rate, tried first.
        num_trials: Jobs.
        seed: Of the sampler.
    """
    optuna = require_package("optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=NUM_STARTUP_TRIALS)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({"factor": 1.0})
    results = []
    for _ in range(num_trials):
        trial = study.ask()
        factor = trial.suggest_float("factor", 1.0 / SEARCH_RANGE, SEARCH_RANGE, log=True)
        results.append(train(learning_rate * factor))
        study.tell(trial, min(validation_loss(results[-1]), _WORST))
    return results


def validation_loss(result: RunResult) -> float:
    """Validation loss of the deployed weights, the end of the curve; infinite where it is not finite."""
    loss = result.curve[-1].loss_validation
    return math.inf if loss is None else loss


def combine_trials(trials: Sequence[RunResult], chosen: int) -> RunResult:
    """The result of one trial with the compute of all.

    Choosing needs every trial's validation loss at the end, so that one evaluation of each counts as the method's own.

    Args:
        trials: Finished jobs with curves.
        chosen: Which of them is deployed.
    """
    peaks = [trial.peak_memory_bytes for trial in trials if trial.peak_memory_bytes is not None]
    choosing = sum(trial.tokens_measured // len(trial.curve) for trial in trials)
    return trials[chosen].model_copy(
        update={
            "seconds": sum(trial.seconds for trial in trials),
            "tokens_trained": sum(trial.tokens_trained for trial in trials),
            "tokens_evaluated": sum(trial.tokens_evaluated for trial in trials) + choosing,
            "tokens_measured": sum(trial.tokens_measured for trial in trials) - choosing,
            "peak_memory_bytes": max(peaks, default=None),
            "num_trials": len(trials),
            "events": {name: sum(trial.events[name] for trial in trials) for name in trials[chosen].events},
        }
    )


def best_trial(trials: Sequence[RunResult]) -> int:
    """The trial of the lowest validation loss, the first of equals."""
    return min(range(len(trials)), key=lambda index: validation_loss(trials[index]))
