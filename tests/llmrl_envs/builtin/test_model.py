from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmrl_envs.builtin import builtin_model_path, load_corpus
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.reference import given_rate_schedule
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "",
    " a  b \n\t.  , 's ?",
    "不 é \x00\x7f\x85\u2028 🎉\r\n end ",
    "<s> </s> <unk> ",
    "x" * 5000,
    "def f(x):\n\n",
]


@functools.cache
def load_tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model_path())


@pytest.fixture
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(builtin_model_path()).eval()


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_is_a_byte_and_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back(text):
    ids = load_tokenizer()(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert load_tokenizer().decode(ids) == text


def test_special_tokens(tokenizer, model):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == model.config.vocab_size == 259
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 256
    batch = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[97, 98, 256, 256], [97, 98, 99, 100]]


def test_it_is_small(model):
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert (builtin_model_path() / "model.safetensors").stat().st_size <= 2_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.max_position_embeddings == tokenizer_limit() == 512


def tokenizer_limit() -> int:
    return json.loads((builtin_model_path() / "tokenizer_config.json").read_text())["model_max_length"]


def test_both_generations_of_transformers_find_the_rotary_base():
    config = json.loads((builtin_model_path() / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_the_folder_holds_what_it_needs_and_no_pickle():
    names = {path.name for path in builtin_model_path().iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_it_has_learned_python_and_generates(model, tokenizer):
    prompt = tokenizer("import os\nimport sys\n\n\ndef main(argv):\n    for name in ", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "\n" in text
    assert text.isascii()


@torch.no_grad()
def test_unseen_text_is_far_from_uniform(model, tokenizer):
    text = "".join(load_corpus("json")["test"])[:2048]
    ids = torch.tensor(tokenizer(text)["input_ids"]).view(-1, 256)
    loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 1.9
    shuffled = ids[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    assert float(model(input_ids=shuffled, labels=shuffled).loss) > 2 * loss


@pytest.mark.slow
def test_making_it_again_gives_the_same_bytes(tmp_path):
    script = Path(__file__).parents[3] / "scripts" / "make_base_model.py"
    for name in ("first", "second"):
        command = [sys.executable, str(script), "--quick", "--output", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (builtin_model_path() / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "objective", "data"),
    [("gpt2", "language_modeling", "builtin:json"), ("bert", "classification", "builtin:kinds")],
)
def test_relatives_of_it_are_kept_at_stages_and_can_be_fine_tuned(tmp_path, architecture, objective, data):
    script = Path(__file__).parents[3] / "scripts" / "make_base_model.py"
    words = ["--architecture", architecture, "--hidden", "16", "--layers", "1", "--steps", "4", "--stages", "0.25", "1"]
    command = [sys.executable, str(script), "--output", str(tmp_path / "base"), *words]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base-s100", "base-s25"]
    early, late = (tmp_path / f"base-s{percent}" for percent in (25, 100))
    assert (early / "model.safetensors").read_bytes() != (late / "model.safetensors").read_bytes()
    assert "the first 1 of 4 steps" in (early / "README.md").read_text()
    task = FineTuningTask(model=str(late), objective=objective, data=data, steps=3, max_length=32)
    session = FineTuningSession(JobLibrary("cpu").job(task), seed=0)
    losses = session.run_interval(3, given_rate_schedule("constant", 3, 1e-3, 0.0)).loss
    assert torch.isfinite(torch.from_numpy(losses)).all()
