"""Bootstrap intervals of shares counted in groups, drawn group by group."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Interval: TypeAlias = tuple[float, float]
"""The lower and the upper end."""


def resampled_shares(
    hits: Tensor, samples: Tensor, *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the share of hits in each group, in each of many resamples; float64, (resamples, G).

    The bootstrap within groups (Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, ch.
    8). The number of hits in n draws from n samples with k hits is binomial. ``hits`` and
    ``samples`` are int64, shape (G,); every group has samples.
    """
    total = samples.numpy()[:, None]
    random = np.random.default_rng(seed)
    # Group by group, since NumPy prepares each anew where the probability changes.
    drawn = random.binomial(total, hits.numpy()[:, None] / total, size=(len(total), resamples))
    return np.asarray((drawn / total).T, dtype=np.float64)


def percentile_interval(draws: NDArray[np.float64], confidence: float) -> Interval:
    """Return the percentile interval of a figure's draws, shape (resamples,)."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
