"""How strongly subspaces are present in a sample, and the threshold above which they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import one_of, positive

Pooling: TypeAlias = Literal["max", "mean"]
"""The maximum over positions, for a mark in one place, or the mean, for a background."""


@dataclass(frozen=True)
class Presence:
    """Subspaces are present in a sample whose score, `presence`, is above a threshold.

    Attributes
    ----------
    threshold : float
        Finite, 0 or more.
    pooling : {"max", "mean"}
        Over positions.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> with xe.ablated(model, "relu1", subspaces, [0], when=xe.Presence(threshold=100.0)):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    threshold: float
    pooling: Pooling = "max"

    def __post_init__(self) -> None:
        vars(self).update(threshold=positive(self.threshold, "threshold", zero=True))
        one_of(self.pooling, get_args(Pooling), "pooling")


def presence(
    activations: Tensor, subspaces: Subspaces, indices: Sequence[int], pooling: Pooling = "max"
) -> Tensor:
    """Return s = max_p ‖Uᵀ(a_p − μ)‖² of samples, or the mean over positions p.

    Activations have the shape (samples, positions, channels), the scores, float64, (samples,).
    ValueError for other channels, an index out of range or an unknown pooling.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", positions=None)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features, attribute)
    >>> scores = xe.concepts.presence(features.activations.unflatten(0, (240, 16)), subspaces, [0])
    >>> (scores > 100).equal(attribute)
    True
    """
    subspaces.require_channels(activations)
    one_of(pooling, get_args(Pooling), "pooling")
    return pooled_square(activations, subspaces.directions(indices), subspaces.mean, pooling)


def pooled_square(a: Tensor, U: Tensor, mean: Tensor, pooling: Pooling) -> Tensor:
    """Return `presence` for directions U, shape (channels, directions), in their dtype."""
    square = ((a.to(U) - mean.to(U)) @ U).square().sum(-1)
    return square.amax(1) if pooling == "max" else square.mean(1)
