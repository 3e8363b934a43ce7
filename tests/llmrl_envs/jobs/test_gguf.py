"""A .gguf file, written here, is trained like any other model."""

import numpy as np
import pytest
import torch
from llmrl_envs.jobs.models import load_model, load_tokenizer, save_model
from llmrl_envs.jobs.task import FineTuningTask
from transformers import AutoModelForCausalLM

gguf = pytest.importorskip("gguf")

WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 2, 1


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, vocabulary):
    """A tiny random Llama with blockwise quantised (Q8_0) linear weights."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = [*vocabulary, "ab", "cd"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    for name, shape in tensor_shapes(len(tokens)).items():
        values = rng.normal(size=shape).astype(np.float32) * 0.1
        if len(shape) == 1 or "token_embd" in name:
            writer.add_tensor(name, values + (len(shape) == 1))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_shapes(num_tokens):
    shapes = {
        "token_embd.weight": (num_tokens, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (num_tokens, WIDTH),
    }
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}.weight"] = (WIDTH, WIDTH)
    for name in ("ffn_gate", "ffn_up"):
        shapes[f"blk.0.{name}.weight"] = (HIDDEN, WIDTH)
    shapes |= {"blk.0.ffn_down.weight": (WIDTH, HIDDEN)}
    return shapes | {"blk.0.attn_norm.weight": (WIDTH,), "blk.0.ffn_norm.weight": (WIDTH,)}


def test_a_gguf_file_trains_and_is_saved_as_a_plain_model(gguf_file, tmp_path, capfd):
    task = FineTuningTask(data="builtin:json", model=str(gguf_file), max_length=32)
    tokenizer = load_tokenizer(task.model)
    loaded = load_model(task, num_labels=None, device="cpu", tokenizer=tokenizer)
    assert capfd.readouterr() == ("", "")
    assert {parameter.dtype for parameter in loaded.trainable.values()} == {torch.float32}
    inputs = torch.tensor([tokenizer("hello")["input_ids"]])
    loaded.model(input_ids=inputs, labels=inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.trainable.values())
    save_model(loaded, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=inputs).logits, loaded.model(input_ids=inputs).logits)


def test_a_gguf_file_takes_adapters(gguf_file):
    task = FineTuningTask(data="builtin:json", model=str(gguf_file), max_length=32, mode="lora")
    loaded = load_model(task, num_labels=None, device="cpu")
    assert loaded.trainable_fraction < 0.5
    assert all(".lora_" in name for name in loaded.trainable)
