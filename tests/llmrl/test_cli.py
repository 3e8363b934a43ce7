import errno
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llmrl_envs.errors import UserError

from llmrl import __version__
from llmrl.cli import main
from llmrl.config import CompareConfig, FinetuneConfig, TrainConfig
from llmrl.failures import explain

HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "wandb", "matplotlib"}
FILES = {
    "train": "env: {tasks: {tasks: [{data: 'builtin:json'}]}}\n",
    "finetune": "task: {data: 'builtin:json', steps: 20}\n",
    "compare": "tasks: [{data: 'builtin:json'}]\n",
}


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, str]:
    paths = {}
    for name, text in FILES.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        paths[name] = str(path)
    return paths


def replace_command(monkeypatch: pytest.MonkeyPatch, module: str, name: str, run: Callable[..., Any]) -> None:
    stand_in = types.ModuleType(module)
    setattr(stand_in, name, run)
    monkeypatch.setitem(sys.modules, module, stand_in)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the commands hand over, instead of running it."""
    seen: list[dict[str, Any]] = []
    for module, name in [
        ("llmrl.training.loop", "train"),
        ("llmrl.finetune", "finetune"),
        ("llmrl.compare.runner", "compare"),
    ]:
        replace_command(monkeypatch, module, name, lambda **arguments: seen.append(arguments))
    return seen


def test_train_hands_over_what_was_asked(configs: dict[str, str], calls: list[dict[str, Any]], tmp_path: Path) -> None:
    words = ["train", "--config", configs["train"], "training.decisions=5", "--output", str(tmp_path / "run")]
    assert main([*words, "--resume", "--wandb", "disabled", "agent.n_step=2"]) == 0
    (call,) = calls
    config = call.pop("config")
    assert isinstance(config, TrainConfig)
    assert (config.training.decisions, config.agent.n_step) == (5, 2)
    assert call == {"output": tmp_path / "run", "resume": True, "wandb_mode": "disabled"}


def test_finetune_hands_over_a_policy_or_a_schedule(
    configs: dict[str, str], calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ["finetune", "--config", configs["finetune"], "--output", str(tmp_path / "run")]
    assert main([*words, "--policy", "hold", "--wandb", "disabled"]) == 0
    assert main([*words, "--schedule", "linear", "task.steps=3"]) == 0
    assert [(call["policy"], call["schedule"]) for call in calls] == [("hold", None), (None, "linear")]
    assert isinstance(calls[0]["config"], FinetuneConfig)
    assert calls[0]["config"].tracking.wandb == "disabled"
    assert calls[1]["config"].task.steps == 3


@pytest.mark.parametrize("words", [[], ["--policy", "hold", "--schedule", "linear"]])
def test_finetune_wants_one_of_policy_and_schedule(
    configs: dict[str, str],
    calls: list[dict[str, Any]],
    tmp_path: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["finetune", "--config", configs["finetune"], "--output", str(tmp_path / "run"), *words]) == 2
    assert "one of --policy and --schedule" in capsys.readouterr().err
    assert calls == []


def test_compare_hands_over_what_was_asked(
    configs: dict[str, str], calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ["compare", "--config", configs["compare"], "--output", str(tmp_path / "run"), "--policy", "default"]
    assert main([*words, "seeds=2"]) == 0
    (call,) = calls
    assert isinstance(call["config"], CompareConfig)
    assert call["config"].seeds == (0, 1)
    assert (call["output"], call["policy"]) == (tmp_path / "run", "default")


def test_mistakes_in_the_configuration_end_with_code_2(
    configs: dict[str, str], calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", configs["train"], "--output", str(tmp_path / "run")]
    assert main([*words, "agent.n_stp=5", "seed=x", "tracking.name=[bold]markup[/bold]"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: 3 mistakes" in printed.err
    assert "did you mean 'n_step'?" in printed.err
    assert "Traceback" not in printed.err
    assert calls == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no such column", expected="'text'", got="'txt'", where="data.jsonl"), "expected: 'text'"),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/x"), "no space left on the device"),
        (PermissionError(errno.EACCES, "Permission denied", "/disk/x"), "where:    /disk/x"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
    ],
)
def test_what_is_not_the_programs_mistake_has_no_traceback(
    configs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    told: str,
) -> None:
    def fail(**arguments: Any) -> None:
        raise error

    replace_command(monkeypatch, "llmrl.training.loop", "train", fail)
    assert main(["train", "--config", configs["train"], "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert told in printed
    assert "Traceback" not in printed


def test_a_wrapped_full_disk_is_recognised() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "f")
    assert "no space" in (explain(error) or "")


@pytest.mark.parametrize("error", [ValueError("shape"), FileNotFoundError(errno.ENOENT, "gone", "f"), KeyError("k")])
def test_a_mistake_of_the_program_keeps_its_traceback(
    configs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**arguments: Any) -> None:
        raise error

    replace_command(monkeypatch, "llmrl.training.loop", "train", fail)
    with pytest.raises(type(error)):
        main(["train", "--config", configs["train"], "--output", str(tmp_path / "run")])


def test_control_c_says_how_to_go_on(
    configs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**arguments: Any) -> None:
        raise KeyboardInterrupt

    replace_command(monkeypatch, "llmrl.training.loop", "train", interrupt)
    output = tmp_path / "a run"
    assert main(["train", "--config", configs["train"], "--output", str(output), "agent.n_step=2"]) == 130
    told = capsys.readouterr().err
    assert f"llmrl train --config {configs['train']} --output '{output}' --resume agent.n_step=2" in told


def test_only_the_first_process_speaks(
    configs: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["config", "validate", configs["train"], "seed=x"]) == 2
    assert capsys.readouterr().err == ""


def test_config_validate_show_and_schema(configs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for kind, path in configs.items():
        assert main(["config", "validate", path]) == 0
        assert f"is a valid {kind} configuration" in capsys.readouterr().out
    assert main(["config", "show", configs["finetune"], "task.steps=3"]) == 0
    assert "  steps: 3\n" in capsys.readouterr().out
    assert main(["config", "validate", configs["finetune"], "--kind", "compare"]) == 2
    assert "the key 'tasks' is missing" in capsys.readouterr().err
    assert main(["config", "schema", "train"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert {"seed", "env", "agent", "training", "tracking"} == set(schema["properties"])


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", [["trian"], ["train"], ["train", "--config"], ["config", "schema", "x"]])
def test_wrong_usage_ends_with_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["config", "validate", "FILE"], ["policy", "--help"]]
)
def test_help_and_validation_load_nothing_heavy(configs: dict[str, str], words: list[str]) -> None:
    words = [configs["train"] if word == "FILE" else word for word in words]
    code = (
        "import sys\n"
        "from llmrl.cli import main\n"
        "code = main(sys.argv[1:])\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else code)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_package_runs_as_a_module(configs: dict[str, str]) -> None:
    command = [sys.executable, "-m", "llmrl", "config", "validate", configs["train"], "agent.n_stp=1"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "did you mean 'n_step'?" in finished.stderr
    assert "Traceback" not in finished.stderr
