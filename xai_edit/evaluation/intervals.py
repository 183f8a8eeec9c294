"""Bootstrap intervals of shares counted in groups, drawn group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from xai_edit.core.checks import fraction, whole_number

Interval: TypeAlias = tuple[float, float]
"""The lower and the upper end."""

CONFIDENCE, RESAMPLES, SEED = 0.95, 2000, 0


def check_bootstrap(confidence: float, resamples: int, seed: int) -> None:
    """Raise ValueError if an argument of a bootstrap interval is out of range."""
    fraction(confidence, "confidence", one=False)
    whole_number(resamples, "resamples", least=1)
    whole_number(seed, "seed")


def resampled_shares(
    hits: Tensor, samples: Tensor, *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the share of hits in each group, in each of many resamples.

    The bootstrap within groups (Efron & Tibshirani 1993, *An Introduction to the Bootstrap*,
    ch. 8). The number of hits in n draws from n samples with k hits is binomial.

    Parameters
    ----------
    hits, samples : Tensor, int64, shape (G,)
        Every group has samples.
    resamples, seed : int

    Returns
    -------
    ndarray, float64, shape (resamples, G)
    """
    total = samples.numpy()[:, None]
    random = np.random.default_rng(seed)
    # One group after the other, since NumPy prepares each anew where the chance changes.
    drawn = random.binomial(total, hits.numpy()[:, None] / total, size=(len(total), resamples))
    return np.asarray((drawn / total).T, dtype=np.float64)


def percentile_interval(draws: NDArray[np.float64], confidence: float) -> Interval:
    """Return the percentile interval of a figure's draws, shape (resamples,)."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a mean of two or more independent values, by Student's t."""
    found = np.asarray(values, dtype=float)
    half = stats.t.ppf((1 + confidence) / 2, len(found) - 1) * stats.sem(found)
    return float(found.mean() - half), float(found.mean() + half)
