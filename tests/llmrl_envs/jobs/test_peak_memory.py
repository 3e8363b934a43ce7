"""Peaks of memory against what is known of a few operations."""

import gc

import pytest
import torch
from llmrl_envs.jobs.peak_memory import peak_allocation

CPU = torch.device("cpu")
KILO = 4096  # bytes of 1,024 floats


def numbers():
    return torch.zeros(1024)


def test_tensors_count_as_long_as_they_live():
    with peak_allocation(CPU) as peak:
        first = numbers()
        second = first + 1
        del first
        third = second * 2
        assert peak == [2 * KILO]
        assert third.sum() == 2048
    del second, third
    with peak_allocation(CPU) as peak:
        assert torch.stack([numbers(), numbers(), numbers()]).shape == (3, 1024)
    assert peak == [6 * KILO]


def test_views_results_in_place_and_tensors_from_before_do_not_count():
    before = numbers()
    with peak_allocation(CPU) as peak:
        before.view(32, 32).t().add_(1)
        before[:10].mul_(2)
        torch.nn.functional.relu_(before)
    assert peak == [0]


def test_what_the_backward_pass_keeps_and_makes_counts():
    layers = torch.nn.Sequential(*[torch.nn.Sigmoid() for _ in range(4)])
    x = numbers().requires_grad_()
    with peak_allocation(CPU) as peak:
        layers(x).sum().backward()
    # Four results are kept for the backward pass; it begins with one gradient more, and gives each back as it goes.
    assert 5 * KILO <= peak[0] <= 6 * KILO + 64


def test_what_is_given_back_later_is_no_trouble():
    with peak_allocation(CPU) as peak:
        kept = numbers()
    del kept
    gc.collect()
    assert peak == [KILO]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_asked_for_its_own_figure():
    device = torch.device("cuda")
    before = torch.zeros(10 * 1024, device=device)
    with peak_allocation(device) as peak:
        assert (before + 1).sum() > 0
    assert 10 * KILO <= peak[0] <= 11 * KILO
