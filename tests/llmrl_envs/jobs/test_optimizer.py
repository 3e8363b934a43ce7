"""AdamW as the session wants it, and the adapters that it finds."""

import pytest
import torch
from llmrl_envs.jobs.optimizer import build_optimizer, low_rank_pairs
from llmrl_envs.jobs.task import OptimizerSettings
from torch import nn


def parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    return dict(model.named_parameters())


def step(optimizer, members, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    for parameter in members.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_weight_decay_is_for_matrices_alone():
    members = parameters()
    before = {name: p.detach().clone() for name, p in members.items()}
    optimizer = build_optimizer(members, OptimizerSettings(weight_decay=0.5))
    step(optimizer, members, 0.1)
    for name, parameter in members.items():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_settings_reach_the_optimizer_and_every_parameter_is_in_it_once():
    members = parameters()
    optimizer = build_optimizer(members, OptimizerSettings(betas=(0.8, 0.95), eps=1e-6))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, members.values()))
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"], group["fused"]) == ((0.8, 0.95), 1e-6, 0.0, True)


def test_nothing_moves_until_a_rate_is_set():
    members = parameters()
    before = {name: p.detach().clone() for name, p in members.items()}
    optimizer = build_optimizer(members, OptimizerSettings(weight_decay=0.5))
    for parameter in members.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in members.items())


def test_the_adapters_of_a_model_are_found_with_what_they_adapt(make_job):
    job = make_job(mode="lora", lora={"rank": 4, "alpha": 12.0})
    pairs = low_rank_pairs(job.loaded.model)
    assert {id(part) for pair in pairs for part in (pair.a, pair.b)} == {id(p) for p in job.loaded.trainable.values()}
    layers = [m for m in job.loaded.model.modules() if hasattr(m, "lora_A")]
    assert len(pairs) == len(layers) > 0
    for pair, layer in zip(pairs, layers, strict=True):
        assert pair.scaling == 3.0
        assert (pair.b @ pair.a).shape == layer.base_layer.weight.shape
        assert pair.weight_norm == pytest.approx(float(layer.base_layer.weight.detach().norm()), rel=1e-5)


def test_a_model_without_adapters_has_no_pairs(make_job):
    assert low_rank_pairs(make_job().loaded.model) == ()
