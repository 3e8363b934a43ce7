"""What a host allows, also where there is none of its kind here: DeepSpeed, FSDP of version 1."""

from types import SimpleNamespace

import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llmrl import ScheduleController
from llmrl.live.capabilities import Distribution, check_deepspeed_config, find_capabilities, find_distribution
from llmrl.live.optimizers import RateSetter, innermost


def host(kind, *, processes=2, fsdp2=False, config=None):
    """An accelerator as the controller sees it."""
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        num_processes=processes,
        is_fsdp2=fsdp2,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config or {})),
        scaler=None,
        clip_grad_norm_=lambda parameters, limit: None,
        unscale_gradients=lambda optimizer: None,
    )


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [
        (host("NO", processes=1), "single"),
        (host("MULTI_GPU"), "ddp"),
        (host("MULTI_CPU"), "ddp"),
        (host("FSDP", fsdp2=True), "fsdp2"),
        (host("DEEPSPEED", config={"zero_optimization": {"stage": 2}}), "deepspeed"),
    ],
)
def test_the_accelerator_says_how_the_model_is_shared(accelerator, expected):
    assert find_distribution(torch.nn.Linear(1, 1), accelerator, 2).value == expected


@pytest.mark.parametrize(
    ("accelerator", "told"),
    [
        (host("FSDP"), "fsdp_version: 2"),
        (host("XLA"), "XLA"),
        (host("MEGATRON_LM"), "MEGATRON_LM"),
        (host("DEEPSPEED", config={"zero_optimization": {"stage": 3}}), "ZeRO-3"),
        (host("DEEPSPEED", config={"scheduler": {"type": "WarmupLR"}}), "has a scheduler"),
    ],
)
def test_a_host_that_cannot_be_steered_is_refused(accelerator, told):
    with pytest.raises(UserError, match=told):
        find_distribution(torch.nn.Linear(1, 1), accelerator, 2)


def test_a_deepspeed_configuration_without_a_scheduler_is_welcome():
    check_deepspeed_config({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}})


def test_deepspeed_leaves_moving_the_level_and_cooling_down():
    layer = torch.nn.Linear(1, 1)
    found = find_capabilities(
        Distribution.DEEPSPEED, layer, has_layers=True, max_grad_norm=1.0, keeps_snapshots=True, is_adam=True
    )
    assert found.choices == {UpdateChoice.NONE, UpdateChoice.COOLDOWN}
    assert "inside the backward pass" in found.describe()


class FlatAdam:
    """Steps as DeepSpeed's ZeRO optimizer: inside `backward`, on one flat float32 copy of the parameters."""

    def __init__(self, parameters, rate):
        self.parameters = list(parameters)
        flat = torch.cat([p.detach().flatten() for p in self.parameters]).float()
        self.flat = torch.nn.Parameter(flat)
        self.optimizer = torch.optim.AdamW([self.flat], lr=rate, weight_decay=0.0)

    def backward(self, loss):
        loss.backward()
        self.flat.grad = torch.cat([p.grad.flatten() for p in self.parameters])
        self.optimizer.step()
        self.flat.grad = None
        offset = 0
        with torch.no_grad():
            for p in self.parameters:
                p.copy_(self.flat[offset : offset + p.numel()].view_as(p))
                p.grad = None
                offset += p.numel()


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def test_a_job_that_steps_inside_backward_is_steered_as_another(monkeypatch):
    """The same job with and without such an optimizer: no step is counted as skipped, and the rates agree.

    In a flat partition the updates of vectors are known by their number alone.
    """
    rates = {}
    for kind in ("DEEPSPEED", "NO"):
        model = tiny()
        late = kind == "DEEPSPEED"
        optimizer = FlatAdam(model.parameters(), 1e-4) if late else torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.0)  # fmt: skip
        controller = ScheduleController.from_pretrained("hold")
        controller.attach(model, optimizer, host(kind, processes=1), total_steps=12, max_grad_norm=None)
        for number in range(12):
            batch = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(number))
            loss = model(input_ids=batch, labels=batch).loss
            if late:
                optimizer.backward(loss)
                controller.before_step(loss.detach())
                controller.after_step()
            else:
                loss.backward()
                controller.job.before_step(loss.detach(), None)
                optimizer.step()
                controller.after_step()
                optimizer.zero_grad()
        records = controller.records
        assert not any("skipped_steps" in record.events for record in records)
        assert (not late) or all("llmrl/gradient_norm" not in controller.metrics(record) for record in records)
        rates[kind] = [record.learning_rate for record in records]
    assert rates["DEEPSPEED"] == pytest.approx(rates["NO"], rel=5e-3)


def test_adapters_under_deepspeed_are_refused():
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="LoRA under DeepSpeed"):
        ScheduleController.from_pretrained("hold").attach(
            model, FlatAdam([p for p in model.parameters() if p.requires_grad], 1e-4), host("DEEPSPEED"), total_steps=8
        )


def test_adapters_over_quantised_weights_are_refused():
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            module.base_layer.weight = torch.nn.Parameter(weight.detach().to(torch.uint8), requires_grad=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(UserError, match="quantised"):
        ScheduleController.from_pretrained("hold").attach(model, torch.optim.AdamW(trained), total_steps=8)


def test_rates_that_are_tensors_stay_the_tensors_that_they_are():
    weight = torch.nn.Parameter(torch.ones(2))
    rate = torch.tensor(1e-3)
    optimizer = torch.optim.AdamW([weight], lr=rate, foreach=False)
    RateSetter(optimizer).set(0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.5


def test_wrappers_are_taken_off():
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    assert innermost(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))) is inner
