"""The built-in model must behave as a pretrained model does, or a schedule learned on it means nothing."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path

import pytest
import torch
from llmrl_envs.builtin import builtin_model_path, load_corpus
from transformers import AutoModelForCausalLM


def load_script(name: str):
    path = Path(__file__).parents[3] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_script("bench_base_model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(builtin_model_path()).eval()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fine_tune(
    model, topic: str, learning_rate: float, schedule: str = "linear", steps: int = 40
) -> tuple[float, float]:
    corpus = load_corpus(topic)
    train, test = bench.windows(corpus["train"]), bench.windows(corpus["test"])[:100]
    after = bench.fine_tune(model, train, test, learning_rate=learning_rate, schedule=schedule, steps=steps, seed=0)
    return bench.mean_loss(model, test), after


def test_fine_tuning_lowers_the_loss_and_too_high_a_rate_destroys(model):
    before, after = fine_tune(model, "encodings", learning_rate=3e-3)
    assert after < 0.75 * before
    before, after = fine_tune(model, "json", learning_rate=0.1, steps=25)
    assert after > 1.1 * before


def test_fine_tuning_leaves_the_base_alone_and_repeats(model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = fine_tune(model, "json", learning_rate=1e-3, steps=3)
    assert first == fine_tune(model, "json", learning_rate=1e-3, steps=3)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_grid_of_rates_and_schedules(model):
    topics = ("email", "typing", "html", "reference", "syntax_trees")
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
    gains, linear_wins = [], []
    for topic in topics:
        rows = bench.measure_topic(model, topic, rates, steps=80, seeds=3)
        linear, constant = (bench.mean_by_rate(rows, topic, schedule) for schedule in bench.SCHEDULES)
        before = rows[0]["loss_initial"]
        best = min(linear, key=linear.get)
        assert rates[0] < best < rates[-1], (topic, linear)
        assert linear[best] < 0.97 * before, (topic, before, linear)
        assert linear[0.1] > before or constant[0.1] > before, (topic, before, linear, constant)
        gains.append(linear[best] / before)
        linear_wins.append(min(linear.values()) < min(constant.values()))
    assert statistics.fmean(gains) < 0.85
    assert sum(linear_wins) >= 4
