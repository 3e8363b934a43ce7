"""What the default policy is asked for, and how the results of a comparison answer.

`results_table.py` writes the answers into the README. A target that the comparison did not measure (a method, a regime
or a kind of task that is missing) raises `NotMeasuredError` with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.compare.aggregate import aggregate_rows, rows_in
from llmrl.compare.pairs import improvement_matrix, paired_differences

POLICY, HOLD, LINEAR, SEARCH = "policy", "hold", "linear", "search_5"
RIVALS = ("linear", "cosine", "greedy", "plateau", "schedule_free", "prodigy", "zclip")
WRONG = "wrong"

MODEL_PARAMETERS = {"stories260k-hf": 260e3, "stories3m-hf": 3.1e6, "minilm-l6-v8k-hf": 14.1e6}
"""Of the models of configs/compare/validation.yaml, by the name of their folder."""
TRAINED_PARAMETERS = 480e3
"""Of the largest model that the default policy learned from, configs/train/default_experience.yaml."""
TRAINED_STEPS = 120
"""The longest budget there."""
RECIPE_MINUTES = 42.0
"""What scripts/train_default.sh takes on two cores: base models, experience, three networks."""

Results = Mapping[str, Any]
Answer = tuple[str, bool]


class NotMeasuredError(Exception):
    """The comparison lacks what a target is about."""


@dataclass(frozen=True)
class Target:
    """A target: what is asked, and how a comparison answers.

    Attributes:
        asks: In words.
        measure: Gives what was found, in words, and whether that is enough.
    """

    asks: str
    measure: Callable[[Results], Answer]


def interval(told: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval over tasks, with the seeds of each; where there is one task alone, that over its seeds.

    Over tasks is what a claim about other tasks needs, and several times as wide as over seeds within tasks.
    """
    for low, high in (("task_ci_low", "task_ci_high"), ("ci_low", "ci_high")):
        if told.get(low) is not None:
            return told[low], told[high]
    return None


def with_interval(value: float, told: Mapping[str, Any], form: str = ".2f") -> str:
    """A figure and its interval, as far as there is one."""
    bounds = interval(told)
    return f"{value:{form}}" + ("" if bounds is None else f" [{bounds[0]:{form}}, {bounds[1]:{form}}]")


def _at(results: Results, *path: str) -> Any:
    value: Any = results
    for key in path:
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise NotMeasuredError(" ".join(path))
        value = value[key]
    return value


def _bounds(told: Mapping[str, Any]) -> tuple[float, float]:
    bounds = interval(told)
    if bounds is None:
        raise NotMeasuredError("an interval")
    return bounds


# -- wrong and tuned rates ----------------------------------------------------------------------------------------


def _score(told: Mapping[str, Any]) -> Answer:
    score = _at(told, "iqm")
    return with_interval(score, told), score >= 1.0


def _score_at_wrong_rates(results: Results) -> Answer:
    return _score(_at(results, "aggregate", POLICY, WRONG))


def _above(told: Mapping[str, Any], least: float) -> Answer:
    """A paired advantage in score; the low end of its interval has to be above `least`."""
    advantage = _at(told, "iqm")
    return with_interval(_at(advantage, "value"), advantage, "+.3f"), _bounds(advantage)[0] > least


def _advantage(other: str, regime: str, least: float) -> Callable[[Results], Answer]:
    def measure(results: Results) -> Answer:
        return _above(_at(results, "paired", "regimes", regime, other), least)

    return measure


def _hardest(told: Mapping[str, Any]) -> Answer:
    """The rival that the policy improves on least surely."""
    missing = [name for name in RIVALS if name not in told]
    if missing:
        raise NotMeasuredError(", ".join(missing))
    name = min(RIVALS, key=lambda rival: _bounds(told[rival]))
    found = told[name]
    return f"hardest is {name}: {with_interval(found['probability'], found)}", _bounds(found)[0] > 0.75


def _better_than_rivals(results: Results) -> Answer:
    return _hardest(_at(results, "improvement", WRONG, POLICY))


