"""Principal relevant components: the directions that hold most relevance, in closed form."""

from __future__ import annotations

import torch
from scipy.linalg import eigh

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces


class PRCA:
    """Principal relevant component analysis, one component a subspace (Chormai et al. 2024).

    The components are eigenvectors of the symmetrised cross-covariance of activations and contexts,
    E[a cᵀ + c aᵀ], uncentred. Among all sets of as many directions they hold the most relevance:
    the mean of (uᵀa)(uᵀc) along an eigenvector u is half its eigenvalue.

    Parameters
    ----------
    n_subspaces : int or None
        Number of components kept, those of most relevance, in falling order; None keeps all that
        have positive relevance.

    Attributes
    ----------
    components_ : Tensor, float64, shape (n_subspaces, channels)
        As in scikit-learn. The largest entry of each is positive.
    relevance_ : Tensor, float64, shape (n_subspaces,)
        Mean relevance along each component.
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
            If the features have no contexts, or fewer directions than subspaces have positive
            relevance.
        """
        c = features.require_contexts().double().cpu()
        a = features.activations.double().cpu()
        vectors, channels = a.shape
        if not vectors:
            raise ValueError("features: no vectors given")
        cross = a.T @ c / vectors
        eigenvalues, eigenvectors = map(torch.from_numpy, eigh((cross + cross.T).numpy()))
        rounding = channels * torch.finfo(cross.dtype).eps * eigenvalues.abs().max()
        positive = int((eigenvalues > rounding).sum())
        kept = positive if self.n_subspaces is None else self.n_subspaces
        if not 1 <= kept <= positive:
            raise ValueError(
                f"n_subspaces: {self.n_subspaces} asked for, but in {vectors} vectors of "
                f"{channels} channels relevance is positive along {positive} directions"
            )
        components = eigenvectors.T.flip(0)[:kept]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components_ = components * largest.sign()
        self.relevance_ = eigenvalues.flip(0)[:kept] / 2
        origin = {"finder": "PRCA", "vectors": vectors}
        return Subspaces(self.components_.T.contiguous(), (1,) * kept, a.mean(0), origin)
