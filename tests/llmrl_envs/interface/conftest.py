"""Statistics of jobs that never ran."""

import numpy as np
import pytest
from llmrl_envs.interface.statistics import TrainingStatistics


def build_statistics(loss, gradient_norm=None, *, total_steps=100, step=None, **changes):
    """One interval of one job from its per-step losses; every other value is unremarkable."""
    loss = np.atleast_2d(np.asarray(loss, np.float64))
    lanes, count = loss.shape
    norm = np.ones_like(loss) if gradient_norm is None else np.atleast_2d(np.asarray(gradient_norm, np.float64))
    values = {
        "step": np.full(lanes, count if step is None else step, np.int64),
        "total_steps": np.full(lanes, total_steps, np.int64),
        "num_steps": np.full(lanes, count, np.int64),
        "loss": loss,
        "gradient_norm": norm,
        "clipped": np.zeros((lanes, count), np.bool_),
        "skipped": ~(np.isfinite(loss) & np.isfinite(norm)),
        "update_norm": np.full(lanes, 5.0),
        "weight_norm": np.full(lanes, 20.0),
        "step_size": np.full(lanes, 1e-3),
        "momentum_cosine": np.full(lanes, 0.2),
        "signal_to_noise": np.full(lanes, 0.1),
        "validation_loss": np.full(lanes, np.nan),
        "mode": np.zeros(lanes, np.int64),
        "trainable_fraction": np.ones(lanes),
    }
    return TrainingStatistics(**{**values, **changes})


@pytest.fixture(scope="session")
def make_statistics():
    return build_statistics
