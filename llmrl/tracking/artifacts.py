"""Fetches the files of an artifact of Weights & Biases, once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from llmrl_envs.errors import UserError

_CACHE_FOLDER = "llmrl-policies"
_OFFLINE_MODES = frozenset({"offline", "dryrun", "disabled"})


def download_artifact(name: str, files: Collection[str], *, where: str) -> Path:
    """The folder with an artifact's files; of those in `files` only.

    A folder that was fetched before is used again if the artifact is still the same. No link and no path of the
    artifact can lead out of the folder, because files are fetched by the names that are asked for.

    Args:
        name: entity/project/name:alias.
        files: Names of the files that are wanted, as far as the artifact has them.
        where: Where the reference was written, for errors.

    Raises:
        UserError: It cannot be reached, does not exist, or has none of the files.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in _OFFLINE_MODES:
        raise _unreachable(name, files, where, f"WANDB_MODE={mode}")
    import wandb
    from wandb.env import get_cache_dir

    try:
        artifact = wandb.Api().artifact(name)
        entries = _wanted_entries(artifact, files, name, where)
        return _fetch(entries, Path(get_cache_dir()) / _CACHE_FOLDER / str(artifact.digest))
    except UserError:
        raise
    except Exception as error:  # the client raises many kinds, all of which mean: not to be had
        told = (str(error).splitlines() or [""])[0]
        raise _unreachable(name, files, where, f"{type(error).__name__}: {told}") from error


def _wanted_entries(artifact: Any, files: Collection[str], name: str, where: str) -> dict[str, Any]:
    entries = artifact.manifest.entries
    for path in entries:
        parts = PurePosixPath(str(path).replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(
                "a file of the artifact lies outside of its folder",
                where=f"{where}: {name}",
                expected="paths inside the artifact",
                got=str(path),
            )
    wanted = {path: entry for path, entry in entries.items() if path in files}
    for path, entry in wanted.items():
        if getattr(entry, "ref", None) is not None:
            raise UserError(
                "a file of the artifact is a reference to another place",
                where=f"{where}: {path} of {name}",
                expected="files stored in the artifact",
                got=str(entry.ref),
            )
    if not wanted:
        raise UserError(
            "the artifact is no policy",
            where=f"{where}: {name}",
            expected=", ".join(files),
            got=", ".join(sorted(map(str, entries))) or "no files",
        )
    return wanted


def _fetch(entries: dict[str, Any], folder: Path) -> Path:
    """Downloads into a folder that appears whole; several processes may do so at once."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        for entry in entries.values():
            entry.download(root=str(part), skip_cache=True)
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.is_dir():  # another process was not faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _unreachable(name: str, files: Collection[str], where: str, why: str) -> UserError:
    return UserError(
        "no artifact of that name can be reached",
        where=f"{where}: looked for {', '.join(files)} of {name} at Weights & Biases",
        expected="`wandb login` and a network, and WANDB_MODE not offline; or a local copy: on a machine that has both "
        f"run `wandb artifact get {name} --root DIR`, bring DIR here, and write DIR in place of the artifact",
        got=why,
    )
