"""A policy in a loop of one's own: what `before_step` and `after_step` do to a job, and what goes into a checkpoint."""

import dataclasses
import logging

import pytest
import torch
from accelerate import Accelerator
from llmrl_envs.builtin import builtin_model_path
from llmrl_envs.errors import UserError
from transformers import AutoModelForCausalLM

from llmrl import ScheduleController
from llmrl.policy import hold_policy

STEPS = 24


class Loop:
    """A job over random bytes, steered."""

    def __init__(self, policy, *, rate=1e-5, steps=STEPS, model=None, fused=False, accelerator=None, **options):
        self.model = AutoModelForCausalLM.from_pretrained(builtin_model_path()) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, fused=fused)
        if accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        attach = {key: options.pop(key) for key in ("max_grad_norm", "first_step") if key in options}
        self.controller = ScheduleController(policy, **options)
        self.capabilities = self.controller.attach(self.model, self.optimizer, accelerator, total_steps=steps, **attach)
        self.rates = []

    def step(self, number, *, factor=1.0):
        batch = torch.randint(97, 110, (2, 16), generator=torch.Generator().manual_seed(number))
        loss = self.model(input_ids=batch, labels=batch).loss * factor
        loss.backward()
        self.controller.before_step(loss)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.controller.after_step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()

    def events(self):
        return [record.events for record in self.controller.records]


@pytest.fixture
def hold():
    return ScheduleController.from_pretrained("hold").policy


def test_a_rate_that_is_far_too_low_is_no_obstacle(hold):
    losses = {}
    for rate in (1e-8, 1.0):
        loop = Loop(hold, rate=rate)
        losses[rate] = [loop.step(number % 4) for number in range(STEPS)]
    assert losses[1e-8] == pytest.approx(losses[1.0], rel=1e-4)
    assert losses[1e-8][-1] < losses[1e-8][0] - 1.0


def test_every_decision_is_reported_as_numbers(hold):
    rows = []
    loop = Loop(hold, on_decision=lambda record: rows.append((record.step, loop.controller.metrics(record))))
    for number in range(STEPS):
        loop.step(number)
    assert [step for step, _ in rows] == [2, 4, 6, 8, 12, 16, 20, 24]
    assert all(name.startswith("llmrl/") for _, row in rows for name in row)
    assert rows[-1][1]["llmrl/learning_rate"] == loop.rates[-1]


def test_steps_past_the_budget_change_nothing(hold):
    loop = Loop(hold, steps=4)
    for number in range(4):
        loop.step(number)
    before = loop.weights()
    loop.step(4)
    assert torch.equal(loop.weights(), before)


