"""What a task's `model` names: the built-in model, a local directory, a .gguf file, or a Hub id; and its tokenizer."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_files import missing_path, shorten
from llmrl_envs.jobs.hub import hub_is_reachable

BUILTIN = "builtin"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        given: What was typed.
        location: Directory or Hub id for `from_pretrained`.
        gguf_file: Name of the .gguf file in `location`, if it is one.
        cache_only: For a Hub id, whether to look in the local cache only, because the Hub does not answer.
    """

    given: str
    location: str
    gguf_file: str | None = None
    cache_only: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine for certain."""
        return Path(self.location).is_dir()

    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that every part of the model is loaded with."""
        # None would stop and ask on the terminal whether to run the code of a stranger.
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": self.location, "trust_remote_code": False}
        if self.cache_only:
            arguments["local_files_only"] = True
        return arguments if self.gguf_file is None else arguments | {"gguf_file": self.gguf_file}


def find_model(model: str) -> ModelSource:
    """Resolves what a task calls its model, without loading it.

    Raises:
        UserError: The path is missing or is no model, or the package that reads .gguf files is.
    """
    if model == BUILTIN:
        from llmrl_envs.builtin import builtin_model_path

        return ModelSource(model, str(builtin_model_path()))
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return _find_gguf(model, path)
    if path.is_dir():
        return _find_directory(model, path)
    if path.exists():
        raise UserError(
            "not a model", where=model, expected="a model directory, a .gguf file or a Hub id", got="a file"
        )
    if model[:1] in "./~" or not _HUB_ID.fullmatch(model):
        raise missing_path(path, "model")
    return ModelSource(model, model, cache_only=not hub_is_reachable())


def _find_gguf(model: str, path: Path) -> ModelSource:
    if not path.is_file():
        raise missing_path(path, "model")
    if find_spec("gguf") is None:
        expected = "pip install 'llmrl[gguf]'"
        raise UserError(
            "reading a .gguf file needs the package gguf", where=model, expected=expected, got="not installed"
        )
    return ModelSource(model, str(path.parent), path.name)


def _find_directory(model: str, path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(model, str(path))
    names = sorted(entry.name for entry in path.iterdir())
    what = "not a model directory"
    if "adapter_config.json" in names:
        what = "the directory holds an adapter, not a model"
    ggufs = [name for name in names if name.endswith(".gguf")]
    expected = f"the file itself, {path / ggufs[0]}" if ggufs else "a directory with config.json and model.safetensors"
    raise UserError(what, where=model, expected=expected, got=shorten(", ".join(names)) or "an empty directory")


def load_tokenizer(model: str) -> Any:
    """Loads the tokenizer of a model; it pads at the end and has a token to pad with.

    A tokenizer without a pad token pads with its end-of-sequence token, else with its unknown token, else with its
    first one. No token is added, so the embeddings keep their size; padding is masked, so any token does.

    Raises:
        UserError: There is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    source = find_model(model)
    with quiet_transformers(source), load_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments())
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    # Documents longer than the model are cut into blocks here, so the warning about their length would mislead.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


@contextmanager
def load_errors(source: ModelSource, part: str) -> Iterator[None]:
    """Turns whatever goes wrong while loading a part of a model into a `UserError` about what was typed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Broken files, unknown architectures and the Hub client raise a dozen types; the reader typed one string.
        got = shorten(f"{type(error).__name__}: {error}", limit=300)
        if source.is_local:
            expected = "weights in safetensors or .gguf files" if part == "weights" else f"a readable {part}"
            raise UserError(
                f"the model's {part} cannot be loaded", where=source.given, expected=expected, got=got
            ) from error
        path = Path(source.given).absolute()
        raise UserError(
            "model not found",
            where=source.given,
            expected=f"a local model directory (nothing at {path}) or the id of a model on the Hub",
            got="not in the local cache, and the Hub does not answer or is switched off" if source.cache_only else got,
        ) from error


@contextmanager
def quiet_transformers(source: ModelSource | None = None) -> Iterator[None]:
    """Silences loading reports, progress bars and deprecations inside the libraries; settings are put back.

    Args:
        source: What is loaded. Reading a .gguf file draws a bar that no setting turns off, so the error stream is
            closed for it.
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        is_gguf = source is not None and source.gguf_file is not None
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) if is_gguf else nullcontext():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
