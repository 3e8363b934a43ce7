"""Where a policy lies: the one place that understands what people write after `--policy`.

    hold                                 no learned policy: the default level
    default                              the policy that ships with the package
    runs/mine/policy, ./policy           a folder
    owner/name, owner/name@revision      a repository of the Hugging Face Hub
    wandb:entity/project/name:alias      an artifact of Weights & Biases; the alias is `latest` where none is given

A folder that exists goes before a Hub id of the same form. Imports neither torch nor wandb.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Literal

from llmrl_envs.errors import UserError

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
POLICY_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
HOLD, DEFAULT = "hold", "default"
HoldsOn = Literal["classification", "larger_models", "classification_but_lean", "larger_models_but_lean"]
"""Jobs that a policy may be told to hold on, or to do nothing but lean on: see `SchedulePolicy.for_model`."""
WANDB_PREFIX = "wandb:"
FORMS = "a folder, a Hub id (owner/name), wandb:entity/project/name:alias, 'default' or 'hold'"

_LONGEST_MESSAGE, _LONGEST_REFERENCE = 1000, 200
_HUB_ID = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_WANDB_NAME = re.compile(r"^(?P<entity>[\w.-]+)/(?P<project>[\w.-]+)/(?P<name>[\w.-]+)(:(?P<alias>[\w.-]+))?$")


class ReferenceKind(StrEnum):
    """What a reference points to."""

    HOLD = "hold"
    DEFAULT = "default"
    FOLDER = "folder"
    HUB = "hub"
    WANDB = "wandb"


@dataclass(frozen=True)
class PolicyReference:
    """A reference that was understood; nothing has been fetched yet.

    Attributes:
        kind: What it points to.
        name: The folder, the Hub id, or the artifact's full name with its alias; for the others the kind itself.
        revision: Branch, tag or commit of a Hub id.
    """

    kind: ReferenceKind
    name: str
    revision: str | None = None


def parse_reference(text: Path | str, *, where: str = "--policy") -> PolicyReference:
    """Understands a reference.

    Args:
        text: What was written.
        where: Where it was written, for the error.

    Raises:
        UserError: It is none of the forms, or a folder that is not there.
    """
    written = str(text)
    if isinstance(text, str) and written in (HOLD, DEFAULT):
        return PolicyReference(ReferenceKind(written), written)
    if written.startswith(WANDB_PREFIX):
        return _parse_wandb(written, where)
    try:
        folder = Path(written).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, or the home of nobody
        raise UserError("no policy folder there", expected=FORMS, got=_shown(written), where=where) from error
    if written and is_folder:
        return PolicyReference(ReferenceKind.FOLDER, str(folder))
    match = _HUB_ID.match(written)
    if match is None or exists or isinstance(text, Path):
        raise UserError("no policy folder there", expected=FORMS, got=_shown(written), where=where)
    return PolicyReference(ReferenceKind.HUB, match["id"], match["revision"])


def _shown(written: str) -> str:
    """What was written, so that a terminal can show it."""
    return shortened(written if written.isprintable() else ascii(written), _LONGEST_REFERENCE) or "nothing"


def shortened(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """A message that somebody else's text has part in, of readable length."""
    return text if len(text) <= longest else f"{text[:longest]} .."


def _parse_wandb(written: str, where: str) -> PolicyReference:
    match = _WANDB_NAME.match(written.removeprefix(WANDB_PREFIX))
    if match is None:
        raise UserError(
            "not the name of an artifact", expected="wandb:entity/project/name:alias", got=_shown(written), where=where
        )
    name = f"{match['entity']}/{match['project']}/{match['name']}:{match['alias'] or 'latest'}"
    return PolicyReference(ReferenceKind.WANDB, name)


def locate_policy(text: Path | str, *, where: str = "--policy") -> Path | None:
    """The local folder of a policy, fetched if it lies elsewhere; None for `hold`, which needs no folder.

    Raises:
        UserError: It cannot be had; says which file was looked for, and how to use a local copy.
    """
    reference = parse_reference(text, where=where)
    if reference.kind is ReferenceKind.HOLD:
        return None
    if reference.kind is ReferenceKind.FOLDER:
        return Path(reference.name)
    if reference.kind is ReferenceKind.DEFAULT:
        return _shipped_policy(where)
    if reference.kind is ReferenceKind.HUB:
        return _download_from_hub(reference, where)
    from llmrl.tracking.artifacts import download_artifact

    return download_artifact(reference.name, POLICY_FILES, where=where)


def _shipped_policy(where: str) -> Path:
    folder = Path(str(resources.files("llmrl"))) / "policies" / "default"
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            "this version ships no default policy",
            expected="a policy folder from `llmrl train`, or 'hold'",
            got="default",
            where=where,
        )
    return folder


def _download_from_hub(reference: PolicyReference, where: str) -> Path:
    """The cached snapshot; fetched first where the Hub answers, so that a moved branch is noticed."""
    from huggingface_hub import constants, snapshot_download
    from llmrl_envs.jobs.hub import hub_is_reachable

    reachable = hub_is_reachable()
    try:
        folder = snapshot_download(
            reference.name,
            revision=reference.revision,
            allow_patterns=list(POLICY_FILES),
            local_files_only=not reachable,
        )
    except Exception as error:  # the Hub client raises many kinds, all of which mean: not to be had
        why = str(error).splitlines()[0] if reachable else "the Hub cannot be reached, and the cache does not have it"
        revision = f" at revision {reference.revision}" if reference.revision else ""
        raise UserError(
            "no policy folder of that name here, and none on the Hub",
            where=f"{where}: looked for {CONFIG_FILE} of {reference.name}{revision} in the folder {reference.name}, "
            f"in the cache {constants.HF_HUB_CACHE}, and at {constants.ENDPOINT}",
            expected=f"a network; or a local copy: on a machine that has one run `hf download {reference.name} "
            "--local-dir DIR`, bring DIR here, and write DIR in place of the id",
            got=f"{type(error).__name__}: {why}",
        ) from error
    return Path(folder)
