"""A schedule policy: a small folder that turns observations into actions.

    config.json         schema version, action table, observation, schedule settings, training provenance
    model.safetensors   the Q-network
    README.md           the policy card

`hold` is the policy that never leaves the default level; it needs no folder. Nothing here unpickles anything.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import ActionTable, action_table
from llmrl_envs.interface.observation import OBSERVATION_VERSION, ObservationSpec
from llmrl_envs.interface.schedule import ScheduleSettings
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmrl.dqn.acting import greedy_actions
from llmrl.dqn.network_file import load_network, save_network
from llmrl.dqn.networks import QNetwork
from llmrl.policy_card import policy_card

SCHEMA_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
HOLD, DEFAULT = "hold", "default"


class PolicyConfig(BaseModel):
    """`config.json` of a policy; unknown and missing keys are errors.

    Attributes:
        schema_version: Version of this file's layout.
        kind: A Q-network, or the policy that holds.
        action_table: The table, as `ActionTable.to_dict` gives it.
        action_table_hash: Its digest.
        observation: `ObservationSpec.to_dict` of the observation that the network was trained on.
        observation_hash: Its digest.
        schedule: Arguments of the `ScheduleSettings` that the actions were learned with.
        provenance: What the policy was trained on, and its results.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["network", "hold"]
    action_table: dict[str, Any]
    action_table_hash: str
    observation: dict[str, Any]
    observation_hash: str
    schedule: dict[str, Any]
    provenance: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class PolicyDecision:
    """What a policy says about E observations.

    Attributes:
        actions: int64[E].
        q_values: float32[E, A]; NaN for a policy without values.
    """

    actions: NDArray[np.int64]
    q_values: NDArray[np.float32]


class SchedulePolicy:
    """Chooses actions from observations.

    Args:
        table: What the action indices mean.
        spec: What the observation's entries mean.
        settings: The schedule that the actions were learned with.
        network: The Q-network; None holds.
        provenance: What the policy was trained on, JSON-ready.
    """

    def __init__(
        self,
        table: ActionTable,
        spec: ObservationSpec,
        settings: ScheduleSettings,
        network: QNetwork | None,
        provenance: dict[str, Any] | None = None,
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

    @property
    def name(self) -> str:
        """What tables call it."""
        return HOLD if self.network is None else str(self.provenance.get("name", "policy"))

    def act(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> PolicyDecision:
        """Greedy actions for observations float32[E, O] among those available in mask bool[E, A]."""
        if observation.shape[1:] != (self.spec.size,):
            raise ValueError(f"observation: expected float32[E, {self.spec.size}], got {observation.shape}")
        if self.network is None:
            shape = (len(observation), self.table.num_actions)
            return PolicyDecision(
                np.full(len(observation), self.table.hold, np.int64), np.full(shape, np.nan, np.float32)
            )
        with torch.inference_mode():
            values = self.network.values(self.network(torch.from_numpy(np.ascontiguousarray(observation))))
        q_values: NDArray[np.float32] = values.numpy()
        config = self.network.config
        actions = greedy_actions(
            q_values, mask, default_action=config.default_action, margin=config.default_action_margin
        )
        return PolicyDecision(actions, q_values)

    def card(self) -> str:
        """The policy card, Markdown."""
        return policy_card(self.table, self.spec, self.settings, self.network, self.provenance)

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, directory: Path | str) -> None:
        """Writes the folder; the same policy always gives the same bytes."""
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
        )
        (directory / CONFIG_FILE).write_text(json.dumps(config.model_dump(), indent=2) + "\n", encoding="utf-8")
        if self.network is not None:
            save_network(self.network, directory / WEIGHTS_FILE)
        (directory / CARD_FILE).write_text(self.card(), encoding="utf-8")

    @classmethod
    def load(cls, source: Path | str) -> SchedulePolicy:
        """Loads a policy.

        Args:
            source: "hold", "default" (the one that ships with the package), a folder, or a Hub id.

        Raises:
            UserError: It is missing, damaged, of another version, or made for another observation or action table.
        """
        if str(source) == HOLD:
            return hold_policy()
        folder = _find_folder(source)
        config = _read_config(folder / CONFIG_FILE)
        table = _read_table(config, folder)
        spec = _read_spec(config, table, folder)
        settings = _read_settings(config, folder)
        network = _read_network(folder / WEIGHTS_FILE) if config.kind == "network" else None
        try:
            return cls(table, spec, settings, network, config.provenance)
        except ValueError as error:
            raise UserError(
                "the policy's network does not fit its config", where=str(folder), got=str(error)
            ) from error


