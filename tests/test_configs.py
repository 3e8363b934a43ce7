"""Every configuration that ships is valid, and the scripts install and check what they say."""

import tomllib
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from llmrl_envs.interface.action import action_table

from llmrl.config import CompareConfig, FinetuneConfig, TrainConfig
from llmrl.config_loading import config_to_yaml, load_config

ROOT = Path(__file__).parents[1]
KINDS = {"train": TrainConfig, "finetune": FinetuneConfig, "compare": CompareConfig}
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
FILES = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LAUNCHERS) - set(SWEEPS))


def test_there_is_one_of_each_kind() -> None:
    for kind in KINDS:
        assert (ROOT / "configs" / kind / "quickstart.yaml") in FILES
    assert (ROOT / "configs" / "train" / "smoke.yaml") in FILES


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_it_is_valid_and_of_the_kind_of_its_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS_DIR", "models")
    monkeypatch.setenv("DATA_DIR", "data")
    config = load_config(None, path)
    assert type(config) is KINDS[path.parent.name]
    again = tmp_path / "config.yaml"
    again.write_text(config_to_yaml(config))
    assert load_config(None, again) == config


@pytest.mark.parametrize("path", LAUNCHERS, ids=[path.name for path in LAUNCHERS])
def test_accelerate_reads_it_and_starts_what_its_name_says(path: Path) -> None:
    found = load_config_from_file(str(path))
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    assert (kind, found.num_processes, found.use_cpu) == {
        "one_gpu.yaml": ("NO", 1, False),
        "ddp.yaml": ("MULTI_GPU", 2, False),
        "fsdp2.yaml": ("FSDP", 2, False),
        "deepspeed_zero2.yaml": ("DEEPSPEED", 2, False),
        "two_cpu_processes.yaml": ("MULTI_GPU", 2, True),
    }[path.name]
    if kind == "FSDP":
        assert found.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert found.deepspeed_config["zero_stage"] == 2
        assert "scheduler" not in found.deepspeed_config


def test_there_is_a_launcher_configuration_for_each_situation() -> None:
    assert len(LAUNCHERS) == 5


@pytest.mark.parametrize("name", ["quickstart", "groups"])
def test_the_quickstart_trains_on_no_task_that_it_is_compared_on(name: str) -> None:
    trained = load_config("train", ROOT / f"configs/train/{name}.yaml").env.tasks
    compared = load_config("compare", ROOT / "configs/compare/quickstart.yaml").tasks
    finetuned = load_config("finetune", ROOT / "configs/finetune/quickstart.yaml").task
    assert trained is not None
    seen = {task.data.train for task in trained.tasks}
    assert seen.isdisjoint({task.data.train for task in (*compared, finetuned)})


@pytest.mark.parametrize("name", ["quickstart", "groups"])
def test_the_default_action_of_the_quickstart_is_to_hold(name: str) -> None:
    config = load_config("train", ROOT / f"configs/train/{name}.yaml")
    assert config.agent.default_action == action_table(config.env.actions).hold


def test_constraints_pin_every_direct_dependency_and_name_no_host() -> None:
    text = (ROOT / "scripts" / "constraints.txt").read_text()
    pinned = {line.split("==")[0].lower() for line in text.splitlines() if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {name.split(">")[0].split("=")[0].split("[")[0].strip().lower() for name in wanted}
    assert names <= pinned
    assert "torch==2.13.0" in text.splitlines()
    assert "://" not in text
    assert "--" not in text


def test_ci_runs_the_same_checks() -> None:
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    script = (ROOT / "scripts" / "test.sh").read_text()
    for check in ("ruff format --check", "ruff check", "mypy", "pytest"):
        assert check in script
