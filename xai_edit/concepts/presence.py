"""Whether a concept is there in a sample, from its activations."""

from __future__ import annotations

import torch
from torch import Tensor

from xai_edit.concepts.subspaces import Subspaces


def concept_strength(subspaces: Subspaces, activations: Tensor) -> Tensor:
    """Return how strongly one subspace is taken, float64, shape (samples,).

    Parameters
    ----------
    subspaces : Subspaces
        With one subspace. Of a single direction (a CAV) the projection with its sign, of more the
        length of the projection.
    activations : Tensor, shape (samples, channels)

    Raises
    ------
    ValueError
        If there are several subspaces, or the channels differ.
    """
    if len(subspaces) != 1:
        raise ValueError(
            f"spurious: {len(subspaces)} subspaces given; give one, "
            "Subspaces(s.block(k), (s.sizes[k],), s.mean)"
        )
    channels = len(subspaces.basis)
    if activations.shape[1] != channels:
        raise ValueError(
            f"spurious: a subspace of {channels} channels given, and the activations have "
            f"{activations.shape[1]}; collect the features of its own layer"
        )
    (projection,) = subspaces.project(activations.double())
    return projection[:, 0] if projection.shape[1] == 1 else projection.norm(dim=1)


def split_point(strength: Tensor) -> float:
    """Return the value that parts samples with a concept from those without, by two means.

    Parameters
    ----------
    strength : Tensor, shape (samples,)

    Raises
    ------
    ValueError
        If all values are equal.
    """
    from sklearn.cluster import KMeans

    ends = torch.stack([strength.min(), strength.max()])
    if ends[0] == ends[1]:
        raise ValueError("spurious: the concept is equally strong in all samples")
    fitted = KMeans(2, init=ends[:, None].numpy(), n_init=1).fit(strength[:, None].numpy())
    return float(fitted.cluster_centers_.mean())
