"""Principal components of a layer's activations as subspaces."""

from __future__ import annotations

import torch

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces


class PCA:
    """Principal component analysis of centred activations, one component a subspace.

    Parameters
    ----------
    n_subspaces : int
        Number of components kept, those of largest variance, in falling order.

    Attributes
    ----------
    components_ : Tensor, float64, shape (n_subspaces, channels)
        As in scikit-learn.
    explained_variance_ : Tensor, float64, shape (n_subspaces,)
        With n − 1 in the denominator, as in scikit-learn.
    """

    def __init__(self, n_subspaces: int = 4) -> None:
        if not isinstance(n_subspaces, int) or n_subspaces < 1:
            raise ValueError(f"n_subspaces: {n_subspaces!r} given; it is a positive whole number")
        self.n_subspaces = n_subspaces

    def fit(self, features: Features) -> Subspaces:
        """Find the subspaces.

        Raises
        ------
        ValueError
            If there are fewer channels than subspaces or fewer vectors than would determine them.
        """
        from sklearn.decomposition import PCA as ScikitPCA

        vectors, channels = features.activations.shape
        if self.n_subspaces > channels or self.n_subspaces >= vectors:
            raise ValueError(
                f"n_subspaces: {self.n_subspaces} asked for, with {channels} channels and "
                f"{vectors} vectors; at most {max(0, min(channels, vectors - 1))} can be found"
            )
        found = ScikitPCA(self.n_subspaces, svd_solver="full").fit(
            features.activations.double().cpu().numpy()
        )
        self.components_ = torch.from_numpy(found.components_)
        self.explained_variance_ = torch.from_numpy(found.explained_variance_)
        origin = {"finder": "PCA", "vectors": vectors}
        mean = torch.from_numpy(found.mean_)
        return Subspaces(self.components_.T.contiguous(), (1,) * self.n_subspaces, mean, origin)
