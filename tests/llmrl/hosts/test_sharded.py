"""`llmrl finetune` on two processes that hold a shard of the model each (FSDP2): as one process would have done it.

The processes are forked from a fresh interpreter that runs this file as a program (see the end).
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmrl.run_directory import read_jsonl

TASK = {
    "name": "tiny", "data": "builtin:json", "steps": 20, "batch_size": 5, "gradient_accumulation": 2, "max_length": 32,
    "validation_examples": 6, "test_examples": 6, "evaluation_batch_size": 2,
}  # fmt: skip
CASES = {
    "full": {},
    "lora": {"mode": "lora", "steps": 12},
    "linear": {"steps": 8},
    "classes": {"objective": "classification", "data": "classes.jsonl", "steps": 8},
}
ACTIONS = {
    "moves": ("hold", "one_up", "freeze", "rollback", "tighten", "hold", "two_down"),
    "lean": ("hold", "lean", "one_up", "hold", "hold", "cooldown"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each case has run: CASE-alone and CASE-sharded, and the schedules of both processes."""
    folder = tmp_path_factory.mktemp("sharded")
    found = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder


def summary(folder, name):
    return json.loads((folder / name / "summary.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_job_is_the_job_of_one_process(folder, case):
    alone, sharded = (summary(folder, f"{case}-{how}") for how in ("alone", "sharded"))
    assert sharded["num_processes"] == 2
    assert len(set(sharded["schedule_digests"])) == 1
    assert sharded["loss_initial"] == pytest.approx(alone["loss_initial"], rel=1e-5)
    assert sharded["loss_test"] == pytest.approx(alone["loss_test"], rel=1e-4)
    assert sharded["loss_validation"] == pytest.approx(alone["loss_validation"], rel=1e-4)
    assert sharded["loss_test"] != pytest.approx(sharded["loss_initial"], rel=1e-3)  # it has trained
    for name in ("tokens_trained", "tokens_evaluated", "num_decisions", "accuracy_test"):
        assert sharded[name] == alone[name], name
    rates = [[row["learning_rate"] for row in read_jsonl(folder / f"{case}-{how}" / "schedule.jsonl")]
             for how in ("alone", "sharded")]  # fmt: skip
    assert rates[1] == pytest.approx(rates[0], rel=1e-3)


@pytest.mark.parametrize("case", ["full", "lora", "classes"])
def test_the_saved_model_loads_and_is_the_one_that_was_measured(folder, case):
    from llmrl_envs.jobs.loading import JobLibrary
    from llmrl_envs.jobs.session import FineTuningSession
    from llmrl_envs.jobs.task import FineTuningTask
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = folder / f"{case}-sharded" / "model"
    task = make_task(folder, case)
    if case != "lora":
        job = JobLibrary("cpu").job(task.model_copy(update={"model": str(model)}))
        loss = FineTuningSession(job, seed=0).evaluate("test").loss
    else:
        job = JobLibrary("cpu").job(FineTuningTask.model_validate({**TASK, "mode": "full"}))
        session = FineTuningSession(job, seed=0)
        base = AutoModelForCausalLM.from_pretrained(job.loaded.model.config.name_or_path)
        job.loaded.model.load_state_dict(PeftModel.from_pretrained(base, str(model)).merge_and_unload().state_dict())
        loss = session.evaluate("test").loss
    assert loss == pytest.approx(summary(folder, f"{case}-sharded")["loss_test"], rel=1e-5)
    assert {path.suffix for path in model.iterdir()} <= {".json", ".safetensors", ".md", ".txt", ".jinja"}


@pytest.mark.parametrize("table", ACTIONS)
def test_every_update_choice_does_in_shards_what_it_does_in_one_process(folder, table):
    """Freezing, rolling back, tightening and leaning among them; one process's third loss is infinite."""
    alone, first, second = (json.loads((folder / f"{table}-{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert [row["action"] for row in first] == [row["action"] for row in alone]
    assert [row["events"] for row in first] == [row["events"] for row in alone]
    assert any("rollback" in row["events"] for row in first) == (table == "moves")
    assert first[0]["events"]["skipped_steps"] == 1
    assert first == second
    for mine, expected in zip(first, alone, strict=True):
        np.testing.assert_allclose(mine["observation"], expected["observation"], atol=2e-3)
        for name in ("learning_rate", "train_loss", "validation_loss", "level", "gradient_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-3), name


def test_float16_is_left_to_the_launcher(folder):
    assert "mixed_precision: fp16" in (folder / "float16.txt").read_text()
    assert not (folder / "float16").exists()


# -- the program ------------------------------------------------------------------------------------------------------


def make_task(folder, case):
    from llmrl_envs.jobs.task import FineTuningTask

    changes = dict(CASES[case])
    if case == "classes":
        changes["data"] = str(folder / "classes.jsonl")
    return FineTuningTask.model_validate({**TASK, **changes})


def make_config(folder, case):
    from llmrl.config import FinetuneConfig

    task = make_task(folder, case)
    return FinetuneConfig(task=task, learning_rate=1e-3, tracking={"wandb": "disabled"}, seed=3)


def make_policy(table):
    from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

    class Wilful(SchedulePolicy):
        decisions = 0

        def act(self, observation, mask):
            name = ACTIONS[table][self.decisions] if self.decisions < len(ACTIONS[table]) else "hold"
            self.decisions += 1
            return PolicyDecision(np.array([self.table.names.index(name)]), np.zeros(mask.shape, np.float32))

    hold = hold_policy(actions=table)
    return Wilful(hold.table, hold.spec, hold.settings, None)


def run_choices(folder, run, context, table):
    """A job in which every update choice is made, and one process's third backward pass is of an infinite loss."""
    from llmrl_envs.jobs.loading import JobLibrary

    from llmrl.decisions import decision_row

    job = JobLibrary("cpu").job(make_task(folder, "full"))
    policy = make_policy(table)
    calls = iter(range(10**6))

    def break_loss(module, arguments, output):
        if module.training and next(calls) == 2 and context.rank == 0:
            output.logits[..., ord("a") : ord("z")] = float("-inf")

    handle = job.loaded.model.register_forward_hook(break_loss)
    result = run(job, policy, learning_rate=1e-3, seed=3, validate="decisions")
    handle.remove()
    rows = [decision_row(record, policy.spec.names, policy.table.names) for record in result.records]
    return [{**row, "observation": list(row["observation"].values()), "q_values": None} for row in rows]


def run_cases(folder, how, before=lambda: None):
    from llmrl.finetune import finetune

    for case in CASES:
        before()
        steering = {"schedule": "linear"} if case == "linear" else {"policy": "hold"}
        finetune(config=make_config(folder, case), output=folder / f"{case}-{how}", **steering)


def one_of_two(folder, efficient):
    from functools import partial

    import torch
    from fsdp_on_cpu import shard_on_cpu
    from llmrl_envs.errors import UserError

    from llmrl.finetune import finetune
    from llmrl.hosts.accelerate import AcceleratorContext
    from llmrl.hosts.sharded import run_sharded_job

    torch.set_num_threads(1)
    context = AcceleratorContext(shard_on_cpu(efficient_loading=efficient))
    assert context.world_size == 2
    assert context.sharded
    # accelerate keeps the first model's layers in mind, so each job gets a plugin of its own.
    run_cases(folder, "sharded", lambda: shard_on_cpu(efficient_loading=efficient))
    for table in ACTIONS:
        shard_on_cpu(efficient_loading=efficient)
        rows = run_choices(folder, partial(run_sharded_job, context=context), context, table)
        (folder / f"{table}-{context.rank}.json").write_text(json.dumps(rows))
    config = make_config(folder, "full")
    config = config.model_copy(update={"task": config.task.model_copy(update={"precision": "fp16"})})
    try:
        finetune(config=config, output=folder / "float16", policy="hold")
    except UserError as error:
        (folder / "float16.txt").write_text(str(error))


def write_inputs(folder):
    rows = [{"text": "abcdefghij"[i % 5 :] * (1 + i % 3), "label": i % 2} for i in range(60)]
    (folder / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder):
    from functools import partial

    import torch
    from accelerate import debug_launcher
    from llmrl_envs.jobs.parallel import SingleProcess

    from llmrl.hosts.job import run_job

    torch.set_num_threads(1)
    write_inputs(folder)
    debug_launcher(one_of_two, args=(folder, False), num_processes=2)
    run_cases(folder, "alone")
    for table in ACTIONS:
        rows = run_choices(folder, partial(run_job, parallel=SingleProcess()), SingleProcess(), table)
        (folder / f"{table}-alone.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
