"""Two processes that stop and go on, with dropout and rollbacks: as if they had not stopped, bit for bit.

Each process draws dropout of its own, so each has generator states of its own to go back to. The processes are forked
from a fresh interpreter that runs this file as a program (see the end).
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmrl.run_directory import read_jsonl

STEPS, STOP = 16, 5
TASK = {
    "name": "tiny", "data": "builtin:json", "steps": STEPS, "batch_size": 4, "gradient_accumulation": 2,
    "max_length": 32, "validation_examples": 4, "test_examples": 4, "mode": "lora", "lora": {"dropout": 0.2},
}  # fmt: skip
KINDS = ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the jobs of one kind; gives the folder where they have run."""

    @functools.cache
    def run(kind):
        folder = tmp_path_factory.mktemp("processes")
        command = [sys.executable, __file__, str(folder), kind]
        found = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert found.returncode == 0, found.stderr[-3000:]
        return folder

    return run


def test_a_controller_that_goes_on_gives_each_process_its_own_generators_back(run):
    folder = run("ddp")
    first, second = (json.loads((folder / f"controller-{rank}.json").read_text()) for rank in (0, 1))
    assert first["rolled_back_at"] == [6]
    assert first["generators"] != second["generators"]
    for found in (first, second):
        assert found["resumed"] == found["whole"]


