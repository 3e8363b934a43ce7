"""From a batch and two networks to the loss of every transition: which of the pure losses, on which outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmrl.dqn import distributional, losses
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.networks import QNetwork
from llmrl.dqn.replay import Batch


class TensorBatch(NamedTuple):
    """A batch on the learner's device."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor
    mask: Tensor
    next_mask: Tensor
    weight: Tensor

    @classmethod
    def from_numpy(cls, batch: Batch, device: torch.device) -> TensorBatch:
        """Wraps the arrays without a copy on the CPU, copies them elsewhere."""
        tensors = (torch.from_numpy(getattr(batch, name)) for name in cls._fields)
        if device.type == "cpu":
            return cls(*tensors)
        return cls(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def elementwise_loss(
    config: DQNConfig, online: QNetwork, target: QNetwork, batch: TensorBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [B], priority [B] and value of the action taken [B]; gradients flow through `online(batch.obs)` alone."""
    outputs = online(batch.obs)
    if config.head != "expected":
        return _distribution_loss(config, online, target, batch, outputs)
    td = td_error(config, online, target, batch, outputs)
    loss = losses.huber(td, config.huber_delta) if config.loss == "huber" else losses.squared(td)
    if config.conservative_weight:
        loss = loss + config.conservative_weight * losses.conservative_penalty(outputs, batch.action, batch.mask)
    return loss, td.detach().abs(), losses.select(outputs.detach(), batch.action)


def td_error(
    config: DQNConfig,
    online: QNetwork,
    target: QNetwork,
    batch: TensorBatch,
    outputs: Tensor,  # [B, A] online(batch.obs)
) -> Tensor:  # [B]
    """TD error of the expected head; gradients flow through `outputs` alone."""
    with torch.no_grad():
        target_outputs = target.forward(batch.next_obs)
        selector = online.forward(batch.next_obs) if config.double and not config.munchausen else None
        previous = target.forward(batch.obs) if config.munchausen else None
    if previous is not None:
        return losses.munchausen_td_error(
            outputs, batch.action, batch.reward, batch.discount, previous, target_outputs,
            config.munchausen_temperature, config.munchausen_scale, config.munchausen_clip, batch.mask, batch.next_mask,
        )  # fmt: skip
    if selector is not None:
        return losses.double_q_td_error(
            outputs, batch.action, batch.reward, batch.discount, selector, target_outputs, batch.next_mask
        )
    return losses.q_learning_td_error(
        outputs, batch.action, batch.reward, batch.discount, target_outputs, batch.next_mask
    )


def _distribution_loss(
    config: DQNConfig, online: QNetwork, target: QNetwork, batch: TensorBatch, outputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`elementwise_loss` of the categorical and the quantile head; outputs are [B, A, K]."""
    with torch.no_grad():
        target_outputs = target.forward(batch.next_obs)
        selector = online.forward(batch.next_obs) if config.double else target_outputs
        next_action = losses.greedy_action(online.values(selector), batch.next_mask)
        next_distribution = losses.select(target_outputs, next_action)
        values = online.values(outputs)
    taken = losses.select(outputs, batch.action)
    if config.head == "categorical":
        probabilities = torch.softmax(next_distribution, dim=1)
        loss = distributional.categorical_td_loss(taken, online.atoms, batch.reward, batch.discount, probabilities)
    else:
        midpoints = distributional.quantile_midpoints(config.num_quantiles, outputs.device)
        loss = distributional.quantile_td_loss(
            taken, midpoints, batch.reward, batch.discount, next_distribution, config.huber_delta
        )
    priority = loss.detach()
    if config.conservative_weight:
        expected = online.values(outputs)
        loss = loss + config.conservative_weight * losses.conservative_penalty(expected, batch.action, batch.mask)
    return loss, priority, losses.select(values, batch.action)
