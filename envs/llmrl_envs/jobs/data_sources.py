"""Finds the examples that a `DataSpec` names: files, directories of split files, `datasets` directories, Hub ids.

A source that holds several splits offers all of them; one that holds a single split offers it as train.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_files import READERS, Table, read_table, shorten
from llmrl_envs.jobs.hub import hub_is_reachable
from llmrl_envs.jobs.task import DataSpec

Split = Literal["train", "validation", "test"]
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Split to the names it goes by, as a file's stem or a key of a `DatasetDict`."""

BUILTIN_PREFIX = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load_tables(spec: DataSpec) -> dict[Split, Table]:
    """Loads every split that the spec names or its training source holds; `train` is always among them.

    Raises:
        UserError: A source is missing, empty, unreadable, or holds no such split.
    """
    tables = _load_source(spec.train)
    if "train" not in tables:
        raise UserError("source has no training split", where=spec.train, expected="train", got=", ".join(tables))
    sources: tuple[tuple[Split, str | None], ...] = (("validation", spec.validation), ("test", spec.test))
    for split, source in sources:
        if source is not None:
            tables[split] = _one_split(_load_source(source), split, source)
    return tables


def _one_split(tables: Mapping[Split, Table], split: Split, source: str) -> Table:
    if split in tables:
        return tables[split]
    if len(tables) == 1:
        return next(iter(tables.values()))
    raise UserError(f"source has no {split} split", where=source, expected=split, got=", ".join(tables))


def _load_source(source: str) -> dict[Split, Table]:
    if source.startswith(BUILTIN_PREFIX):
        return _load_builtin(source.removeprefix(BUILTIN_PREFIX))
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_directory(path)
    if path.is_file() or _is_path(source):
        return {"train": read_table(path)}
    return _load_hub(source)


def _is_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a path, not as a Hub id."""
    return Path(source).suffix.lower() in READERS or source[:1] in "./~" or not _HUB_ID.fullmatch(source)


def _load_builtin(name: str) -> dict[Split, Table]:
    from llmrl_envs.builtin import corpus_topics, example_sets, load_corpus, load_examples

    if name in example_sets():
        return _builtin_tables(name, load_examples(name), unit="example")
    topics = (*corpus_topics(), *example_sets())
    if name not in topics:
        close = difflib.get_close_matches(name, topics, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError("unknown built-in corpus", expected=f"one of {', '.join(topics)}", got=f"{name!r}{hint}")
    rows = {split: [{"text": text} for text in documents] for split, documents in load_corpus(name).items()}
    return _builtin_tables(name, rows, unit="document")


def _builtin_tables(name: str, rows: Mapping[str, list[dict[str, str]]], unit: str) -> dict[Split, Table]:
    return {
        split: Table(rows[split], f"{BUILTIN_PREFIX}{name}[{split}]", range(1, len(rows[split]) + 1), unit=unit)
        for split in SPLIT_NAMES
    }


def _load_directory(path: Path) -> dict[Split, Table]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _load_saved_dataset(path)
    tables: dict[Split, Table] = {}
    for split, stems in SPLIT_NAMES.items():
        files = [file for file in sorted(path.iterdir()) if file.stem in stems and file.suffix.lower() in READERS]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"directory has several files for the {split} split", where=str(path), got=names)
        if files:
            tables[split] = read_table(files[0])
    if not tables:
        names = ", ".join(sorted(entry.name for entry in path.iterdir())) or "an empty directory"
        raise UserError(
            "directory holds no data",
            where=str(path),
            expected=f"train, validation and test files ({', '.join(READERS)}), or one written by save_to_disk",
            got=shorten(names),
        )
    return tables


def _load_saved_dataset(path: Path) -> dict[Split, Table]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError("not a readable datasets directory", where=str(path), got=_first_line(error)) from error
    return _dataset_tables(loaded, str(path))


def _load_hub(source: str) -> dict[Split, Table]:
    import datasets

    identifier, _, configuration = source.partition(":")
    is_reachable = hub_is_reachable()
    try:
        with _loading_datasets(cache_only=not is_reachable):
            loaded = datasets.load_dataset(identifier, configuration or None)
    except Exception as error:
        # Whatever the Hub client raises (offline, not found, gated, broken files), the reader typed one string.
        raise UserError(
            "data set not found",
            where=source,
            expected=(
                f"a local path (nothing at {Path(source).expanduser().absolute()}) or a Hub data set; "
                "without a network, the path of a local copy made with dataset.save_to_disk(path)"
            ),
            got=_first_line(error) if is_reachable else "not in the local cache, and the Hub does not answer",
        ) from error
    return _dataset_tables(loaded, source)


def _dataset_tables(loaded: Any, source: str) -> dict[Split, Table]:
    """Turns a `datasets.Dataset` or `DatasetDict` into tables."""
    if not isinstance(loaded, dict):
        return {"train": _dataset_table(loaded, source)}
    tables: dict[Split, Table] = {}
    for split, names in SPLIT_NAMES.items():
        present = [name for name in names if name in loaded]
        if present:
            tables[split] = _dataset_table(loaded[present[0]], f"{source}[{present[0]}]")
    if not tables:
        raise UserError("data set has no split of a known name", where=source, expected="train", got=", ".join(loaded))
    return tables


def _dataset_table(dataset: Any, source: str) -> Table:
    rows = list(dataset.with_format(None))
    if not rows:
        raise UserError("data set holds no examples", where=source, expected="at least one example", got="none")
    names = {
        column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    return Table(rows, source, range(1, len(rows) + 1), unit="row", class_names=names)


@contextmanager
def _loading_datasets(*, cache_only: bool) -> Iterator[None]:
    """Switches progress bars off, and the network where it would not answer; both are put back."""
    import datasets

    had_bars, was_offline = not datasets.are_progress_bars_disabled(), datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = was_offline or cache_only
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if had_bars:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", limit=200)
