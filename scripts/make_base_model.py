#!/usr/bin/env python
"""Pretrain the built-in base model: a byte-level Llama of 218 thousand parameters, in about 20 minutes on one core.

    python scripts/make_base_model.py                              # the model that ships, with its seed and steps
    python scripts/make_base_model.py --output base --minutes 5
    python scripts/make_base_model.py --output base --quick        # a few seconds; the result is of no use

It learns from the standard library of the Python that runs it: sources and documentation, **without** every file
and every long line that a built-in corpus (`llmrl_envs.builtin.corpora`) is made of, so that fine-tuning on
`builtin:json` is fine-tuning on text that the model has not seen. Nothing is downloaded.

Runs with the same Python, torch, machine type, seed and number of steps give the same bytes. `--minutes` chooses the
number of steps by measuring the machine's speed and prints it, because it cannot be known beforehand.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from llmrl_envs.builtin import builtin_model_path, corpus_topics, load_corpus
from llmrl_envs.builtin.corpora import topic_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD, BOS, EOS = 256, 257, 258
CONTEXT_BYTES = 256
MAX_POSITIONS = 512
ROPE_THETA = 10_000.0
MAX_FILE_BYTES = 256_000
VALIDATION_PERIOD = 40
DISTINCT_CHARACTERS = 40
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
SUFFIXES = frozenset({".py", ".rst", ".html"})


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; the defaults made the one that ships."""

    steps: int = 4_000
    batch_size: int = 16
    learning_rate: float = 5e-3
    warmup_fraction: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0


# ------------------------------------------------------------------------------------------------------------- text


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


# ------------------------------------------------------------------------------------------------ tokenizer and model


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level `tokenizer.json`.

    Printable Latin-1 stands for itself; the other 68 bytes, in order, are the characters from U+0100 on. This is the
    alphabet of GPT-2 (Radford et al. 2019), which the `ByteLevel` decoder inverts.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def build_tokenizer() -> Tokenizer:
    """One token a byte, token id = byte, and three special tokens behind them; no merges, nothing added to a text."""
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def build_model(seed: int) -> LlamaForCausalLM:
    """The architecture with weights drawn from a generator of its own, so that the global one is left alone."""
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    residual_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.nn.init.normal_(parameter, std=0.05 * scale, generator=generator)
    return model


# --------------------------------------------------------------------------------------------------------- training


