"""Names of the methods that a comparison knows, and what each costs; imports neither torch nor transformers."""

from __future__ import annotations

from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.base_schedule import BASE_NAMES

from llmrl.policy_reference import DEFAULT, HOLD

POLICY, LINEAR, RANDOM, BEST_CONSTANT = "policy", "linear", "random", "best_constant"
HOLD_LEAN = "hold_lean"

SCHEDULE_NAMES: tuple[str, ...] = (*BASE_NAMES, "constant_warmup")
"""Schedules of the given rate that are functions of the step."""

BASELINE_NAMES = ("plateau", "greedy", "greedy_bounded", "hypergradient", "schedule_free", "prodigy", "zclip")
"""Published methods that are no function of the step alone."""

SEARCH_TRIALS = {"search_2": 2, "search_5": 5, "search_10": 10}
POPULATION_MEMBERS = {"pbt_4": 4}

NUM_LEVELS = len(action_table("moves").levels)
NUM_JOBS = {**SEARCH_TRIALS, **POPULATION_MEMBERS, BEST_CONSTANT: NUM_LEVELS}
"""Jobs that one result takes, where it is more than one."""

ALWAYS_RATE_INDEPENDENT = frozenset({BEST_CONSTANT, "prodigy"})
"""Methods that have no use for the given rate."""

POLICY_NAMES = (POLICY, HOLD, DEFAULT, RANDOM, HOLD_LEAN)
"""Policies that have names. They have no use for the given rate either, if their level starts at its default."""

METHOD_NAMES = (
    *POLICY_NAMES, BEST_CONSTANT, *SCHEDULE_NAMES, *BASELINE_NAMES, *SEARCH_TRIALS, *POPULATION_MEMBERS,
)  # fmt: skip
"""Methods of a comparison that have names; any other is the reference of a policy."""
