"""Stopping a Trainer between any two steps and going on: the same decisions and the same weights, bit for bit."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from transformers import TrainerCallback

from llmrl import ScheduleCallback
from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

ACTIONS = ("hold", "one_up", "one_up", "rollback", "freeze", "tighten", "one_down", "hold")
SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def history(trainer):
    rows = [row for row in trainer.state.log_history if "llmrl/level" in row]
    return [{k: v for k, v in row.items() if k.startswith("llmrl/") or k == "step"} for row in rows]


@pytest.fixture
def whole(make_trainer, scripted):
    """A job that was not stopped, with a checkpoint at each step."""
    trainer = make_trainer([ScheduleCallback(scripted(ACTIONS), snapshots="memory")], folder="whole", **SAVED)
    trainer.train()
    return trainer, weights(trainer).clone(), history(trainer)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_job_that_stops_between_any_two_steps_goes_on_as_if_it_had_not(whole, make_trainer, scripted, place):
    trainer, expected, rows = whole
    assert any(row["llmrl/event_rollback"] for row in rows)
    for step in (1, 4, 7, 8, 9, 13, 17, 23) if place == "memory" else (7,):
        policy = scripted(ACTIONS)
        callback = ScheduleCallback(policy, snapshots=place)
        again = make_trainer([callback], folder=f"again{step}")
        ends = [row["step"] for row in rows]
        policy.seen = [None] * (sum(end <= step for end in ends))
        again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{step}")
        assert torch.equal(weights(again), expected), step
        assert history(again) == rows, step


def test_a_checkpoint_without_the_controller_starts_it_cleanly(make_trainer):
    plain = make_trainer([], folder="plain", save_strategy="steps", save_steps=10, lr_scheduler_type="constant")
    plain.train()
    callback = ScheduleCallback("hold")
    steered = make_trainer([callback], folder="steered", save_strategy="steps", save_steps=6)
    steered.train(resume_from_checkpoint=f"{plain.args.output_dir}/checkpoint-10")
    records = callback.controller.records
    assert records[0].decision.step == 10
    assert records[-1].step == 24
    assert [record.decision.index for record in records] == list(range(len(records)))
    seen = dict(zip(callback.policy.spec.names, records[0].decision.observation, strict=True))
    assert seen["progress"] == pytest.approx(10 / 24)
    for record in records[:3]:
        assert record.step_size == pytest.approx(0.0025 * (24 - record.step + 1) / 23, rel=0.5)
    assert (steered.state.global_step, torch.isfinite(weights(steered)).all().item()) == (24, True)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_a_checkpoint_goes_on_without_the_controller(whole, make_trainer, kind):
    trainer, _, _ = whole
    plain = make_trainer([], folder="plain", lr_scheduler_type=kind)
    plain.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-12")
    assert plain.state.global_step == 24
    rates = {row["step"]: row["learning_rate"] for row in plain.state.log_history if "learning_rate" in row}
    if kind == "linear":
        assert rates[20] == pytest.approx(1e-5 * (24 - 19) / 24)


def test_a_checkpoint_of_another_length_is_refused(whole, make_trainer, scripted):
    trainer, _, _ = whole
    other = make_trainer([ScheduleCallback(scripted(ACTIONS))], folder="other", max_steps=30)
    with pytest.raises(UserError, match="steered differently"):
        other.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-12")


def test_a_checkpoint_under_another_policy_is_refused(whole, make_trainer):
    trainer, _, _ = whole
    other = make_trainer([ScheduleCallback("default")], folder="other")
    with pytest.raises(UserError, match="steered differently"):
        other.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-12")


class Kill(TrainerCallback):
    """Ends the process as a power cut would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    """One process is left alone; another is killed with -9 after steps 3, 9 and 17, and goes on from where it was.

    After step 12 they return to a state that was the best before a kill, the dropout's generator with it.
    """
    for name, kill_at in (("whole", -1), ("cut", 3), ("cut", 9), ("cut", 17), ("cut", -1)):
        command = [sys.executable, __file__, str(tmp_path / name), str(kill_at)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert found.returncode == (-signal.SIGKILL if kill_at > 0 else 0), found.stderr[-2000:]
    assert (tmp_path / "whole.weights").read_bytes() == (tmp_path / "cut.weights").read_bytes()
    assert (tmp_path / "whole.rates").read_text() == (tmp_path / "cut.rates").read_text()
    assert (tmp_path / "cut.rollbacks").read_text() == (tmp_path / "whole.rollbacks").read_text() == "[16]"


class RollsBack(SchedulePolicy):
    """Rolls back once, in the decision after step 12 of 20."""

    def act(self, observation, mask):
        progress = float(observation[0, self.spec.names.index("progress")])
        name = "rollback" if abs(progress - 0.6) < 0.01 else "hold" if progress > 0.2 else "one_up"
        return PolicyDecision(np.array([self.table.names.index(name)]), np.zeros(mask.shape, np.float32))


def main(folder, kill_at):
    hold = hold_policy()
    policy = RollsBack(hold.table, hold.spec, hold.settings, None)
    from llmrl_envs.builtin import builtin_model_path, load_corpus
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(builtin_model_path())
    rows = [tokenizer(text[:32])["input_ids"] for text in load_corpus("json")["train"] if len(text) > 40][:60]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(builtin_model_path(), attention_dropout=0.1),
        args=TrainingArguments(
            folder, max_steps=20, per_device_train_batch_size=2, save_steps=1, logging_steps=1, report_to=[],
            learning_rate=1e-5, use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[ScheduleCallback(policy, snapshots="memory"), Kill(kill_at)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    with open(folder + ".weights", "wb") as file:
        file.write(weights.numpy().tobytes())
    rates = [(row["step"], row["learning_rate"]) for row in trainer.state.log_history if "learning_rate" in row]
    with open(folder + ".rates", "w") as file:
        file.write(repr(rates))
    rollbacks = [row["step"] for row in trainer.state.log_history if row.get("llmrl/event_rollback")]
    with open(folder + ".rollbacks", "w") as file:
        file.write(repr(rollbacks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
