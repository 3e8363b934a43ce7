"""All parameters of a network in one vector.

The optimizer, the gradient norm and the averaged target network then take one operation each instead of one per
layer. On networks of two layers of 128 those operations are mostly call overhead, so this is where time goes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrl.dqn.networks import decayed_parameters


class FlatParameters:
    """Moves a network's parameters and gradients into two vectors; the network keeps working on views of them.

    Args:
        network: The network, on its final device.

    Attributes:
        values: [P] parameters; also the leaf that an optimizer steps.
        gradient: [P] gradients of `backward`.
        decay_mask: [P] 1 where weight decay applies.
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = list(network.parameters())
        self.values = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self.gradient = torch.zeros_like(self.values)
        self.values.grad = self.gradient
        self.decay_mask = torch.cat(
            [torch.full_like(p.detach(), float(decays)).reshape(-1) for p, decays in decayed_parameters(network)]
        )
        offset = 0
        for parameter in parameters:
            piece = slice(offset, offset + parameter.numel())
            parameter.data = self.values[piece].view_as(parameter)
            parameter.grad = self.gradient[piece].view_as(parameter)
            offset += parameter.numel()


def update_target(
    target: Tensor,  # [P]
    online: Tensor,  # [P]
    share: float,
) -> None:
    """target += share * (online - target), in place; a share of 1 copies exactly.

    Lillicrap et al. 2016, https://arxiv.org/abs/1509.02971
    """
    if share == 1.0:
        target.copy_(online)
    else:
        target.lerp_(online, share)
