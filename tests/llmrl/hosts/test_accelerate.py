"""One job shared by two processes: the same on both, and the same as on one.

The processes are forked from a fresh interpreter that runs this file as a program (see the end).
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.parallel import SingleProcess
from safetensors.numpy import load_file

from llmrl.hosts.accelerate import AcceleratorContext, parallel_context
from llmrl.hosts.sharded import check_sharded_task

CASES = {
    "full": {},
    "accumulated": {"gradient_accumulation": 2, "batch_size": 3},
    "lora": {"mode": "lora"},
    "poisoned": {},
}
SEED = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the processes measured: results[case]["alone" | "first" | "second"]."""
    folder = tmp_path_factory.mktemp("processes")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300)
    names = ("alone", "first", "second")
    return {case: {name: load_file(folder / f"{case}-{name}.safetensors") for name in names} for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_both_processes_have_identical_statistics_and_weights(results, case):
    first, second = results[case]["first"], results[case]["second"]
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(results, case):
    """Batches of five are shared unevenly, and completions differ in length."""
    alone, first = results[case]["alone"], results[case]["first"]
    for name, value in alone.items():
        np.testing.assert_allclose(first[name], value, rtol=2e-3, atol=2e-5, err_msg=name)


def test_a_loss_that_breaks_on_one_process_skips_the_step_on_both(results):
    for name in ("alone", "first", "second"):
        assert results["poisoned"][name]["skipped"].tolist() == [0, 0, 1, 0, 0, 0]
        assert not results["full"][name]["skipped"].any()


def test_the_first_process_decides(results):
    assert [results["full"][name]["agreed"].tolist() for name in ("first", "second")] == [[4], [4]]


def test_a_second_job_in_the_same_processes_starts_afresh(results):
    for name in ("first", "second"):
        found = results["full"][name]
        np.testing.assert_array_equal(found["again.loss"], found["loss"])


class FakeAccelerator:
    """Notes which backward passes keep their gradients to themselves."""

    process_index, num_processes = 0, 2

    def no_sync(self, model):
        return f"no_sync({model})"


def test_gradients_travel_in_the_last_backward_pass_only():
    context = AcceleratorContext(FakeAccelerator())
    assert context.accumulate("model", last=False) == "no_sync(model)"
    assert context.accumulate("model", last=True) != "no_sync(model)"


class Wrapping:
    """Wraps models as an accelerator does, and holds on to them."""

    def __init__(self):
        self._models = []

    def prepare_model(self, model):
        self._models.append(f"wrapped {model}")
        return self._models[-1]


def test_a_wrapped_model_is_used_again_and_let_go_for_another():
    accelerator = Wrapping()
    context = AcceleratorContext(accelerator)
    assert [context.prepare(name) for name in ("one", "one")] == ["wrapped one", "wrapped one"]
    assert accelerator._models == ["wrapped one"]
    assert context.prepare("two") == "wrapped two"
    assert accelerator._models == ["wrapped two"]


@pytest.mark.parametrize("world_size", [None, "1"])
def test_a_process_alone_needs_no_accelerator(monkeypatch, world_size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert isinstance(parallel_context(), SingleProcess)


class DeepSpeedLike:
    """An accelerator with a DeepSpeed configuration; wraps nothing."""

    num_processes, process_index, is_fsdp2 = 2, 0, False
    distributed_type = SimpleNamespace(value="DEEPSPEED")

    def __init__(self, config):
        self.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))

    def prepare(self, *objects):
        return objects


def test_deepspeed_takes_batch_size_accumulation_and_clipping_from_the_task(tmp_path):
    from llmrl_envs.jobs.loading import JobLibrary

    write_data(tmp_path)
    accelerator = DeepSpeedLike({"gradient_clipping": 7.0, "zero_optimization": {"stage": 2}})
    job = JobLibrary("cpu").job(make_task(tmp_path, {"gradient_accumulation": 3}))
    AcceleratorContext(accelerator).prepare_sharded(job, None)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 3)
    assert config["train_batch_size"] == 18
    assert config["gradient_clipping"] == job.task.optimizer.max_grad_norm
    assert config["zero_optimization"] == {"stage": 2}
    assert accelerator.gradient_accumulation_steps == 3


