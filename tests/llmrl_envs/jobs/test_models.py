"""Models: what is loaded, what is trained, and what is said when it cannot be."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs import model_files
from llmrl_envs.jobs.models import load_model, load_tokenizer, position_limit, save_model
from llmrl_envs.jobs.task import FineTuningTask
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def load(path, *, num_labels=None, **settings):
    task = FineTuningTask(**{"data": "builtin:json", "model": str(path), "max_length": 32, **settings})
    return load_model(task, num_labels=num_labels, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def test_every_weight_of_a_language_model_is_trained_in_float32(make_model):
    loaded = load(make_model("llama"))
    assert not loaded.model.training
    assert list(loaded.trainable) == [name for name, _ in loaded.model.named_parameters()]
    assert {parameter.dtype for parameter in loaded.trainable.values()} == {torch.float32}
    assert loaded.trainable_fraction == 1.0
    assert loaded.num_parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.model.config.use_cache is False


def test_a_half_precision_file_is_trained_in_float32(make_model):
    loaded = load(make_model("bert"), objective="classification", num_labels=3)
    assert {parameter.dtype for parameter in loaded.trainable.values()} == {torch.float32}


@pytest.mark.parametrize(("kind", "mode"), [("llama", "lora"), ("bert", "full"), ("bert", "lora"), ("llama", "full")])
def test_new_weights_start_the_same_and_leave_the_global_generator_alone(make_model, kind, mode):
    settings = {"mode": mode}
    if kind == "bert":
        settings |= {"objective": "classification", "num_labels": 3}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(make_model(kind), **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = load(make_model(kind), **settings)
    assert list(first.trainable) == list(second.trainable)
    states = zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in states)


def test_adapters_are_trained_and_nothing_else(make_model):
    loaded = load(make_model("llama"), mode="lora", lora={"rank": 2, "target_modules": ["q_proj"]})
    assert all("q_proj.lora_" in name for name in loaded.trainable)
    assert len(loaded.trainable) == 4
    assert 0 < loaded.trainable_fraction < 0.2
    assert torch.equal(logits(loaded.model), logits(load(make_model("llama")).model))


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "deberta", "gpt2"])
def test_a_classifier_with_adapters_trains_its_head_too(make_model, kind):
    loaded = load(make_model(kind), mode="lora", objective="classification", num_labels=5)
    heads = [name for name in loaded.trainable if "modules_to_save" in name]
    adapters = [name for name in loaded.trainable if ".lora_" in name]
    assert heads
    assert sorted(heads + adapters) == sorted(loaded.trainable)
    output = loaded.model(**BATCH, labels=torch.tensor([0, 4]))
    assert output.logits.shape == (2, 5)
    output.loss.backward()
    assert all(parameter.grad is not None for name, parameter in loaded.trainable.items() if name in heads)


def test_a_decoder_classifies_at_the_last_token_that_is_no_padding(make_model):
    model = load(make_model("llama"), objective="classification", num_labels=2).model
    alone = model(input_ids=torch.tensor([[9, 10]]), attention_mask=torch.ones(1, 2, dtype=torch.int64)).logits
    assert torch.allclose(logits(model)[1:], alone, atol=1e-6)


def test_a_saved_model_is_read_by_from_pretrained(make_model, tmp_path):
    loaded = load(make_model("llama"))
    with torch.no_grad():
        loaded.trainable["model.norm.weight"].mul_(1.5)
    save_model(loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded.model))
    assert again.config.use_cache is True
    assert loaded.model.config.use_cache is False
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


def test_a_saved_adapter_is_read_on_top_of_its_base(make_model, tmp_path):
    loaded = load(make_model("llama"), mode="lora")
    with torch.no_grad():
        for parameter in loaded.trainable.values():
            parameter.add_(0.1)
    save_model(loaded, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(again), logits(loaded.model), atol=1e-6)


def test_a_saved_classifier_knows_its_labels(make_model, tmp_path):
    loaded = load(make_model("bert"), objective="classification", num_labels=2)
    save_model(loaded, tmp_path, label_names=("no", "yes"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(logits(again), logits(loaded.model))


def test_a_classifier_is_trained_on_or_gets_a_head_for_other_classes(make_model, tmp_path):
    first = load(make_model("bert"), objective="classification", num_labels=2)
    with torch.no_grad():
        first.trainable["classifier.weight"].mul_(3.0)
    save_model(first, tmp_path)
    same = load(tmp_path, objective="classification", num_labels=2)
    assert torch.equal(logits(same.model), logits(first.model))
    assert logits(load(tmp_path, objective="classification", num_labels=5).model).shape == (2, 5)


def test_the_built_in_model_trains():
    loaded = load("builtin")
    assert loaded.num_parameters < 500_000
    assert loaded.tokenizer.pad_token_id is not None


@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({"pad_token": None}, "</s>"),
        ({"pad_token": None, "eos_token": None}, "<unk>"),
        ({"pad_token": None, "eos_token": None, "unk_token": None, "bos_token": None}, "<pad>"),
    ],
)
def test_a_tokenizer_without_a_pad_token_gets_one_that_it_has(make_tokenizer, make_model, tmp_path, settings, pad):
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    made = make_tokenizer(**settings)
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == len(made)
    assert logits(load(tmp_path, objective="classification", num_labels=2).model).shape == (2, 2)


def test_a_long_document_is_tokenised_without_a_warning(make_tokenizer, make_model, tmp_path, caplog):
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    make_tokenizer(model_max_length=8).save_pretrained(tmp_path)
    code = f"from llmrl_envs.jobs.models import load_tokenizer; load_tokenizer({str(tmp_path)!r})('x' * 99)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == ""


def test_loading_says_nothing(make_model, capfd):
    load(make_model("bert"), objective="classification", num_labels=3, mode="lora")
    assert capfd.readouterr() == ("", "")


def problem(path, **settings):
    with pytest.raises(UserError) as caught:
        load(path, **settings)
    return caught.value


@pytest.mark.parametrize(("kind", "limit"), [("llama", 64), ("gpt2", 48), ("bert", 32), ("roberta", 33)])
def test_a_length_beyond_the_model_s_positions_is_told(make_model, kind, limit):
    settings = {} if kind in ("llama", "gpt2") else {"objective": "classification", "num_labels": 2}
    model = load(make_model(kind), max_length=limit, **settings).model
    assert torch.isfinite(model(input_ids=torch.full((1, limit), 9)).logits).all()
    error = problem(make_model(kind), max_length=limit + 1, **settings)
    assert error.expected == f"at most {limit} tokens"
    assert error.got == limit + 1


def test_relative_positions_have_no_limit(make_model):
    load(make_model("deberta"), max_length=4096, objective="classification", num_labels=2)
    assert position_limit(LlamaConfig(max_position_embeddings=77)) == 77


def test_a_missing_path_is_told_with_its_neighbour(make_model, tmp_path):
    shutil.copytree(make_model("llama"), tmp_path / "llama")
    error = problem(tmp_path / "lama")
    assert error.what == "model not found"
    assert f"did you mean {tmp_path / 'llama'}?" in error.got
    assert problem(tmp_path / "lama.gguf").what == "model not found"


def test_a_directory_that_is_no_model_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    error = problem(tmp_path)
    assert (error.what, error.got) == ("not a model directory", "notes.txt")
    (tmp_path / "weights.gguf").write_text("x")
    assert str(tmp_path / "weights.gguf") in problem(tmp_path).expected
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in problem(tmp_path).what
    assert problem(tmp_path / "notes.txt").what == "not a model"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", "{", "configuration"),
        ("config.json", "{}", "configuration"),
        ("config.json", '{"model_type": "nonsense"}', "configuration"),
        ("model.safetensors", "nonsense", "weights"),
        ("model.safetensors", None, "weights"),
        ("tokenizer.json", "{", "tokenizer"),
    ],
)
def test_a_broken_model_file_is_told(make_model, tmp_path, name, content, part):
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    error = problem(tmp_path)
    assert error.what == f"the model's {part} cannot be loaded"
    assert error.where == str(tmp_path)


def test_pickled_weights_are_not_read(make_model, tmp_path):
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    torch.save(load(tmp_path).model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert "safetensors" in problem(tmp_path).expected


def test_an_unreachable_hub_id_is_told(monkeypatch):
    monkeypatch.setattr(model_files, "hub_is_reachable", lambda: False)
    error = problem("nobody/nothing")
    assert error.what == "model not found"
    assert error.where == "nobody/nothing"
    assert "local cache" in error.got


def test_reading_gguf_names_the_package_that_it_needs(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    assert problem(tmp_path / "model.gguf").expected == "pip install 'llmrl[gguf]'"


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_a_model_that_does_not_write_from_left_to_right_is_told(make_model, kind):
    error = problem(make_model(kind))
    assert "language_modeling" in error.what
    assert error.got == f"model type {kind!r}"


def test_a_tokenizer_of_another_model_is_told(make_model, make_tokenizer, tmp_path):
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path)
    make_tokenizer(pad_token="<extra>").save_pretrained(tmp_path)
    assert problem(tmp_path).what == "the tokenizer does not belong to the model"


def test_unknown_adapter_targets_are_told_with_those_there_are(make_model):
    error = problem(make_model("llama"), mode="lora", lora={"target_modules": ["query"]})
    assert error.where == "lora.target_modules"
    assert "q_proj" in error.expected


def test_a_classifier_needs_its_number_of_classes(make_model):
    with pytest.raises(ValueError, match="num_labels"):
        load(make_model("bert"), objective="classification")


def test_the_configuration_on_disk_stays_as_it_is(make_model):
    path = make_model("llama") / "config.json"
    before = path.read_text()
    load(path.parent, objective="classification", num_labels=2)
    assert path.read_text() == before
    assert "use_cache" in json.loads(before)
