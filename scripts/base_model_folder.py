"""Base models as folders that `from_pretrained` loads, with a card."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from base_model_networks import (
    BOS,
    CONTEXT_BYTES,
    EOS,
    MASK_TOKEN,
    MAX_POSITIONS,
    PAD,
    SPECIAL_TOKENS,
    Recipe,
    build_tokenizer,
)
from base_model_training import evaluate
from llmrl_envs.builtin import corpus_topics, load_corpus
from transformers import PreTrainedModel

ROPE_THETA = 10_000.0


def save(model: PreTrainedModel, output: Path, architecture: str) -> None:
    """A folder that `from_pretrained` of transformers 4.46 to 5 loads."""
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    is_bert = architecture == "bert"
    if not is_bert:
        _write_json(output / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    build_tokenizer(architecture).save(str(output / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    _write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "pad_token": pad,
            "bos_token": bos,
            "eos_token": eos,
            **({"mask_token": MASK_TOKEN} if is_bert else {}),
        },
    )
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    # Transformers 4 reads the first of each pair, transformers 5 the second.
    if architecture == "llama":
        config |= {"rope_theta": ROPE_THETA, "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"}}
    config |= {"torch_dtype": "float32", "dtype": "float32"}
    _write_json(output / "config.json", config)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def topic_losses(model: PreTrainedModel) -> dict[str, float]:
    """Loss on the test split of each built-in topic, nats per byte, before any fine-tuning."""
    losses = {}
    for topic in corpus_topics():
        text = "".join(load_corpus(topic)["test"]).encode("utf-8")
        losses[topic] = evaluate(model, np.frombuffer(text, dtype=np.uint8).astype(np.int16))
    return losses


SHIPPED = """\
A Llama over bytes, small enough to ship with the package and to be fine-tuned on one CPU core in seconds. It exists
so that learned fine-tuning schedules can be tried and tested with no download. It is of no other use."""
MADE = """\
A relative of the built-in base model, made so that schedule policies learn on more than one size, architecture and
stage of pretraining. It is of no other use."""


def _of_steps(recipe: Recipe, step: int) -> str:
    return f"{step:,}" if step == recipe.steps else f"the first {step:,} of {recipe.steps:,}"


def _options(recipe: Recipe, step: int) -> str:
    """The command line of a recipe."""
    options = {
        "architecture": recipe.architecture,
        "hidden": recipe.hidden_size,
        "layers": recipe.num_layers,
        "batch-size": recipe.batch_size,
        "learning-rate": recipe.learning_rate,
    }
    usual = {**options, **dict(zip(options, ("llama", 64, 4, 16, 5e-3), strict=True))}
    changed = [f"--{name} {value}" for name, value in options.items() if value != usual[name]]
    stage = [f"--stages {step / recipe.steps:g}"] if step != recipe.steps else []
    return " ".join([*changed, f"--steps {recipe.steps} --seed {recipe.seed}", *stage])


def model_card(model: PreTrainedModel, recipe: Recipe, num_bytes: int, step: int, loss: float) -> str:
    """README.md of the model folder, with the figures of this run."""
    built_in = recipe == Recipe() and step == recipe.steps
    rows = "\n".join(f"| `builtin:{topic}` | {value:.3f} |" for topic, value in topic_losses(model).items())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = step * recipe.batch_size * CONTEXT_BYTES
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {"The built-in base model" if built_in else f"A small {recipe.architecture} over bytes"}

{SHIPPED if built_in else MADE}

- {num_parameters:,} parameters: {recipe.num_layers} layers, hidden size {recipe.hidden_size},
  2 heads, tied embeddings, {MAX_POSITIONS} positions.
- Tokenizer: one token a byte (id = byte), `{"`, `".join(SPECIAL_TOKENS)}`; decoding gives back exactly the text
  that was encoded.
- Pretrained on {num_bytes / 1e6:.1f} MB of the standard library of CPython {platform.python_version()} (sources,
  docstrings, tests) **without the files and long lines of the built-in corpora**: {_of_steps(recipe, step)} steps of
  {recipe.batch_size} windows of {CONTEXT_BYTES} bytes, {trained / 1e6:.1f} million bytes in all; AdamW,
  learning rate {recipe.learning_rate:g}, warm-up over {recipe.warmup_fraction:.0%}, then linear to zero;
  seed {recipe.seed}.
- Loss on files held out from pretraining: **{loss:.3f} nats per byte** (uniform guessing: 5.557).
- Made with `python scripts/make_base_model.py {_options(recipe, step)}`, torch {torch.__version__},
  transformers {transformers.__version__}.

Licence: the weights are under Apache-2.0. The text that they were trained on is part of CPython and is under the
Python Software Foundation licence; none of it is in this folder.

Loss before fine-tuning on the test split of each built-in topic, windows of {CONTEXT_BYTES} bytes:

| topic | nats per byte |
|---|---|
{rows}
"""


def write_folder(model: PreTrainedModel, recipe: Recipe, num_bytes: int, step: int, loss: float, output: Path) -> None:
    """Writes a model and its card; a folder of that name is whole or not there."""
    unfinished = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save(model, unfinished, recipe.architecture)
    (unfinished / "README.md").write_text(model_card(model, recipe, num_bytes, step, loss), encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    unfinished.rename(output)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{loss:.3f} nats per byte on held-out files; {size / 1e6:.2f} MB in {output}", flush=True)
