"""Tokenizer, architectures and first weights of base models, and the recipe that decides them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
CONTEXT_BYTES = 256
MAX_POSITIONS = 512


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
