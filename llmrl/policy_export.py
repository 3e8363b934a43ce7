"""Writes a policy as files for other programs: the folder itself, NumPy arrays, or an ONNX graph."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from llmrl_envs.errors import UserError
from torch import Tensor, nn

from llmrl.dqn.ensemble import EnsembleNetwork
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy
from llmrl.policy_hub import upload_policy_folder
from llmrl.policy_numpy import ARRAYS_FILE, NETWORK_FILE
from llmrl.policy_reference import WEIGHTS_FILE
from llmrl.run_directory import atomic_write_json, create_run_directory

ONNX_FILE = "network.onnx"
_ONNX_PACKAGES = ("onnx", "onnxscript")

ExportFormat = Literal["safetensors", "numpy", "onnx"]


def export_policy(source: str, output: Path, *, file_format: ExportFormat) -> list[Path]:
    """Writes a policy to a new or empty directory.

    `safetensors` is the policy folder itself. The others replace its weights: `numpy` with `network.npz` and
    `network.json`, which `llmrl.policy_numpy.NumpyPolicy` reads without torch; `onnx` with `network.onnx`, which maps
    `observation` float32[E, O] to `q_values` float32[E, A]. What the entries mean stands in `config.json`.

    Args:
        source: Any reference to a policy.
        output: The directory.
        file_format: Which files.

    Returns:
        The files.

    Raises:
        UserError: There is no such policy, it has no network to export, a package is missing, or the directory is not
            empty.
    """
    policy = SchedulePolicy.from_pretrained(source, where="policy export")
    network = policy.network
    if file_format != "safetensors" and network is None:
        raise UserError("this policy has no network", expected="a policy from `llmrl train`", got=source)
    if file_format == "onnx":
        _check_packages()
    create_run_directory(output)
    policy.save_pretrained(output)
    if file_format != "safetensors" and network is not None:
        if file_format == "numpy":
            _write_arrays(network, output)
        else:
            _write_onnx(policy, network, output / ONNX_FILE)
        (output / WEIGHTS_FILE).unlink()
    return sorted(output.iterdir())


def _write_arrays(network: QNetwork | EnsembleNetwork, output: Path) -> None:
    weights = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    np.savez(output / ARRAYS_FILE, allow_pickle=False, **weights)
    atomic_write_json(output / NETWORK_FILE, network.config.model_dump(mode="json"))


def _check_packages() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError("ONNX is not installed", expected="pip install 'llmrl[onnx]'", got=f"no {', '.join(missing)}")


class _Values(nn.Module):
    """Observation to action values, as one graph."""

    def __init__(self, network: QNetwork | EnsembleNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: Tensor) -> Tensor:
        """[E, O] -> [E, A]."""
        return self.network.values(self.network(observation))


def _write_onnx(policy: SchedulePolicy, network: QNetwork | EnsembleNetwork, path: Path) -> None:
    # Two rows, because an exporter takes a size of one for a constant.
    example = torch.zeros(2, policy.spec.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _Values(network).eval(),
            (example,),
            input_names=["observation"],
            output_names=["q_values"],
            dynamic_shapes=({0: torch.export.Dim("E")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["llmrl"] = json.dumps(
        {"actions": list(policy.table.names), "observation": list(policy.spec.names)}
    )
    program.save(path, external_data=False)


def push_policy(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a policy folder to the Hub, after reading it once as a user would; see `SchedulePolicy.push_to_hub`."""
    SchedulePolicy.from_pretrained(folder)
    return upload_policy_folder(folder, repository, private=private)
