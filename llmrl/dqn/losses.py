"""Losses of DQN as pure functions, in the notation of the papers.

`s_tm1` is the state acted in, `s_t` the state `n` steps later. The discount carries termination: `discount_t` is
`gamma**n`, and 0 where the episode terminated in between, so that no function needs to know about episode ends.
Actions whose entry in a mask is False are never chosen and never bootstrapped from.

Shape letters: B batch, A actions. Value distributions are in `distributional.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked(
    q: Tensor,  # [B, A]
    mask: Tensor | None,  # [B, A] bool, True = available
) -> Tensor:  # [B, A]
    """Action values with -inf where an action is not available."""
    return q if mask is None else q.masked_fill(~mask, -torch.inf)


def greedy_action(
    q: Tensor,  # [B, A]
    mask: Tensor | None = None,  # [B, A] bool
) -> Tensor:  # [B] int64
    """The first available action of highest value."""
    return masked(q, mask).argmax(dim=1)


def select(
    values: Tensor,  # [B, A] or [B, A, K]
    action: Tensor,  # [B] int64
) -> Tensor:  # [B] or [B, K]
    """The entries of the given actions."""
    if values.dim() == 2:
        return values.gather(1, action.unsqueeze(1)).squeeze(1)
    index = action.view(-1, 1, 1).expand(-1, 1, values.shape[2])
    return values.gather(1, index).squeeze(1)


def q_learning_td_error(
    q_tm1: Tensor,  # [B, A]
    a_tm1: Tensor,  # [B] int64
    r_t: Tensor,  # [B] n-step reward
    discount_t: Tensor,  # [B] gamma**n, 0 after termination
    q_t: Tensor,  # [B, A] target network at s_t
    mask_t: Tensor | None = None,  # [B, A] bool
) -> Tensor:  # [B]
    """TD error of Q-learning; no gradient flows through the target.

    td = r_t + discount_t * max_a q_t[a] - q_tm1[a_tm1]

    Mnih et al. 2015, https://www.nature.com/articles/nature14236
    """
    target = r_t + discount_t * masked(q_t, mask_t).amax(dim=1)
    return target.detach() - select(q_tm1, a_tm1)


def double_q_td_error(
    q_tm1: Tensor,  # [B, A]
    a_tm1: Tensor,  # [B] int64
    r_t: Tensor,  # [B] n-step reward
    discount_t: Tensor,  # [B] gamma**n, 0 after termination
    q_t_selector: Tensor,  # [B, A] online network at s_t
    q_t_value: Tensor,  # [B, A] target network at s_t
    mask_t: Tensor | None = None,  # [B, A] bool
) -> Tensor:  # [B]
    """TD error of double Q-learning; no gradient flows through the target.

    td = r_t + discount_t * q_t_value[argmax_a q_t_selector[a]] - q_tm1[a_tm1]

    van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461
    """
    target = r_t + discount_t * select(q_t_value, greedy_action(q_t_selector, mask_t))
    return target.detach() - select(q_tm1, a_tm1)


def log_policy(
    q: Tensor,  # [B, A]
    temperature: float,
    mask: Tensor | None = None,  # [B, A] bool
) -> Tensor:  # [B, A]
    """`temperature * log softmax(q / temperature)`, -inf where an action is not available."""
    return temperature * torch.log_softmax(masked(q, mask) / temperature, dim=1)


def munchausen_td_error(
    q_tm1: Tensor,  # [B, A]
    a_tm1: Tensor,  # [B] int64
    r_t: Tensor,  # [B] n-step reward
    discount_t: Tensor,  # [B] gamma**n, 0 after termination
    q_tm1_target: Tensor,  # [B, A] target network at s_tm1
    q_t_target: Tensor,  # [B, A] target network at s_t
    temperature: float,
    scale: float,
    clip: float,
    mask_tm1: Tensor | None = None,  # [B, A] bool
    mask_t: Tensor | None = None,  # [B, A] bool
) -> Tensor:  # [B]
    """TD error of Munchausen DQN; no gradient flows through the target.

    With pi = softmax(q_target / temperature):

    td = r_t + scale * clip(temperature * log pi(a_tm1 | s_tm1), clip, 0)
         + discount_t * sum_a pi(a | s_t) (q_t_target[a] - temperature * log pi(a | s_t)) - q_tm1[a_tm1]

    With n-step rewards the log-policy of the first action only is added.

    Vieillard et al. 2020, https://arxiv.org/abs/2007.14430
    """
    bonus = scale * select(log_policy(q_tm1_target, temperature, mask_tm1), a_tm1).clamp(clip, 0.0)
    # sum_a pi (q - tau log pi) is tau logsumexp(q / tau): exact, and finite where an action is not available.
    soft_value = temperature * torch.logsumexp(masked(q_t_target, mask_t) / temperature, dim=1)
    return (r_t + bonus + discount_t * soft_value).detach() - select(q_tm1, a_tm1)


def huber(
    td_error: Tensor,  # any shape
    delta: float = 1.0,
) -> Tensor:  # same shape
    """`x**2 / 2` up to `delta`, `delta * (|x| - delta / 2)` beyond.

    Huber 1964, https://doi.org/10.1214/aoms/1177703732; its gradient is the clipped TD error of Mnih et al. 2015.
    """
    return F.huber_loss(td_error, torch.zeros_like(td_error), reduction="none", delta=delta)


def squared(
    td_error: Tensor,  # any shape
) -> Tensor:  # same shape
    """`x**2 / 2`, so that the gradient is the TD error itself."""
    return 0.5 * td_error * td_error


def weighted_mean(
    loss: Tensor,  # [B]
    weight: Tensor,  # [B] importance weights, 1 under uniform sampling
) -> Tensor:  # []
    """`mean(weight * loss)`: importance weights apply to every kind of loss.

    Schaul et al. 2016, https://arxiv.org/abs/1511.05952
    """
    return (weight * loss).mean()


def conservative_penalty(
    q_tm1: Tensor,  # [B, A]
    a_tm1: Tensor,  # [B] int64, the logged actions
    mask_tm1: Tensor | None = None,  # [B, A] bool
) -> Tensor:  # [B]
    """`logsumexp_a q_tm1 - q_tm1[a_tm1]`: pushes down the values of actions that the log does not hold.

    Kumar et al. 2020, https://arxiv.org/abs/2006.04779
    """
    return torch.logsumexp(masked(q_tm1, mask_tm1), dim=1) - select(q_tm1, a_tm1)