def window_batch(tokens: np.ndarray, batch_size: int, rng: np.random.Generator) -> torch.Tensor:  # int64[B, L]
    """Windows of `CONTEXT_BYTES` tokens that begin anywhere."""
    starts = rng.integers(0, len(tokens) - CONTEXT_BYTES, size=batch_size)
    return torch.from_numpy(np.stack([tokens[start : start + CONTEXT_BYTES] for start in starts]).astype(np.int64))


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear to zero at the last step."""
    warmup = max(1, round(recipe.steps * recipe.warmup_fraction))
    return min((step + 1) / warmup, (recipe.steps - step) / max(1, recipe.steps - warmup))


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: torch.Tensor, recipe: Recipe) -> float:
    """One optimizer step; the mean loss in nats per token before it."""
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(model: LlamaForCausalLM, tokens: np.ndarray, validation: np.ndarray, recipe: Recipe) -> float:
    """Train in place.

    Returns:
        Validation loss at the end, nats per token.
    """
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    model.train()
    start = time.monotonic()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe)
        loss = train_step(model, optimizer, window_batch(tokens, recipe.batch_size, rng), recipe)
        if (step + 1) % max(1, recipe.steps // 40) == 0:
            seconds = time.monotonic() - start
            print(
                f"step {step + 1}/{recipe.steps}  train {loss:.3f}  validation {evaluate(model, validation):.3f}"
                f"  {(step + 1) * recipe.batch_size * CONTEXT_BYTES / seconds:,.0f} bytes/s",
                flush=True,
            )
    return evaluate(model, validation, num_windows=512)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: np.ndarray, num_windows: int = 64) -> float:
    """Mean loss in nats per token over windows that are evenly spaced in `tokens`."""
    was_training = model.training
    model.eval()
    starts = np.linspace(0, len(tokens) - CONTEXT_BYTES, num_windows).astype(int)
    windows = np.stack([tokens[start : start + CONTEXT_BYTES] for start in starts]).astype(np.int64)
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in torch.from_numpy(windows).split(32)]
    model.train(was_training)
    return float(np.mean(losses))


def steps_in(minutes: float, tokens: np.ndarray, recipe: Recipe) -> int:
    """How many steps fit into `minutes` here, from a short trial on a model that is thrown away."""
    model = build_model(recipe.seed)
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    num_trials = 12
    for trial in range(num_trials):
        if trial == 2:  # the first two pay for allocation
            start = time.monotonic()
        train_step(model, optimizer, window_batch(tokens, recipe.batch_size, rng), recipe)
    return max(1, int(minutes * 60 * (num_trials - 2) / (time.monotonic() - start)))


# ----------------------------------------------------------------------------------------------------------- saving


def save(model: LlamaForCausalLM, output: Path) -> None:
    """A folder that `from_pretrained` of transformers 4.46 to 5 loads."""
    model.eval()
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    _write_json(output / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    build_tokenizer().save(str(output / "tokenizer.json"))
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
        },
    )
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    # Transformers 4 reads the first of each pair, transformers 5 the second.
    config |= {"rope_theta": ROPE_THETA, "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"}}
    config |= {"torch_dtype": "float32", "dtype": "float32"}
    _write_json(output / "config.json", config)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def topic_losses(model: LlamaForCausalLM) -> dict[str, float]:
    """Loss on the test split of each built-in topic, nats per byte, before any fine-tuning."""
    losses = {}
    for topic in corpus_topics():
        text = "".join(load_corpus(topic)["test"]).encode("utf-8")
        losses[topic] = evaluate(model, np.frombuffer(text, dtype=np.uint8).astype(np.int16))
    return losses


def model_card(model: LlamaForCausalLM, recipe: Recipe, num_bytes: int, loss: float) -> str:
    """README.md of the model folder, with the figures of this run."""
    rows = "\n".join(f"| `builtin:{topic}` | {value:.3f} |" for topic, value in topic_losses(model).items())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = recipe.steps * recipe.batch_size * CONTEXT_BYTES
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The built-in base model

A Llama over bytes, small enough to ship with the package and to be fine-tuned on one CPU core in seconds. It exists
so that learned fine-tuning schedules can be tried and tested with no download. It is of no other use.

- {num_parameters:,} parameters: {model.config.num_hidden_layers} layers, hidden size {model.config.hidden_size},
  {model.config.num_attention_heads} heads, tied embeddings, {MAX_POSITIONS} positions.
- Tokenizer: one token a byte (id = byte), `{"`, `".join(SPECIAL_TOKENS)}`; decoding gives back exactly the text
  that was encoded.
- Pretrained on {num_bytes / 1e6:.1f} MB of the standard library of CPython {platform.python_version()} (sources,
  docstrings, tests) **without the files and long lines of the built-in corpora**: {recipe.steps:,} steps of
  {recipe.batch_size} windows of {CONTEXT_BYTES} bytes, {trained / 1e6:.1f} million bytes in all; AdamW,
  learning rate {recipe.learning_rate:g}, warm-up over {recipe.warmup_fraction:.0%}, then linear to zero;
  seed {recipe.seed}.
- Loss on files held out from pretraining: **{loss:.3f} nats per byte** (uniform guessing: 5.557).
- Made with `python scripts/make_base_model.py --steps {recipe.steps} --seed {recipe.seed}`, torch {torch.__version__},
  transformers {transformers.__version__}.

Licence: the weights are under Apache-2.0. The text that they were trained on is part of CPython and is under the
Python Software Foundation licence; none of it is in this folder.

Loss before fine-tuning on the test split of each built-in topic, windows of {CONTEXT_BYTES} bytes:

| topic | nats per byte |
|---|---|
{rows}
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; `--help` shows this file's first lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=builtin_model_path(), help="folder to write, replaced if there")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=Recipe.steps, help=f"training steps (default {Recipe.steps})")
    length.add_argument("--minutes", type=float, help="as many steps as fit into this time on this machine")
    length.add_argument("--quick", action="store_true", help="20 steps, to see that it works")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Gather the text, train, save."""
    options = parse_arguments(arguments)
    torch.set_num_threads(1)  # a model this small gains nothing from more, and sums then have one order
    torch.use_deterministic_algorithms(True)
    tokens, validation = pretraining_text(Path(sysconfig.get_path("stdlib")))
    print(f"{len(tokens) / 1e6:.1f} MB for training, {len(validation) / 1e6:.2f} MB for validation")
    recipe = Recipe(steps=options.steps, seed=options.seed, learning_rate=options.learning_rate)
    if options.quick or options.minutes is not None:
        steps = 20 if options.quick else steps_in(options.minutes, tokens, recipe)
        recipe = Recipe(steps=steps, seed=options.seed, learning_rate=options.learning_rate)
        print(f"--steps {steps} gives this model again")
    model = build_model(recipe.seed)
    loss = train(model, tokens, validation, recipe)
    if options.output.exists():
        shutil.rmtree(options.output)
    options.output.mkdir(parents=True)
    save(model, options.output)
    (options.output / "README.md").write_text(model_card(model, recipe, len(tokens), loss), encoding="utf-8")
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{loss:.3f} nats per byte on held-out files; {size / 1e6:.2f} MB in {options.output}")


if __name__ == "__main__":
    sys.exit(main())
