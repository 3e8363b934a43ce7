"""A policy in a Trainer when things are not as in the examples: losses that break, streams, interruptions."""

from types import SimpleNamespace

import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from llmrl import ScheduleCallback
from llmrl.policy import hold_policy


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Watch(TrainerCallback):
    """Notes the weights after each step, and breaks off where it is told to."""

    def __init__(self, stop_at=None):
        self.weights = []
        self.stop_at = stop_at

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def breaking(base, at, factor):
    """A Trainer whose losses are multiplied in some micro-batches."""

    class Breaking(base):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if not self.model.training:
                return loss
            self.calls += 1
            return loss * factor if self.calls - 1 in at else loss

    return Breaking


@pytest.mark.parametrize("limit", [1.0, 0.0])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_is_not_finite_is_not_taken(make_trainer, in_order, limit, optim):
    """One micro-batch of two breaks, of the sixth step."""
    callback, watch = ScheduleCallback("hold"), Watch()
    trainer = make_trainer(
        [callback, watch], trainer=breaking(in_order, {11}, float("nan")), gradient_accumulation_steps=2, max_steps=12,
        max_grad_norm=limit, optim=optim,
    )  # fmt: skip
    trainer.train()
    events = [record.events.get("skipped_steps", 0) for record in callback.controller.records]
    assert events == [0, 0, 1, 0, *[0] * (len(events) - 4)]
    changed = [not torch.equal(a, b) for a, b in zip(watch.weights[:-1], watch.weights[1:], strict=True)]
    assert changed == [True] * 4 + [False] + [True] * 6
    assert torch.isfinite(weights(trainer)).all()
    rows = [row for row in trainer.state.log_history if "llmrl/event_skipped_steps" in row]
    assert sum(row["llmrl/event_skipped_steps"] for row in rows) == 1


@pytest.mark.parametrize("skips", [False, True])
def test_a_spike_and_a_job_that_only_breaks_are_events_in_the_log(make_trainer, in_order, skips):
    callback = ScheduleCallback(hold_policy(ScheduleSettings(skip_outliers=skips)))
    wrong = {24: 30.0} | dict.fromkeys(range(30, 60), float("inf"))

    class Wrong(in_order):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs) * wrong.get(self.calls - 1, 1.0)

    trainer = make_trainer([callback], trainer=Wrong, task={"steps": 60})
    trainer.train()
    rows = [row for row in trainer.state.log_history if "llmrl/level" in row]
    stands_out = "llmrl/event_skipped_steps" if skips else "llmrl/event_spike"
    assert next(row["step"] for row in rows if row[stands_out] > 0) == 28
    assert skips or not any(row["llmrl/event_skipped_steps"] for row in rows if row["step"] <= 28)
    assert not skips or not any(row["llmrl/event_spike"] for row in rows)
    assert [row["step"] for row in rows if row["llmrl/event_fallback"]] == [44]
    assert callback.controller.job.loop.schedule.fallen_back[0]


def test_a_fraction_of_an_epoch_is_a_whole_schedule(make_trainer):
    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback], num_train_epochs=0.5, max_steps=-1)
    trainer.train()
    records = callback.controller.records
    assert records[-1].step == trainer.state.global_step == 12
    # a twelfth of the peak by the base alone
    assert records[-1].learning_rate < 0.3 * max(record.learning_rate for record in records)


def test_a_stream_with_max_steps_is_steered(make_trainer):
    rows = make_trainer([]).train_dataset

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows

    made = make_trainer([], max_steps=12)
    callback = ScheduleCallback("hold")
    trainer = Trainer(model=made.model, args=made.args, train_dataset=Stream(), callbacks=[callback])
    trainer.train()
    assert callback.controller.records[-1].step == 12


def test_a_job_that_was_interrupted_while_clipping_was_tight_gives_the_norm_back(make_trainer, scripted):
    watch = Watch(stop_at=6)
    trainer = make_trainer([ScheduleCallback(scripted(["tighten"])), watch], max_steps=12)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.args.max_grad_norm < 1.0
    watch.stop_at = None
    trainer.train()
    assert trainer.args.max_grad_norm == 1.0


def test_a_batch_that_does_not_fit_is_halved_and_the_schedule_starts_again(make_trainer, in_order):
    class Small(in_order):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 1:
                raise RuntimeError("CUDA out of memory. ")
            return super().training_step(model, inputs, *args, **kwargs)

    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback], trainer=Small, auto_find_batch_size=True, max_steps=12)
    trainer.train()
    assert callback.controller.records[-1].step == 12


def test_weights_alone_can_be_resumed(make_trainer):
    """`save_only_model` keeps no scheduler: the job goes on from there under a fresh controller."""
    first = make_trainer([ScheduleCallback("hold")], save_strategy="steps", save_steps=6, save_only_model=True)
    first.train()
    callback = ScheduleCallback("hold")
    again = make_trainer([callback], folder="again")
    again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-6")
    assert callback.controller.records[0].decision.step == 6
    assert again.state.global_step == 24


def test_a_sequence_to_sequence_trainer_is_steered(tmp_path):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    rows = [{"input_ids": [5 + i % 7, 6, 7], "labels": [8 + i % 5, 1]} for i in range(64)]
    callback = ScheduleCallback("hold")
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=16, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, learning_rate=1e-9, predict_with_generate=True, eval_strategy="steps", eval_steps=8,
        ),
        train_dataset=rows, eval_dataset=rows[:8], callbacks=[callback],
        data_collator=DataCollatorForSeq2Seq(SimpleNamespace(padding_side="right", pad=pad), model=model),
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert (weights(trainer) - before).norm() / before.norm() > 1e-3
    assert callback.controller.job.capabilities.choices
    assert len(callback.controller.records) > 3


def pad(features, **kwargs):
    """A tokenizer's `pad` for rows of one length."""
    return {name: torch.tensor([row[name] for row in features]) for name in features[0]}


@pytest.mark.parametrize(
    ("config", "told"),
    [({"scheduler": {"type": "WarmupLR"}}, "has a scheduler"), ({"zero_optimization": {"stage": 3}}, "ZeRO-3")],
)
def test_what_deepspeed_would_do_to_the_rates_is_refused_when_the_trainer_is_made(make_trainer, in_order, config, told):
    class DeepSpeed(in_order):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin = SimpleNamespace(deepspeed_config=config)
            state = SimpleNamespace(deepspeed_plugin=plugin)
            self.is_deepspeed_enabled = True
            self.accelerator = SimpleNamespace(state=state, unwrap_model=self.accelerator.unwrap_model)

    with pytest.raises(UserError, match=told):
        make_trainer([ScheduleCallback("hold")], trainer=DeepSpeed)
