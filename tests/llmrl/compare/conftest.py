"""A tiny random Llama, a tiny text, and comparisons of them."""

import json
from pathlib import Path

import pytest
import torch
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmrl.config import CompareConfig
from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy

VOCABULARY = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a random Llama of one layer with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(VOCABULARY)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two files of short lines that differ from each other."""
    folder = tmp_path_factory.mktemp("texts")
    lines = {
        "squares": [f"the square of {number} is {number * number}" for number in range(60)],
        "rhymes": [f"row {number}: hickory dickory dock" for number in range(60)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in lines}


@pytest.fixture(scope="session")
def make_config(tiny_model: Path, texts: dict[str, Path]):
    """Builds a comparison of both texts; keyword arguments replace its keys."""

    def make(**changes) -> CompareConfig:
        task = {
            "model": str(tiny_model), "steps": 8, "batch_size": 4, "max_length": 24, "learning_rate": 1e-2,
            "test_examples": 6, "validation_examples": 6,
        }  # fmt: skip
        values = {
            "tasks": [{**task, "name": name, "data": str(path)} for name, path in texts.items()],
            "methods": ["policy", "constant", "linear"],
            "learning_rate_factors": [0.1, 1, 10],
            "seeds": [0, 1],
            "oracle_factors": [0.3, 1, 3],
            "device": "cpu",
            "tracking": {"wandb": "disabled"},
        }
        return CompareConfig.model_validate({**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_policy():
    """Writes a policy with a random network; returns its folder."""

    def make(folder: Path, *, seed: int = 0, name: str = "tiny", actions: str = "moves", **settings) -> Path:
        table = action_table(actions)
        spec = ObservationSpec(table)
        config = NetworkConfig(obs_shape=(spec.size,), num_actions=table.num_actions, hidden_sizes=(8,))
        network = QNetwork(config, torch.Generator().manual_seed(seed))
        SchedulePolicy(table, spec, ScheduleSettings(**settings), network, {"name": name}).save_pretrained(folder)
        return folder

    return make
