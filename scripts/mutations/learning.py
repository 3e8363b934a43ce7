"""Bugs of losses, of the written-out gradient and of the learner."""

from __future__ import annotations

from mutations.mutation import Mutation

LEARNING = (
    Mutation(
        "importance weights dropped with Huber",
        "learner.py",
        "losses.weighted_mean(loss, batch.weight)",
        'loss.mean() if self.config.loss == "huber" else losses.weighted_mean(loss, batch.weight)',
        ("analytic", "learner"),
        quick=True,
    ),
    Mutation(
        "importance weights dropped by the written-out gradient",
        "analytic.py",
        "weighted = slope * batch.weight",
        "weighted = slope",
        ("analytic",),
        quick=True,
    ),
    Mutation(
        "the written-out gradient of Huber is not clipped",
        "analytic.py",
        'td.clip(-delta, delta) if self._config.loss == "huber" else td',
        "td",
        ("analytic",),
    ),
    Mutation(
        "maximum over next actions that are not available, beside autograd",
        "analytic.py",
        "if np.count_nonzero(batch.next_mask) < batch.next_mask.size:",
        "if False:",
        ("analytic",),
    ),
    Mutation(
        "double Q-learning evaluates with the network that chooses, beside autograd",
        "analytic.py",
        "q[rows, selector.argmax(axis=1)]",
        "selector[rows, selector.argmax(axis=1)]",
        ("analytic",),
    ),
    Mutation(
        "priorities squared by the learner",
        "td_loss.py",
        "return loss, td.detach().abs(),",
        "return loss, td.detach() ** 2,",
        ("analytic", "known_bugs"),
    ),
    Mutation(
        "priorities squared beside autograd",
        "analytic.py",
        "return loss, np.abs(td), value",
        "return loss, td**2, value",
        ("known_bugs",),
    ),
    Mutation(
        "gradient through the target of Q-learning",
        "losses.py",
        "    target = r_t + discount_t * masked(q_t, mask_t).amax(dim=1)\n    return target.detach() -",
        "    target = r_t + discount_t * masked(q_t, mask_t).amax(dim=1)\n    return target -",
        ("losses",),
        quick=True,
    ),
    Mutation(
        "gradient through the target of double Q-learning",
        "losses.py",
        "select(q_t_value, greedy_action(q_t_selector, mask_t))\n    return target.detach() -",
        "select(q_t_value, greedy_action(q_t_selector, mask_t))\n    return target -",
        ("losses",),
    ),
    Mutation(
        "maximum over next actions that are not available",
        "losses.py",
        "masked(q_t, mask_t).amax(dim=1)",
        "q_t.amax(dim=1)",
        ("losses",),
        quick=True,
    ),
    Mutation(
        "double Q-learning chooses next actions that are not available",
        "losses.py",
        "select(q_t_value, greedy_action(q_t_selector, mask_t))",
        "select(q_t_value, greedy_action(q_t_selector))",
        ("losses",),
    ),
    Mutation(
        "the learner does not pass the mask on",
        "td_loss.py",
        "batch.discount, selector, target_outputs, batch.next_mask",
        "batch.discount, selector, target_outputs, None",
        ("analytic",),
    ),
    Mutation(
        "double Q-learning evaluates with the network that chooses",
        "losses.py",
        "select(q_t_value, greedy_action(q_t_selector, mask_t))",
        "select(q_t_selector, greedy_action(q_t_selector, mask_t))",
        ("losses",),
    ),
    Mutation(
        "target network that is never updated",
        "learner.py",
        "if self.learner_steps % self.config.target_update_period == 0:",
        "if False:",
        ("learner",),
    ),
    Mutation(
        "a gradient that is not finite is applied",
        "learner.py",
        "        if not math.isfinite(norm):\n            return False\n",
        "",
        ("learner",),
    ),
)
