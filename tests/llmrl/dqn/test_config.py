"""The configuration: presets, contradictions, and that checking one imports no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llmrl.dqn.config import PRESETS, DQNConfig, NetworkConfig


def test_the_published_agent() -> None:
    """Extended Data Table 1 of Mnih et al. 2015."""
    config = DQNConfig.preset("nature")
    assert not any((config.double, config.dueling, config.layer_norm, config.noisy, config.munchausen))
    assert (config.n_step, config.gamma, config.head, config.sampling) == (1, 0.99, "expected", "uniform")
    assert (config.target_update_period, config.target_ema) == (10_000, 1.0)
    assert (config.loss, config.huber_delta, config.reward_clip) == ("huber", 1.0, 1.0)
    assert (config.optimizer, config.learning_rate, config.rmsprop_decay) == ("rmsprop", 0.00025, 0.95)
    assert (
        config.rmsprop_epsilon * config.batch_size**2 == 0.01
    )  # the paper sums over the batch, the loss here is a mean
    assert (config.max_grad_norm, config.weight_decay) == (None, 0.0)
    assert (config.batch_size, config.replay_capacity, config.learning_starts) == (32, 1_000_000, 50_000)
    assert config.replay_ratio == 1 / 4
    assert (config.epsilon_start, config.epsilon_end, config.epsilon_decay_steps) == (1.0, 0.1, 1_000_000)


def test_the_default_agent() -> None:
    config = DQNConfig.preset("default")
    assert config == DQNConfig()
    assert config.double
    assert config.dueling
    assert config.layer_norm
    assert config.n_step > 1
    assert config.target_ema < 1


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_take_changes_and_survive_json(name: Any) -> None:
    config = DQNConfig.preset(name, gamma=0.5)
    assert config.gamma == 0.5
    assert DQNConfig.model_validate_json(config.model_dump_json()) == config
    network = config.network((4,), 2)
    assert NetworkConfig.model_validate_json(network.model_dump_json()) == network


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"batch_size": 0}, "batch_size"),
        ({"replay_capacity": 0}, "replay_capacity"),
        ({"gamma": 1.5}, "gamma"),
        ({"munchausen": True, "head": "quantile"}, "munchausen: expected head 'expected', got 'quantile'"),
        ({"sampling": "lap", "loss": "squared"}, "expected loss 'huber'"),
        ({"learning_starts": 11, "replay_capacity": 10}, "expected learning_starts <= replay_capacity=10, got 11"),
        ({"value_min": 1.0, "value_max": 1.0}, "expected value_min < value_max"),
        ({"branches": (2, 2), "head": "quantile"}, "branches: expected head 'expected'"),
        ({"noisy": True, "epsilon_schedule": "ladder"}, "noisy"),
        ({"epsilon_schedule": "exponential", "epsilon_end": 0.0}, "expected epsilon_start and epsilon_end above 0"),
        ({"gamma": 1.0, "gamma_end": 0.9}, "expected both ends below 1, got 1.0 and 0.9"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DQNConfig(**changes)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of \['default', 'nature'\], got 'rainbow'"):
        DQNConfig.preset("rainbow")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"default_action": 2}, "expected below num_actions=2, got 2"),
        ({"branches": (2, 3)}, "product is num_actions=2"),
        ({"torso": "cnn"}, r"expected obs_shape \[C, H, W\]"),
    ],
)
def test_networks_that_do_not_fit_the_problem_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DQNConfig(**changes).network((4,), 2)


def test_configurations_need_no_torch() -> None:
    code = "import sys, llmrl.dqn.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
