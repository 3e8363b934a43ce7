import subprocess
import sys

import numpy as np
import pytest
from llmrl_envs.jobs.task import DataSpec, FineTuningTask, OptimizerSettings, TaskDistribution, log_uniform_integer
from pydantic import ValidationError


def make_task(**settings):
    return FineTuningTask(**{"data": "builtin:json", **settings})


def test_a_string_stands_for_the_training_source_and_the_optimizer():
    task = make_task(optimizer="adamw")
    assert task.data == DataSpec(train="builtin:json")
    assert task.optimizer == OptimizerSettings(name="adamw")


def test_a_task_survives_json_with_infinite_clipping():
    task = make_task(optimizer={"max_grad_norm": float("inf")}, mode="lora", lora={"target_modules": ["q_proj"]})
    assert FineTuningTask.model_validate_json(task.model_dump_json()) == task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 3}, "Extra inputs are not permitted"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "finite number"),
        ({"objective": "clasification"}, "'classification'"),
        ({"num_labels": 3}, "num_labels belongs to objective 'classification'"),
        ({"data": {"train": "x.csv", "split_fractions": (0.5, 0.4, 0.2)}}, "sum to 1"),
        ({"data": {"train": "x.csv", "split_fractions": (1.0, 0.0, 0.0)}}, "positive shares"),
        ({"data": {"train": "x.csv", "fields": {"txt": "a"}}}, "did you mean 'text'"),
        ({"objective": "instruction", "data": {"train": "x.csv", "fields": {"text": "a"}}}, "knows prompt, completion"),
        ({"lora": {"target_modules": []}}, "at least one module name"),
        ({"bad_batches": 1.0}, "less than 1"),
        ({"bad_batches": [3, -1]}, "greater than or equal to 0"),
        ({"data": {"train": "x.csv", "label_noise": 0.1}}, "language modelling has neither"),
        ({"optimizer": "sgd"}, "'adamw'"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "less than 1"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(ValidationError, match=message):
        make_task(**settings)


def test_a_range_has_its_low_end_first():
    with pytest.raises(ValidationError, match="low end first"):
        TaskDistribution(tasks=[make_task()], steps_range=(100, 10))


def test_sampling_follows_the_configured_distribution():
    tasks = [make_task(name="a", learning_rate=1e-3), make_task(name="b", learning_rate=1e-4)]
    distribution = TaskDistribution(tasks=tasks, steps_range=(60, 2000), num_seeds=4)
    rng = np.random.default_rng(0)
    samples = [distribution.sample(rng) for _ in range(4000)]
    ratios = np.array([s.learning_rate / s.task.learning_rate for s in samples])
    steps = np.array([s.task.steps for s in samples])
    assert np.mean(ratios == 1.0) == pytest.approx(0.3, abs=0.03)
    exponents = np.log10(ratios[ratios != 1.0])
    assert -1.5 <= exponents.min() < -1.45
    assert 1.45 < exponents.max() <= 1.5
    assert exponents.mean() == pytest.approx(0.0, abs=0.06)
    assert steps.min() >= 60
    assert steps.max() <= 2000
    assert np.log(steps).mean() == pytest.approx((np.log(60) + np.log(2000)) / 2, abs=0.06)
    assert {s.seed for s in samples} == {0, 1, 2, 3}
    assert np.mean([s.task_index for s in samples]) == pytest.approx(0.5, abs=0.03)
    assert all(s.task.name == tasks[s.task_index].name for s in samples)


def test_every_sample_draws_the_same_amount_of_randomness():
    states = []
    for settings in ({}, {"steps_range": (10, 20)}, {"default_rate_probability": 1.0}, {"num_seeds": 100}):
        rng = np.random.default_rng(3)
        TaskDistribution(tasks=[make_task()], **settings).sample(rng)
        states.append(rng.bit_generator.state)
    assert all(state == states[0] for state in states)


def test_without_a_range_a_task_keeps_its_steps():
    sample = TaskDistribution(tasks=[make_task(steps=77)]).sample(np.random.default_rng(0))
    assert sample.task.steps == 77


def test_tasks_are_drawn_by_weight_and_with_budgets_of_their_own():
    tasks = [
        {**make_task(name="often", steps=50).model_dump(), "weight": 3},
        {**make_task(name="long").model_dump(), "steps_range": [500, 600]},
    ]
    distribution = TaskDistribution(tasks=tasks)
    rng = np.random.default_rng(0)
    samples = [distribution.sample(rng) for _ in range(2000)]
    assert np.mean([s.task_index for s in samples]) == pytest.approx(0.25, abs=0.03)
    assert {s.task.steps for s in samples if s.task_index == 0} == {50}
    assert all(500 <= s.task.steps <= 600 for s in samples if s.task_index == 1)
    assert {type(s.task) for s in samples} == {FineTuningTask}


def test_equal_weights_draw_as_if_there_were_none():
    tasks = [make_task(name=str(index)) for index in range(7)]
    distribution, rng, twin = TaskDistribution(tasks=tasks), np.random.default_rng(1), np.random.default_rng(1)
    assert [distribution.sample(rng).task_index for _ in range(500)] == [int(twin.random(5)[0] * 7) for _ in range(500)]


def test_some_jobs_meet_bad_batches_and_nothing_else_changes():
    tasks = [make_task(name="a"), make_task(name="b", bad_batches=[3])]
    settings = {"bad_batches_probability": 0.4, "bad_batches_range": [0.02, 0.2]}
    plain, stressed = TaskDistribution(tasks=tasks), TaskDistribution(tasks=tasks, **settings)
    rng, twin = np.random.default_rng(0), np.random.default_rng(0)
    pairs = [(plain.sample(rng), stressed.sample(twin)) for _ in range(2000)]
    assert all((x.task_index, x.learning_rate, x.seed) == (y.task_index, y.learning_rate, y.seed) for x, y in pairs)
    assert {y.task.bad_batches for _, y in pairs if y.task_index == 1} == {(3,)}
    shares = np.array([y.task.bad_batches for _, y in pairs if y.task_index == 0])
    assert np.mean(shares > 0) == pytest.approx(0.4, abs=0.04)
    assert 0.02 <= shares[shares > 0].min() < 0.022
    assert 0.18 < shares.max() < 0.2


def test_log_uniform_integers_reach_both_ends():
    uniforms = np.linspace(0.0, 1.0, 10_001)[:-1]
    values = [log_uniform_integer(u, 2, 9) for u in uniforms]
    assert sorted(set(values)) == list(range(2, 10))
    assert log_uniform_integer(0.999999, 5, 5) == 5


def test_settings_import_without_torch():
    code = "import sys, llmrl_envs.jobs.task; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_starting_levels_are_drawn_as_often_as_they_stand_there_and_change_nothing_else() -> None:
    plain = TaskDistribution(tasks=[make_task()], num_seeds=4)
    spread = TaskDistribution(tasks=[make_task()], num_seeds=4, start_moves=(0, 0, -2, 3))
    rng, twin = np.random.default_rng(0), np.random.default_rng(0)
    pairs = [(plain.sample(rng), spread.sample(twin)) for _ in range(2000)]
    moves = [with_move.start_move for _, with_move in pairs]
    assert np.mean(np.array(moves) == 0) == pytest.approx(0.5, abs=0.05)
    assert set(moves) == {0, -2, 3}
    assert all(a.start_move == 0 and (a.learning_rate, a.seed) == (b.learning_rate, b.seed) for a, b in pairs)
