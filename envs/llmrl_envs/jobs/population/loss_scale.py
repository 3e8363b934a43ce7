"""Loss scales for float16, one for each job: a job whose gradients overflow halves its own scale and no other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrl_envs.jobs.population.stack import grown

_INITIAL, _GROWTH, _BACKOFF, _PERIOD = 65536.0, 2.0, 0.5, 2000


class LossScales:
    """Scales of C jobs, with the constants of `torch.amp.GradScaler`.

    Args:
        device: Where the jobs are.
        enabled: Whether losses are scaled at all.

    Attributes:
        state: float32[C, 2], the scale and the steps since it changed.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.state = torch.zeros(0, 2, device=device)

    def reserve(self, capacity: int) -> None:
        """Makes room for at least so many rows."""
        if capacity > len(self.state):
            self.state = grown(self.state, capacity)

    def begin(self, row: int) -> None:
        """A job's first scale."""
        self.state[row] = torch.tensor([_INITIAL, 0.0], device=self.state.device)

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Copies the rows `sources` to `targets`."""
        self.state[targets] = self.state[sources]

    def scale(self, losses: Tensor, start: int, stop: int) -> Tensor:
        """The losses float32[M] of rows to run backward from."""
        return losses * self.state[start:stop, 0] if self.enabled else losses

    def unscale(self, gradients: Tensor, start: int, stop: int) -> None:
        """Takes the scales out of the rows' gradients."""
        if self.enabled:
            gradients[start:stop] /= self.state[start:stop, :1]

    def update(self, finite: Tensor, start: int, stop: int) -> None:
        """Takes in whether the rows' gradients were finite, bool[M]."""
        if not self.enabled:
            return
        scale, steps = self.state[start:stop].unbind(dim=1)
        grows = finite & (steps + 1 >= _PERIOD)
        factor = torch.where(finite, torch.where(grows, _GROWTH, 1.0), _BACKOFF)
        self.state[start:stop, 1] = torch.where(finite & ~grows, steps + 1, 0.0)
        self.state[start:stop, 0] = scale * factor