def outcome(run):
    """Everything that a run leaves, but how long it took."""
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    (weights,) = (run / "model").glob("*.safetensors")
    return summary, (run / "schedule.jsonl").read_text(), weights.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_of_two_processes_goes_on_as_if_it_had_not_stopped(run, kind):
    folder = run(kind)
    assert outcome(folder / f"{kind}-cut") == outcome(folder / f"{kind}-whole")
    rows = read_jsonl(folder / f"{kind}-whole" / "schedule.jsonl")
    assert [row["step"] for row in rows if "rollback" in row["events"]] == [6, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_more_or_less_is_refused(run, kind):
    told = (run(kind) / f"{kind}-alone.txt").read_text()
    assert "another number of processes" in told
    assert "2 processes" in told


def test_what_the_first_process_refuses_all_refuse(run):
    """Another job's directory, and a checkpoint that was damaged."""
    for rank in (0, 1):
        first, second = json.loads((run("ddp") / f"refused-{rank}.json").read_text())
        assert "belongs to another job" in first
        assert "the checkpoint is damaged" in second


@pytest.mark.slow
def test_a_launched_job_that_is_killed_goes_on(tmp_path):
    """All of its processes are killed with -9, once they have written a checkpoint."""
    config = tmp_path / "job.yaml"
    settings = {"task": {**TASK, "steps": 40}, "tracking": {"wandb": "disabled"}, "checkpoint_period_decisions": 1}
    config.write_text(yaml.safe_dump(settings))
    for name, kills in (("whole", False), ("cut", True)):
        output = tmp_path / name
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            str(Path(__file__).parents[3] / "configs/accelerate/two_cpu_processes.yaml"),
            "-m", "llmrl", "finetune", "--config", str(config), "--policy", "hold", "--output", str(output),
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        if kills:
            job = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
            while not list(output.glob("checkpoints/0*3")):
                assert job.poll() is None
                os.sched_yield()
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            assert not (output / "summary.json").exists()
            command.append("--resume")
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr[-3000:]
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# -- the program ------------------------------------------------------------------------------------------------------


def make_policy():
    import numpy as np

    from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

    class RollsBack(SchedulePolicy):
        """Rolls back after 6 and after 12 steps."""

        def act(self, observation, mask):
            done = round(STEPS * float(observation[0, self.spec.names.index("progress")]))
            name = "rollback" if done in (6, 12) else "hold"
            return PolicyDecision(np.array([self.table.names.index(name)]), np.zeros(mask.shape, np.float32))

    hold = hold_policy()
    return RollsBack(hold.table, hold.spec, hold.settings, None)


class Loop:
    """A loop of one's own on this process, under a controller."""

    def __init__(self, accelerator):
        import torch
        from llmrl_envs.builtin import builtin_model_path
        from transformers import AutoModelForCausalLM

        from llmrl import ScheduleController

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(builtin_model_path(), attention_dropout=0.2)
        self.rank = accelerator.process_index
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5))
        self.controller = ScheduleController(make_policy(), snapshots="memory")
        self.controller.attach(self.model, self.optimizer, accelerator, total_steps=STEPS)
        self.rows = torch.randint(97, 123, (STEPS, 2, 12), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(self.rank)  # dropout differs between the processes

    def run(self, first, last):
        self.model.train()
        for step in range(first, last):
            batch = self.rows[step][self.rank : self.rank + 1]
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            self.controller.before_step(loss.detach() + (step >= 4))  # so that the best state is of before the stop
            self.optimizer.step()
            self.controller.after_step()
            self.optimizer.zero_grad()

    def found(self):
        import torch

        weights = [parameter.detach().flatten() for parameter in self.model.parameters()]
        return {"weights": torch.cat(weights).double().cumsum(0)[::1000].tolist(), "rng": rng()}


def rng():
    import torch

    return torch.get_rng_state().sum().item()


def run_controller(folder, accelerator):
    """Undisturbed; and stopped after five steps, with the controller's state of the first process on both."""
    from copy import deepcopy

    import torch
    from accelerate.utils import broadcast_object_list

    loop = Loop(accelerator)
    loop.run(0, STOP)
    (state,) = broadcast_object_list([loop.controller.state_dict()])
    kept = deepcopy((loop.model.state_dict(), loop.optimizer.state_dict(), torch.get_rng_state(), state))
    loop.run(STOP, STEPS)
    whole = loop.found()
    again = Loop(accelerator)
    again.model.load_state_dict(kept[0])
    again.optimizer.load_state_dict(kept[1])
    again.controller.load_state_dict(kept[3])
    torch.set_rng_state(kept[2])
    again.run(STOP, STEPS)
    events = [(r.decision.step, r.events) for r in loop.controller.records]
    found = {
        "whole": whole,
        "resumed": again.found(),
        "generators": kept[2].tolist(),
        "rolled_back_at": [step for step, event in events if "rollback" in event and step < 12],
    }
    (folder / f"controller-{accelerator.process_index}.json").write_text(json.dumps(found))


def run_finetune(output, *, resume=False, stop=None):
    from llmrl import finetune as module
    from llmrl.config import FinetuneConfig
    from llmrl.hosts.sharded import _SharedJob

    class StopError(Exception):
        pass

    module.choose_policy = lambda config, policy, schedule: (make_policy(), None)
    train_step, shared_step = module_session()._train_step, _SharedJob._train_step

    def step_of_session(session, *arguments, **options):
        if session.step == stop:
            raise StopError
        train_step(session, *arguments, **options)

    def step_of_shards(shared, step):
        if step == stop:
            raise StopError
        return shared_step(shared, step)

    module_session()._train_step, _SharedJob._train_step = step_of_session, step_of_shards
    config = FinetuneConfig.model_validate(
        {"task": TASK, "tracking": {"wandb": "disabled"}, "checkpoint_period_decisions": 1}
    )
    try:
        module.finetune(config=config, output=output, policy="hold", resume=resume)
        assert stop is None
    except StopError:
        assert stop is not None
    finally:
        module_session()._train_step, _SharedJob._train_step = train_step, shared_step


def run_refused(folder, accelerator):
    """What this process is told about a run of another job, and about one whose checkpoint is damaged."""
    from llmrl_envs.errors import UserError

    told = []
    for steps, damaged in ((12, False), (STEPS, True)):
        if damaged and accelerator.is_main_process:
            os.truncate(folder / "checkpoints/000000006/state.json", 10)
        TASK["steps"] = steps
        try:
            run_finetune(folder, resume=True)
        except UserError as error:
            told.append(str(error))
    return told


def module_session():
    from llmrl_envs.jobs.session import FineTuningSession

    return FineTuningSession


def one_of_two(folder, kind):
    import torch
    from accelerate import Accelerator
    from fsdp_on_cpu import shard_on_cpu

    torch.set_num_threads(1)
    begin = (lambda: Accelerator(cpu=True)) if kind == "ddp" else shard_on_cpu
    accelerator = begin()
    if kind == "ddp":
        run_controller(folder, accelerator)
        accelerator.free_memory()
    for name, options in (("whole", {}), ("cut", {"stop": 9}), ("cut", {"resume": True})):
        accelerator = begin()
        run_finetune(folder / f"{kind}-{name}", **options)
    if kind == "ddp":
        if accelerator.is_main_process:
            shutil.copytree(folder / "ddp-cut", folder / "ddp-refused")
        told = run_refused(folder / "ddp-refused", accelerator)
        (folder / f"refused-{accelerator.process_index}.json").write_text(json.dumps(told))


def main(folder, kind):
    import torch
    from accelerate import debug_launcher
    from llmrl_envs.errors import UserError

    torch.set_num_threads(1)
    debug_launcher(one_of_two, args=(folder, kind), num_processes=2)
    try:
        run_finetune(folder / f"{kind}-cut", resume=True)
    except UserError as error:
        (folder / f"{kind}-alone.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
