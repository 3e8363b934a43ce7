"""Several policies as one: values, files, exports, and what does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from safetensors.torch import save_file

from llmrl.cli import main
from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.ensemble import EnsembleNetwork, join_networks
from llmrl.dqn.ensemble_config import EnsembleConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy
from llmrl.policy_ensemble import ensemble_policy
from llmrl.policy_export import export_policy
from llmrl.policy_numpy import NumpyPolicy

TABLE = action_table("moves")
SPEC = ObservationSpec(TABLE)
EVERYTHING = np.ones((50, TABLE.num_actions), np.bool_)
SHAPES: list[dict[str, Any]] = [
    {},
    {"layer_norm": True, "dueling": True, "default_action": TABLE.hold, "default_action_margin": 0.05},
    {"head": "quantile", "num_quantiles": 5, "cvar_level": 0.5},
    {"normalize_obs": True},
]


def network(seed: int, **shape: Any) -> QNetwork:
    sizes = {"obs_shape": (SPEC.size,), "num_actions": TABLE.num_actions, "hidden_sizes": (8,)}
    config = NetworkConfig(**{**sizes, **shape})
    made = QNetwork(config, torch.Generator().manual_seed(seed))
    if config.normalize_obs:
        made.set_obs_statistics(np.full(SPEC.size, 0.1 * seed), np.linspace(0.1, 1.0 + seed, SPEC.size))
    return made


def write(folder: Path, seed: int, **shape: Any) -> str:
    SchedulePolicy(TABLE, SPEC, ScheduleSettings(), network(seed, **shape), {"name": f"n{seed}"}).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def observations() -> np.ndarray:
    low, high = SPEC.bounds()
    return np.random.default_rng(0).uniform(low, high, size=(50, SPEC.size)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lower_bound", [0.0, 1.5])
def test_values_are_mean_less_deviations_of_the_members(tmp_path, observations, shape, lower_bound):
    sources = [write(tmp_path / str(seed), seed, **shape) for seed in range(3)]
    own = np.stack([SchedulePolicy.from_pretrained(s).act(observations, EVERYTHING).q_values for s in sources])
    expected = own.mean(axis=0) - lower_bound * own.std(axis=0, ddof=1)
    joined = ensemble_policy(sources, lower_bound)
    np.testing.assert_allclose(joined.act(observations, EVERYTHING).q_values, expected, rtol=1e-5, atol=1e-6)

    joined.save_pretrained(tmp_path / "joined")
    loaded = SchedulePolicy.from_pretrained(tmp_path / "joined")
    np.testing.assert_array_equal(
        loaded.act(observations, EVERYTHING).q_values, joined.act(observations, EVERYTHING).q_values
    )
    assert loaded.digest == joined.digest
    export_policy(str(tmp_path / "joined"), tmp_path / "arrays", file_format="numpy")
    arrays = NumpyPolicy.from_export(tmp_path / "arrays").act(observations, EVERYTHING)
    np.testing.assert_allclose(arrays.q_values, expected, rtol=1e-4, atol=1e-5)


def test_what_members_have_in_common_is_told_once(tmp_path):
    for seed in range(2):
        provenance = {"name": "dqn", "seed": seed, "tasks": ["a", "b"]}
        SchedulePolicy(TABLE, SPEC, ScheduleSettings(), network(seed), provenance).save_pretrained(tmp_path / str(seed))
    told = ensemble_policy([str(tmp_path / "0"), str(tmp_path / "1")], 1.0).provenance
    assert {key: told[key] for key in ("name", "lower_bound", "tasks")} == {
        "name": "ensemble", "lower_bound": 1.0, "tasks": ["a", "b"],
    }  # fmt: skip
    assert [set(member) for member in told["members"]] == [{"digest", "seed"}] * 2


def test_the_bound_makes_another_policy(tmp_path):
    sources = [write(tmp_path / str(seed), seed) for seed in range(2)]
    assert ensemble_policy(sources, 0.0).digest != ensemble_policy(sources, 1.0).digest


def test_the_onnx_form_gives_the_same_values(tmp_path, observations):
    import onnxruntime

    sources = [write(tmp_path / str(seed), seed, layer_norm=True) for seed in range(2)]
    joined = ensemble_policy(sources, 1.0)
    joined.save_pretrained(tmp_path / "joined")
    export_policy(str(tmp_path / "joined"), tmp_path / "onnx", file_format="onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "network.onnx"))
    (values,) = session.run(["q_values"], {"observation": observations})
    expected = joined.act(observations, EVERYTHING).q_values
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_policy_that_the_card_describes(tmp_path, capsys):
    sources = [write(tmp_path / str(seed), seed) for seed in range(2)]
    output = tmp_path / "joined"
    assert main(["policy", "ensemble", *sources, "--lower-bound", "0.5", "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert main(["policy", "show", str(output)]) == 0
    told = capsys.readouterr().out
    assert "2 of mlp [8], expected head" in told
    assert "0.5 standard deviations below their mean" in told
    assert main(["policy", "ensemble", *sources, "--output", str(output)]) == 2  # not empty


def test_it_holds_wherever_a_member_does(tmp_path):
    one, other = (network(seed) for seed in range(2))
    SchedulePolicy(TABLE, SPEC, ScheduleSettings(), one, {}, ("classification",)).save_pretrained(tmp_path / "a")
    SchedulePolicy(TABLE, SPEC, ScheduleSettings(), other, {}, ("larger_models",)).save_pretrained(tmp_path / "b")
    joined = ensemble_policy([str(tmp_path / "a"), str(tmp_path / "b")], 0.0)
    assert joined.holds_on == ("classification", "larger_models")


def test_policies_that_do_not_fit_are_refused(tmp_path):
    first = write(tmp_path / "first", 0)
    wide = write(tmp_path / "wide", 1, hidden_sizes=(16,))
    moved = dataclasses.replace(ScheduleSettings(), base="cosine")
    SchedulePolicy(TABLE, SPEC, moved, network(1), {}).save_pretrained(tmp_path / "cosine")
    ensemble_policy([first, first], 0.0).save_pretrained(tmp_path / "joined")
    for sources, told in (
        ([first], "2 to 100 policies"),
        ([first] * 101, "2 to 100 policies"),
        ([first, wide], "another shape of the network"),
        ([first, str(tmp_path / "cosine")], "another schedule"),
        ([first, "hold"], "it holds"),
        ([first, str(tmp_path / "joined")], "an ensemble"),
    ):
        with pytest.raises(UserError, match=told):
            ensemble_policy(sources, 0.0)
    for bound in (-1.0, float("nan")):
        with pytest.raises(UserError, match="at least 0"):
            ensemble_policy([first, first], bound)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        join_networks([network(0)], 0.0)
    with pytest.raises(ValueError, match="same shape"):
        join_networks([network(0), network(1, hidden_sizes=(4,))], 0.0)
    config = EnsembleConfig(**network(0).config.model_dump(), num_members=3)
    with pytest.raises(ValueError, match="expected 3 networks"):
        EnsembleNetwork(config, [network(0), network(1)])


@pytest.mark.parametrize("damage", ["missing", "extra", "count"])
def test_a_damaged_file_is_told(tmp_path, damage):
    joined = ensemble_policy([write(tmp_path / str(seed), seed) for seed in range(2)], 0.0)
    joined.save_pretrained(tmp_path / "joined")
    assert joined.network is not None
    tensors = dict(joined.network.state_dict())
    config = joined.network.config
    if damage == "missing":
        del tensors["members.1.head.layer.bias"]
    elif damage == "extra":
        tensors["members.2.head.layer.bias"] = torch.zeros(9)
    else:
        config = config.model_copy(update={"num_members": 3})
    path = tmp_path / "joined" / "model.safetensors"
    save_file(tensors, path, metadata={"network_config": config.model_dump_json()})
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.from_pretrained(tmp_path / "joined")
