"""Rotary embeddings of a population against the models' own function."""

import pytest
import torch
from llmrl_envs.jobs.population.conversion import convert_model
from llmrl_envs.jobs.population.rotary import Rotary
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

OWN = modeling_llama.apply_rotary_pos_emb
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64}


def heads_of(generator, batch, heads, length, width):
    """As a projection gives them: the heads of a position lie next to each other."""
    x = torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2)
    return x.requires_grad_()


def replaced(model):
    """Modules of the stacked model with a forward pass of their own."""
    stacked = convert_model(model, dict(model.named_parameters()), "model").model
    assert not any("forward" in vars(module) for module in model.modules())
    return sum("forward" in vars(module) for module in stacked.modules())


@pytest.mark.parametrize("num_keys", [1, 2, 4])
@pytest.mark.parametrize("batch_of_angles", [1, 3])
def test_values_and_gradients_equal_those_of_the_models_own_function(num_keys, batch_of_angles):
    generator = torch.Generator().manual_seed(num_keys)
    rotary = Rotary(OWN)
    for length in (1, 5, 7):
        q, k = (heads_of(generator, 3, heads, length, 6) for heads in (4, num_keys))
        cos, sin = torch.randn(2, batch_of_angles, length, 6, generator=generator)
        for _ in range(2):  # the second layer of a pass finds the tables of the first
            found, expected = rotary(q, k, cos, sin), OWN(q, k, cos, sin)
            noise = [torch.randn(y.shape, generator=generator) for y in expected]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            slopes = [
                torch.autograd.grad(sum((y * n).sum() for y, n in zip(ys, noise, strict=True)), (q, k))
                for ys in (found, expected)
            ]
            torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_other_forms_go_to_the_models_own_function():
    generator = torch.Generator().manual_seed(0)
    q, k = (heads_of(generator, 2, 2, 4, 8).detach() for _ in range(2))
    cos, sin = torch.randn(2, 1, 4, 8, generator=generator)
    for arguments in ((q, k, cos.double(), sin.double()), (q.bfloat16(), k.bfloat16(), cos, sin)):
        torch.testing.assert_close(Rotary(OWN)(*arguments), OWN(*arguments), rtol=0, atol=0)
    by_position = (q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    found = Rotary(OWN)(*by_position, unsqueeze_dim=2)
    torch.testing.assert_close(found, OWN(*by_position, unsqueeze_dim=2), rtol=0, atol=0)


def test_attention_of_a_stacked_model_uses_it_where_the_formula_is_the_same(monkeypatch):
    assert replaced(LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))) == 3
    assert replaced(Qwen2ForCausalLM(Qwen2Config(**SMALL, **HEADS, num_key_value_heads=1))) == 3
    assert replaced(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=48, n_embd=16, n_layer=2, n_head=2))) == 0
    # Neighbours instead of halves.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_cohere.apply_rotary_pos_emb)
    assert replaced(LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))) == 0


def test_a_forward_pass_that_was_replaced_already_is_left_alone():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))
    attention: nn.Module = model.model.layers[0].self_attn
    attention.forward = attention.forward
    stacked = convert_model(model, dict(model.named_parameters()), "model").model
    assert stacked.model.layers[0].self_attn.forward.__func__ is type(attention).forward
