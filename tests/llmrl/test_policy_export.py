import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule import ScheduleSettings

from llmrl.cli import main
from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    table = action_table("moves")
    spec = ObservationSpec(table)
    config = NetworkConfig(obs_shape=(spec.size,), num_actions=table.num_actions, hidden_sizes=(8,))
    network = QNetwork(config, torch.Generator().manual_seed(0))
    SchedulePolicy(table, spec, ScheduleSettings(), network, {"name": "tiny"}).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_show_prints_the_card(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "show", str(policy)]) == 0
    assert "# tiny: a learning-rate schedule policy" in capsys.readouterr().out
    assert main(["policy", "show", "hold"]) == 0


def test_an_exported_folder_is_the_same_policy(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["policy", "export", str(policy), "--output", str(output)]) == 0
    for file in policy.iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert str(output / "config.json") in capsys.readouterr().out


def test_numpy_weights_give_the_same_values(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["policy", "export", str(policy), "--output", str(output), "--format", "numpy"]) == 0
    assert json.loads((output / "network.json").read_text())["hidden_sizes"] == [8]
    network = SchedulePolicy.from_pretrained(policy).network
    assert network is not None
    with np.load(output / "network.npz", allow_pickle=False) as weights:
        assert set(weights) == set(network.state_dict())
        for name, value in network.state_dict().items():
            np.testing.assert_array_equal(weights[name], value.numpy())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "hold", "--format", "numpy"], "no network"),
        (["export", "./missing"], "no policy folder"),
    ],
)
def test_what_cannot_be_exported_is_told(
    tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy", *words, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "export", str(policy), "--output", str(policy)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_push_without_a_network_is_told(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["policy", "push", str(policy), "owner/name"]) == 2
    told = capsys.readouterr().err
    assert "not uploaded" in told
    assert "owner/name" in told
    assert "Traceback" not in told
