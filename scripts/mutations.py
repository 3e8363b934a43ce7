"""The bugs that `check_mutations.py` puts in: each shipped in a well-known DQN library, or is a close relative."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug: a text of one file, what it becomes, and the test files that are to notice."""

    name: str
    file: str  # in llmrl/dqn
    old: str
    new: str
    tests: tuple[str, ...]  # tests/llmrl/dqn/test_NAME.py
    quick: bool = False


MUTATIONS = (
    Mutation(
        "epsilon stuck at its end value",
        "exploration.py",
        "return linear(self.start, self.end, env_steps, self.decay_steps)",
        "return self.end",
        ("exploration",),
        quick=True,
    ),
    Mutation(
        "epsilon stuck at its start value",
        "agent.py",
        "self.exploration.choose(mask, self.env_steps)",
        "self.exploration.choose(mask, 0)",
        ("known_bugs",),
    ),
    Mutation(
        "n-step returns run across truncations",
        "replay_rows.py",
        "self.open[lanes] = ~(t.terminated | t.truncated)",
        "self.open[lanes] = ~t.terminated",
        ("n_step",),
        quick=True,
    ),
    Mutation(
        "n-step returns run across terminations",
        "replay_rows.py",
        "self.open[lanes] = ~(t.terminated | t.truncated)",
        "self.open[lanes] = ~t.truncated",
        ("n_step",),
    ),
    Mutation(
        "n-step returns run over the write head",
        "replay_rows.py",
        "self.episode[lanes])\n        self.stop[slots] = True",
        "self.episode[lanes])\n        self.stop[slots] = False",
        ("n_step",),
    ),
    Mutation(
        "n-step returns of lanes in step run across truncations",
        "replay_rows.py",
        "np.logical_not(t.terminated | t.truncated, out=self.open)",
        "np.logical_not(t.terminated, out=self.open)",
        ("n_step", "replay"),
    ),
    Mutation(
        "n-step returns of lanes in step run over the write head",
        "replay_rows.py",
        "self.stop[first : first + num_envs] = True",
        "self.stop[first : first + num_envs] = False",
        ("n_step", "replay"),
    ),
    Mutation(
        "n-step returns run into another environment's lane",
        "n_step.py",
        "start[:, None] + num_envs * np.arange(n_step)",
        "start[:, None] + np.arange(n_step)",
        ("n_step",),
    ),
    Mutation(
        "n-step returns bootstrap with gamma instead of gamma**m",
        "n_step.py",
        "return NStep(total, powers.take(final + 1),",
        "return NStep(total, np.full(num_starts, gamma),",
        ("n_step",),
    ),
    Mutation(
        "interrupted episodes are joined to the next",
        "replay.py",
        "self.rows.open[:] = False",
        "pass",
        ("n_step",),
    ),
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
        "importance weights with the wrong sign",
        "replay.py",
        "self._tree.total) ** -beta",
        "self._tree.total) ** beta",
        ("replay",),
    ),
    Mutation(
        "importance weights that forget how many transitions there are",
        "replay.py",
        "(len(self) * self._tree.get(index) / self._tree.total)",
        "(self._tree.get(index) / self._tree.total)",
        ("replay",),
    ),
    Mutation(
        "the agent draws without importance weights",
        "agent.py",
        "beta=learner.importance_exponent if",
        "beta=0.0 if",
        ("known_bugs",),
    ),
    Mutation(
        "priorities squared: alpha applied twice",
        "replay.py",
        "np.asarray((priority + PRIORITY_FLOOR) ** self.alpha)",
        "np.asarray((priority + PRIORITY_FLOOR) ** self.alpha**2)",
        ("replay",),
    ),
    Mutation(
        "priorities squared: squared errors as priorities",
        "replay.py",
        "np.asarray((priority + PRIORITY_FLOOR) ** self.alpha)",
        "np.asarray((priority**2 + PRIORITY_FLOOR) ** self.alpha)",
        ("replay",),
        quick=True,
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
        "stale priorities reach the transition that took the slot",
        "replay.py",
        "fresh = self.rows.generation[index] == generation",
        "fresh = np.ones(len(index), dtype=np.bool_)",
        ("replay",),
    ),
    Mutation(
        "new transitions get no priority",
        "replay.py",
        "self._tree.set_later(changed.filled, self._highest_leaf)",
        "self._tree.set_later(changed.filled, PRIORITY_FLOOR)",
        ("replay",),
    ),
    Mutation(
        "sum tree in float32",
        "sum_tree.py",
        "self._levels = [np.zeros(num) for num in padded]",
        "self._levels = [np.zeros(num, dtype=np.float32) for num in padded]",
        ("sum_tree",),
        quick=True,
    ),
    Mutation(
        "sum tree that adds differences and drifts",
        "sum_tree.py",
        "        self._levels[0][leaves] = values\n        self._recompute(leaves)\n",
        "        old = self._levels[0][leaves]\n"
        "        self._levels[0][leaves] = values\n"
        "        difference = self._levels[0][leaves] - old\n"
        "        self._prefix = None\n"
        "        for parents in self._levels[1:]:\n"
        "            leaves = leaves // FAN_OUT\n"
        "            np.add.at(parents, leaves, difference)\n",
        ("sum_tree",),
    ),
    Mutation(
        "sum tree that draws leaves without priority",
        "sum_tree.py",
        'node = prefix.searchsorted(mass, side="right")',
        'node = prefix.searchsorted(mass, side="left")',
        ("sum_tree",),
    ),
    Mutation(
        "one exploration coin for all environments",
        "exploration.py",
        "coin = self._rng.random(self.num_envs)",
        "coin = np.full(self.num_envs, self._rng.random())",
        ("exploration",),
        quick=True,
    ),
    Mutation(
        "exploration ignores the mask",
        "exploration.py",
        "random_actions(mask[starts], self._rng)",
        "random_actions(np.ones_like(mask[starts]), self._rng)",
        ("exploration",),
    ),
    Mutation(
        "exploratory actions go on into the next episode",
        "exploration.py",
        "self._remaining[ended] = 0",
        "pass",
        ("exploration",),
    ),
    Mutation(
        "replay that pickles",
        "column_files.py",
        "self._file.write(np.ascontiguousarray(rows, dtype=self.kind.dtype).tobytes())",
        'self._file.write(__import__("pickle").dumps(np.ascontiguousarray(rows, dtype=self.kind.dtype)))',
        ("replay_storage",),
        quick=True,
    ),
    Mutation(
        "replay that keeps every stack of frames whole",
        "replay_rows.py",
        "if spec.obs_dtype == np.uint8 and len(shape) == 3 and shape[0] <= MAX_STACK:",
        "if False:",
        ("replay_observations",),
        quick=True,
    ),
    Mutation(
        "replay in double precision",
        "replay_rows.py",
        "return PairedObservations(shape, spec.obs_dtype)",
        "return PairedObservations(shape, np.dtype(np.float64))",
        ("replay",),
    ),
    Mutation(
        "restarted replay that forgets its priorities",
        "replay.py",
        "priorities = stored.priorities() if same else None",
        "priorities = None",
        ("replay_storage",),
    ),
    Mutation(
        "checksums that nobody looks at",
        "column_files.py",
        "wrong = np.flatnonzero(total != checksums[start:stop])",
        "wrong = np.flatnonzero(total != total)",
        ("replay_damage",),
    ),
    Mutation(
        "terminated and truncated confused in the replay",
        "replay_rows.py",
        'records["terminated"] = t.terminated',
        'records["terminated"] = t.truncated',
        ("n_step",),
        quick=True,
    ),
    Mutation(
        "no bootstrap after truncation",
        "replay_batch.py",
        'np.where(last["terminated"], np.float32(0.0), discount)',
        'np.where(last["terminated"] | last["truncated"], np.float32(0.0), discount)',
        ("n_step",),
    ),
    Mutation(
        "terminated and truncated confused by the collector",
        "lanes.py",
        "            np.array([terminated], dtype=np.bool_),\n            np.array([truncated], dtype=np.bool_),\n",
        "            np.array([terminated or truncated], dtype=np.bool_),\n"
        "            np.array([False], dtype=np.bool_),\n",
        ("collector",),
    ),
    Mutation(
        "the first observation of the next episode taken for the final one",
        "lanes.py",
        'next_obs[lane] = info["final_obs"][lane]',
        "pass",
        ("collector",),
    ),
    Mutation(
        "the step that only resets an environment taken for a transition",
        "lanes.py",
        "~resetting if resetting.any() else None",
        "None",
        ("collector",),
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
    Mutation(
        "a resumed agent that draws other batches",
        "agent.py",
        'self._sample_rng.bit_generator.state = state["sample_rng"]',
        "pass",
        ("agent",),
    ),
)
