"""Takes a policy out of here: as files for other programs, or to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from llmrl_envs.errors import UserError

from llmrl.policy import SchedulePolicy
from llmrl.policy_hub import upload_policy_folder
from llmrl.policy_reference import WEIGHTS_FILE
from llmrl.run_directory import atomic_write_json, create_run_directory

NUMPY_FILE, NETWORK_FILE = "network.npz", "network.json"


def export_policy(source: str, output: Path, *, file_format: Literal["safetensors", "numpy"]) -> list[Path]:
    """Writes a policy to a new or empty directory.

    `safetensors` is the policy folder itself. `numpy` adds what a program without torch needs to run the network:
    its weights (`network.npz`) and its shape (`network.json`).

    Args:
        source: Directory or Hub id of a policy, or "default".
        output: The directory.
        file_format: Which files.

    Returns:
        The files.

    Raises:
        UserError: There is no such policy, it has no network to export, or the directory is not empty.
    """
    policy = SchedulePolicy.from_pretrained(source)
    if policy.network is None and file_format == "numpy":
        raise UserError("this policy has no network", expected="a policy from `llmrl train`", got=source)
    create_run_directory(output)
    policy.save_pretrained(output)
    if file_format == "numpy" and policy.network is not None:
        weights = {name: value.detach().cpu().numpy() for name, value in policy.network.state_dict().items()}
        np.savez(output / NUMPY_FILE, **weights)
        atomic_write_json(output / NETWORK_FILE, policy.network.config.model_dump(mode="json"))
        (output / WEIGHTS_FILE).unlink()
    return sorted(output.iterdir())


def push_policy(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a policy folder to the Hub, after reading it once as a user would; see `SchedulePolicy.push_to_hub`."""
    SchedulePolicy.from_pretrained(folder)
    return upload_policy_folder(folder, repository, private=private)