def hold_policy(settings: ScheduleSettings | None = None, actions: str = "moves") -> SchedulePolicy:
    """The policy that keeps the default level."""
    table = action_table(actions)
    return SchedulePolicy(table, ObservationSpec(table), settings or ScheduleSettings(), None)


def _find_folder(source: Path | str) -> Path:
    if str(source) == DEFAULT:
        folder = Path(str(resources.files("llmrl"))) / "policies" / "default"
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(
                "this version ships no default policy",
                expected="a policy folder from `llmrl train`, or 'hold'",
                got="default",
                where="--policy",
            )
        return folder
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise UserError(
            "no policy folder there",
            expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, a Hub id, 'default' or 'hold'",
            got=str(source),
            where="--policy",
        )
    return _download(str(source))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]))
    except Exception as error:  # the Hub client raises many kinds, all of which mean: not to be had
        raise UserError(
            "no policy folder of that name here, and none on the Hub",
            expected=f"a local folder, or a Hub repository with {CONFIG_FILE} that can be reached or is cached",
            got=f"{hub_id} ({type(error).__name__})",
            where="--policy",
        ) from error


def _read_config(path: Path) -> PolicyConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "the policy has no readable config", expected=CONFIG_FILE, got=error.strerror, where=str(path)
        ) from error
    except ValueError as error:
        raise UserError("the policy's config is not JSON", got=str(error), where=str(path)) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            "the policy is of another version",
            expected=f"schema_version {SCHEMA_VERSION}",
            got=version,
            where=str(path),
        )
    try:
        return PolicyConfig.model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError("the policy's config does not fit its schema", got=told, where=str(path)) from error


def _read_table(config: PolicyConfig, folder: Path) -> ActionTable:
    try:
        table = ActionTable.from_dict(config.action_table)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("the policy's action table cannot be read", got=repr(error), where=str(folder)) from error
    if table.hash != config.action_table_hash:
        raise UserError(
            "the policy's action table was changed after training",
            expected=config.action_table_hash,
            got=table.hash,
            where=str(folder / CONFIG_FILE),
        )
    return table


def _read_spec(config: PolicyConfig, table: ActionTable, folder: Path) -> ObservationSpec:
    stack = config.observation.get("stack")
    spec = ObservationSpec(table, stack=stack) if isinstance(stack, int) and stack >= 1 else None
    if spec is None or spec.hash != config.observation_hash:
        names = config.observation.get("names")
        size = len(names) if isinstance(names, list) else "unknown"
        raise UserError(
            "the policy was made for another observation",
            expected=f"version {OBSERVATION_VERSION}, hash {spec.hash if spec else 'of a valid stack'}",
            got=f"version {config.observation.get('version')}, hash {config.observation_hash}, {size} entries",
            where=str(folder / CONFIG_FILE),
        )
    return spec


def _read_settings(config: PolicyConfig, folder: Path) -> ScheduleSettings:
    try:
        return ScheduleSettings(**config.schedule)
    except TypeError as error:
        raise UserError("the policy's schedule settings cannot be read", got=str(error), where=str(folder)) from error


def _read_network(path: Path) -> QNetwork:
    try:
        return load_network(path)
    except ValueError as error:
        raise UserError("the policy's weights cannot be read", got=str(error), where=str(path)) from error
