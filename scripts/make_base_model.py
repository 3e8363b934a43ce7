#!/usr/bin/env python
"""Pretrain small byte-level models: the built-in one, a Llama of 218 thousand parameters, in 20 minutes on one core.

    python scripts/make_base_model.py                              # the model that ships, with its seed and steps
    python scripts/make_base_model.py --output base --minutes 5
    python scripts/make_base_model.py --output base --quick        # a few seconds; the result is of no use
    python scripts/make_base_model.py --output bases/gpt2-120k --architecture gpt2 --hidden 48 --layers 3 \
        --steps 1500 --batch-size 8 --stages 0.05 0.3 1            # bases/gpt2-120k-s5, -s30, -s100

It learns from the standard library of the Python that runs it: sources and documentation, **without** every file
and every long line that a built-in corpus (`llmrl_envs.builtin.corpora`) is made of, so that fine-tuning on
`builtin:json` is fine-tuning on text that the model has not seen. Nothing is downloaded.

Runs with the same Python, torch, machine type, seed and number of steps give the same bytes. `--minutes` chooses the
number of steps by measuring the machine's speed and prints it, because it cannot be known beforehand. With `--stages`
the model is kept at these shares of the training, as it is then, and training stops at the last one.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from llmrl_envs.builtin import builtin_model_path, corpus_topics, load_corpus
from llmrl_envs.builtin.corpora import topic_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD, BOS, EOS, MASK = 256, 257, 258, 259
MASK_TOKEN = "<|mask|>"
MASKED_SHARE = 0.15
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

    architecture: str = "llama"
    hidden_size: int = 64
    num_layers: int = 4
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


def build_tokenizer(architecture: str) -> Tokenizer:
    """One token a byte, token id = byte, and special tokens behind them; no merges.

    Nothing is added to a text but for BERT, which reads `bos text eos` and has a token for what is masked.
    """
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if architecture == "bert":
        tokenizer.add_special_tokens([MASK_TOKEN])
        _, bos, eos = SPECIAL_TOKENS
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} $B:1 {eos}:1", special_tokens=[(bos, BOS), (eos, EOS)]
        )
    return tokenizer


def _llama(recipe: Recipe) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 11 // 4,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def _gpt2(recipe: Recipe) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=256 + len(SPECIAL_TOKENS),
        n_positions=MAX_POSITIONS,
        n_embd=recipe.hidden_size,
        n_layer=recipe.num_layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config)


def _bert(recipe: Recipe) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=257 + len(SPECIAL_TOKENS),
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
    )
    return BertForMaskedLM(config)


ARCHITECTURES: dict[str, Callable[[Recipe], PreTrainedModel]] = {"llama": _llama, "gpt2": _gpt2, "bert": _bert}
RESIDUAL_ENDS = ("o_proj.weight", "down_proj.weight", "c_proj.weight", "output.dense.weight")
"""Names of the matrices whose result is added to the residual stream."""


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The architecture with weights drawn from a generator of its own, so that the global one is left alone."""
    model = ARCHITECTURES[recipe.architecture](recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    residual_scale = (2 * recipe.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = residual_scale if name.endswith(RESIDUAL_ENDS) else 1.0
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


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def model_loss(model: PreTrainedModel, batch: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mean loss in nats per token: of the next one, or for BERT of `MASKED_SHARE` of them, which it does not see."""
    if not isinstance(model, BertForMaskedLM):
        return model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]
    is_masked = torch.from_numpy(rng.random(batch.shape) < MASKED_SHARE)
    return model(  # type: ignore[no-any-return]
        input_ids=batch.masked_fill(is_masked, MASK),
        attention_mask=torch.ones_like(batch),
        labels=batch.masked_fill(~is_masked, -100),
    ).loss


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, batch: torch.Tensor, recipe: Recipe, rng: np.random.Generator
) -> float:
    """One optimizer step; the mean loss in nats per token before it."""
    loss = model_loss(model, batch, rng)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(
    model: PreTrainedModel,
    tokens: np.ndarray,
    validation: np.ndarray,
    recipe: Recipe,
    stages: Collection[int],
    keep: Callable[[int, float], None],
) -> None:
    """Train in place, up to the last stage.

    Args:
        model: What to train.
        tokens: For training, int16[N].
        validation: For validation, int16[M].
        recipe: How.
        stages: Steps after which the model is kept.
        keep: Called at each of them with the step and the validation loss, nats per token.
    """
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    model.train()
    start = time.monotonic()
    for step in range(max(stages)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe)
        loss = train_step(model, optimizer, window_batch(tokens, recipe.batch_size, rng), recipe, rng)
        if (step + 1) % max(1, recipe.steps // 40) == 0:
            seconds = time.monotonic() - start
            print(
                f"step {step + 1}/{recipe.steps}  train {loss:.3f}  validation {evaluate(model, validation):.3f}"
                f"  {(step + 1) * recipe.batch_size * CONTEXT_BYTES / seconds:,.0f} bytes/s",
                flush=True,
            )
        if step + 1 in stages:
            keep(step + 1, evaluate(model, validation, num_windows=512))


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: np.ndarray, num_windows: int = 64) -> float:
    """Mean loss in nats per token over windows that are evenly spaced in `tokens`."""
    was_training = model.training
    model.eval()
    starts = np.linspace(0, len(tokens) - CONTEXT_BYTES, num_windows).astype(int)
    windows = np.stack([tokens[start : start + CONTEXT_BYTES] for start in starts]).astype(np.int64)
    rng = np.random.default_rng(0)
    losses = [float(model_loss(model, batch, rng)) for batch in torch.from_numpy(windows).split(32)]
    model.train(was_training)
    return float(np.mean(losses))


def steps_in(minutes: float, tokens: np.ndarray, recipe: Recipe) -> int:
    """How many steps fit into `minutes` here, from a short trial on a model that is thrown away."""
    model = build_model(recipe)
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    num_trials = 12
    for trial in range(num_trials):
        if trial == 2:  # the first two pay for allocation
            start = time.monotonic()
        train_step(model, optimizer, window_batch(tokens, recipe.batch_size, rng), recipe, rng)
    return max(1, int(minutes * 60 * (num_trials - 2) / (time.monotonic() - start)))


# ----------------------------------------------------------------------------------------------------------- saving


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
    parser.add_argument("--stages", type=float, nargs="+", help="keep OUTPUT-sPERCENT at these shares of the steps")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default=Recipe.architecture)
    parser.add_argument("--hidden", type=int, default=Recipe.hidden_size, help="hidden size")
    parser.add_argument("--layers", type=int, default=Recipe.num_layers)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size, help="windows of a step")
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
    recipe = Recipe(
        architecture=options.architecture,
        hidden_size=options.hidden,
        num_layers=options.layers,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        learning_rate=options.learning_rate,
    )
    if options.quick or options.minutes is not None:
        steps = 20 if options.quick else steps_in(options.minutes, tokens, recipe)
        recipe = replace(recipe, steps=steps)
        print(f"--steps {steps} gives this model again")
    outputs = {recipe.steps: options.output}
    if options.stages:
        outputs = {
            max(1, round(share * recipe.steps)): options.output.with_name(f"{options.output.name}-s{100 * share:g}")
            for share in options.stages
        }
    model = build_model(recipe)

    def keep(step: int, loss: float) -> None:
        write_folder(model, recipe, len(tokens), step, loss, outputs[step])

    train(model, tokens, validation, recipe, outputs, keep)


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


if __name__ == "__main__":
    sys.exit(main())
