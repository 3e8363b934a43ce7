"""The processes that train one model together, through torch.distributed; a job alone in its process is the plain case.

Whatever decides is made identical: sums are taken over all processes and then the first one's bits are used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The default process group, or this process alone where there is none.

    Args:
        device: Where tensors that travel must lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        joined = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if joined else 1
        self.rank = dist.get_rank() if joined else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes, the same bits on each."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        dist.broadcast(total, src=0)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Elementwise mean over the processes, the same bits on each."""
        return self.sum(tensor) / self.world_size if self.world_size > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor [P, ..], by rank; on the device that the own one is on."""
        if self.world_size == 1:
            return tensor[None]
        own = tensor.to(self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own)
        return torch.stack(gathered).to(tensor.device)

    def agree(self, action: int) -> int:
        """The first process's action, on every process."""
        if self.world_size == 1:
            return action
        value = torch.tensor([action], dtype=torch.int64, device=self.device)
        dist.broadcast(value, src=0)
        return int(value.item())
