"""A policy in a Trainer: what it sees, the rates that train and are logged, what a Trainer may be asked for."""

import numpy as np
import prodigyopt
import pytest
import schedulefree
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.jobs.optimizer import build_optimizer
from llmrl_envs.jobs.task import FineTuningTask, SampledTask
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from llmrl import ScheduleCallback

ACTIONS = ("hold", "one_up", "one_up", "rollback", "freeze", "tighten", "two_down", "hold")
LEANING_ACTIONS = ("hold", "lean", "one_up", "hold", "hold", "cooldown", "hold", "hold")


class Rates(TrainerCallback):
    """Notes what stands in the optimizer when it steps."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("changes", "table"),
    [({}, "moves"), ({}, "lean"), ({"gradient_accumulation": 2}, "moves"), ({"mode": "lora"}, "moves"),
     ({"mode": "lora"}, "lean")],
    ids=str,
)  # fmt: skip
def test_a_trainer_shows_the_policy_what_the_environment_shows(make_trainer, changes, table, scripted, task_settings):
    """The same job, seed and actions: equal observations and equal learning rates.

    Both sum a batch's losses in another order, so that losses differ in their last bit; features that divide by a small
    difference of losses make more of that.
    """
    task = FineTuningTask.model_validate({**task_settings, **changes})
    env, actions = FineTuningEnv({"tasks": [task]}, actions=table), ACTIONS if table == "moves" else LEANING_ACTIONS
    seen = [env.reset(options={"job": SampledTask(task, 0, 1e-5, 3)})[0]]
    rates = []
    for name in actions:
        observation, _, terminated, _, _ = env.step(env.unwrapped._steering.schedule.table.names.index(name))
        seen.append(observation)
        rates.append(env._history.learning_rates[-1])
    assert terminated

    policy = scripted(actions, table=table)
    callback = ScheduleCallback(policy, snapshots="memory")
    trainer = make_trainer(
        [callback], task=changes, gradient_accumulation_steps=task.gradient_accumulation, weight_decay=0.01
    )
    trainer.optimizer = build_optimizer(trainer.job.loaded.trainable, task.optimizer)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-5
    trainer.train()
    records = callback.controller.records
    np.testing.assert_allclose([record.learning_rate for record in records], rates, rtol=1e-6)
    # A step's own gradient differs in its last bits where the mean of ten does not.
    close = {"rtol": 1e-6, "atol": 1e-5} if table == "moves" else {"rtol": 1e-3, "atol": 1e-3}
    for index in range(len(actions)):
        np.testing.assert_allclose(policy.seen[index], seen[index], **close, err_msg=str(index))
    assert [record.decision.action_name for record in records] == list(actions)
    mine = torch.cat([p.detach().flatten() for p in env.unwrapped._session._parameters.values()])
    trained = torch.cat([p.detach().flatten() for p in trainer.job.loaded.trainable.values()])
    torch.testing.assert_close(trained, mine, rtol=1e-3, atol=1e-5)


def test_the_rate_that_is_logged_is_the_one_that_trained(make_trainer, scripted):
    rates = Rates()
    trainer = make_trainer([ScheduleCallback(scripted(["one_up"] * 3)), rates])
    trainer.train()
    assert logged(trainer, "learning_rate") == [row[0] for row in rates.rates]
    assert len(set(logged(trainer, "learning_rate"))) > 12


def test_each_decision_is_one_row_of_numbers_in_the_log(make_trainer, scripted):
    trainer = make_trainer([ScheduleCallback(scripted(["hold", "one_up"]))])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "llmrl/level" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 12, 16, 20, 24]
    assert [row["llmrl/level"] for row in rows[:2]] == pytest.approx([0.0025, 0.00425])
    for row in rows:
        assert all(isinstance(value, (int, float)) and np.isfinite(value) for value in row.values())


def test_the_given_rate_does_not_matter(make_trainer):
    ends = []
    for rate in (1e-7, 1.0):
        trainer = make_trainer([ScheduleCallback("hold")], learning_rate=rate)
        trainer.train()
        ends.append(weights(trainer))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 10},
        {"gradient_checkpointing": True, "max_steps": 10},
        {"bf16": True, "max_steps": 10},
        {"max_grad_norm": 0.0, "max_steps": 10},
        {"optim": "adafactor", "optim_args": "scale_parameter=False", "max_steps": 10},
        {"num_train_epochs": 0.5, "max_steps": -1},
        {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 10},
    ],
    ids=str,
)
def test_the_job_learns_whatever_a_trainer_is_asked_for(make_trainer, arguments, scripted):
    trainer = make_trainer([ScheduleCallback(scripted(["one_up", "freeze", "hold", "tighten"]))], **arguments)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(before, weights(trainer))
    assert torch.isfinite(weights(trainer)).all()
    sizes = logged(trainer, "llmrl/step_size")
    assert len(sizes) == len(logged(trainer, "llmrl/level"))
    assert 2e-4 < sizes[2] < 2e-2
    assert trainer.args.max_grad_norm == arguments.get("max_grad_norm", 1.0)


def test_groups_keep_the_ratio_of_their_rates_and_may_be_empty(make_trainer):
    rates = Rates()
    trainer = make_trainer([ScheduleCallback("hold"), rates])
    named = dict(trainer.model.named_parameters())
    head = [p for n, p in named.items() if "embed" in n]
    body = [p for n, p in named.items() if "embed" not in n]
    trainer.optimizer = torch.optim.AdamW(
        [{"params": body, "lr": 1e-4}, {"params": [], "lr": 5.0}, {"params": head, "lr": 1e-3}]
    )
    trainer.train()
    for body_rate, _, head_rate in rates.rates:
        assert head_rate == pytest.approx(10 * body_rate)
    assert len(rates.rates) == trainer.args.max_steps


def test_several_groups_together_move_by_the_level(make_trainer):
    """The relative step is that of all weights together, whichever group moves more."""
    measured = []
    for factor in (1.0, 10.0):
        callback = ScheduleCallback("hold")
        trainer = make_trainer([callback])
        named = dict(trainer.model.named_parameters())
        trainer.optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named.items() if "embed" in n], "lr": 1e-3 * factor},
                {"params": [p for n, p in named.items() if "embed" not in n], "lr": 1e-3},
            ],
            weight_decay=0.0,
        )
        trainer.train()
        measured.append([record.step_size for record in callback.controller.records][3:])
    np.testing.assert_allclose(measured[0], measured[1], rtol=0.5)


def test_lora_moves_at_its_own_scale(make_trainer):
    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback], task={"mode": "lora"})
    trainer.train()
    seen = dict(zip(callback.policy.spec.names, callback.controller.records[0].decision.observation, strict=True))
    assert (seen["mode_lora"], seen["mode_full"]) == (1.0, 0.0)
    assert callback.controller.records[3].step_size > 2e-3


def test_the_best_model_is_loaded_and_early_stopping_stops(make_trainer):
    trainer = make_trainer(
        [ScheduleCallback("hold"), EarlyStoppingCallback(2, early_stopping_threshold=1e9)],
        save_strategy="steps", eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_training_again_starts_the_schedule_again(make_trainer):
    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback])
    trainer.train()
    first = [record.learning_rate for record in callback.controller.records]
    trainer.train()
    second = [record.learning_rate for record in callback.controller.records]
    assert len(first) == len(second)
    assert second[0] > 0.0


def test_a_subclass_may_override_what_it_likes(make_trainer, in_order):
    class Overriding(in_order):
        def create_scheduler(self, num_training_steps, optimizer=None):
            raise AssertionError("never called")

        def compute_loss(self, *args, **kwargs):
            return 1.0 * super().compute_loss(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    trainer = make_trainer([ScheduleCallback("hold")], trainer=Overriding)
    trainer.train()
    assert len(logged(trainer, "llmrl/level")) == 8


def test_a_callback_that_comes_late_says_how_to_come_in_time(make_trainer):
    trainer = make_trainer([])
    trainer.add_callback(ScheduleCallback("hold"))
    with pytest.raises(UserError, match=r"callback\.attach\(trainer\)"):
        trainer.train()
    trainer = make_trainer([])
    ScheduleCallback("hold").attach(trainer)
    trainer.train()
    assert len(logged(trainer, "llmrl/level")) == 8


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: __import__("transformers").Adafactor(p, lr=None, relative_step=True), "relative steps"),
        (lambda p: __import__("transformers").Adafactor(p, lr=1e-3, relative_step=False), "scale_parameter"),
        (prodigyopt.Prodigy, "Prodigy"),
        (schedulefree.AdamWScheduleFree, "ScheduleFree"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD"),
        (lambda p: torch.optim.AdamW(p, lr=0.0), "positive learning rate"),
    ],
    ids=["relative", "scaled", "prodigy", "schedule-free", "sgd", "zero"],
)
def test_optimizers_that_would_fight_the_schedule_are_refused_before_training(make_trainer, make, told):
    trainer = make_trainer([ScheduleCallback("hold")])
    trainer.optimizer = make(list(trainer.model.parameters()))
    before = weights(trainer)
    with pytest.raises(UserError, match=told):
        trainer.train()
    assert torch.equal(before, weights(trainer))


def test_two_schedules_are_refused(make_trainer):
    with pytest.raises(UserError, match="two callbacks"):
        make_trainer([ScheduleCallback("hold"), ScheduleCallback("hold")])
    callback = ScheduleCallback("hold")
    make_trainer([callback])
    with pytest.raises(UserError, match="another Trainer"):
        make_trainer([callback])


def test_a_scheduler_beside_it_is_refused(make_trainer):
    trainer = make_trainer([ScheduleCallback("hold")])
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    with pytest.raises(UserError, match="given a scheduler"):
        trainer.train()


def test_a_policy_that_is_not_there_is_refused_when_the_callback_is_made(tmp_path):
    with pytest.raises(UserError, match="missing"):
        ScheduleCallback(str(tmp_path / "missing"))


def test_a_job_of_unknown_length_is_asked_for_it(make_trainer):
    trainer = make_trainer([ScheduleCallback("hold")])
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(UserError, match="max_steps"):
        trainer.create_scheduler(num_training_steps=2**62)


def test_a_streamed_dataset_needs_max_steps(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="max_steps"):
        Trainer(
            model=make_trainer([]).model,
            args=make_trainer([], max_steps=-1).args,
            train_dataset=Stream(),
            callbacks=[ScheduleCallback("hold")],
        )


def test_an_adapter_made_by_the_user_is_found(make_trainer, in_order):
    from llmrl_envs.builtin import builtin_model_path
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback])
    rows = trainer.train_dataset
    other = in_order(model=model, args=trainer.args, train_dataset=rows, callbacks=[ScheduleCallback("hold")])
    other.train()
    assert 1e-3 < logged(other, "llmrl/step_size")[3] < 2e-2
