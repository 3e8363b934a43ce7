"""Learned learning-rate and update schedules for fine-tuning language models.

What people use is found here by name and loaded when it is asked for, so that `import llmrl` itself loads neither
torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.controller import ScheduleController
    from llmrl.hosts.trainer import ScheduleCallback
    from llmrl.policy import SchedulePolicy

__version__ = "0.10.0"
__all__ = ["ScheduleCallback", "ScheduleController", "SchedulePolicy", "__version__"]

_HOMES = {
    "ScheduleCallback": "llmrl.hosts.trainer",
    "ScheduleController": "llmrl.controller",
    "SchedulePolicy": "llmrl.policy",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmrl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
