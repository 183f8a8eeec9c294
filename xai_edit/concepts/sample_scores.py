"""How much of each subspace is in each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces

VECTORS = 2**16  # that are projected at once


def sample_scores(subspaces: Subspaces, features: Features) -> Tensor:
    """Return the relevance or energy of each sample by subspace.

    Parameters
    ----------
    subspaces : Subspaces
    features : Features
        With contexts the score is the relevance Σ (U_kᵀa)·(U_kᵀc) over the sample's positions,
        else the activations' energy Σ ‖U_kᵀ(a − mean)‖².

    Returns
    -------
    Tensor, float64, shape (samples, subspaces)

    Raises
    ------
    ValueError
        If the channels differ.
    """
    channels = len(subspaces.basis)
    if features.activations.shape[1] != channels:
        raise ValueError(
            f"subspaces: of {channels} channels, but the features have "
            f"{features.activations.shape[1]}; collect them at the subspaces' own layer"
        )
    activations = features.activations.split(VECTORS)
    if features.contexts is None:
        parts = [
            torch.stack([part.square().sum(1) for part in subspaces.project(a)], 1)
            for a in activations
        ]
    else:
        contexts = features.contexts.split(VECTORS)
        parts = [subspaces.split(a, c)[0] for a, c in zip(activations, contexts, strict=True)]
    return features.per_sample(torch.cat(parts).cpu())
