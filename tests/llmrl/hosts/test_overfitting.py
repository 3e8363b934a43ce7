"""Jobs that learn a few examples by heart, in every host: the validation loss turns, and the guard takes them back."""

import math

import pytest
import torch
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask

from llmrl import ScheduleCallback, ScheduleController
from llmrl.config import FinetuneConfig
from llmrl.finetune import finetune
from llmrl.hosts.job import named_schedule, run_job
from llmrl.policy import hold_policy
from llmrl.run_directory import read_jsonl

FEW = {
    "data": {"train": "builtin:json", "max_train_examples": 4}, "steps": 72, "batch_size": 4, "max_length": 64,
    "validation_examples": 8, "test_examples": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def job():
    return JobLibrary("cpu").job(FineTuningTask.model_validate(FEW))


def run(job, **options):
    return run_job(job, hold_policy(), learning_rate=1e-3, seed=0, **options)


@pytest.fixture(scope="module")
def results(job):
    """Without and with the guard."""
    found = {}
    for name, options in (
        ("free", {"validate": "decisions", "guarded": False}),
        ("guard", {"validate": "guard"}),
        ("decisions", {"validate": "decisions"}),
        ("lower", {"validate": "guard", "keeps_best": False}),
    ):
        found[name] = run(job, **options)
    return found


def turns(result):
    return [record.step for record in result.records if "fallback" in record.events]


def test_a_job_that_overfits_is_taken_back_and_ends_lower(results):
    free = [record.validation_loss for record in results["free"].records]
    guarded = [record.validation_loss for record in results["guard"].records]
    assert min(free) < free[-1] * 0.99  # it does overfit
    assert not turns(results["free"])
    assert turns(results["guard"])
    assert all("rollback" in record.events for record in results["guard"].records if "fallback" in record.events)
    assert results["guard"].final.loss < results["free"].final.loss
    assert sum(not math.isnan(loss) for loss in guarded) <= 13


def test_the_loss_before_the_first_step_is_measured_and_its_state_kept(job, monkeypatch):
    """A job whose every step does harm ends where it began."""
    spoil, kept = FineTuningSession._train_step, []

    def spoilt(session, *arguments, **options):
        spoil(session, *arguments, **options)
        with torch.no_grad():
            for parameter in session.job.loaded.trainable.values():
                parameter.mul_(1.2)

    monkeypatch.setattr(FineTuningSession, "_train_step", spoilt)
    monkeypatch.setattr(FineTuningSession, "mark_best", lambda s, mark=FineTuningSession.mark_best: (
        kept.append(s.step), mark(s)))  # fmt: skip
    result = run(job, validate="guard")
    assert kept == [0]
    assert result.final == result.initial
    assert turns(result)[0] <= 72 / 6
    assert result.records[-1].level == pytest.approx(result.records[0].level / 1.7**4)


def test_without_a_kept_state_only_the_rate_falls(results):
    lower = results["lower"]
    assert turns(lower)[0] == turns(results["guard"])[0]
    assert not any("rollback" in record.events for record in lower.records)
    assert lower.records[-1].level < results["free"].records[-1].level


def test_how_often_a_host_validates_changes_nothing(results):
    often, seldom = results["decisions"], results["guard"]
    assert often.final == seldom.final
    assert often.tokens_evaluated > 1.5 * seldom.tokens_evaluated


def test_usual_schedules_do_not_validate_for_a_guard(job):
    result = run_job(
        job, named_schedule("linear", 0.1), learning_rate=1e-3, seed=0, guarded=False, validate="guard"
    )  # fmt: skip
    assert result.tokens_evaluated == 0


# -- loops of one's own ---------------------------------------------------------------------------------------------


class Loop:
    def __init__(self, job, **options):
        job.restore_initial_weights()
        self.model = job.loaded.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.controller = ScheduleController(hold_policy(), **options)
        self.controller.attach(self.model, self.optimizer, total_steps=24)

    def steps(self, count):
        for _ in range(count):
            batch = torch.randint(97, 110, (2, 16), generator=torch.Generator().manual_seed(1))
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            self.controller.before_step(loss)
            self.optimizer.step()
            self.controller.after_step()
            self.optimizer.zero_grad()

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()


def test_a_loop_tells_what_it_measured_and_is_taken_back(job, caplog):
    loop = Loop(job, snapshots="memory")
    loop.steps(4)
    loop.controller.validated(2.0)
    best, moments = loop.weights(), [s["exp_avg"].clone() for s in loop.optimizer.state.values()]
    loop.steps(5)  # not at a decision: the interval under way goes on at the lower rate
    before = loop.optimizer.param_groups[0]["lr"]
    loop.controller.validated(3.0)
    assert torch.equal(loop.weights(), best)
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(loop.optimizer.state.values(), moments, strict=True))
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(before / 1.7)
    record = loop.controller.records[-1]
    assert (record.validation_loss, record.events) == (3.0, {"fallback": True, "rollback": True})
    assert "the validation loss has turned at step 9" in caplog.text
    loop.steps(15)
    assert not torch.equal(loop.weights(), best)


def test_a_loop_that_validates_before_its_first_step_can_return_to_it(job):
    loop = Loop(job, snapshots="memory")
    first = loop.weights()
    assert loop.controller.validated(1.0) == {}
    loop.steps(4)
    assert loop.controller.validated(3.0) == {"fallback": True, "rollback": True}
    assert torch.equal(loop.weights(), first)
    assert not loop.optimizer.state
    loop.steps(20)
    assert not torch.equal(loop.weights(), first)


