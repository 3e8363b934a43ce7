"""The job library: everything is loaded once, and nothing is shared that should not be."""

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs import loading
from llmrl_envs.jobs.loading import JobLibrary, resolve_device


@pytest.fixture
def task(make_job):
    return make_job().task


@pytest.fixture
def num_loads(task, monkeypatch):
    """Counts what is really loaded from now on."""
    loads = {"model": 0, "data": 0}

    def counted(kind, original):
        def load(*arguments, **options):
            loads[kind] += 1
            return original(*arguments, **options)

        return load

    monkeypatch.setattr(loading, "load_model", counted("model", loading.load_model))
    monkeypatch.setattr(loading, "load_task_data", counted("data", loading.load_task_data))
    return loads


def variant(task, **changes):
    return type(task).model_validate({**dict(task), **changes})


def test_tasks_of_one_model_and_one_dataset_load_each_once(task, num_loads):
    library = JobLibrary("cpu")
    first = library.job(task)
    for changes in ({"steps": 99}, {"learning_rate": 1.0}, {"name": "x"}, {"optimizer": {"weight_decay": 0.1}}):
        other = library.job(variant(task, **changes))
        assert other.loaded is first.loaded
        assert other.data is first.data
    assert num_loads == {"model": 1, "data": 1}


def test_another_mode_or_data_is_another_matter_and_another_length_the_same_model(task, num_loads):
    library = JobLibrary("cpu")
    first = library.job(task)
    lora = library.job(variant(task, mode="lora"))
    assert lora.loaded.model is not first.loaded.model
    assert lora.data is first.data
    shorter = library.job(variant(task, max_length=12))
    assert shorter.data is not first.data
    assert shorter.loaded is first.loaded
    assert num_loads == {"model": 2, "data": 2}
    with pytest.raises(UserError, match="max_length is longer"):
        library.job(variant(task, max_length=100_000))
    assert not set(map(id, lora.loaded.model.parameters())) & set(map(id, first.loaded.model.parameters()))


def test_the_initial_weights_come_back_bit_for_bit(make_job):
    job = make_job()
    before = {name: tensor.clone() for name, tensor in job.initial.items()}
    for parameter in job.loaded.trainable.values():
        parameter.data.add_(1.0)
        parameter.grad = torch.ones_like(parameter)
    job.restore_initial_weights()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in job.loaded.trainable.items())


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_subset_is_fixed_complete_and_batched_by_length(make_job, split):
    examples = {"validation_examples": 4, "test_examples": 4, "evaluation_batch_size": 3}
    job, again = make_job(**examples), make_job(**examples, steps=7)
    data = getattr(job.data, split)
    batches = job.subset(split)
    assert [len(batch) for batch in batches] == [3, 1]
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == 4
    assert np.all(np.diff(data.num_tokens[rows]) >= 0)
    np.testing.assert_array_equal(rows, np.concatenate(again.subset(split)))
    everything = np.concatenate(make_job(validation_examples=10**6, test_examples=10**6).subset(split))
    assert sorted(everything.tolist()) == list(range(len(data)))


def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(UserError, match="device cannot be used"):
            resolve_device(name)
