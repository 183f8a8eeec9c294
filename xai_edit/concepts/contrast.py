"""Contrastive principal components: directions that vary more with a feature than without it."""

from __future__ import annotations

import torch
from torch import Tensor

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces


class ContrastivePCA:
    """Contrastive principal component analysis as one subspace of several directions.

    The leading eigenvectors of E₁[a aᵀ] − E₀[a aᵀ], the second moments of activations with the
    feature less those without it (Abid et al. 2018, Eq. 2, with α = 1 and uncentred). Where there
    are labels, moments are taken within each class and averaged, so that classes that have the
    feature more often do not enter. No sample is needed both with and without the feature; and what
    sits at few positions, as a watermark does, moves second moments more than means (`CAV`).

    Parameters
    ----------
    size : int
        Directions of the subspace.

    Attributes
    ----------
    components_ : Tensor, float64, shape (size, channels)
        In falling order of their contrast.
    contrast_ : Tensor, float64, shape (size,)
        By how much the second moment along each is larger with the feature.
    """

    def __init__(self, size: int = 4) -> None:
        if type(size) is not int or size < 1:
            raise ValueError(f"size: {size!r} given; it is a positive number")
        self.size = size

    def fit(self, features: Features, spurious: Tensor | None = None) -> Subspaces:
        """Find the subspace.

        Parameters
        ----------
        features : Features
            Of samples with and without the feature.
        spurious : Tensor, optional
            Yes or no a sample, shape (samples,); the features' own attribute when left out.

        Raises
        ------
        ValueError
            If the feature is missing or the same in every sample, no class has samples of both
            kinds, or fewer directions than asked for vary more with it.
        """
        has = features.require_spurious(spurious).cpu()
        labels = torch.zeros_like(has).long() if features.labels is None else features.labels.cpu()
        sample = features.sample
        of = slice(None) if sample is None else sample.cpu()
        has, labels = has[of], labels[of]
        a = features.activations.double().cpu()
        contrasts = []
        for label in labels.unique():
            kinds = [a[(labels == label) & (has == kind)] for kind in (True, False)]
            if min(map(len, kinds)):
                within, without = (rows.T @ rows / len(rows) for rows in kinds)
                contrasts.append(within - without)
        if not contrasts:
            raise ValueError(
                "features: no class has samples both with and without the feature; add some, or "
                "leave out the labels"
            )
        values, vectors = torch.linalg.eigh(torch.stack(contrasts).mean(0))
        more = int((values > len(values) * torch.finfo(a.dtype).eps * values.abs().max()).sum())
        if self.size > more:
            raise ValueError(
                f"size: {self.size} given; the activations vary more with the feature in {more} of "
                f"{len(values)} directions"
            )
        self.components_ = vectors.flip(1)[:, : self.size].T.contiguous()
        self.contrast_ = values.flip(0)[: self.size]
        origin = {"finder": "ContrastivePCA", "vectors": len(a), "with": int(has.sum())}
        return Subspaces(self.components_.T.contiguous(), (self.size,), a.mean(0), origin)
