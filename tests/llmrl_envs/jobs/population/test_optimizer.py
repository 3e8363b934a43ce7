"""PopulationAdamW against P separate torch.optim.AdamW over random steps."""

import numpy as np
import pytest
import torch
from llmrl_envs.interface.momentum import lean_on_gradient
from llmrl_envs.jobs.population.columns import ColumnLayout
from llmrl_envs.jobs.population.optimizer import PopulationAdamW, RowStep
from llmrl_envs.jobs.task import OptimizerSettings

SHAPES = {"lower.weight": (3, 5), "lower.bias": (7,), "upper.weight": (4, 4), "upper.bias": (4,)}
LOWER = ("lower.weight", "lower.bias")
SETTINGS = (
    OptimizerSettings(),
    OptimizerSettings(weight_decay=0.3, max_grad_norm=0.5),
    OptimizerSettings(betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
)


class Twin:
    """One job with torch's own optimizer, step by step."""

    def __init__(self, parameters, settings):
        self.parameters = {name: torch.nn.Parameter(value.clone()) for name, value in parameters.items()}
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
        self.settings = settings

    def step(self, gradients, rate, limit, *, frozen, share):
        for name, parameter in self.parameters.items():
            parameter.grad = None if frozen and name in LOWER else gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            self.optimizer.step()
            lean_on_gradient(self.optimizer, share)
        return norm


@pytest.mark.parametrize("by_row", [True, False])
def test_one_hundred_random_steps_equal_those_of_separate_optimizers(by_row):
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    jobs, start = len(SETTINGS), 2  # two rows before them belong to somebody else
    initial = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in SETTINGS]
    layout = ColumnLayout(initial[0], LOWER)
    weights = torch.cat([torch.ones(start, layout.num_columns), *(layout.flatten(p)[None] for p in initial)])
    gradients = torch.zeros_like(weights)
    optimizer = PopulationAdamW(layout, torch.device("cpu"), by_row=by_row)
    optimizer.reserve(len(weights))
    twins = [Twin(p, settings) for p, settings in zip(initial, SETTINGS, strict=True)]
    for row, settings in enumerate(SETTINGS):
        optimizer.begin(start + row, settings)
    untouched = weights[:start].clone()
    for _ in range(100):
        rates, limits = 10.0 ** rng.uniform(-4, -1, jobs), 10.0 ** rng.uniform(-1, 1, jobs)
        frozen = frozenset(np.flatnonzero(rng.random(jobs) < 0.3).tolist())
        shares = tuple(rng.choice([0.5, 0.7, 1.0], jobs).tolist())
        norms = []
        for row, twin in enumerate(twins):
            found = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
            if rng.random() < 0.1:
                found["upper.weight"][0, 0] = float("nan")
            gradients[start + row] = layout.flatten(found)
            norms.append(twin.step(found, rates[row], limits[row], frozen=row in frozen, share=shares[row]))
        limits = torch.tensor(limits, dtype=torch.float32)
        step = RowStep(start, start + jobs, torch.from_numpy(rates), limits, torch.stack(norms), frozen, shares)
        optimizer.step(weights, gradients, step)
    for row, twin in enumerate(twins):
        for name, parameter in twin.parameters.items():
            mine = layout.view(weights, name)[start + row]
            torch.testing.assert_close(mine, parameter.detach(), rtol=2e-5, atol=2e-6)
            mine = layout.view(optimizer.exp_avg_sq, name)[start + row]
            torch.testing.assert_close(mine, twin.optimizer.state[parameter]["exp_avg_sq"], rtol=2e-5, atol=1e-7)
            steps = optimizer.steps[start + row, 0 if name in LOWER else 1]
            assert steps == twin.optimizer.state[parameter]["step"]
    assert torch.equal(weights[:start], untouched)
    assert len({tuple(row.tolist()) for row in optimizer.steps[start:]}) > 1


def test_columns_between_parameters_stay_zero():
    layout = ColumnLayout({name: torch.ones(shape) for name, shape in SHAPES.items()}, LOWER)
    row = layout.flatten({name: torch.ones(shape) for name, shape in SHAPES.items()})
    assert row.sum() == sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert all(column.start % 16 == 0 for column in layout.columns.values())
    assert {name for name, column in layout.columns.items() if column.start < layout.lower_stop} == set(LOWER)
    first, last = layout.decayed
    assert {n for n, c in layout.columns.items() if first <= c.start < last} == {"lower.weight", "upper.weight"}
