"""Tiny random models and tokenizers, built here: nothing is downloaded."""

import json

import pytest
import torch
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import FineTuningTask
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
VOCABULARY = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(*, adds_bos=False, is_encoder=False, **settings):
    """One token a byte; token id = 4 + place in the sorted byte alphabet."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if is_encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="<s>:0 $A:0 </s>:0", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    defaults = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if is_encoder:
        defaults["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**defaults, **settings})


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def vocabulary():
    return VOCABULARY


@pytest.fixture(scope="session")
def chat_template():
    return CHAT_TEMPLATE


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Writes a tiny random model of a kind, with its tokenizer, once; returns the directory."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                _KINDS[kind]().save_pretrained(made[kind])
            build_tokenizer(is_encoder=kind in {"bert", "deberta"}).save_pretrained(made[kind])
        return made[kind]

    return make


_KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **TOKENS, max_position_embeddings=64)),
    "bert": lambda: BertModel(BertConfig(**SMALL, **HEADS, max_position_embeddings=32)).half(),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, **HEADS, **TOKENS, max_position_embeddings=34)),
    "deberta": lambda: DebertaV2Model(DebertaV2Config(**SMALL, **HEADS, position_biased_input=False)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=len(VOCABULARY), n_positions=48, n_embd=16, n_layer=1, n_head=2)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.fixture
def write_lines(tmp_path):
    """Writes examples as JSON lines; returns the path."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def job_library():
    """Tiny models and data, loaded once for all tests: every session starts from the initial weights anyway."""
    return JobLibrary("cpu")


@pytest.fixture(scope="session")
def make_job(make_model, job_library, tmp_path_factory):
    """A tiny job: completions of uneven lengths for decoders, three classes for encoders.

    Who changes the model itself asks for one of its own.
    """
    folder = tmp_path_factory.mktemp("job_data")

    def make(kind="llama", *, own_model=False, **settings):
        objective = "classification" if kind == "bert" else "instruction"
        path = folder / f"{objective}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in _ROWS[objective]))
        defaults = {
            "model": str(make_model(kind)), "objective": objective, "data": str(path), "steps": 12, "batch_size": 4,
            "max_length": 24, "validation_examples": 10, "test_examples": 6, "evaluation_batch_size": 4,
            "learning_rate": 3e-3,
        }  # fmt: skip
        library = JobLibrary("cpu") if own_model else job_library
        return library.job(FineTuningTask(**{**defaults, **settings}))

    return make


_ROWS = {
    "instruction": [
        {"prompt": f"say {letter}:", "completion": " " + letter * (1 + (7 * i) % 12)}
        for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    ],
    "classification": [
        {"text": f"{'abc'[i % 3] * (1 + i % 7)} {i}", "label": ("first", "second", "third")[i % 3]} for i in range(60)
    ],
}
