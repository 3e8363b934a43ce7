"""The policy that ships: small, described, and found by its name wherever a policy is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from llmrl_envs.errors import UserError
from numpy.typing import NDArray

from llmrl.cli import main
from llmrl.hosts.trainer import ScheduleCallback
from llmrl.policy import SchedulePolicy, hold_policy
from llmrl.policy_reference import POLICY_FILES, locate_policy

ROOT = Path(__file__).parents[2]
MAX_BYTES = 1_000_000


def test_it_is_small_and_nothing_but_a_policy() -> None:
    folder = locate_policy("default")
    assert folder == ROOT / "llmrl" / "policies" / "default"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == set(POLICY_FILES)
    assert sum(path.stat().st_size for path in files) < MAX_BYTES


def test_its_card_says_what_it_was_trained_on_and_where_it_ends() -> None:
    folder = locate_policy("default")
    assert folder is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Use", "## Training", "## Limits"):
        assert heading in card


def test_it_decides_something_for_every_observation() -> None:
    policy = SchedulePolicy.from_pretrained("default")
    assert policy.network is not None, "hold needs no files"
    low, high = policy.spec.bounds()
    obs = np.random.default_rng(0).uniform(low, high, size=(50, policy.spec.size)).astype(np.float32)
    mask = np.ones((50, policy.table.num_actions), dtype=np.bool_)
    decision = policy.act(obs, mask)
    assert decision.actions.shape == (50,)
    assert np.isfinite(decision.q_values).all()


def test_it_decays_unless_sure_and_names_no_place_of_its_maker() -> None:
    policy = SchedulePolicy.from_pretrained("default")
    assert policy.network is not None
    config = policy.network.config
    assert config.default_action == policy.table.names.index("cooldown")
    margins = dict(zip(policy.table.names, config.default_action_margin, strict=True))
    assert margins["one_up"] > margins["hold"] > margins["cooldown"] == 0.0
    assert not any(Path(folder).is_absolute() for folder in policy.provenance["agent"]["experience"])


@pytest.mark.parametrize(
    ("cosine", "signal_to_noise", "action"),
    [(0.3, -0.3, "hold"), (0.0, -0.5, "cooldown"), (-0.05, -0.6, "cooldown")],
)
def test_it_waits_with_the_decay_while_gradients_agree(cosine: float, signal_to_noise: float, action: str) -> None:
    assert set(decided([0.15, 0.2, 0.3, 0.4], cosine, signal_to_noise)) == {action}


def test_it_leans_from_the_first_decision_on() -> None:
    assert decided([0.0], 0.0, 0.0, leaning=False) == ["lean"]
    assert set(decided([0.06, 0.1, 0.2], 0.05, -0.45, leaning=False)) == {"lean"}


def test_rising_is_worth_more_the_better_gradients_agree() -> None:
    worth = [valued(cosine, noise)["one_up"] for cosine, noise in ((0.6, -0.1), (0.3, -0.3), (0.1, -0.4), (0.0, -0.5))]
    assert worth == sorted(worth, reverse=True)
    assert worth[0] > 0.0 > worth[-1]


def test_what_a_host_cannot_measure_is_no_reason_to_rise_or_wait() -> None:
    assert set(decided([0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5], 0.0, 0.0)) == {"cooldown"}


def valued(cosine: float, signal_to_noise: float) -> dict[str, float]:
    """Values at an eighth of the budget of a job that leans, less that of beginning to decay."""
    policy = SchedulePolicy.from_pretrained("default")
    obs = observations(policy, [0.125], cosine, signal_to_noise, leaning=True)
    values = policy.act(obs, np.ones((1, policy.table.num_actions), np.bool_)).q_values[0]
    return dict(zip(policy.table.names, (values - values[policy.table.names.index("cooldown")]).tolist(), strict=True))


def decided(progress: list[float], cosine: float, signal_to_noise: float, *, leaning: bool = True) -> list[str]:
    """Actions where all ten decisions that it sees show the same."""
    policy = SchedulePolicy.from_pretrained("default")
    obs = observations(policy, progress, cosine, signal_to_noise, leaning=leaning)
    mask = np.ones((len(progress), policy.table.num_actions), np.bool_)
    mask[:, policy.table.names.index("lean" if leaning else "one_up")] = False
    mask[np.array(progress) < 0.05, 1:3] = False
    return [policy.table.names[choice] for choice in policy.act(obs, mask).actions]


def observations(
    policy: SchedulePolicy, progress: list[float], cosine: float, signal_to_noise: float, *, leaning: bool
) -> NDArray[np.float32]:
    """float32[len(progress), O]."""
    shares = np.array(progress, np.float32)
    obs = np.zeros((len(shares), policy.spec.size), np.float32)
    for index, name in enumerate(policy.spec.names):
        base = name.partition("@")[0]
        if base == "progress":
            obs[:, index] = shares
        elif base.startswith("progress_tanh_"):
            obs[:, index] = np.tanh(10.0 * (shares - float(base.removeprefix("progress_tanh_"))))
        elif base == "momentum_cosine":
            obs[:, index] = cosine
        elif base == "log10_signal_to_noise":
            obs[:, index] = signal_to_noise
        elif base == "leaning":
            obs[:, index] = leaning
    return obs


def test_it_acts_within_the_mask() -> None:
    policy = SchedulePolicy.from_pretrained("default")
    only_hold = np.zeros((1, policy.table.num_actions), np.bool_)
    only_hold[:, policy.table.hold] = True
    assert policy.act(np.zeros((1, policy.spec.size), np.float32), only_hold).actions.tolist() == [policy.table.hold]


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "show", "default"]) == 0
    assert "a learning-rate schedule policy" in capsys.readouterr().out


def test_a_trainer_callback_takes_it_by_name() -> None:
    assert ScheduleCallback("default").policy.network is not None


def test_an_installation_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrl.policy_reference.resources.files", lambda package: tmp_path)
    with pytest.raises(UserError, match="ships no default policy") as caught:
        SchedulePolicy.from_pretrained("default")
    assert "'hold'" in str(caught.value)


@pytest.mark.slow
def test_a_wheel_carries_it(tmp_path: Path) -> None:
    """Built from a copy, with a policy that has learned nothing in its place."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("llmrl", "envs"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "policies")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    hold_policy().save_pretrained(copy / "llmrl" / "policies" / "default")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"llmrl/policies/default/{path.name}" for path in (copy / "llmrl/policies/default").iterdir()} <= names