# -- stress -------------------------------------------------------------------------------------------------------


def _fewer_failures(results: Results) -> Answer:
    own, theirs = (_at(results, "aggregate", name, "stress", "failures") for name in (POLICY, "zclip"))
    return f"{own} against {theirs}", 3 * own <= theirs


def _no_worse_than_linear(results: Results) -> Answer:
    worst = _at(results, "paired", "regimes", "stress", LINEAR, "worst")
    return f"{worst:+.3f}", worst >= -0.02


# -- transfer -----------------------------------------------------------------------------------------------------


def _is_larger(task: Mapping[str, Any]) -> bool:
    name = str(task["model"]).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return MODEL_PARAMETERS.get(name, 0.0) >= 3 * TRAINED_PARAMETERS


def _is_longer(task: Mapping[str, Any]) -> bool:
    return bool(task["steps"] >= 3 * TRAINED_STEPS)


def _transfer(belongs: Callable[[Mapping[str, Any]], bool]) -> Callable[[Results], Answer]:
    """All three questions about wrong rates, of some tasks alone."""

    def measure(results: Results) -> Answer:
        names = {task["name"] for task in _at(results, "settings", "tasks") if belongs(task)}
        rows = [row for row in rows_in(results["rows"], WRONG) if row["task"] in names]
        own = [row for row in rows if row["method"] == POLICY]
        if not own:
            raise NotMeasuredError("such tasks")
        methods = [POLICY, HOLD, *RIVALS]
        score, is_high = _score(aggregate_rows(own, rows))
        above, is_above = _above(_at(paired_differences(rows, methods, POLICY), HOLD), 0.0)
        rival, is_better = _hardest(improvement_matrix(rows, methods)[POLICY])
        count = len({row["task"] for row in own})
        told = f"{count} {'task' if count == 1 else 'tasks'}: {score}; above hold {above}; {rival}"
        return told, is_high and is_above and is_better

    return measure


# -- cost ---------------------------------------------------------------------------------------------------------


def _recipe(results: Results) -> Answer:
    """Time of the recipe, and after how many jobs of the comparison's size it has saved that against a search."""
    compute, found = results.get("compute", {}), f"{RECIPE_MINUTES:.0f} minutes"
    search, policy = (compute.get(name, {}).get("seconds_per_job", 0.0) for name in (SEARCH, POLICY))
    if search > policy > 0.0:
        jobs = 2 * 60.0 * RECIPE_MINUTES / (search - policy)
        found += f"; paid back after {jobs:.0f} jobs of {policy:.0f} s on one core that need no search of 5 trials"
    return found, RECIPE_MINUTES < 180.0


def _transfer_targets(kinds: Sequence[tuple[str, Callable[[Mapping[str, Any]], bool]]]) -> tuple[Target, ...]:
    return tuple(Target(f"the first three again: {words}", _transfer(belongs)) for words, belongs in kinds)


TARGETS = (
    Target("wrong rate: score of at least 1.00", _score_at_wrong_rates),
    Target("wrong rate: above hold, interval above zero", _advantage(HOLD, WRONG, 0.0)),
    Target("wrong rate: better than each usual schedule in more than 0.75 of starts (low end)", _better_than_rivals),
    Target("tuned rate: at most 0.01 below linear decay (low end)", _advantage(LINEAR, "tuned", -0.01)),
    Target("wrong rate: not below a search of 5 trials, for a fifth of its compute", _advantage(SEARCH, WRONG, -0.01)),
    Target("stress: at most a third of the failures of ZClip with linear decay", _fewer_failures),
    Target("stress: no run more than 0.02 below linear decay", _no_worse_than_linear),
    *_transfer_targets(
        (
            ("models three times larger than any in training", _is_larger),
            ("budgets three times longer", _is_longer),
            ("LoRA", lambda task: bool(task["mode"] == "lora")),
            ("full fine-tuning", lambda task: bool(task["mode"] == "full")),
        )
    ),
    Target("training recipe under 3 hours of two cores", _recipe),
)
