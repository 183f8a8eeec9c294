"""Average precision of one ranking in many bootstrap resamples at once, drawn group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ENTRIES = 2**22  # samples × resamples in memory at once; 16 MB in single precision


def counted_once(sizes: Sequence[int]) -> list[Tensor]:
    """Return the counts of `resampled_counts` for the samples themselves, float64."""
    return [torch.arange(size + 1).double()[:, None] for size in sizes]


def resampled_counts(
    sizes: Sequence[int], resamples: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Draw each group with replacement, many times, a chunk of resamples at a time.

    A bootstrap within groups (Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, ch. 8),
    so that no resample lacks a group. As all samples of a group are drawn alike, one draw of counts
    serves every ranking of the group.

    Parameters
    ----------
    sizes : sequence of int
        Samples of each group.
    resamples : int
    generator : torch.Generator

    Yields
    ------
    list of Tensor, float32, shape (size + 1, chunk)
        Of each group, how often its first 0, 1, … samples were drawn together.
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

    Samples of the same score share a threshold, as in scikit-learn.

    Parameters
    ----------
    ranked : sequence of Tensor, shape (size,)
        Scores of each group, rising.
    counts : sequence of Tensor, shape (size + 1, resamples)
        See `resampled_counts`.
    positive, negative : sequence of int
        The groups that are to have high and low scores; both with samples.
    """
    # Recall changes only at the scores of positive samples.
    thresholds = torch.cat([ranked[group] for group in positive]).unique().flip(0)

    def found(groups: Sequence[int]) -> Tensor:
        above = {k: len(ranked[k]) - torch.searchsorted(ranked[k], thresholds) for k in groups}
        return torch.stack([counts[k][at] for k, at in above.items()]).sum(0)

    right, wrong = found(positive), found(negative)
    precision = right / (right + wrong).clamp(min=1)
    gained = torch.cat([right[:1], right.diff(dim=0)])
    return ((gained * precision).sum(0) / right[-1]).clamp(max=1)  # rounding may exceed 1
