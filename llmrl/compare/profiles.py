"""Performance profiles: the share of runs that score higher than tau, for every tau.

Where one method's profile lies above another's everywhere, it is better however one weighs good and bad runs. Bands are
pointwise and stratified over seeds. Agarwal et al. 2021, https://arxiv.org/abs/2108.13264, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrl.compare.aggregate import strata
from llmrl.compare.rows import Row
from llmrl.compare.scoring import SCORE_FLOOR
from llmrl.compare.statistics import CONFIDENCE, Floats, bootstrap_means

HIGHEST_TAU = 1.5
NUM_TAUS = 101


def profile_taus(rows: Sequence[Row]) -> Floats:
    """Where profiles are evaluated: from the floor of scores to a little above the highest, at most `HIGHEST_TAU`."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    top = min(max([*scores, 1.0]) + 0.1, HIGHEST_TAU)
    return np.linspace(SCORE_FLOOR, top, NUM_TAUS)


def profile(rows: Sequence[Row], taus: Floats) -> dict[str, Any] | None:
    """The profile of one method in one regime; None where none of its runs has a score.

    Returns:
        share, and ci_low and ci_high (None where every task has one seed), a number for every tau.
    """
    scored = strata([row for row in rows if row["score"] is not None], lambda row: float(row["score"]))
    if not scored:
        return None
    above = [_above(values, taus) for values in scored]
    everything = np.concatenate([values.reshape(-1, len(taus)) for values in above])
    told: dict[str, Any] = {"share": np.nanmean(everything, axis=0).tolist(), "ci_low": None, "ci_high": None}
    if any(len(values) > 1 for values in above):
        tail = (1.0 - CONFIDENCE) / 2.0
        resampled = bootstrap_means(above, np.random.default_rng(0))
        low, high = np.quantile(resampled, [tail, 1.0 - tail], axis=0).tolist()
        told |= {"ci_low": low, "ci_high": high}
    return told


def _above(scores: Floats, taus: Floats) -> Floats:  # [U, F], [K] -> [U, F, K]
    """1 where a score is above tau, NaN where there is no score."""
    return np.where(np.isnan(scores)[..., None], np.nan, scores[..., None] > taus)
