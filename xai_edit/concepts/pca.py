"""Principal components of a layer's activations as subspaces."""

from __future__ import annotations

import numpy as np
import torch

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces


class PCA:
    """Principal component analysis of centred activations, one component a subspace.

    Parameters
    ----------
    n_subspaces : int or None
        Number of components kept, those of largest variance, in falling order; None keeps all that
        have variance. Those without (dead channels) are any basis of the rest and mean nothing.

    Attributes
    ----------
    components_ : Tensor, float64, shape (n_subspaces, channels)
        As in scikit-learn.
    explained_variance_ : Tensor, float64, shape (n_subspaces,)
        With n − 1 in the denominator, as in scikit-learn.
    """

    def __init__(self, n_subspaces: int | None = 4) -> None:
        if n_subspaces is not None and (type(n_subspaces) is not int or n_subspaces < 1):
            raise ValueError(f"n_subspaces: {n_subspaces!r} given; it is a positive number or None")
        self.n_subspaces = n_subspaces

    def fit(self, features: Features) -> Subspaces:
        """Find the subspaces.

        Raises
        ------
        ValueError
            If fewer directions than subspaces have variance, or there are too few vectors.
        """
        from sklearn.decomposition import PCA as ScikitPCA

        vectors, channels = features.activations.shape
        if vectors < 2:
            raise ValueError(f"features: {vectors} vectors given; variance needs two or more")
        found = ScikitPCA(svd_solver="full").fit(features.activations.double().cpu().numpy())
        rounding = channels * np.finfo(found.components_.dtype).eps
        spanned = int((found.explained_variance_ > rounding * found.explained_variance_[0]).sum())
        kept = spanned if self.n_subspaces is None else self.n_subspaces
        if not 1 <= kept <= spanned:
            raise ValueError(
                f"n_subspaces: {self.n_subspaces} asked for, but the {vectors} vectors of "
                f"{channels} channels vary in {spanned} directions"
            )
        self.components_ = torch.from_numpy(found.components_[:kept])
        self.explained_variance_ = torch.from_numpy(found.explained_variance_[:kept])
        origin = {"finder": "PCA", "vectors": vectors}
        mean = torch.from_numpy(found.mean_)
        return Subspaces(self.components_.T.contiguous(), (1,) * kept, mean, origin)
