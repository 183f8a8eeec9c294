"""Concept activation vectors: the direction that tells samples with a feature from others."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces

Kind = Literal["pattern", "logistic", "svm"]


class CAV:
    """A concept activation vector as the first subspace, and all directions beside it as another.

    Parameters
    ----------
    kind : {"pattern", "logistic", "svm"}
        ``"pattern"`` is the signal pattern cov(a, t) / var(t), how activations a change with the
        feature t (Haufe et al. 2014; Pahde et al. 2025). The others are the weights of a linear
        classifier, logistic regression or a support vector machine (Kim et al. 2018). Such weights
        also cancel what disturbs the classifier, so they point off the feature's own direction.
    C : float
        Inverse strength of the classifiers' regularisation, as in scikit-learn, for activations
        divided by their root mean square. The pattern has none.

    Attributes
    ----------
    direction_ : Tensor, float64, shape (channels,)
        Of length one, towards samples with the feature.

    Notes
    -----
    Every vector counts as one of its sample's kind, whatever its position.
    """

    def __init__(self, kind: Kind = "pattern", *, C: float = 1.0) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind: {kind!r} given; it is one of {get_args(Kind)}")
        if not 0 < C < float("inf"):
            raise ValueError(f"C: {C!r} given; it is a positive number")
        self.kind = kind
        self.C = C

    def fit(self, features: Features, spurious: Tensor | None = None) -> Subspaces:
        """Find the direction.

        Parameters
        ----------
        features : Features
            Of samples with and without the feature.
        spurious : Tensor, optional
            Yes or no a sample, shape (samples,); the features' own attribute when left out.

        Returns
        -------
        Subspaces
            The direction, then its orthogonal complement.

        Raises
        ------
        ValueError
            If the feature is missing or the same in every sample, or makes no difference.
        """
        has = features.require_spurious(spurious).cpu()
        if features.sample is not None:
            has = has[features.sample.cpu()]
        a = features.activations.double().cpu()
        direction = self._direction(a, has)
        length = direction.norm()
        if not length > a.shape[1] * torch.finfo(a.dtype).eps * a.abs().max():
            raise ValueError("features: the activations do not differ between the samples")
        self.direction_ = direction / length
        basis = torch.linalg.qr(self.direction_[:, None], mode="complete").Q
        basis[:, 0] = self.direction_
        sizes = (1, len(basis) - 1)[: len(basis)]
        origin = {"finder": "CAV", "kind": self.kind, "vectors": len(a), "with": int(has.sum())}
        return Subspaces(basis, sizes, a.mean(0), origin)

    def _direction(self, a: Tensor, has: Tensor) -> Tensor:
        if self.kind == "pattern":
            t = has.double() - has.double().mean()
            return (a - a.mean(0)).T @ t / t.square().sum()
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        if self.kind == "logistic":
            classifier = LogisticRegression(C=self.C, max_iter=1000)
        else:
            classifier = LinearSVC(C=self.C, dual=False, max_iter=10_000)
        scale = a.square().mean().sqrt()
        if scale == 0:
            return torch.zeros(a.shape[1]).double()
        classifier.fit((a / scale).numpy(), has.numpy())
        return torch.from_numpy(classifier.coef_[0].copy()).double()
