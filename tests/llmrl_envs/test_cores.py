"""How many cores a process takes to be its own, and how many workers a population gets."""

import os

import pytest
import torch
from llmrl_envs import cores
from llmrl_envs.cores import container_cores, population_workers, usable_cores
from llmrl_envs.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A machine of 16 cores without quotas or launchers, on which torch would use 8 threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cores, "container_cores", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return monkeypatch


def test_the_cores_are_the_threads_that_torch_would_use(machine):
    assert usable_cores() == 8
    machine.setattr(torch, "get_num_threads", lambda: 1)  # OMP_NUM_THREADS=1
    assert usable_cores() == 1


def test_no_more_cores_than_the_process_may_use(machine):
    machine.setattr(cores, "container_cores", lambda: 3)
    assert usable_cores() == 3
    machine.setattr(os, "sched_getaffinity", lambda pid: {5, 6})
    assert usable_cores() == 2


def test_processes_of_one_launcher_share_the_cores(machine):
    machine.setenv("LOCAL_WORLD_SIZE", "4")
    assert usable_cores() == 4
    machine.setenv("LOCAL_WORLD_SIZE", "40")
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1), ("what\n", None)]
)
def test_a_container_has_its_quota(tmp_path, text, expected):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert container_cores(path) == expected
    assert container_cores(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("num_envs", "group_size", "expected"), [(1, 1, 1), (7, 1, 1), (8, 1, 2), (16, 1, 4), (64, 1, 8), (24, 12, 2)]
)
def test_by_itself_a_worker_has_four_lanes_or_more(machine, num_envs, group_size, expected):
    assert population_workers("auto", num_envs, group_size, CPU) == expected


def test_a_gpu_has_one_worker(machine):
    assert population_workers("auto", 64, 1, GPU) == 1
    assert population_workers(1, 64, 1, GPU) == 1
    with pytest.raises(UserError, match="1 or auto"):
        population_workers(2, 64, 1, GPU)


def test_as_many_workers_as_asked_for_if_there_are_jobs_for_them(machine):
    assert population_workers(3, 4, 1, CPU) == 3
    with pytest.raises(UserError, match="1 to 2, the number of groups"):
        population_workers(3, 4, 2, CPU)
    with pytest.raises(UserError, match="1 to 4, the number of jobs"):
        population_workers(0, 4, 1, CPU)
