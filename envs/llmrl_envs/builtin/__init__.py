"""A base model and corpora that need no download: `model: builtin`, `data: builtin:json`."""

from __future__ import annotations

from pathlib import Path

from llmrl_envs.builtin.corpora import corpus_topics, load_corpus

__all__ = ["builtin_model_path", "corpus_topics", "load_corpus"]


def builtin_model_path() -> Path:
    """Folder of the built-in model and its tokenizer, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"
