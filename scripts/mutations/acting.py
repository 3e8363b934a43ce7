"""Bugs of exploration, of the collector and of the agent that ties everything together."""

from __future__ import annotations

from mutations.mutation import Mutation

ACTING = (
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
        "the agent draws without importance weights",
        "agent.py",
        "beta=learner.importance_exponent if",
        "beta=0.0 if",
        ("known_bugs",),
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
        "terminated and truncated confused by the collector",
        "lanes.py",
        "            FLAG[bool(terminated)],\n            FLAG[bool(truncated)],\n",
        "            FLAG[bool(terminated or truncated)],\n            FLAG[False],\n",
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
        "a resumed agent that draws other batches",
        "agent.py",
        'self._sample_rng.bit_generator.state = state["sample_rng"]',
        "pass",
        ("agent",),
    ),
)
