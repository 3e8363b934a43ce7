"""Puts the numbers of a decision where a Trainer reports to.

W&B gets them under their own names, `llmrl/*`, against `train/global_step`; its integration would put `train/` before
every name. The other integrations (TensorBoard, Trackio, ...) get them through their own `on_log`. `log_history`, and
so `trainer_state.json`, has them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_INTEGRATIONS = "transformers.integrations"


def report_to_integrations(trainer: Any, metrics: Mapping[str, float], step: int) -> None:
    """Reports one flat row of numbers.

    Args:
        trainer: The Trainer.
        metrics: Names `llmrl/*`.
        step: Optimizer steps done.
    """
    trainer.state.log_history.append({**metrics, "step": step})
    for callback in trainer.callback_handler.callbacks:
        if not type(callback).__module__.startswith(_INTEGRATIONS):
            continue
        if type(callback).__name__ == "WandbCallback":
            _log_to_wandb(metrics, step)
        else:
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(metrics), model=trainer.model)


def _log_to_wandb(metrics: Mapping[str, float], step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.run.log({**metrics, "train/global_step": step})
