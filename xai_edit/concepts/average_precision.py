"""Average precision of a ranking in all resamples of a bootstrap within groups at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ENTRIES = 2**22  # samples × resamples in memory at once; 16 MB in single precision


def resampled_counts(
    sizes: Sequence[int], resamples: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Yield how often samples are drawn in a bootstrap within groups, some resamples at a time.

    Each group is drawn with replacement (Efron & Tibshirani 1993, *An Introduction to the
    Bootstrap*, ch. 8). For each group of ``size`` samples the list has the number of draws of its
    first 0, 1, … samples, float32, shape (size + 1, chunk).
    """
    chunk = max(1, ENTRIES // max(1, sum(sizes)))
    for first in range(0, resamples, chunk):
        width = min(chunk, resamples - first)
        counts = []
        for size in sizes:
            times = torch.zeros(size + 1, width, dtype=torch.int32)
            if size:
                drawn = torch.randint(1, size + 1, (size, width), generator=generator)
                times.scatter_add_(0, drawn, torch.ones((), dtype=torch.int32).expand(size, width))
            counts.append(times.cumsum(0).float())
        yield counts


def average_precision(
    ranked: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    positive: Sequence[int],
    negative: Sequence[int],
) -> Tensor:
    """Return Σ_t (recall_t − recall_{t−1}) · precision_t over thresholds t, shape (resamples,).

    ``ranked`` are the ascending scores of each group, of which equal ones share a threshold, as in
    scikit-learn; ``counts`` are those of `resampled_counts`; ``positive`` and ``negative`` are
    indices of groups.
    """
    # Recall changes only at the scores of positive samples.
    thresholds = torch.cat([ranked[group] for group in positive]).unique().flip(0)

    def above(groups: Sequence[int]) -> Tensor:
        ranks = {k: len(ranked[k]) - torch.searchsorted(ranked[k], thresholds) for k in groups}
        return torch.stack([counts[k][rank] for k, rank in ranks.items()]).sum(0)

    true_positives, false_positives = above(positive), above(negative)
    precision = true_positives / (true_positives + false_positives).clamp(min=1)
    gained = torch.cat([true_positives[:1], true_positives.diff(dim=0)])
    # Rounding may exceed 1.
    return ((gained * precision).sum(0) / true_positives[-1]).clamp(max=1)
