"""How a policy responds to each entry of its observation, one at a time: as a picture, and as text for a terminal.

Around a base observation, a feature is moved over its range while all others stay; what is drawn is the lead of every
action's value over that of holding. A line above zero is an action that the policy prefers to holding there. This shows
one-dimensional cuts: what two features do together is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llmrl_envs.errors import UserError
from llmrl_envs.interface.observation import ObservationSpec
from numpy.typing import NDArray

from llmrl.policy import SchedulePolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_POINTS = 33
_COLUMNS = 6
_TYPICAL = {"progress": 0.3, "log10_total_steps": 0.6, "rollbacks_left": 1.0, "mode_full": 1.0}
"""The base observation where it is not zero: a third into a full fine-tuning of some 250 steps."""


@dataclass(frozen=True)
class FeatureResponse:
    """What one feature does.

    Attributes:
        name: The feature.
        points: Where it was put, float64[P].
        leads: Value of every action less that of holding, float32[P, A].
        actions: The action taken, int64[P], all being available.
    """

    name: str
    points: NDArray[np.float64]
    leads: NDArray[np.float32]
    actions: NDArray[np.int64]

    @property
    def strength(self) -> float:
        """How much the feature moves any action's lead: its largest range over the points."""
        return float(np.ptp(self.leads, axis=0).max())


def base_observation(spec: ObservationSpec) -> NDArray[np.float32]:
    """The observation around which features are moved, float32[O]: an ordinary job, all signals at zero."""
    values = np.zeros(spec.size, np.float32)
    names = {name: index for index, name in enumerate(spec.names)}
    for name, value in _TYPICAL.items():
        values[names[name]] = value
    for name, index in names.items():
        if name.startswith("has_") and name != "has_validation":
            values[index] = 1.0
    _set_progress(spec, values, _TYPICAL["progress"])
    low, high = spec.bounds()
    return np.clip(values, low, high)


def _set_progress(spec: ObservationSpec, values: NDArray[np.float32], progress: float) -> None:
    """Sets the progress together with its transforms, so that the observation could occur."""
    for index, name in enumerate(spec.names):
        if name == "progress":
            values[index] = progress
        elif name.startswith("progress_tanh_"):
            values[index] = np.tanh(10.0 * (progress - float(name.removeprefix("progress_tanh_"))))


def respond(policy: SchedulePolicy, base: NDArray[np.float32] | None = None) -> list[FeatureResponse]:
    """Moves every feature over its range, the strongest response first.

    Features of earlier decisions (`name@1`) move with those of the latest, as they do in a job whose signal lasts; the
    progress moves with its transforms.

    Args:
        policy: One that has values.
        base: The observation to move around, float32[O]; None takes `base_observation`.

    Raises:
        UserError: The policy has no values: it always holds.
    """
    if policy.network is None:
        raise UserError(
            "this policy has no values to draw: it holds whatever it sees",
            expected="a policy from `llmrl train`",
            got=policy.reference,
        )
    spec = policy.spec
    start = base_observation(spec) if base is None else base
    names = [f.name for f in spec.features if "@" not in f.name and not f.name.startswith("progress_tanh_")]
    return sorted((_respond_to(policy, name, start) for name in names), key=lambda found: -found.strength)


def _respond_to(policy: SchedulePolicy, name: str, base: NDArray[np.float32]) -> FeatureResponse:
    spec = policy.spec
    moved = [index for index, other in enumerate(spec.names) if other == name or other.startswith(f"{name}@")]
    feature = spec.features[moved[0]]
    points = np.linspace(feature.low, feature.high, NUM_POINTS)
    observations = np.repeat(base[None], NUM_POINTS, axis=0)
    observations[:, moved] = points[:, None]
    if name == "progress":
        for row, point in zip(observations, points, strict=True):
            _set_progress(spec, row, float(point))
    decision = policy.act(observations, np.ones((NUM_POINTS, policy.table.num_actions), np.bool_))
    leads = decision.q_values - decision.q_values[:, [policy.table.hold]]
    return FeatureResponse(name, points, leads, decision.actions)


def draw_response(policy: SchedulePolicy, path: Path) -> None:
    """Draws every feature's panel to a PNG file, the strongest response first.

    Raises:
        UserError: The policy has no values.
    """
    from matplotlib.figure import Figure

    responses = respond(policy)
    num_rows = -(-len(responses) // _COLUMNS)
    figure = Figure(figsize=(2.6 * _COLUMNS, 1.9 * num_rows + 0.8), dpi=100, layout="constrained")
    axes = figure.subplots(num_rows, _COLUMNS, sharey=True, squeeze=False).ravel()
    for panel, response in zip(axes, responses, strict=False):
        _draw_panel(panel, response, policy)
    for panel in axes[len(responses) :]:
        panel.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{policy.name}: value of every action less that of holding; the strip below: the action taken")
    figure.savefig(path)


def _draw_panel(axes: Axes, response: FeatureResponse, policy: SchedulePolicy) -> None:
    for action, name in enumerate(policy.table.names):
        color: Any = "black" if action == policy.table.hold else f"C{action % 10}"
        axes.plot(response.points, response.leads[:, action], color=color, linewidth=1.1, label=name)
    colors = ["black" if a == policy.table.hold else f"C{a % 10}" for a in response.actions.tolist()]
    place = np.full(NUM_POINTS, 0.03)
    axes.scatter(response.points, place, c=colors, marker="s", s=9, transform=axes.get_xaxis_transform(), zorder=3)
    axes.set_title(response.name, fontsize=8)
    axes.tick_params(labelsize=7)


def response_text(policy: SchedulePolicy) -> str:
    """The same for a terminal: a line a feature, a letter for the action taken at each point of its range.

    Raises:
        UserError: The policy has no values.
    """
    table = policy.table
    letters = _letters(table.num_actions, table.hold)
    legend = ", ".join(f"{letters[action]} {name}" for action, name in enumerate(table.names))
    responses = respond(policy)
    width = max(len(response.name) for response in responses)
    lines = [f"action taken as one feature moves over its range, the others as in an ordinary job: {legend}", ""]
    for response in responses:
        strip = "".join(letters[action] for action in response.actions.tolist())
        low, high = response.points[0], response.points[-1]
        lines.append(f"{response.name:<{width}}  {low:>5g} {strip} {high:<5g}  moves values by {response.strength:.3g}")
    return "\n".join(lines)


def _letters(num_actions: int, hold: int) -> list[str]:
    """A letter for every action, a dot for holding."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return ["·" if action == hold else alphabet[action % len(alphabet)] for action in range(num_actions)]
