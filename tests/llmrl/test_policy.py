"""A policy folder: saved, loaded, and refused when anything in it is not as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule import ScheduleSettings

from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy, hold_policy

TABLE = action_table("moves")
SPEC = ObservationSpec(TABLE)


def make_policy(**network: object) -> SchedulePolicy:
    config = NetworkConfig(obs_shape=(SPEC.size,), num_actions=TABLE.num_actions, hidden_sizes=(8,), **network)
    q_network = QNetwork(config, torch.Generator().manual_seed(0)).eval()
    return SchedulePolicy(TABLE, SPEC, ScheduleSettings(rollbacks=1), q_network, {"name": "test", "seed": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_policy().save(tmp_path / "policy")
    return tmp_path / "policy"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_a_loaded_policy_acts_as_the_saved_one(folder: Path) -> None:
    observation = np.random.default_rng(0).normal(size=(5, SPEC.size)).astype(np.float32)
    mask = np.ones((5, TABLE.num_actions), np.bool_)
    before, after = make_policy().act(observation, mask), SchedulePolicy.load(folder).act(observation, mask)
    np.testing.assert_array_equal(before.actions, after.actions)
    np.testing.assert_array_equal(before.q_values, after.q_values)
    assert SchedulePolicy.load(folder).settings == ScheduleSettings(rollbacks=1)


def test_saving_the_same_policy_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_policy().save(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_masked_actions_are_never_taken() -> None:
    observation = np.random.default_rng(1).normal(size=(64, SPEC.size)).astype(np.float32)
    mask = np.zeros((64, TABLE.num_actions), np.bool_)
    mask[:, [0, TABLE.hold]] = True
    assert set(make_policy().act(observation, mask).actions.tolist()) <= {0, TABLE.hold}


def test_hold_holds_and_has_no_values() -> None:
    decision = SchedulePolicy.load("hold").act(np.zeros((2, SPEC.size), np.float32), np.ones((2, 9), np.bool_))
    assert decision.actions.tolist() == [TABLE.hold] * 2
    assert np.isnan(decision.q_values).all()


def test_hold_can_be_saved_and_loaded(tmp_path: Path) -> None:
    hold_policy().save(tmp_path)
    assert SchedulePolicy.load(tmp_path).network is None


def test_the_card_says_what_it_does_and_knows(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "two_down" in card
    assert '"seed": 3' in card
    assert SPEC.hash in card


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema_version": 99}, "another version"),
        ({"surprise": 1}, "surprise"),
        ({"observation_hash": "0" * 16}, "another observation"),
        ({"observation": {"stack": 0}}, "another observation"),
        ({"action_table_hash": "0" * 16}, "action table was changed"),
        ({"action_table": {}}, "action table cannot be read"),
        ({"schedule": {"no_such": 1}}, "schedule settings"),
    ],
)
def test_a_changed_config_is_refused(folder: Path, changes: dict[str, object], told: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=told):
        SchedulePolicy.load(folder)


def test_a_missing_key_is_named(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["kind"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="kind"):
        SchedulePolicy.load(folder)


def test_a_policy_for_other_actions_than_its_network_is_refused(folder: Path, tmp_path: Path) -> None:
    table = action_table("factors")
    other = SchedulePolicy(table, ObservationSpec(table), ScheduleSettings(), None)
    other.save(tmp_path / "other")
    values = json.loads((tmp_path / "other" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "kind": "network"}))
    with pytest.raises(UserError, match="does not fit"):
        SchedulePolicy.load(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"not a tensor file"])
def test_damaged_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.load(folder)


def test_broken_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        SchedulePolicy.load(folder)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/policy", "nowhere"])
def test_a_missing_folder_is_told(source: str) -> None:
    with pytest.raises(UserError, match="no policy folder"):
        SchedulePolicy.load(source)


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        SchedulePolicy.load(tmp_path)
