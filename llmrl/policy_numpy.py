"""A policy in NumPy, as `llmrl policy export --format numpy` writes it: decides in well under a millisecond, no torch.

config.json    as in a policy folder
network.json   shape of the Q-network
network.npz    its weights, by the names of `QNetwork.state_dict()`
README.md      the policy card

policy = NumpyPolicy.from_export("exported")
policy.act(observation[None], mask[None]).actions
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from llmrl_envs.errors import UserError
from numpy.typing import NDArray
from pydantic import ValidationError

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.ensemble_config import read_network_config
from llmrl.dqn.network_shapes import check_shapes
from llmrl.dqn.numpy_network import numpy_network
from llmrl.policy_decision import PolicyDecision, check_observation, finite_values, greedy_decision
from llmrl.policy_files import PolicyLanguage, read_language

ARRAYS_FILE, NETWORK_FILE = "network.npz", "network.json"


class NumpyPolicy:
    """Chooses the actions that the `SchedulePolicy` it was exported from chooses.

    Args:
        language: What actions and observations mean.
        config: Shape of the Q-network.
        tensors: Its weights.

    Raises:
        ValueError: They do not fit each other.
    """

    def __init__(
        self, language: PolicyLanguage, config: NetworkConfig, tensors: Mapping[str, NDArray[np.float32]]
    ) -> None:
        self.table, self.spec, self.settings = language.table, language.spec, language.settings
        if (config.num_actions, tuple(config.obs_shape)) != (self.table.num_actions, (self.spec.size,)):
            raise ValueError(
                f"network: expected {self.table.num_actions} actions and observations of {self.spec.size} entries, "
                f"got {config.num_actions} and {config.obs_shape}"
            )
        check_shapes(config, {name: array.shape for name, array in tensors.items()})
        for name, array in tensors.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"network weight {name!r}: expected finite float32 numbers, got {array.dtype}")
        self._config = config
        self._network = numpy_network(config, tensors)

    def act(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> PolicyDecision:
        """Greedy actions for observations float32[E, O] among those available in mask bool[E, A]."""
        check_observation(observation, self.spec.size)
        return greedy_decision(self._network.values(observation), mask, self._config)

    @classmethod
    def from_export(cls, folder: Path | str) -> NumpyPolicy:
        """Reads an exported folder.

        Raises:
            UserError: It is missing, damaged, unsafe, of another version, or its parts do not fit; says which file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(
                "no exported policy there", expected="a folder from `llmrl policy export --format numpy`", got=folder
            )
        language = read_language(folder, ARRAYS_FILE)
        try:
            config = read_network_config((folder / NETWORK_FILE).read_text(encoding="utf-8"))
            tensors = read_arrays(folder / ARRAYS_FILE)
            policy = cls(language, config, tensors)
            if not finite_values(policy.act, policy.spec, policy.table):
                raise ValueError("network: expected finite values, got infinity or NaN")
            return policy
        except (OSError, ValueError, ValidationError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise UserError(
                "the exported network cannot be read",
                where=str(folder),
                expected=f"{NETWORK_FILE} and {ARRAYS_FILE} as the export wrote them",
                got=str(error),
            ) from error


def read_arrays(path: Path) -> dict[str, NDArray[np.float32]]:
    """The arrays of an .npz file; an array of Python objects, which would be a pickle, is refused.

    Raises:
        ValueError: It holds a pickle or is damaged.
    """
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
