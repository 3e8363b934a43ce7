"""Value distributions: C51, quantile regression, and the lower tail to act on.

Shape letters: B batch, A actions, K atoms or quantiles. The notation is that of `losses.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_categorical(
    atoms: Tensor,  # [K] ascending, equally spaced
    r_t: Tensor,  # [B] n-step reward
    discount_t: Tensor,  # [B] gamma**n, 0 after termination
    probabilities_t: Tensor,  # [B, K] at s_t
) -> Tensor:  # [B, K]
    """Distribution of `r_t + discount_t * Z_t`, projected on the atoms so that each mass goes to its two neighbours.

    p[i] = sum_j probabilities_t[j] * max(0, 1 - |clip(r_t + discount_t atoms[j], v_min, v_max) - atoms[i]| / spacing)

    Bellemare et al. 2017, https://arxiv.org/abs/1707.06887
    """
    spacing = atoms[1] - atoms[0]
    shifted = (r_t.unsqueeze(1) + discount_t.unsqueeze(1) * atoms).clamp(atoms[0], atoms[-1])  # [B, K]
    distance = (shifted.unsqueeze(1) - atoms.view(1, -1, 1)).abs() / spacing  # [B, K, K]
    return ((1.0 - distance).clamp(min=0.0) * probabilities_t.unsqueeze(1)).sum(dim=2)


def categorical_td_loss(
    logits_tm1: Tensor,  # [B, K] of the action taken
    atoms: Tensor,  # [K]
    r_t: Tensor,  # [B]
    discount_t: Tensor,  # [B]
    probabilities_t: Tensor,  # [B, K] target network, of the action chosen at s_t
) -> Tensor:  # [B]
    """Cross-entropy from the projected target to the predicted distribution; no gradient through the target.

    Bellemare et al. 2017, https://arxiv.org/abs/1707.06887
    """
    target = project_categorical(atoms, r_t, discount_t, probabilities_t).detach()
    return -(target * torch.log_softmax(logits_tm1, dim=1)).sum(dim=1)


def quantile_midpoints(
    num_quantiles: int,
    device: torch.device | None = None,
) -> Tensor:  # [K]
    """`(i + 1/2) / K`, the probabilities that K quantiles stand for."""
    return (torch.arange(num_quantiles, device=device) + 0.5) / num_quantiles


def quantile_td_loss(
    quantiles_tm1: Tensor,  # [B, K] of the action taken
    midpoints: Tensor,  # [K]
    r_t: Tensor,  # [B]
    discount_t: Tensor,  # [B]
    quantiles_t: Tensor,  # [B, K] target network, of the action chosen at s_t
    delta: float = 1.0,
) -> Tensor:  # [B]
    """Quantile Huber loss; no gradient through the target.

    With u = r_t + discount_t quantiles_t[j] - quantiles_tm1[i]:
    sum_i mean_j |midpoints[i] - 1(u < 0)| huber(u, delta) / delta

    Dabney et al. 2018, https://arxiv.org/abs/1710.10044
    """
    target = (r_t.unsqueeze(1) + discount_t.unsqueeze(1) * quantiles_t).detach()
    u = target.unsqueeze(1) - quantiles_tm1.unsqueeze(2)  # [B, K of tm1, K of t]
    side = (midpoints.view(1, -1, 1) - (u.detach() < 0).to(u.dtype)).abs()
    size = u.abs()
    inside = size.clamp(max=delta)
    return (side * inside * (size - 0.5 * inside) / delta).mean(dim=2).sum(dim=1)


def quantile_lower_mean(
    quantiles: Tensor,  # [..., K] in any order
    level: float,
) -> Tensor:  # [...]
    """Conditional value at risk: the mean of the lowest share `level` of the returns; 1 is the plain mean.

    Each quantile stands for a mass of 1/K; the last one counted enters with the mass that is left.

    Dabney et al. 2018, https://arxiv.org/abs/1806.06923
    """
    if level >= 1.0:
        return quantiles.mean(dim=-1)
    num_quantiles = quantiles.shape[-1]
    edges = torch.arange(num_quantiles, device=quantiles.device, dtype=quantiles.dtype) / num_quantiles
    mass = (level - edges).clamp(0.0, 1.0 / num_quantiles)
    return (quantiles.sort(dim=-1).values * mass).sum(dim=-1) / level


def categorical_lower_mean(
    probabilities: Tensor,  # [..., K]
    atoms: Tensor,  # [K] ascending
    level: float,
) -> Tensor:  # [...]
    """Conditional value at risk of a distribution on atoms; `level` 1 is the plain mean.

    Dabney et al. 2018, https://arxiv.org/abs/1806.06923
    """
    if level >= 1.0:
        return (probabilities * atoms).sum(dim=-1)
    below = probabilities.cumsum(dim=-1) - probabilities
    mass = torch.minimum(probabilities, (level - below).clamp(min=0.0))
    return (mass * atoms).sum(dim=-1) / level
