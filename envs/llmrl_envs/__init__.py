"""Gymnasium environments whose episodes are fine-tuning jobs.

Importing the package registers the environments, so `gymnasium.make("llmrl_envs:llmrl/FineTuning-v0")` needs no
import of its own. Nothing here imports torch until an environment is made.
"""

from __future__ import annotations
