"""What `llmrl policy show` draws: cuts through a policy whose response is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from matplotlib.image import imread

from llmrl.cli import main
from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy, hold_policy
from llmrl.policy_response import NUM_POINTS, base_observation, respond, response_text

TABLE = action_table("moves")
SPEC = ObservationSpec(TABLE)


@pytest.fixture
def policy() -> SchedulePolicy:
    """Goes one up exactly where the gradient agrees with the momentum now: Q(one_up) = momentum_cosine, others 0."""
    config = NetworkConfig(obs_shape=(SPEC.size,), num_actions=TABLE.num_actions, hidden_sizes=())
    network = QNetwork(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        network.head.layer.weight.zero_()
        network.head.layer.bias.zero_()
        network.head.layer.bias[TABLE.hold] = 1e-6
        network.head.layer.weight[TABLE.names.index("one_up"), SPEC.names.index("momentum_cosine")] = 1.0
    return SchedulePolicy(TABLE, SPEC, ScheduleSettings(), network, {"name": "known"})


def test_the_one_feature_that_matters_comes_first(policy: SchedulePolicy) -> None:
    first, *others = respond(policy)
    up = TABLE.names.index("one_up")
    assert first.name == "momentum_cosine"
    assert first.strength == pytest.approx(2.0)
    np.testing.assert_allclose(first.leads[:, up], first.points, atol=1e-5)
    assert first.actions.tolist() == [up if point > 0 else TABLE.hold for point in first.points]
    assert all(other.strength < 1e-6 for other in others)


def test_every_feature_of_the_latest_decision_is_shown_once(policy: SchedulePolicy) -> None:
    shown = [response.name for response in respond(policy)]
    assert len(shown) == len(set(shown))
    hidden = [name for name in SPEC.names if name not in shown]
    assert all("@" in name or name.startswith("progress_tanh_") for name in hidden)


def test_the_base_is_an_observation_that_could_occur() -> None:
    base = base_observation(SPEC)
    low, high = SPEC.bounds()
    assert ((low <= base) & (base <= high)).all()
    values = dict(zip(SPEC.names, base.tolist(), strict=True))
    assert values["progress_tanh_0.2"] == pytest.approx(np.tanh(10 * (values["progress"] - 0.2)), rel=1e-5)
    assert (values["has_loss"], values["has_validation"]) == (1.0, 0.0)


def test_the_progress_moves_with_its_transforms(policy: SchedulePolicy) -> None:
    assert policy.network is not None
    with torch.no_grad():
        policy.network.head.layer.weight[0, SPEC.names.index("progress_tanh_0.4")] = 1.0
    (progress,) = (response for response in respond(policy) if response.name == "progress")
    np.testing.assert_allclose(progress.leads[:, 0], np.tanh(10 * (progress.points - 0.4)), atol=1e-5)


def test_the_text_shows_where_it_leaves_holding(policy: SchedulePolicy) -> None:
    line = next(line for line in response_text(policy).splitlines() if line.startswith("momentum_cosine"))
    half = NUM_POINTS // 2
    assert "·" * (half + 1) + "d" * half in line
    assert "d one_up" in response_text(policy)


def test_show_prints_and_draws(policy: SchedulePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.save_pretrained(tmp_path / "policy")
    picture = tmp_path / "response.png"
    assert main(["policy", "show", str(tmp_path / "policy"), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "# known: a learning-rate schedule policy" in printed
    assert "momentum_cosine" in printed
    assert printed.rstrip().endswith(str(picture))
    assert imread(picture).std() > 0.01


def test_a_policy_that_holds_has_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="holds whatever it sees"):
        respond(hold_policy())
    assert main(["policy", "show", "hold", "--picture", str(tmp_path / "response.png")]) == 2
    assert "holds whatever it sees" in capsys.readouterr().err
    assert not (tmp_path / "response.png").exists()