class Lion(torch.optim.Optimizer):
    """Steps by the sign of an average of gradients."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * average + 0.1 * p.grad).sign())
                average.mul_(0.99).add_(p.grad, alpha=0.01)


def test_an_optimizer_without_adams_moments_moves_by_the_level_too(hold):
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    optimizer = Lion(model.parameters(), lr=1e-6)
    controller = ScheduleController(hold)
    controller.attach(model, optimizer, total_steps=STEPS)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for number in range(STEPS):
        batch = torch.randint(97, 110, (2, 16), generator=torch.Generator().manual_seed(number))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        controller.before_step(loss)
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        if number == 1:
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            assert (after - before).norm() / before.norm() < 2 * 0.0025
    sizes = [record.step_size for record in controller.records]
    assert sizes[2] == pytest.approx(0.0025 * (STEPS - 5) / (STEPS - 1), rel=0.3)


@pytest.mark.parametrize("limit", [1.0, None])
def test_before_step_clips(hold, limit):
    loop = Loop(hold, max_grad_norm=limit)
    batch = torch.randint(97, 110, (2, 16), generator=torch.Generator().manual_seed(0))
    loop.model(input_ids=batch, labels=batch).loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in loop.model.parameters()]))
    loop.controller.before_step(1.0)
    clipped = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in loop.model.parameters()]))
    assert norm > 1.0
    assert float(clipped) == pytest.approx(min(limit or float(norm), float(norm)), rel=1e-3)


# -- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "loss"])
def test_a_step_that_is_not_finite_is_not_taken(hold, fused, factor):
    """The loss or its gradient breaks; "loss" breaks the loss alone, its gradients are finite."""
    loop = Loop(hold, fused=fused)
    loop.step(0)
    before = loop.weights()
    moments = [s["exp_avg"].clone() for s in loop.optimizer.state.values()]
    if factor == "loss":
        batch = torch.full((1, 8), 100)
        loop.model(input_ids=batch, labels=batch).loss.backward()
        loop.controller.before_step(float("inf"))
        loop.optimizer.step()
        loop.controller.after_step()
        loop.optimizer.zero_grad()
    else:
        loop.step(1, factor=factor)
    assert torch.equal(loop.weights(), before)
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, loop.optimizer.state.values(), strict=True))
    assert loop.events() == [{"skipped_steps": 1}]
    loop.step(2)
    assert not torch.equal(loop.weights(), before)


def test_a_spike_is_an_event(hold):
    loop = Loop(hold_policy(dataclasses.replace(hold.settings, skip_outliers=False)), steps=60)
    for number in range(20):
        loop.step(number % 2)
    loop.step(0, factor=50.0)
    for number in range(21, 40):
        loop.step(number % 2)
    spikes = [event for event in loop.events() if "spike" in event]
    assert len(spikes) == 1
    assert spikes[0]["spike"] > 6


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_rollback_takes_weights_and_moments_back_and_goes_on_in_the_data(scripted, place, tmp_path):
    """Decision 1 ends at its best; the two steps of decision 2 are undone by the rollback that follows."""
    loop = Loop(scripted(["hold", "hold", "hold", "rollback"]), snapshots=place, snapshot_folder=tmp_path)
    for _ in range(4):
        loop.step(0)
    best = loop.weights(), [s["exp_avg"].clone() for s in loop.optimizer.state.values()]
    loop.step(1, factor=3.0)
    loop.step(1, factor=3.0)
    assert torch.equal(loop.weights(), best[0])
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(best[1], loop.optimizer.state.values(), strict=True))
    assert loop.controller.job.step == 6
    loop.step(0)
    loop.step(0)
    assert loop.events()[-1]["rollback"]
    assert (list(tmp_path.glob("*.safetensors")) != []) == (place == "disk")


def test_a_rollback_undoes_damage(scripted):
    loop = Loop(scripted(["hold"] * 4 + ["rollback"]), snapshots="memory")
    for number in range(6):
        loop.step(number % 2)
    good = loop.weights()
    with torch.no_grad():
        for p in loop.model.parameters():
            p.add_(0.5)
    loop.step(0)
    bad = loop.weights()
    loop.step(1)
    assert loop.controller.records[-1].step == 8
    assert (loop.weights() - good).norm() < 0.01 * (bad - good).norm()


def test_a_job_that_loses_its_gain_falls_back_from_the_best_snapshot(hold):
    loop = Loop(hold, steps=100, snapshots="memory")
    for number in range(30):
        loop.step(number % 2)
    good = loop.weights()
    with torch.no_grad():
        for p in loop.model.parameters():
            p.mul_(-1.0)
    number = 30
    while not any("fallback" in event for event in loop.events()) and number < 90:
        loop.step(number % 2)
        number += 1
    assert loop.events()[-1] == {"fallback": True, "rollback": True} | loop.events()[-1]
    assert torch.linalg.vector_norm(loop.weights() - good) < 0.2 * torch.linalg.vector_norm(good)
    rates = []
    while number < 100:
        loop.step(number % 2)
        rates.append(loop.rates[-1])
        number += 1
    assert rates[-1] < 0.3 * rates[0]
    assert len({record.level for record in loop.controller.records if record.step > 60}) == 1
    assert loop.controller.job.loop.schedule.fallen_back[0]


def test_a_job_whose_every_step_breaks_falls_back(hold):
    loop = Loop(hold, steps=60)
    for number in range(4):
        loop.step(number)
    for number in range(4, 30):
        loop.step(number, factor=float("nan"))
    assert any("fallback" in event for event in loop.events())


# -- capabilities -----------------------------------------------------------------------------------------------------


def test_what_a_host_cannot_do_is_masked_and_said_once(scripted, caplog):
    policy = scripted(["tighten", "rollback"])
    policy.network = torch.nn.Identity()
    caplog.set_level(logging.INFO, logger="llmrl")
    loop = Loop(policy, max_grad_norm=None, snapshots="off")
    for number in range(6):
        loop.step(number)
    assert {choice.value for choice in loop.capabilities.masked} == {"rollback", "tighten"}
    told = [record.getMessage() for record in caplog.records if record.name == "llmrl"]
    assert len(told) == 1
    assert "tighten (gradients are not clipped)" in told[0]
    assert [record.decision.action_name for record in loop.controller.records] == ["hold", "hold", "hold"]


def test_a_compiled_model_is_recognised_and_its_layers_are_found(hold):
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    compiled = torch.compile(model, backend="eager")
    controller = ScheduleController(hold)
    found = controller.attach(compiled, torch.optim.AdamW(compiled.parameters(), lr=1e-4), total_steps=8)
    assert found.compiled
    assert [choice.value for choice in found.masked] == ["rollback"]
    assert not ScheduleController(hold).attach(model, torch.optim.AdamW(model.parameters()), total_steps=8).compiled


@pytest.mark.parametrize("wrap", ["compiled", "plain"])
def test_freezing_leaves_the_lower_half_alone(scripted, wrap):
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    loop = Loop(
        scripted(["hold", "freeze"]), model=torch.compile(model, backend="eager") if wrap == "compiled" else model
    )
    loop.step(0)
    loop.step(1)
    named = dict(model.named_parameters())
    low, high = named["model.layers.0.mlp.up_proj.weight"], named["model.norm.weight"]
    before = low.detach().clone(), high.detach().clone()
    loop.step(2)
    assert torch.equal(low, before[0])
    assert not torch.equal(high, before[1])
    assert low.requires_grad


def test_steps_lean_on_their_gradient_from_where_the_policy_says_and_the_optimizer_is_left_as_it_was(scripted):
    loops = [Loop(scripted(actions, table="lean"), steps=12) for actions in (["hold"], ["hold", "lean"])]
    for number in range(12):
        for loop in loops:
            loop.step(number)
        same = torch.equal(loops[0].weights(), loops[1].weights())
        assert same == (number < 2), number
        assert not loops[1].optimizer._optimizer_step_post_hooks
    mean = loops[1].optimizer.state[next(loops[1].model.parameters())]["exp_avg"]
    assert torch.isfinite(mean).all()


def test_a_job_that_was_interrupted_in_its_step_leaves_the_optimizers_next_steps_alone(scripted):
    loop = Loop(scripted(["lean"], table="lean"), steps=12)
    loop.step(0)
    loop.controller.before_step(torch.tensor(1.0))
    loop.controller.before_step(torch.tensor(1.0))
    assert len(loop.optimizer._optimizer_step_post_hooks) == 1
    loop.optimizer.step()
    assert not loop.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_is_not_leant_on(scripted, fused):
    loop = Loop(scripted(["lean"], table="lean"), steps=12, fused=fused)
    for number in range(4):
        loop.step(number)
    before = loop.weights()
    loop.step(4, factor=float("inf"))
    assert torch.equal(loop.weights(), before)
    loop.step(5)
    assert not torch.equal(loop.weights(), before)
    assert torch.isfinite(loop.weights()).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_whose_loss_stands_out_is_not_taken(hold, fused):
    loop = Loop(hold, steps=24, fused=fused)
    for number in range(12):
        loop.step(number % 4)
    before = loop.weights()
    loop.step(12, factor=20.0)
    assert torch.equal(loop.weights(), before)
    for number in range(13, 24):
        loop.step(number % 4)
    assert not torch.equal(loop.weights(), before)
    assert sum(events.get("skipped_steps", 0) for events in loop.events()) == 1


@pytest.mark.parametrize("guarded", [False, True])
def test_steps_whose_loss_stands_out_are_taken_where_a_policy_or_a_job_without_guards_says_so(hold, guarded):
    settings = dataclasses.replace(hold.settings, skip_outliers=not guarded)
    loop = Loop(hold_policy(settings), steps=24, guarded=guarded)
    for number in range(12):
        loop.step(number % 4)
    before = loop.weights()
    loop.step(12, factor=20.0)
    assert not torch.equal(loop.weights(), before)


def test_only_adam_can_lean(scripted):
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    policy = scripted(["lean"] * 4, table="lean")
    for kind, leans in ((torch.optim.Adam, True), (torch.optim.AdamW, True), (torch.optim.NAdam, False)):
        controller = ScheduleController(policy)
        found = controller.attach(model, kind(model.parameters(), lr=1e-4), total_steps=8)
        assert ("quasi_hyperbolic" not in [choice.value for choice in found.masked]) == leans
        assert controller.job.loop.schedule.leaning[0] == leans
        policy.seen.clear()


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("table", ["moves", "lean"])
def test_a_loop_goes_on_from_accelerates_checkpoint_bit_for_bit(scripted, tmp_path, place, table):
    actions = ["hold", "one_up", "rollback", "freeze", "tighten"] if table == "moves" else ["hold", "lean", "one_up"]
    accelerator = Accelerator(cpu=True)

    def fresh(name):
        options = {"snapshots": place, "snapshot_folder": tmp_path / name}
        made = Loop(scripted(actions, table=table), accelerator=accelerator, **options)
        accelerator.register_for_checkpointing(made.controller)
        return made

    whole = fresh("whole")
    for number in range(STEPS):
        if number == 7:
            accelerator.save_state(str(tmp_path / "state"))
        whole.step(number)
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    again = fresh("again")
    again.controller.policy.seen = [None] * 4
    accelerator.load_state(str(tmp_path / "state"))
    for number in range(7, STEPS):
        again.step(number)
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    assert torch.equal(whole.weights(), again.weights())
    assert whole.rates[7:] == again.rates


@pytest.mark.parametrize("total_steps", [None, 0, 2**62, "many"])
def test_a_job_of_unknown_length_is_asked_for_it(hold, total_steps):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="length is not known"):
        ScheduleController(hold).attach(model, torch.optim.AdamW(model.parameters()), total_steps=total_steps)


def test_an_optimizer_of_another_model_is_refused(hold):
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="does not train the parameters"):
        ScheduleController(hold).attach(model, torch.optim.AdamW(other.parameters()), total_steps=8)


def test_a_controller_without_a_job_says_so(hold):
    for call in (lambda c: c.before_step(1.0), lambda c: c.after_step(), lambda c: c.state_dict()):
        with pytest.raises(ValueError, match="attach"):
            call(ScheduleController(hold))


@pytest.mark.parametrize(
    ("options", "told"), [({"snapshots": "elsewhere"}, "unknown place"), ({"snapshots": "disk"}, "needs a place")]
)
def test_snapshots_need_a_place_that_there_is(hold, options, told):
    with pytest.raises(UserError, match=told):
        ScheduleController(hold, **options)
