"""Intervals of shares counted in groups: Wilson's, and by bootstrap, drawn group by group."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

Interval: TypeAlias = tuple[float, float]
"""The lower and the upper end."""


def resampled_shares(
    hits: Tensor, samples: Tensor, *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the share of hits in each group, in each of many resamples; float64, (resamples, G).

    The bootstrap within groups (Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, ch.
    8). The number of hits in n draws from n samples with k hits is binomial, of probability k / n.
    Where k is 0 or n every draw would be the same, as if one sample showed a rate for sure; there
    it is (k + 1/2) / (n + 1), the mean of the rate's posterior under Jeffreys' prior. ``hits`` and
    ``samples`` are int64, shape (G,); every group has samples.
    """
    k, total = hits.numpy()[:, None], samples.numpy()[:, None]
    rate = np.where((k == 0) | (k == total), (k + 0.5) / (total + 1), k / total)
    random = np.random.default_rng(seed)
    # Group by group, since NumPy prepares each anew where the probability changes.
    drawn = random.binomial(total, rate, size=(len(total), resamples))
    return np.asarray((drawn / total).T, dtype=np.float64)


def percentile_interval(draws: NDArray[np.float64], confidence: float) -> Interval:
    """Return the percentile interval of a figure's draws, shape (resamples,)."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson_intervals(hits: Tensor, samples: Tensor, confidence: float) -> list[Interval]:
    """Return the Wilson score interval of the share of hits in each group.

    Wilson 1927, *Probable inference, the law of succession, and statistical inference*. Unlike a
    bootstrap it has a width where all or none of few samples are hits. ``hits`` and ``samples`` are
    int64, shape (G,); every group has samples.
    """
    n = samples.numpy().astype(np.float64)
    p, z = hits.numpy() / n, float(ndtri((1 + confidence) / 2))
    middle = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # The end is 0 or 1 exactly where no sample or every one is a hit.
    low = np.where(p == 0, 0.0, (middle - half) / (1 + z**2 / n))
    high = np.where(p == 1, 1.0, (middle + half) / (1 + z**2 / n))
    return [(float(one), float(other)) for one, other in zip(low, high, strict=True)]