@pytest.mark.parametrize(("task", "told"), [({"mode": "lora"}, "under DeepSpeed"), ({"precision": "fp16"}, "fp16")])
def test_what_a_shared_out_model_cannot_do_is_told_before_it_is_loaded(tmp_path, task, told):
    context = AcceleratorContext(DeepSpeedLike({"zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match=told):
        check_sharded_task(make_task(tmp_path, task), context)


def test_under_deepspeed_no_checkpoints_are_written_and_resuming_is_refused(tmp_path, capsys):
    from llmrl.config import FinetuneConfig
    from llmrl.finetune import _make_checkpoints
    from llmrl.policy import hold_policy

    context = AcceleratorContext(DeepSpeedLike({"zero_optimization": {"stage": 2}}))
    config = FinetuneConfig(task=make_task(tmp_path, {}))
    assert _make_checkpoints(config, hold_policy(), context, tmp_path, resume=False) is None
    assert "no checkpoints" in capsys.readouterr().err
    with pytest.raises(UserError, match="DeepSpeed cannot be resumed"):
        _make_checkpoints(config, hold_policy(), context, tmp_path, resume=True)


# -- the program ----------------------------------------------------------------------------------------------------


def write_data(folder):
    rows = [{"prompt": f"{i}:", "completion": " " + "abcdefghij"[: 1 + (7 * i) % 10]} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_task(folder, changes):
    from llmrl_envs.jobs.task import FineTuningTask

    settings = {
        "data": str(folder / "data.jsonl"), "objective": "instruction", "steps": 6, "batch_size": 5, "max_length": 24,
        "validation_examples": 5, "evaluation_batch_size": 2,
    }  # fmt: skip
    return FineTuningTask.model_validate({**settings, **changes})


def train(job, context, *, poisoned=False):
    """Six steps, two of them frozen; in the poisoned case one process's third loss is infinite."""
    from llmrl_envs.interface.action import action_table
    from llmrl_envs.interface.schedule import Schedule
    from llmrl_envs.jobs.session import FineTuningSession

    session = FineTuningSession(job, seed=SEED, parallel=context)
    schedule = Schedule(action_table("moves"), np.array([6]), np.array([1e-3]))
    schedule.observe_norms(*(np.array([norm]) for norm in session.initial_norms()))
    calls = iter(range(10**6))

    def break_loss(module, arguments, output):
        if module.training and next(calls) == 2 and poisoned and context.rank == 0:
            output.logits[..., ord("a") : ord("z")] = float("-inf")

    handle = job.loaded.model.register_forward_hook(break_loss)
    intervals = [session.run_interval(2, schedule)]
    schedule.apply(np.array([schedule.table.names.index("freeze")]))
    intervals.append(session.run_interval(2, schedule))
    schedule.apply(np.array([schedule.table.names.index("freeze")]))
    intervals.append(session.run_interval(2, schedule))
    handle.remove()
    found = {f"weight.{name}": parameter.detach().numpy().copy() for name, parameter in session._parameters.items()}
    for name in ("loss", "gradient_norm", "clipped", "skipped"):
        found[name] = np.concatenate([getattr(interval, name)[0] for interval in intervals]).astype(np.float64)
    for name in ("update_norm", "weight_norm", "momentum_cosine", "signal_to_noise"):
        found[name] = np.concatenate([getattr(interval, name) for interval in intervals])
    evaluation = session.evaluate("validation")
    found["evaluation"] = np.array([evaluation.loss, evaluation.num_targets, evaluation.num_tokens])
    found["tokens"] = np.array([session.tokens_trained])
    return {name: np.nan_to_num(value, nan=-1.0) for name, value in found.items()}


def run_cases(folder, context, name):
    from llmrl_envs.jobs.loading import JobLibrary
    from safetensors.numpy import save_file

    library = JobLibrary("cpu")
    for case, changes in CASES.items():
        job = library.job(make_task(folder, changes))
        found = train(job, context, poisoned=case == "poisoned")
        if case == "full" and context.world_size > 1:
            found["agreed"] = np.array([context.agree(4 + context.rank)])
            found |= {f"again.{key}": value for key, value in train(job, context).items()}
        save_file(found, folder / f"{case}-{name}.safetensors")


def one_of_two(folder):
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(1)
    context = AcceleratorContext(Accelerator(cpu=True))
    assert context.world_size == 2
    run_cases(folder, context, ("first", "second")[context.rank])


def main(folder):
    import torch
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    write_data(folder)
    debug_launcher(one_of_two, args=(folder,), num_processes=2)
    run_cases(folder, SingleProcess(), "alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
