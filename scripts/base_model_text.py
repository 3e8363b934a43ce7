"""What base models are pretrained on: the standard library without what the built-in corpora are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from base_model_networks import BOS, EOS
from llmrl_envs.builtin import corpus_topics, load_corpus
from llmrl_envs.builtin.corpora import topic_files

MAX_FILE_BYTES = 256_000
VALIDATION_PERIOD = 40
DISTINCT_CHARACTERS = 40
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
SUFFIXES = frozenset({".py", ".rst", ".html"})


def pretraining_text(library: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the standard library without the built-in topics.

    Returns:
        Training and validation tokens, int16[N]; every `VALIDATION_PERIOD`-th file is for validation.
    """
    excluded_files = {path for topic in corpus_topics() for path in topic_files(topic, library)}
    excluded_texts = [path.read_bytes() for path in sorted(excluded_files)] + [
        document.encode("utf-8")
        for topic in corpus_topics()
        for documents in load_corpus(topic).values()
        for document in documents
    ]
    excluded_lines = {line for text in excluded_texts for line in _long_lines(text)}
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    files = [path for path in library_files(library) if path not in excluded_files]
    for index, path in enumerate(files):
        tokens = _file_tokens(path, excluded_lines)
        if tokens is not None:
            parts[index % VALIDATION_PERIOD == VALIDATION_PERIOD - 1].append(tokens)
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def library_files(library: Path) -> list[Path]:
    """Text files of the standard library in an order that no file system has a say in; nothing that is per machine."""
    relative = [path.relative_to(library) for path in library.rglob("*") if path.suffix in SUFFIXES]
    kept = [
        path
        for path in relative
        if SKIPPED_FOLDERS.isdisjoint(path.parts) and not path.parts[0].startswith(("_sysconfigdata", "config-"))
    ]
    return [library / path for path in sorted(kept, key=lambda path: path.as_posix())]


def _long_lines(content: bytes) -> list[bytes]:
    return [line.strip() for line in content.split(b"\n") if len(line.strip()) >= DISTINCT_CHARACTERS]


def _file_tokens(path: Path, excluded_lines: set[bytes]) -> np.ndarray | None:
    """`bos bytes eos` of one file; None if it is empty or not UTF-8."""
    content = path.read_bytes()[:MAX_FILE_BYTES].replace(b"\r\n", b"\n")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    content = b"\n".join(line for line in content.split(b"\n") if line.strip() not in excluded_lines)
    if not content.strip():
        return None
    return np.concatenate([[BOS], np.frombuffer(content, dtype=np.uint8), [EOS]]).astype(np.int16)