def test_where_no_snapshot_is_kept_the_weights_stay(job):
    loop = Loop(job)
    loop.steps(4)
    loop.controller.validated(2.0)
    loop.steps(4)
    before, rate = loop.weights(), loop.optimizer.param_groups[0]["lr"]
    loop.controller.validated(3.0)
    assert torch.equal(loop.weights(), before)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(rate / 1.7)
    assert loop.controller.records[-1].events == {"fallback": True}


def test_a_loop_that_is_resumed_knows_its_best_state(job):
    first, second = Loop(job, snapshots="memory"), Loop(job, snapshots="memory")
    first.steps(4)
    first.controller.validated(2.0)
    best = first.weights()
    first.steps(4)
    state, weights = first.controller.state_dict(), [p.detach().clone() for p in first.model.parameters()]
    moments = first.optimizer.state_dict()
    second = Loop(job, snapshots="memory")
    with torch.no_grad():
        for parameter, value in zip(second.model.parameters(), weights, strict=True):
            parameter.copy_(value)
    second.optimizer.load_state_dict(moments)
    second.controller.load_state_dict(state)
    second.controller.validated(3.0)
    assert torch.equal(second.weights(), best)


# -- a Trainer ------------------------------------------------------------------------------------------------------


def make(make_trainer, callback, *, losses, **arguments):
    """A Trainer that evaluates every four steps, and is told these losses."""
    trainer = make_trainer([callback], eval_strategy="steps", eval_steps=4, max_steps=24, **arguments)
    told = iter(losses)
    evaluate = trainer.evaluation_loop

    def wrong(*positional, **named):
        output = evaluate(*positional, **named)
        output.metrics["eval_loss"] = next(told)
        return output

    trainer.evaluation_loop = wrong
    return trainer


def test_a_trainers_evaluations_are_what_the_guard_sees(make_trainer):
    callback = ScheduleCallback("hold", snapshots="memory")
    trainer = make(make_trainer, callback, losses=[3.0, 2.0, 2.5, 1.9, 1.8, 1.7])
    trainer.train()
    events = [(record.step, record.events) for record in callback.controller.records if record.events]
    assert events == [(12, {"fallback": True, "rollback": True})]
    assert sum(row.get("llmrl/event_fallback", 0.0) for row in trainer.state.log_history) == 1.0
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates[12] < rates[11] / 1.6


def test_a_trainer_that_evaluates_before_its_first_step_can_return_to_it(make_trainer):
    callback = ScheduleCallback("hold", snapshots="memory")
    trainer = make(make_trainer, callback, losses=[1.0, 3.0, 2.5, 2.0, 1.9, 1.8, 1.7], eval_on_start=True)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    events = [(record.step, record.events) for record in callback.controller.records if record.events]
    assert events == [(step, {"fallback": True, "rollback": True}) for step in (4, 8, 12, 16, 20, 24)]
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize(("mode", "rescued"), [("full", False), ("lora", True)])
def test_a_snapshot_is_kept_by_itself_where_little_is_trained(make_trainer, mode, rescued):
    callback = ScheduleCallback("hold")
    task = {"mode": mode, "lora": {"rank": 2, "target_modules": ["q_proj"]}} if mode == "lora" else None
    trainer = make(make_trainer, callback, losses=[3.0, 2.0, 2.5, 1.9, 1.8, 1.7], task=task)
    trainer.train()
    events = [record.events for record in callback.controller.records if record.events]
    assert events == [{"fallback": True, "rollback": True} if rescued else {"fallback": True}]


def test_evaluations_before_and_after_training_are_nobodys_business(make_trainer):
    callback = ScheduleCallback("hold")
    trainer = make(make_trainer, callback, losses=[1.0, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 9.0])
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert not any(record.events for record in callback.controller.records)


# -- interrupted ----------------------------------------------------------------------------------------------------


def test_a_job_that_has_turned_is_resumed_exactly(tmp_path, monkeypatch):
    """Interrupted right after it was taken back to its best state, and after that."""
    config = FinetuneConfig.model_validate({
        "task": {"name": "few", **FEW}, "checkpoint_period_decisions": 1, "tracking": {"wandb": "disabled"},
    })  # fmt: skip
    whole = finetune(config=config, output=tmp_path / "whole", policy="hold")
    rows = read_jsonl(tmp_path / "whole" / "schedule.jsonl")
    ends = [row["step"] for row in rows[1:]]  # a row's step is where its interval begins
    turned = next(end for row, end in zip(rows, ends, strict=False) if "fallback" in row["events"])
    train_step = FineTuningSession._train_step
    for stops in (turned, turned + 5):

        def interrupt(session, *arguments, at=stops, **options):
            if session.step == at:
                raise KeyboardInterrupt
            train_step(session, *arguments, **options)

        run = tmp_path / f"at-{stops}"
        monkeypatch.setattr(FineTuningSession, "_train_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config=config, output=run, policy="hold")
        monkeypatch.setattr(FineTuningSession, "_train_step", train_step)
        again = finetune(config=config, output=run, policy="hold", resume=True)
        assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
        assert read_jsonl(run / "schedule.jsonl") == rows
        assert (run / "model/model.safetensors").read_bytes() == (
            tmp_path / "whole/model/model.safetensors"
        ).read_bytes()
