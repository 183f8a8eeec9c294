"""How well each subspace tells samples with the spurious feature from those without."""

from __future__ import annotations

import torch
from torch import Tensor

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces


def predictiveness(
    subspaces: Subspaces, features: Features, spurious: Tensor | None = None
) -> list[float]:
    """Return the average precision of each subspace for the spurious feature.

    A sample's score is the subspace's relevance Σ (U_kᵀa)·(U_kᵀc) where the features have contexts
    (concept-aware network pruning, the poster's AP_wm), else its share of the activation's energy,
    Σ ‖U_kᵀ(a − mean)‖² over the sample's positions.

    Parameters
    ----------
    subspaces : Subspaces
    features : Features
        Of samples with and without the feature, all classes.
    spurious : Tensor, optional
        Yes or no a sample, shape (samples,); the features' own attribute when left out.

    Returns
    -------
    list of float
        One number in [0, 1] a subspace; the share of samples with the feature is chance level.

    Raises
    ------
    ValueError
        If the feature is missing or the same in every sample.
    """
    from sklearn.metrics import average_precision_score

    spurious = features.attribute if spurious is None else torch.as_tensor(spurious)
    if (
        spurious is None
        or len(spurious) != features.samples
        or spurious.long().unique().tolist() != [0, 1]
    ):
        raise ValueError(
            f"spurious: one yes (1) or no (0) for each of {features.samples} samples is needed, "
            "and some of each"
        )
    projected = subspaces.project(features.activations)
    if features.contexts is None:
        energies = [part.square().sum(1) for part in projected]
        scores = [features.per_sample(energy) for energy in energies]
    else:
        contexts = (features.contexts.to(subspaces.basis) @ subspaces.basis).split(
            subspaces.sizes, dim=1
        )
        activations = (features.activations.to(subspaces.basis) @ subspaces.basis).split(
            subspaces.sizes, dim=1
        )
        scores = [
            features.per_sample((a * c).sum(1)) for a, c in zip(activations, contexts, strict=True)
        ]
    has = (spurious > 0).long().numpy()
    return [float(average_precision_score(has, score.numpy())) for score in scores]
