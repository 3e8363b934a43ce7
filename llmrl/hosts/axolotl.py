"""A plugin for axolotl that lets a policy steer its job. In axolotl's configuration:

    plugins: [llmrl.hosts.axolotl.SchedulePlugin]
    llmrl_policy: hold          # or any other reference to a policy

Only axolotl imports this module. The policy is read before the model is loaded, so that a wrong one costs nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from llmrl.hosts.trainer import ScheduleCallback
from llmrl.policy import SchedulePolicy
from llmrl.policy_reference import HOLD

WHERE = "llmrl_policy in axolotl's configuration"


class ScheduleArgs(BaseModel):
    """Keys that the plugin adds to axolotl's configuration.

    Attributes:
        llmrl_policy: A folder, a Hub id, wandb:entity/project/name:alias, "default", or "hold".
        llmrl_guarded: Fall back to linear decay when the job loses too much.
        llmrl_snapshots: Where the best state is kept for rollbacks.
    """

    llmrl_policy: str = HOLD
    llmrl_guarded: bool = True
    llmrl_snapshots: Literal["auto", "memory", "disk", "off"] = "auto"


class SchedulePlugin(BasePlugin):  # type: ignore[misc]
    """Adds a `ScheduleCallback` to the trainer that axolotl makes; its own scheduler is not used."""

    def __init__(self) -> None:
        super().__init__()
        self._policy: SchedulePolicy | None = None

    def get_input_args(self) -> str:
        """Where axolotl finds the plugin's keys."""
        return f"{__name__}.{ScheduleArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Reads the policy.

        Raises:
            UserError: There is no such policy, or it is damaged.
        """
        self._policy = SchedulePolicy.from_pretrained(_arguments(cfg).llmrl_policy, where=WHERE)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback, for the trainer that is about to be made."""
        arguments = _arguments(cfg)
        policy = self._policy or SchedulePolicy.from_pretrained(arguments.llmrl_policy, where=WHERE)
        return [ScheduleCallback(policy, guarded=arguments.llmrl_guarded, snapshots=arguments.llmrl_snapshots)]


def _arguments(cfg: Any) -> ScheduleArgs:
    """The plugin's keys; axolotl's configuration gives None for what is not in it."""
    given = {name: getattr(cfg, name) for name in ScheduleArgs.model_fields}
    return ScheduleArgs(**{name: value for name, value in given.items() if value is not None})
