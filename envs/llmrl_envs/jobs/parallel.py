"""How a session shares one job among processes; a job alone in its process is the plain case."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn


class ParallelContext(Protocol):
    """The processes that train one model together. Every process sees the whole batch plan and takes its share."""

    @property
    def rank(self) -> int:
        """This process's index."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def sharded(self) -> bool:
        """Whether a process holds a part of the weights only, so that all must take part in every forward pass."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wraps the model so that its gradients are averaged over the processes."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Context of one backward pass; gradients travel between processes only in the step's last one."""


class SingleProcess:
    """A job that is alone in its process."""

    rank = 0
    world_size = 1
    sharded = False

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        return tensor

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """No context."""
        return nullcontext()
