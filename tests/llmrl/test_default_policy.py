"""The policy that ships: it loads, is small, says what it is, and steers a job whatever rate that was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmrl.policy import SchedulePolicy
from llmrl.policy_reference import POLICY_FILES, locate_policy


@pytest.fixture(scope="module")
def policy() -> SchedulePolicy:
    return SchedulePolicy.from_pretrained("default")


def test_the_folder_is_complete_and_small() -> None:
    folder = locate_policy("default")
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == sorted(POLICY_FILES)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20


def test_it_is_a_network_with_a_default_to_fall_back_on(policy: SchedulePolicy) -> None:
    assert policy.network is not None
    config = policy.network.config
    assert config.default_action == policy.table.hold
    assert config.default_action_margin > 0.0
    assert not any(Path(path).is_absolute() for path in policy.provenance["agent"].get("experience", ()))


def test_it_acts_within_the_mask(policy: SchedulePolicy) -> None:
    obs = np.zeros((1, policy.spec.size), np.float32)
    only_hold = np.zeros((1, policy.table.num_actions), np.bool_)
    only_hold[:, policy.table.hold] = True
    assert policy.act(obs, only_hold).actions.tolist() == [policy.table.hold]
