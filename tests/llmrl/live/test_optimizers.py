"""Which optimizers are steered, how their update is measured, and what the others are told."""

from types import SimpleNamespace

import prodigyopt
import pytest
import schedulefree
import torch
from llmrl_envs.errors import UserError

from llmrl import ScheduleController
from llmrl.live.optimizers import check_optimizer, skip_unless, take_steps_again

STEPS = 24


def parameters():
    return [torch.nn.Parameter(torch.ones(4, 4))]


def of_module(name, base=torch.optim.AdamW, **groups):
    """A class that looks as if it came from that package."""
    kind = type("AdamW8bit", (base,), {"__module__": name})
    return kind([{"params": parameters(), **groups}])


def renamed(name, base):
    return type(name, (base,), {})(parameters())


@pytest.mark.parametrize(
    ("optimizer", "source"),
    [
        (torch.optim.AdamW(parameters()), "moments"),
        (torch.optim.Adam(parameters()), "moments"),
        (renamed("FusedAdam", torch.optim.NAdam), "moments"),
        (torch.optim.AdamW(parameters(), amsgrad=True), "difference"),
        (torch.optim.NAdam(parameters()), "difference"),
        (torch.optim.RAdam(parameters()), "difference"),
        (renamed("Lion", torch.optim.SGD), "difference"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.optim.Optimizer) else value,
)
def test_adams_own_update_is_read_from_its_moments_and_others_from_what_they_change(optimizer, source):
    assert check_optimizer(optimizer) == source


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (prodigyopt.Prodigy(parameters()), "chooses its own learning rates.*Prodigy"),
        (schedulefree.AdamWScheduleFree(parameters()), "chooses its own learning rates.*AdamWScheduleFree"),
        (schedulefree.RAdamScheduleFree(parameters()), "chooses its own learning rates"),
        (of_module("galore_torch.adamw", rank=8, update_proj_gap=50, scale=0.25), "in a projection"),
        (of_module("bitsandbytes.optim"), "not quantised"),
        (of_module("torchao.optim.adam"), "not quantised"),
        (torch.optim.SGD(parameters(), lr=0.1), "not known before it steps.*SGD"),
        (torch.optim.Adagrad(parameters()), "not known before it steps"),
    ],
    ids=["prodigy", "schedule-free", "radam-schedule-free", "low-rank", "bitsandbytes", "torchao", "sgd", "adagrad"],
)
def test_what_cannot_be_steered_is_refused_by_name(optimizer, told):
    with pytest.raises(UserError, match=f"(?s){told}"):
        check_optimizer(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Adamax])
def test_relatives_of_adam_move_by_the_level(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 32, bias=False)
    start = model.weight.detach().clone()
    controller = ScheduleController.from_pretrained("hold")
    controller.attach(model, kind(model.parameters(), lr=1e-9), total_steps=STEPS)
    optimizer = controller.job._optimizer
    for step in range(STEPS):
        loss = (model(torch.randn(8, 32, generator=torch.Generator().manual_seed(step))) - 1).square().mean()
        loss.backward()
        controller.before_step(loss)
        before = model.weight.detach().clone()
        optimizer.step()
        moved = float((model.weight.detach() - before).norm() / before.norm())
        controller.after_step()
        optimizer.zero_grad()
        if step == 15:
            assert moved == pytest.approx(0.0025 * (STEPS - step) / (STEPS - 1), rel=0.4)
    assert not torch.equal(start, model.weight)


def test_an_update_that_is_the_change_of_the_weights_is_refused_where_the_step_is_over_by_then():
    model = torch.nn.Linear(2, 2)
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value="DEEPSPEED"),
        num_processes=2,
        is_fsdp2=False,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})),
    )
    with pytest.raises(UserError, match="under DeepSpeed only the update of Adam"):
        ScheduleController.from_pretrained("hold").attach(
            model, torch.optim.NAdam(model.parameters()), accelerator, total_steps=8
        )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [bool, torch.tensor])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(fused, kind):
    steered, plain = parameters(), parameters()
    optimizers = [torch.optim.AdamW(one, fused=fused) for one in (steered, plain)]
    for finite in (True, False, True):
        for one in (steered, plain):
            one[0].grad = torch.full((4, 4), 2.0 if finite else float("nan"))
        skip_unless(kind(finite), optimizers[0], steered, scaled=False)
        optimizers[0].step()
        take_steps_again(optimizers[0])
        if finite:
            optimizers[1].step()
    assert torch.equal(steered[0], plain[0])
    states = [optimizer.state[one[0]] for optimizer, one in zip(optimizers, (steered, plain), strict=True)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_step_that_is_finite_takes_back_that_one_before_was_not():
    """A host may not have told that it was over."""
    optimizer = torch.optim.AdamW(parameters(), fused=True)
    skip_unless(False, optimizer, [], scaled=False)
    assert float(optimizer.found_inf) == 1.0
    skip_unless(True, optimizer, [], scaled=False)
    assert not hasattr(optimizer, "found_inf")
