"""The bugs that `check_mutations.py` puts in: each shipped in a well-known DQN library, or is a close relative."""

from __future__ import annotations

from mutations.acting import ACTING
from mutations.learning import LEARNING
from mutations.mutation import Mutation
from mutations.replay import REPLAY

MUTATIONS: tuple[Mutation, ...] = (*ACTING, *REPLAY, *LEARNING)

__all__ = ["MUTATIONS", "Mutation"]
