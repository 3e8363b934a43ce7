"""How many jobs go through the model at once, and what happens when the memory does not suffice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

_Value = TypeVar("_Value")
_UNLIMITED = sys.maxsize
_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory", "out of memory")

logger = logging.getLogger("llmrl.population")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)


class PassWidth:
    """The most jobs of one pass; halved, with a message, when a pass runs out of memory.

    The jobs keep their places and their numbers: they go through the model in more passes. One job that does not fit
    by itself raises.

    Attributes:
        most: Jobs of a pass.
    """

    def __init__(self) -> None:
        self.most = _UNLIMITED

    def ranges(self, num_jobs: int) -> Iterator[tuple[int, int]]:
        """Cuts so many jobs into passes, (first, stop)."""
        for first in range(0, num_jobs, min(self.most, num_jobs)):
            yield first, min(first + self.most, num_jobs)

    def attempt(self, num_jobs: int, run: Callable[[], _Value], undo: Callable[[], None]) -> _Value:
        """Runs something over `num_jobs` jobs, again with fewer at once as long as the memory does not suffice.

        Args:
            num_jobs: Jobs that it is about.
            run: Goes through `ranges(num_jobs)`.
            undo: Takes back what a run that failed has left.
        """
        while True:
            try:
                return run()
            except (RuntimeError, MemoryError) as error:
                width = min(self.most, num_jobs)
                if not is_out_of_memory(error) or width <= 1:
                    raise
            # Outside the handler, whose traceback would keep the pass's tensors alive.
            self.most = width // 2
            undo()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("out of memory with %d jobs in one pass; going on with %d", width, self.most)
