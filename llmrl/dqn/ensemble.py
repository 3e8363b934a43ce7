"""Several Q-networks that choose together: by the mean of their values, or by a lower bound of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llmrl.dqn.ensemble_config import EnsembleConfig, member_tensors
from llmrl.dqn.networks import QNetwork


class EnsembleNetwork(nn.Module):
    """Q-networks of one shape, each learned by itself (other initial weights, exploration and samples).

    Where members agree an action's value is their mean; `lower_bound` standard deviations are taken off where they do
    not, so that what only some of them promise counts for less. Lakshminarayanan et al. 2017,
    https://arxiv.org/abs/1612.01474, for members that are independent; acting on a lower bound: Lan et al. 2020 (their
    minimum over members), https://arxiv.org/abs/2002.06487.

    Args:
        config: Shape of the ensemble.
        members: Its networks; None makes them, with weights that mean nothing.

    Raises:
        ValueError: Their number or shape is not that of `config`.
    """

    def __init__(self, config: EnsembleConfig, members: Sequence[QNetwork] | None = None) -> None:
        super().__init__()
        shape = config.member
        if members is None:
            members = [QNetwork(shape, torch.Generator()) for _ in range(config.num_members)]
        if len(members) != config.num_members or any(member.config != shape for member in members):
            raise ValueError(f"members: expected {config.num_members} networks of the same shape, got {len(members)}")
        self.config = config
        self.members = nn.ModuleList(members)
        self._networks = tuple(members)  # the same, with their type

    def forward(self, obs: Tensor) -> Tensor:
        """Values by each member, [B, A, K], for obs [B, *obs_shape]."""
        return torch.stack([member.values(member.forward(obs)) for member in self._networks], dim=2)

    def values(self, outputs: Tensor) -> Tensor:
        """Action values [B, A] that actions are chosen by."""
        mean = outputs.mean(dim=2)
        if self.config.lower_bound == 0.0:
            return mean
        return mean - self.config.lower_bound * outputs.std(dim=2)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies a state dict into the members.

        Raises:
            ValueError: Names, shapes or dtypes are not theirs.
        """
        for index, member in enumerate(self._networks):
            member.load_weights(member_tensors(tensors, index))


def join_networks(networks: Sequence[QNetwork], lower_bound: float) -> EnsembleNetwork:
    """An ensemble of networks, which it goes on using.

    Args:
        networks: Two or more of one shape.
        lower_bound: Standard deviations below the mean.

    Raises:
        ValueError: There are fewer, or their shapes differ.
    """
    if len(networks) < 2:
        raise ValueError(f"networks: expected at least two, got {len(networks)}")
    shape = networks[0].config
    config = EnsembleConfig(**shape.model_dump(), num_members=len(networks), lower_bound=lower_bound)
    return EnsembleNetwork(config, networks)
