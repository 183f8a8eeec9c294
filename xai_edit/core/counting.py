"""Counts of samples and right answers by class and attribute."""

from __future__ import annotations

import torch
from torch import Tensor


def count_by_group(
    predicted: Tensor, labels: Tensor, classes: int, attribute: Tensor | None = None
) -> Tensor:
    """Return right answers, samples and predictions by class and attribute.

    Parameters
    ----------
    predicted, labels : Tensor, int64, shape (samples,)
    classes : int
        The model's number of classes.
    attribute : Tensor, int64, shape (samples,), optional
        Values from 0; without it the groups are the classes.

    Returns
    -------
    Tensor, int64, shape (3, classes, attributes)
        Right answers, samples, and samples that are predicted as the class.
    """
    predicted, labels = predicted.cpu(), labels.cpu()
    attribute = torch.zeros_like(labels) if attribute is None else attribute.cpu().long()
    if attribute.min() < 0:
        raise ValueError(f"groups: {int(attribute.min())} given; they are numbered from 0")
    attributes = int(attribute.max()) + 1
    group, as_predicted = (part * attributes + attribute for part in (labels, predicted))
    counts = [
        torch.bincount(cells, minlength=classes * attributes)
        for cells in (group[predicted == labels], group, as_predicted)
    ]
    return torch.stack(counts).view(3, classes, attributes)


def add_counts(first: Tensor, second: Tensor) -> Tensor:
    """Add counts of different numbers of classes or attributes."""
    attributes = max(first.shape[2], second.shape[2])
    padded = [
        torch.nn.functional.pad(
            counts, (0, attributes - counts.shape[2], 0, second.shape[1] - counts.shape[1])
        )
        for counts in (first, second)
    ]
    return padded[0] + padded[1]
