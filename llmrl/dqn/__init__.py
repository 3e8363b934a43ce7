"""DQN on its own: replay, losses, networks, learner and agents; it knows nothing of fine-tuning.

Importing the package imports no torch, so that `DQNConfig` can be part of a configuration file that is checked in
milliseconds. The agents are in `llmrl.dqn.agent`, `llmrl.dqn.tabular` and `llmrl.dqn.reinforce`.
"""

from __future__ import annotations
