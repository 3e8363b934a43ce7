"""A policy in a Trainer where several things come together: what was asked for, and an interruption."""

import io

import pytest
import torch
from torch.optim import AdamW
from transformers import EarlyStoppingCallback, TrainerCallback

from llmrl import ScheduleCallback
from llmrl.controller import ScheduleController
from llmrl.hosts.schedule_lr import ScheduleLR
from llmrl.policy import hold_policy

SAVED = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def rates(trainer):
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def test_the_last_step_of_an_epoch_may_have_fewer_batches(make_trainer):
    """24 batches an epoch, 5 a step: the fifth has four, and the loss of a step is its mean all the same."""
    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback], gradient_accumulation_steps=5, num_train_epochs=3, max_steps=-1)
    trainer.train()
    records = callback.controller.records
    assert trainer.state.global_step == records[-1].step == 15
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    for record in records:
        mean = sum(losses[record.decision.step : record.step]) / (record.step - record.decision.step)
        assert record.train_loss == pytest.approx(mean, rel=1e-3)


def test_the_best_model_is_the_same_after_an_interruption_and_stopping_early(make_trainer):
    arguments = {
        **SAVED, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": False,
    }  # fmt: skip

    def make(folder):
        stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=0.5)
        return make_trainer([ScheduleCallback("hold"), stopping], folder=folder, **arguments)

    whole = make("whole")
    whole.train()
    expected = weights(whole).clone()
    assert whole.state.global_step == 8  # two evaluations, the second not better by 0.5
    again = make("again")
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert again.state.global_step == 8
    assert again.state.best_metric == whole.state.best_metric
    assert torch.equal(weights(again), expected)
    assert rates(again) == rates(whole)


def test_groups_keep_the_ratio_of_their_rates_after_an_interruption(make_trainer):
    def make(folder):
        plain = make_trainer([], folder="unused")
        layers = [p for name, p in plain.model.named_parameters() if "layers" in name]
        others = [p for name, p in plain.model.named_parameters() if "layers" not in name]
        optimizer = AdamW([{"params": layers, "lr": 1e-5}, {"params": others, "lr": 3e-6}, {"params": []}])
        callback = ScheduleCallback("hold")
        return make_trainer([callback], folder=folder, optimizers=(optimizer, None), **SAVED), optimizer

    whole, _ = make("whole")
    whole.train()
    expected = weights(whole).clone()
    again, optimizer = make("again")
    ratios = []
    again.add_callback(Watch(lambda: ratios.append(optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"])))
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-8")
    assert ratios == pytest.approx([0.3] * 16)
    assert torch.equal(weights(again), expected)


class Watch(TrainerCallback):
    """Looks at something before each step."""

    def __init__(self, look):
        self.look = look

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.look()


def attached():
    model = torch.nn.Linear(3, 3)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    controller = ScheduleController(hold_policy())
    scheduler = ScheduleLR(optimizer, controller)
    controller.attach(model, optimizer, total_steps=20)
    scheduler.show(controller.job.rates())
    return optimizer, scheduler


def test_a_step_of_the_scheduler_changes_nothing_however_often_it_is_called():
    """accelerate calls it once for each process."""
    optimizer, scheduler = attached()
    before = optimizer.param_groups[0]["lr"], scheduler.get_last_lr()
    for _ in range(5):
        scheduler.step()
    assert (optimizer.param_groups[0]["lr"], scheduler.get_last_lr()) == before


def test_the_state_in_a_checkpoint_needs_no_pickle():
    _, scheduler = attached()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == scheduler.state_dict().keys()
