"""A base model and corpora that need no download: `model: builtin`, `data: builtin:json`.

`builtin:json` and its like are texts for language modelling; `builtin:summaries` has prompts with completions and
`builtin:modules` texts with labels, see `labelled.py`.
"""

from __future__ import annotations

from pathlib import Path

from llmrl_envs.builtin.corpora import corpus_topics, load_corpus
from llmrl_envs.builtin.labelled import example_sets, load_examples

__all__ = ["builtin_model_path", "corpus_topics", "example_sets", "load_corpus", "load_examples"]


def builtin_model_path() -> Path:
    """Folder of the built-in model and its tokenizer, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"
