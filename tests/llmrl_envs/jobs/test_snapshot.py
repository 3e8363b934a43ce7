"""Snapshots: copies that later training cannot touch, put back into the same tensors."""

import torch
from llmrl_envs.jobs.snapshot import restore_snapshot, take_snapshot
from torch.nn import Parameter


class Small:
    """Two parameters, their optimizer and their average."""

    def __init__(self):
        values = torch.arange(1.0, 7.0)
        self.parameters = {"a": Parameter(values.reshape(2, 3).clone()), "b": Parameter(values[:2].clone())}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, fused=True)
        self.average = [p.detach().clone() for p in self.parameters.values()]

    def train(self, names=("a", "b")):
        for name in names:
            self.parameters[name].grad = self.parameters[name].detach() * 0.5 + 1.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, parameter in zip(self.average, self.parameters.values(), strict=True):
            average.lerp_(parameter.detach(), 0.5)

    def take(self, **position):
        generator = {"cpu": torch.Generator().manual_seed(1).get_state()}
        return take_snapshot(self.parameters, self.optimizer, self.average, position, generator)

    def restore(self, snapshot):
        return restore_snapshot(snapshot, self.parameters, self.optimizer, self.average)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_later_training_does_not_change_a_snapshot_and_a_restore_equals_it():
    small = Small()
    small.train()
    taken = small.take(step=1)
    copies = {name: tensor.clone() for name, tensor in taken.tensors.items()}
    small.train()
    small.train()
    assert_same(taken.tensors, copies)
    assert small.restore(taken) == {"step": 1}
    assert_same(small.take().tensors, copies)
    assert set(copies) == {
        *(f"{kind}.{name}" for kind in ("parameter", "step", "exp_avg", "exp_avg_sq") for name in ("a", "b")),
        "average.0", "average.1",
    }  # fmt: skip


def test_a_snapshot_can_be_restored_again_and_again():
    small = Small()
    small.train()
    taken = small.take()
    for _ in range(2):
        small.restore(taken)
        small.train()
        found = small.take().tensors
    twin = Small()
    twin.train()
    twin.train()
    assert_same(found, twin.take().tensors)


def test_the_very_same_tensors_are_filled():
    small = Small()
    taken = small.take()
    small.train()
    before = [p.data_ptr() for p in small.parameters.values()]
    small.parameters["a"].grad = torch.ones(2, 3)
    small.restore(taken)
    assert [p.data_ptr() for p in small.parameters.values()] == before
    assert small.parameters["a"].grad is None


def test_moments_that_were_not_there_yet_are_gone_again():
    small = Small()
    small.train(["a"])
    taken = small.take()
    small.train()
    small.restore(taken)
    assert small.parameters["b"] not in small.optimizer.state
    small.train()
    twin = Small()
    twin.train(["a"])
    twin.train()
    assert_same(small.take().tensors, twin.take().tensors)


def test_a_fresh_optimizer_takes_over_the_moments():
    small, other = Small(), Small()
    small.train()
    taken = small.take()
    copies = {name: tensor.clone() for name, tensor in taken.tensors.items()}
    other.restore(taken)
    small.train()
    other.train()
    assert_same(other.take().tensors, small.take().tensors)
    assert_same(taken.tensors, copies)
