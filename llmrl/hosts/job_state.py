"""A job's state as what a checkpoint's files hold: JSON values, NumPy arrays and named tensors; numbers to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from llmrl_envs.jobs.passes import Evaluation
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.snapshot import SessionSnapshot
from numpy.typing import NDArray
from torch import Tensor

from llmrl.decisions import Decision, DecisionRecord

_NUMBERS = ("learning_rate", "train_loss", "validation_loss", "level", "step_size", "gradient_norm")
_ARRAYS = ("observation", "q_values", "mask")
_PRESENT, _BEST = "present.", "best."


@dataclass(frozen=True)
class JobState:
    """State of a job between two steps, as one of its processes holds it.

    Attributes:
        values: JSON values and NumPy arrays, the same in all processes.
        shared: Tensors that are the same in all processes; none where the model is shared out.
        own: Tensors of this process alone: its generators, and its shards where the model is shared out.
    """

    values: dict[str, Any]
    shared: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_decisions(self) -> int:
        """Decisions taken so far whose intervals have ended."""
        return len(self.values["records"])


# -- a session --------------------------------------------------------------------------------------------------------


def session_state(session: FineTuningSession) -> JobState:
    """A session with its best snapshot, not copied: to be written before the next step."""
    present = session.present_state()
    shared = _named(present.tensors, _PRESENT)
    own = _named(present.random_state, _PRESENT)
    values: dict[str, Any] = {"present": dict(present.position), "best": None}
    if present.best is not None:
        shared |= _named(present.best.tensors, _BEST)
        own |= _named(present.best.random_state, _BEST)
        values["best"] = dict(present.best.position)
    return JobState(values, shared, own)


def restore_session(session: FineTuningSession, state: JobState) -> None:
    """Takes a session to where `session_state` was taken."""
    best = None
    if state.values["best"] is not None:
        best = SessionSnapshot(_part(state.shared, _BEST), state.values["best"], _part(state.own, _BEST))
    tensors, generators = _part(state.shared, _PRESENT), _part(state.own, _PRESENT)
    session.restore(SessionSnapshot(tensors, state.values["present"], generators, best))


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# -- what was decided and measured ------------------------------------------------------------------------------------


def records_state(records: Sequence[DecisionRecord]) -> list[dict[str, Any]]:
    """Records as JSON values and arrays; numbers that may not be finite are arrays, because JSON has none."""
    return [
        {
            "index": record.decision.index,
            "decided_at": record.decision.step,
            "action": record.decision.action,
            "action_name": record.decision.action_name,
            "rollback": record.decision.rollback,
            **{name: getattr(record.decision, name) for name in _ARRAYS},
            "step": record.step,
            "events": dict(record.events),
            "numbers": np.array([getattr(record, name) for name in _NUMBERS], np.float64),
        }
        for record in records
    ]


def restored_records(states: Sequence[Mapping[str, Any]]) -> list[DecisionRecord]:
    """What `records_state` was given."""
    return [
        DecisionRecord(
            decision=Decision(
                index=state["index"],
                step=state["decided_at"],
                action=state["action"],
                action_name=state["action_name"],
                rollback=state["rollback"],
                **{name: state[name] for name in _ARRAYS},
            ),
            step=state["step"],
            events=state["events"],
            **dict(zip(_NUMBERS, state["numbers"].tolist(), strict=True)),
        )
        for state in states
    ]


def evaluation_state(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation; its loss, which may not be finite, as an array."""
    return {**vars(evaluation), "loss": np.array([evaluation.loss], np.float64)}


def restored_evaluation(state: Mapping[str, Any]) -> Evaluation:
    """What `evaluation_state` was given."""
    return Evaluation(**{**state, "loss": float(state["loss"][0])})


# -- tensors in nested values -----------------------------------------------------------------------------------------


def as_arrays(value: Any) -> Any:
    """The same nested values with NumPy arrays in place of tensors of at least one dimension."""
    if isinstance(value, Tensor):
        array: NDArray[Any] = value.cpu().numpy()
        return array
    if isinstance(value, Mapping):
        return {key: as_arrays(item) for key, item in value.items()}
    return [as_arrays(item) for item in value] if isinstance(value, list | tuple) else value


def as_tensors(value: Any) -> Any:
    """Undoes `as_arrays`."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Mapping):
        return {key: as_tensors(item) for key, item in value.items()}
    return [as_tensors(item) for item in value] if isinstance(value, list | tuple) else value
