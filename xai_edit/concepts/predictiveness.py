"""How well each subspace tells samples with the spurious feature from those without."""

from __future__ import annotations

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

    has = features.require_spurious(spurious).long().numpy()
    if features.contexts is None:
        energies = [part.square().sum(1) for part in subspaces.project(features.activations)]
        scores = [features.per_sample(energy) for energy in energies]
    else:
        parts, _ = subspaces.split(features.activations, features.contexts)
        scores = [features.per_sample(part) for part in parts.unbind(1)]
    return [float(average_precision_score(has, score.numpy())) for score in scores]
