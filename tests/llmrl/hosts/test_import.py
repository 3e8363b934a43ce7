"""`import llmrl` costs nothing beyond what is asked for."""

import subprocess
import sys

import llmrl


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(' '.join(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_transformers():
    assert not modules_after("import llmrl") & {"torch", "transformers", "wandb", "accelerate", "gymnasium"}


def test_the_callback_loads_no_tracker_and_no_environment():
    loaded = modules_after("from llmrl import ScheduleCallback")
    assert "transformers" in loaded
    assert not loaded & {"wandb", "matplotlib", "trl", "llmrl.finetune", "llmrl_envs.fine_tuning"}


def test_every_public_name_is_there():
    for name in llmrl.__all__:
        assert getattr(llmrl, name) is not None
