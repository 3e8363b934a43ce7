"""Live progress of a training."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

from rich.progress import TaskID

from llmrl.progress import make_progress

_RECENT = 20


class TrainingStatus:
    """A progress line: episodes, return, score against linear decay, greedy score, epsilon, loss, time left.

    Args:
        total_decisions: Where the bar ends.
        is_schedule: The environment's score compares with a linear decay (1 is as good).
        enabled: Show anything at all.
    """

    def __init__(self, total_decisions: int, *, is_schedule: bool, enabled: bool = True) -> None:
        columns = ["ep {task.fields[episodes]}", "ret {task.fields[mean_return]}"]
        if is_schedule:
            columns += ["score {task.fields[score]}", "greedy {task.fields[greedy]}"]
        columns += ["eps {task.fields[epsilon]}", "loss {task.fields[loss]}"]
        self._progress = make_progress(*columns, enabled=enabled)
        self._total_decisions = total_decisions
        self._bar: TaskID = self._progress.add_task(
            "decisions",
            total=total_decisions,
            episodes=0,
            mean_return="-",
            score="-",
            greedy="-",
            epsilon="-",
            loss="-",
        )
        self._returns: deque[float] = deque(maxlen=_RECENT)
        self._scores: deque[float] = deque(maxlen=_RECENT)

    def update(self, decisions: int, epsilon: float, loss: float | None) -> None:
        """Moves the bar."""
        self._progress.update(self._bar, completed=decisions, epsilon=f"{epsilon:.2f}", loss=_shown(loss))

    def pretraining(self, num_updates: int, total_updates: int, loss: float | None) -> None:
        """Shows updates on stored experience instead of decisions, until the last of them."""
        going_on = num_updates < total_updates
        self._progress.update(
            self._bar,
            description="updates from logs" if going_on else "decisions",
            total=total_updates if going_on else self._total_decisions,
            completed=num_updates if going_on else 0,
            loss=_shown(loss),
        )

    def episode(self, number: int, episode_return: float, score: float) -> None:
        """Notes a finished episode; shown are means over the latest ones."""
        self._returns.append(episode_return)
        self._scores.append(score)
        mean_return = f"{sum(self._returns) / len(self._returns):.2f}"
        mean_score = f"{sum(self._scores) / len(self._scores):.2f}"
        self._progress.update(self._bar, episodes=number, mean_return=mean_return, score=mean_score)

    def evaluation(self, score: float) -> None:
        """Notes the score of a greedy evaluation."""
        self._progress.update(self._bar, greedy=f"{score:.2f}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3g}"
