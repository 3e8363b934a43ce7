"""A policy in a job of two processes, under DDP and FSDP2: the same decisions and rates on both, and as with one.

The processes are forked from a fresh interpreter that runs this file as a program (see the end).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 16
ACTIONS = {
    "moves": ("hold", "one_up", "freeze", "rollback", "tighten", "hold"),
    "lean": ("hold", "lean", "one_up", "hold", "cooldown", "hold"),
}
CASES = ("ddp", "ddp-lean", "fsdp2", "fsdp2-lean", "fsdp2-lora", "ddp-lora", "ddp-poisoned", "fsdp2-poisoned",
         "trainer", "trainer-lean", "trainer-fsdp2")  # fmt: skip
ALONE = ("alone", "alone-lean")
AS_ALONE = ("ddp", "ddp-lean", "fsdp2", "fsdp2-lean", "trainer", "trainer-lean", "trainer-fsdp2")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the processes saw: results[case][rank]."""
    folder = tmp_path_factory.mktemp("processes")
    found = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    ranks = {case: (0, 1) for case in CASES} | {case: (0,) for case in ALONE}
    return {case: [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in ranks[case]] for case in ranks}


@pytest.mark.parametrize("case", CASES)
def test_both_processes_decide_and_train_alike(results, case):
    first, second = results[case]
    assert first["rates"] == second["rates"]
    assert first["actions"] == second["actions"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("case", AS_ALONE)
def test_two_processes_are_steered_as_one_is(results, case):
    found, alone = results[case][0], results["alone-lean" if case.endswith("lean") else "alone"][0]
    assert found["actions"] == alone["actions"]
    assert found["rates"] == pytest.approx(alone["rates"], rel=1e-3)
    assert found["weights"] == pytest.approx(alone["weights"], rel=1e-3)


def test_a_job_that_leans_does_what_its_policy_says_and_trains_otherwise(results):
    plain, leaning = (results[case][0] for case in ALONE)
    assert leaning["actions"] == list(ACTIONS["lean"])
    assert leaning["weights"] != pytest.approx(plain["weights"], rel=1e-6)


def test_sharded_adapters_are_measured_as_replicated_ones(results):
    assert results["fsdp2-lora"][0]["rates"] == pytest.approx(results["ddp-lora"][0]["rates"], rel=1e-3)


@pytest.mark.parametrize("case", ["ddp-poisoned", "fsdp2-poisoned"])
def test_a_loss_that_breaks_on_one_process_skips_the_step_on_both(results, case):
    for found in results[case]:
        assert [event.get("skipped_steps", 0) for event in found["events"]] == [0, 0, 0, 1, 0, 0]


def test_the_controller_finds_out_how_the_model_is_shared(results):
    found = {case: results[case][0]["distribution"] for case in ("alone", "ddp", "fsdp2", "trainer", "trainer-fsdp2")}
    assert found == {"alone": "single", "ddp": "ddp", "fsdp2": "fsdp2", "trainer": "ddp", "trainer-fsdp2": "fsdp2"}


def test_a_sharded_trainer_saves_the_model_that_it_evaluated(results):
    for found in results["trainer-fsdp2"]:
        assert len(found["evaluations"]) == 4
        assert found["reloaded_loss"] == pytest.approx(found["evaluations"][-1], rel=1e-5)


def test_the_first_process_decides(results):
    """The second process's policy wanted something else all the time."""
    assert results["ddp"][1]["wanted"] != results["ddp"][1]["actions"]
    assert results["ddp"][0]["wanted"] == results["ddp"][0]["actions"]


# -- the program ------------------------------------------------------------------------------------------------------


def make_policy(rank, case):
    import numpy as np

    from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

    class Wilful(SchedulePolicy):
        wanted: list

        def act(self, observation, mask):
            position = len(self.wanted)
            name = actions[position] if rank == 0 and position < len(actions) else "hold" if rank == 0 else other
            self.wanted.append(name)
            return PolicyDecision(np.array([self.table.names.index(name)]), np.zeros(mask.shape, np.float32))

    table = "lean" if case.endswith("lean") else "moves"
    actions, other = ACTIONS[table], "cooldown" if table == "lean" else "two_down"
    hold = hold_policy(actions=table)
    made = Wilful(hold.table, hold.spec, hold.settings, None)
    made.wanted = []
    return made


def make_model(*, lora):
    import torch
    from llmrl_envs.builtin import builtin_model_path
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if lora else model


def share(model, case, accelerator):
    """The model as the case wants it."""
    if accelerator is None:
        return model
    if not case.startswith("fsdp2"):
        return accelerator.prepare(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rows():
    import torch

    return torch.randint(97, 123, (2 * STEPS, 12), generator=torch.Generator().manual_seed(0))


def run_loop(case, accelerator):
    import torch

    from llmrl import ScheduleController

    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, 2)
    model = share(make_model(lora="lora" in case), case, accelerator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    policy = make_policy(rank, case)
    controller = ScheduleController(policy, snapshots="memory")
    host = None if case.startswith("fsdp2") else accelerator
    capabilities = controller.attach(model, optimizer, host, total_steps=STEPS)
    rates = []
    for number, pair in enumerate(rows().reshape(STEPS, 2, -1)):
        batch = pair if world == 1 else pair[rank : rank + 1]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        poisoned = case.endswith("poisoned") and number == 6 and rank == 1
        controller.before_step(float("inf") if poisoned else loss)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    return outcome(model, controller, policy, rates, capabilities)


def run_trainer(folder, case, rank):
    import torch
    from fsdp_on_cpu import take_as_sharding
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llmrl import ScheduleCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments):
            return None

        def create_optimizer(self, *arguments):
            self.optimizer = self.optimizer or torch.optim.AdamW(self.model.parameters(), lr=1e-5)
            return self.optimizer

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if case == "trainer-fsdp2":
                take_as_sharding()
                self.is_fsdp_enabled = True

    class Rates(TrainerCallback):
        rates: list

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.rates.append(optimizer.param_groups[0]["lr"])

    noted = Rates()
    noted.rates = []
    policy = make_policy(rank, case)
    # Unguarded, or the evaluations would say which state is best, which the loops do not know.
    callback = ScheduleCallback(policy, snapshots="memory", guarded=False)
    model = make_model(lora=False)
    arguments = TrainingArguments(
        str(folder / case), per_device_train_batch_size=1, max_steps=STEPS, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, weight_decay=0.01, learning_rate=1e-5, ddp_backend="gloo",
        eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    examples = [{"input_ids": row, "labels": row} for row in rows()]
    trainer = InOrder(
        model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:4], callbacks=[callback, noted],
    )  # fmt: skip
    trainer.train()
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    capabilities = callback.controller.job.capabilities
    trainer.save_model(str(folder / case / "model"))
    trainer.accelerator.wait_for_everyone()
    found = outcome(trainer.model, callback.controller, policy, noted.rates, capabilities)
    return found | {"evaluations": evaluations, "reloaded_loss": loss_of(folder / case / "model", examples[:4])}


def loss_of(path, examples):
    import torch
    from transformers import AutoModelForCausalLM

    batch = torch.stack([example["input_ids"] for example in examples])
    with torch.no_grad():
        return float(AutoModelForCausalLM.from_pretrained(path)(input_ids=batch, labels=batch).loss)


def outcome(model, controller, policy, rates, capabilities):
    from llmrl_envs.interface.tensor_sums import full_tensor

    return {
        "distribution": capabilities.distribution.value,
        "rates": rates,
        "actions": [record.decision.action_name for record in controller.records],
        "events": [record.events for record in controller.records],
        "wanted": policy.wanted,
        "weights": [float(full_tensor(p.detach().double().square().sum())) for p in model.parameters()],
    }


def one_of_two(folder):
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    for case in CASES:
        in_trainer = case.startswith("trainer")
        found = run_trainer(folder, case, rank) if in_trainer else run_loop(case, accelerator)
        (folder / f"{case}-{rank}.json").write_text(json.dumps(found))
        accelerator.free_memory()


def main(folder):
    import torch
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    debug_launcher(one_of_two, args=(folder,), num_processes=2)
    for case in ALONE:
        (folder / f"{case}-0.json").write_text(json.dumps(run_loop(case, None)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
