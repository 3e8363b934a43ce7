"""A schedule policy: a small folder that turns observations into actions.

`llmrl.policy_reference` finds it, `llmrl.policy_files` checks it. `hold` is the policy that never leaves the default
level; it needs no folder. Nothing here unpickles anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface import job_scale
from llmrl_envs.interface.action import ActionTable, action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from numpy.typing import NDArray
from torch import nn

from llmrl.policy_card import policy_card
from llmrl.policy_decision import PolicyDecision, check_observation, finite_values, greedy_decision, hold_decision
from llmrl.policy_hub import upload_policy_folder
from llmrl.policy_reference import (
    CARD_FILE,
    CONFIG_FILE,
    DEFAULT,
    HOLD,
    WEIGHTS_FILE,
    HoldsOn,
    locate_policy,
    shortened,
)

if TYPE_CHECKING:
    from llmrl.dqn.ensemble import EnsembleNetwork
    from llmrl.dqn.networks import QNetwork

__all__ = ["DEFAULT", "HOLD", "PolicyDecision", "SchedulePolicy", "hold_policy", "is_classifier"]

_BUT_LEAN = "_but_lean"
_CLASSIFIER = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)$")


class SchedulePolicy:
    """Chooses actions from observations.

    Args:
        table: What the action indices mean.
        spec: What the observation's entries mean.
        settings: The schedule that the actions were learned with.
        network: The Q-network, or several; None holds.
        provenance: What the policy was trained on, JSON-ready.
        holds_on: Jobs that it was found to do harm on, so that it holds there; see `for_model`.

    Attributes:
        reference: What it was loaded by; its name where it was made here.
        folder: The folder that it was read from; None where it was made here.
    """

    def __init__(
        self,
        table: ActionTable,
        spec: ObservationSpec,
        settings: ScheduleSettings,
        network: QNetwork | EnsembleNetwork | None,
        provenance: dict[str, Any] | None = None,
        holds_on: Sequence[HoldsOn] = (),
    ) -> None:
        if network is not None and network.config.num_actions != table.num_actions:
            raise ValueError(f"network: expected {table.num_actions} actions, got {network.config.num_actions}")
        if network is not None and tuple(network.config.obs_shape) != (spec.size,):
            raise ValueError(f"network: expected observations of {spec.size} entries, got {network.config.obs_shape}")
        self.table = table
        self.spec = spec
        self.settings = settings
        self.network = network
        self.provenance = provenance or {}
        self.holds_on = tuple(holds_on)
        self._allowed: NDArray[np.bool_] = np.ones(table.num_actions, np.bool_)
        self.reference = self.name
        self.folder: Path | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return str(self.provenance.get("name", HOLD if self.network is None else "policy"))

    @property
    def digest(self) -> str:
        """SHA-256, shortened, of everything that decisions follow from: languages, schedule and network."""
        languages = [self.table.hash, self.spec.hash, self.settings.identity(), *self.holds_on]
        if not self._allowed.all():
            languages.append(self._allowed.tolist())
        found = hashlib.sha256(json.dumps(languages, sort_keys=True).encode())
        if self.network is not None:
            found.update(self.network.config.model_dump_json().encode())
            for name, value in sorted(self.network.state_dict().items()):
                found.update(name.encode())
                found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def for_model(self, model: nn.Module, num_parameters: int) -> SchedulePolicy:
        """This policy; where `holds_on` says so, *hold* under its name, on all levels that a guard may come down to.

        Where `holds_on` has the kind of job with `_but_lean` behind it, and its actions can lean, it is one of its name
        that keeps the level and the base of *hold*, and whose network chooses between leaning and holding alone.

        Args:
            model: "classification" are models with a head for classes.
            num_parameters: Of the whole model. "larger_models" have more than the language models that the default
                level was measured on.
        """
        kinds = {
            "classification": is_classifier(model),
            "larger_models": num_parameters > job_scale.LARGEST_LANGUAGE_MODEL,
        }
        found = [name for name in self.holds_on if kinds[name.removesuffix(_BUT_LEAN)]]
        if not found:
            return self
        lean = self.table.lean
        if self.network is not None and lean is not None and all(name.endswith(_BUT_LEAN) for name in found):
            holding = SchedulePolicy(self.table, self.spec, ScheduleSettings(), self.network, self.provenance)
            holding._allowed = np.isin(np.arange(self.table.num_actions), (self.table.hold, lean))
        else:
            hold = hold_policy()
            holding = SchedulePolicy(hold.table, hold.spec, hold.settings, None, {"name": self.name})
        holding.reference, holding.folder = self.reference, self.folder
        return holding

    def act(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> PolicyDecision:
        """Greedy actions for observations float32[E, O] among those available in mask bool[E, A]."""
        check_observation(observation, self.spec.size)
        if self.network is None:
            return hold_decision(self.table, len(observation))
        with torch.inference_mode():
            values = self.network.values(self.network(torch.from_numpy(np.ascontiguousarray(observation))))
        return greedy_decision(values.numpy(), mask & self._allowed, self.network.config)

    def card(self) -> str:
        """The policy card, Markdown."""
        return policy_card(self.table, self.spec, self.settings, self.network, self.provenance, self.holds_on)

    # -- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, reference: Path | str, *, where: str = "--policy") -> SchedulePolicy:
        """Loads a policy.

        Args:
            reference: Any form that `llmrl.policy_reference` lists: a folder, a Hub id, an artifact, "default", "hold".
            where: Where the reference was written, for the error.

        Raises:
            UserError: It is missing, damaged, unsafe, of another version, or made for another observation or action
                table; says which file.
        """
        folder = locate_policy(reference, where=where)
        if folder is None:
            return hold_policy()
        # Pydantic reads the metadata of every installed package once; who holds does without.
        from llmrl.policy_files import read_language

        language = read_language(folder)
        config = language.config
        network = _read_network(folder / WEIGHTS_FILE) if config.kind == "network" else None
        try:
            policy = cls(language.table, language.spec, language.settings, network, config.provenance, config.holds_on)
        except ValueError as error:
            raise UserError(
                "the policy's network does not fit its config", where=str(folder), got=str(error)
            ) from error
        if network is not None and not finite_values(policy.act, policy.spec, policy.table):
            raise UserError(
                "the policy's values are not finite",
                expected="finite numbers",
                got="infinity or NaN",
                where=str(folder),
            )
        policy.reference, policy.folder = str(reference), folder
        return policy

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes the folder; the same policy always gives the same bytes."""
        from llmrl.dqn.network_file import save_network
        from llmrl.policy_files import PolicyConfig

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = PolicyConfig(
            kind="hold" if self.network is None else "network",
            action_table=self.table.to_dict(),
            action_table_hash=self.table.hash,
            observation=self.spec.to_dict(),
            observation_hash=self.spec.hash,
            schedule=dataclasses.asdict(self.settings),
            provenance=self.provenance,
            holds_on=list(self.holds_on),
        )
        (directory / CONFIG_FILE).write_text(json.dumps(config.model_dump(), indent=2) + "\n", encoding="utf-8")
        if self.network is not None:
            save_network(self.network, directory / WEIGHTS_FILE)
        (directory / CARD_FILE).write_text(self.card(), encoding="utf-8")

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads the policy to the Hugging Face Hub.

        Args:
            repository: Hub id, owner/name; made if it is not there.
            private: Make a new repository private.

        Returns:
            Address of the repository.

        Raises:
            UserError: The id is none, or the Hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return upload_policy_folder(Path(directory), repository, private=private)


def is_classifier(model: nn.Module) -> bool:
    """Whether a model of transformers, wrapped or not, ends in a head for classes in place of one for tokens."""
    return any(_CLASSIFIER.search(type(module).__name__) for module in model.modules())


def hold_policy(settings: ScheduleSettings | None = None, actions: str = "moves") -> SchedulePolicy:
    """The policy that keeps the default level."""
    table = action_table(actions)
    return SchedulePolicy(table, ObservationSpec(table), settings or ScheduleSettings(), None)


def _read_network(path: Path) -> QNetwork | EnsembleNetwork:
    from llmrl.dqn.network_file import load_network

    try:
        network = load_network(path)
    except ValueError as error:
        raise UserError("the policy's weights cannot be read", got=shortened(str(error)), where=str(path)) from error
    for name, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError("the policy's weights are not finite", expected="finite numbers", got=name, where=str(path))
    return network
