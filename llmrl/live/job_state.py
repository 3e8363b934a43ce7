"""A decision and arrays as the tensors and plain values that a checkpoint may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.decisions import Decision

_ARRAYS = ("observation", "q_values", "mask")
_VALUES = ("index", "step", "action", "action_name", "rollback")


def to_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays and numbers as tensors, copied."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `to_tensors` took."""
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def decision_state(decision: Decision) -> dict[str, Any]:
    """A decision, for `restored_decision`."""
    arrays = to_tensors({name: getattr(decision, name) for name in _ARRAYS})
    return {**{name: getattr(decision, name) for name in _VALUES}, "arrays": arrays}


def restored_decision(state: Mapping[str, Any]) -> Decision:
    """The decision that `decision_state` told of."""
    return Decision(**{name: state[name] for name in _VALUES}, **to_arrays(state["arrays"]))
