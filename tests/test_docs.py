"""The page on DQN tells of every flag, and of none that is not there."""

import re
from pathlib import Path

from llmrl.config import TrainingConfig
from llmrl.config_agent import AgentConfig
from llmrl.dqn.config import PRESETS, DQNConfig

PAGE = (Path(__file__).parents[1] / "docs" / "dqn.md").read_text(encoding="utf-8")


def test_every_flag_is_explained():
    told = set(re.findall(r"`([a-z_]+)(?:: [a-z_]+)?`", PAGE))
    assert set(DQNConfig.model_fields) - told == set()
    assert all(f"preset: {name}" in PAGE for name in PRESETS)


def test_every_key_exists():
    for section, model in (("agent", AgentConfig), ("training", TrainingConfig)):
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert set(re.findall(rf"\b{section}\.([a-z_]+)(?=[=`:\] ])", PAGE)) - {"py"} <= names, section
