"""Pictures of a job: loss, learning rate and actions over optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCKS = "▁▂▃▄▅▆▇█"
_FIGURE_SIZE = (7.0, 6.0)
_PIXELS_PER_INCH = 100
_WINDOW = "llmrl"


@dataclass
class ScheduleHistory:
    """What a job did, one entry a decision interval.

    Attributes:
        action_names: Names by action index.
        title: The task's name.
        total_steps: The budget.
        steps: Optimizer steps done at the interval's end.
        train_losses: Mean train loss of the interval, nats per target; NaN where unknown.
        validation_losses: Validation loss at the interval's end; NaN where unknown.
        learning_rates: Rate of the interval's last step.
        actions: Action index carried out before the interval.
    """

    action_names: tuple[str, ...]
    title: str
    total_steps: int
    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)

    def append(
        self, *, step: int, train_loss: float, validation_loss: float, learning_rate: float, action: int
    ) -> None:
        """Notes one interval."""
        self.steps.append(step)
        self.train_losses.append(train_loss)
        self.validation_losses.append(validation_loss)
        self.learning_rates.append(learning_rate)
        self.actions.append(action)


def draw_history(history: ScheduleHistory) -> Figure:
    """Three panels over optimizer steps: losses, learning rate, and the actions other than holding."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_FIGURE_SIZE, dpi=_PIXELS_PER_INCH, layout="constrained")
    loss, rate, action = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
    loss.plot(history.steps, history.train_losses, label="train", color="tab:gray")
    if any(math.isfinite(value) for value in history.validation_losses):
        loss.plot(history.steps, history.validation_losses, label="validation", color="tab:blue")
    loss.set_ylabel("loss (nats per target)")
    loss.set_title(history.title)
    loss.legend(loc="upper right")
    positive = [value if value > 0 else math.nan for value in history.learning_rates]
    rate.plot(history.steps, positive, color="tab:orange", drawstyle="steps-pre")
    if any(math.isfinite(value) for value in positive):
        rate.set_yscale("log")
    rate.set_ylabel("learning rate")
    names = history.action_names
    held = [i for i, index in enumerate(history.actions) if 0 <= index < len(names) and names[index] != "hold"]
    action.scatter([history.steps[i] for i in held], [history.actions[i] for i in held], s=18, color="tab:red")
    action.set_yticks(range(len(names)), names, fontsize=6)
    action.set_ylim(-0.5, len(names) - 0.5)
    action.set_xlim(0, history.total_steps)
    action.set_xlabel("optimizer step")
    return figure


def render_history(history: ScheduleHistory, mode: str) -> Any:
    """The history as uint8[H, W, 3] ("rgb_array"), as text ("ansi"), or in a window ("human")."""
    if mode == "ansi":
        return history_text(history)
    figure = draw_history(history)
    if mode == "rgb_array":
        return figure_pixels(figure)
    _show_in_window(figure)
    return None


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure drawn to uint8[H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _show_in_window(figure: Figure) -> None:
    from matplotlib import pyplot

    window = pyplot.figure(_WINDOW, figsize=_FIGURE_SIZE, clear=True)
    window.figimage(figure_pixels(figure), resize=True)
    window.canvas.draw_idle()
    window.canvas.flush_events()


def close_window() -> None:
    """Closes the window that "human" rendering opened; there need not be one."""
    from matplotlib import pyplot

    if _WINDOW in pyplot.get_figlabels():
        pyplot.close(_WINDOW)


def history_text(history: ScheduleHistory) -> str:
    """Loss and learning rate as two lines of block characters, with their ranges, and the latest action."""
    if not history.steps:
        return f"{history.title}: step 0/{history.total_steps}"
    known = [v if math.isfinite(v) else t for v, t in zip(history.validation_losses, history.train_losses, strict=True)]
    index = history.actions[-1]
    name = history.action_names[index] if 0 <= index < len(history.action_names) else "none"
    return "\n".join(
        [
            f"{history.title}: step {history.steps[-1]}/{history.total_steps}, last action {name}",
            f"loss          {_sparkline(known)}  {known[0]:.4g} -> {known[-1]:.4g}",
            f"learning rate {_sparkline(history.learning_rates)}  now {history.learning_rates[-1]:.3g}",
        ]
    )


def _sparkline(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "?" * len(values)
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / span * top)] if math.isfinite(value) else "×" for value in values)
