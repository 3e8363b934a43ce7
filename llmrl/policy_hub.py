"""Uploads a policy folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from llmrl_envs.errors import UserError

from llmrl.policy_reference import POLICY_FILES


def upload_policy_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads the files of a policy, and nothing else that may lie beside them.

    Args:
        folder: A policy that was read before.
        repository: Hub id, owner/name; made if it is not there.
        private: Make a new repository private.

    Returns:
        Address of the repository.

    Raises:
        UserError: The Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(POLICY_FILES))
    except Exception as error:  # the Hub client raises many kinds, all of which mean: not uploaded
        raise UserError(
            "the policy was not uploaded",
            where=repository,
            expected="a network, `hf auth login`, HF_HUB_OFFLINE not set, and an id of the form owner/name",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
        ) from error
    return str(address)
