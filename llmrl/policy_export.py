"""Takes a policy out of here: as files for other programs, or to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from llmrl_envs.errors import UserError

from llmrl.policy import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, SchedulePolicy
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
    policy = SchedulePolicy.load(source)
    if policy.network is None and file_format == "numpy":
        raise UserError("this policy has no network", expected="a policy from `llmrl train`", got=source)
    create_run_directory(output)
    policy.save(output)
    if file_format == "numpy" and policy.network is not None:
        weights = {name: value.detach().cpu().numpy() for name, value in policy.network.state_dict().items()}
        np.savez(output / NUMPY_FILE, **weights)
        atomic_write_json(output / NETWORK_FILE, policy.network.config.model_dump(mode="json"))
        (output / WEIGHTS_FILE).unlink()
    return sorted(output.iterdir())


def push_policy(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a policy folder to the Hub, after reading it once as a user would.

    Args:
        folder: The policy.
        repository: Hub id, owner/name; made if it is not there.
        private: Make a new repository private.

    Returns:
        Address of the repository.

    Raises:
        UserError: The folder is no policy, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    SchedulePolicy.load(folder)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE])
    except Exception as error:  # the Hub client raises many kinds, all of which mean: not uploaded
        raise UserError(
            "the policy was not uploaded",
            where=repository,
            expected="a network, `hf auth login`, HF_HUB_OFFLINE not set, and an id of the form owner/name",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
        ) from error
    return str(address)
