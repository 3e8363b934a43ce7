"""Which random generators a rollback turns back: those that the job's steps draw from, and not the data's."""

import pytest
import torch
from llmrl_envs.builtin import builtin_model_path
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from llmrl import ScheduleController
from llmrl.live.generators import Generators
from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

STEPS, EPOCH = 24, 3
ROLLBACK_AFTER = 6
"""Decisions come after steps 2, 4 and 6 here; the third one rolls back to the state after step 4."""


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class RollsBack(SchedulePolicy):
    """Rolls back once, at the fourth decision."""

    def __init__(self):
        hold = hold_policy()
        super().__init__(hold.table, hold.spec, hold.settings, None)
        self.decisions = 0

    def act(self, observation, mask):
        import numpy as np

        self.decisions += 1
        action = self.table.names.index("rollback" if self.decisions == 4 else "hold")
        return PolicyDecision(np.array([action]), np.zeros(mask.shape, np.float32))


def run(dropout, *, steps=STEPS):
    """Trains on shuffled rows; returns the generator's state after each step, and the order of the rows."""
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path(), attention_dropout=dropout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    controller = ScheduleController(RollsBack(), snapshots="memory")
    controller.attach(model, optimizer, total_steps=STEPS)
    rows = torch.randint(97, 110, (EPOCH, 16), generator=torch.Generator().manual_seed(1))
    states, order = [], []
    while len(states) < steps:
        for indices in DataLoader(range(EPOCH), batch_size=1, shuffle=True):
            batch = rows[int(indices) : int(indices) + 1]
            damage = 3.0 if len(states) in (4, 5) else 1.0  # so that step 4 stays the best
            loss = model(input_ids=batch, labels=batch).loss * damage
            loss.backward()
            controller.before_step(loss)
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
            states.append(torch.get_rng_state())
            order.append(int(indices))
    return states, order, controller


def test_a_rollback_turns_the_dropouts_generator_back_and_goes_on_in_the_data():
    states, order, controller = run(0.1)
    assert torch.equal(states[ROLLBACK_AFTER - 1], states[3])
    assert not torch.equal(states[ROLLBACK_AFTER], states[3])
    assert controller.job.step == STEPS
    assert all(sorted(order[i : i + EPOCH]) == list(range(EPOCH)) for i in range(0, STEPS, EPOCH))


def test_a_rollback_leaves_the_order_of_the_data_alone_where_nothing_else_is_drawn():
    """The loader shuffles with the global generator, which turned back would give an epoch's order again."""
    _, order, controller = run(0.0)
    torch.manual_seed(0)
    expected = [int(i) for _ in range(STEPS // EPOCH) for i in DataLoader(range(EPOCH), batch_size=1, shuffle=True)]
    assert any("rollback" in record.events for record in controller.records)
    assert order == expected


def test_a_generator_that_a_step_leaves_alone_is_not_the_jobs():
    generators = Generators(torch.device("cpu"))
    generators.begin_step()
    torch.rand(1)
    generators.end_step()
    kept = generators.states()
    assert generators.own == ("cpu",)
    torch.rand(1)
    generators.restore(kept)
    assert torch.equal(torch.get_rng_state(), kept["cpu"])
    generators.begin_step()
    generators.end_step()
    assert generators.own == ()
    torch.rand(1)
    moved = torch.get_rng_state()
    generators.restore(kept)
    assert torch.equal(torch.get_rng_state(), moved)


def test_what_was_found_out_survives_an_interruption():
    found, other = Generators(torch.device("cpu")), Generators(torch.device("cpu"))
    found.begin_step()
    found.end_step()
    other.keep(found.own)
    assert other.own == ()
