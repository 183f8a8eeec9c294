"""Finders of concept subspaces: PCA, PRCA, contrastive PCA and concept activation vectors."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
from scipy.linalg import eigh
from torch import Tensor

from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import one_class_a_sample, one_of, positive, require, whole_number
from xai_edit.core.text import Described

Kind = Literal["pattern", "logistic", "svm"]


class Finder(Protocol):
    """`PCA`, `PRCA`, `DRSA`, `CAV`, `ContrastivePCA`, or a class of a user's own."""

    def fit(self, features: Features) -> Subspaces: ...  # noqa: D102


class _Components(Described):
    def __init__(self, n_subspaces: int | None = 4) -> None:
        if n_subspaces is not None:
            n_subspaces = whole_number(n_subspaces, "n_subspaces", least=1)
        self.n_subspaces = n_subspaces


class PCA(_Components):
    """Principal component analysis of centred activations, one component a subspace.

    Fitting sets ``components_`` and ``explained_variance_``, as in scikit-learn.

    Parameters
    ----------
    n_subspaces : int or None
        Number of components, by descending variance; None for all with variance.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1")
    >>> pca = xe.PCA(n_subspaces=2)
    >>> pca.fit(features).sizes, pca.components_.abs().argmax(1)[0]
    ((1, 1), tensor(3))
    """

    def fit(self, features: Features) -> Subspaces:
        """Find the subspaces; ValueError if fewer directions than subspaces have variance."""
        from sklearn.decomposition import PCA as ScikitPCA

        a = _activations(features, least=2)
        fitted = ScikitPCA(svd_solver="full").fit(a.numpy())
        variance = torch.from_numpy(fitted.explained_variance_)
        kept = _kept(variance, self.n_subspaces, "n_subspaces", "the activations vary in")
        self.components_ = torch.from_numpy(fitted.components_[:kept])
        self.explained_variance_ = variance[:kept]
        mean = torch.from_numpy(fitted.mean_)
        return _subspaces(self, len(a), mean, self.components_, (1,) * kept)


class PRCA(_Components):
    """Principal relevant component analysis, one component a subspace (Chormai et al. 2024).

    The components are the leading eigenvectors of E[a cᵀ + c aᵀ], uncentred; along each the mean
    relevance (uᵀa)(uᵀc) is half the eigenvalue. Fitting sets ``components_``, shape (n_subspaces,
    channels), each with a positive largest entry, and ``relevance_``, shape (n_subspaces,).

    Parameters
    ----------
    n_subspaces : int or None
        Number of components, by descending relevance; None for all with positive relevance.

    Examples
    --------
    >>> scorer = xe.LRP("epsilon")
    >>> features = xe.collect_features(model, data, layer="fc2:input", scorer=scorer, target=0)
    >>> xe.PRCA(n_subspaces=2).fit(features).basis.shape
    torch.Size([32, 2])
    """

    def fit(self, features: Features) -> Subspaces:
        """Find the subspaces; ValueError without contexts or enough positive relevance."""
        c = features.require_contexts().double().cpu()
        a = _activations(features)
        return self.fit_moments(a.T @ c / len(a), a.mean(0), len(a))

    def fit_moments(self, cross: Tensor, mean: Tensor, vectors: int) -> Subspaces:
        """Find the subspaces from moments of the vectors: E[a cᵀ], E[a], and their number."""
        values, basis = map(torch.from_numpy, eigh((cross + cross.T).numpy()))
        values, basis = values.flip(0), basis.flip(1)
        kept = _kept(values, self.n_subspaces, "n_subspaces", "relevance is positive along")
        components = basis.T[:kept]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components_ = components * largest.sign()
        self.relevance_ = values[:kept] / 2
        return _subspaces(self, vectors, mean, self.components_, (1,) * kept)


class ContrastivePCA(Described):
    """Contrastive principal component analysis, all components in one subspace.

    The leading eigenvectors of E₁[a aᵀ] − E₀[a aᵀ], the second moments of activations with the
    feature less those without it (Abid et al. 2018, Eq. 2, with α = 1 and uncentred). With labels
    the difference is the mean of those within the classes, so that a correlation of feature and
    class does not matter; of n₁ vectors with the feature and n₀ without it a class has the weight
    n₁n₀ / (n₁ + n₀), by which few of them, perhaps by mistake, count little. Suits a feature at few
    positions, such as a watermark. Fitting sets ``components_``, shape (size, channels), and
    ``contrast_``, their eigenvalues, shape (size,), descending.

    Parameters
    ----------
    size : int or None
        Directions of the subspace; None for all along which the contrast is positive, of which
        `choose_spurious` takes some.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> xe.ContrastivePCA(size=1).fit(features).basis.abs().argmax()
    tensor(3)
    """

    def __init__(self, size: int | None = 4) -> None:
        self.size = None if size is None else whole_number(size, "size", least=1)

    def fit(self, features: Features, attribute: Tensor | None = None) -> Subspaces:
        """Find the subspace.

        ``attribute`` is whether each sample has the feature, shape (samples,); that of the features
        when left out. ValueError if it is missing or the same in every sample or within every
        class, or the contrast is positive in fewer directions.
        """
        has = features.by_vector(features.require_attribute(attribute))
        a = _activations(features)
        known = features.labels
        one_class_a_sample(known)
        labels = torch.zeros(len(a)) if known is None else features.by_vector(known)
        contrast, total = torch.zeros(a.shape[1], a.shape[1], dtype=a.dtype), 0.0
        for label in labels.unique():
            a_1, a_0 = a[(labels == label) & has], a[(labels == label) & ~has]
            if len(a_1) and len(a_0):
                weight = len(a_1) * len(a_0) / (len(a_1) + len(a_0))
                contrast += weight * (a_1.T @ a_1 / len(a_1) - a_0.T @ a_0 / len(a_0))
                total += weight
        if not total:
            raise ValueError(
                "features: no class has samples both with and without the feature; add some, or "
                "leave out the labels"
            )
        return self.fit_moments(contrast / total, a.mean(0), len(a), **{"with": int(has.sum())})

    def fit_moments(self, contrast: Tensor, mean: Tensor, vectors: int, **origin: Any) -> Subspaces:
        """Find the subspace from moments of the vectors: the contrast, E[a], and their number."""
        values, components = torch.linalg.eigh(contrast)
        values, components = values.flip(0), components.flip(1)
        size = _kept(values, self.size, "size", "the activations vary more with the feature in")
        self.components_ = components[:, :size].T.contiguous()
        self.contrast_ = values[:size]
        return _subspaces(self, vectors, mean, self.components_, (size,), **origin)


class CAV(Described):
    """A concept activation vector as the first subspace, its orthogonal complement as the second.

    Fitting sets ``direction_``, the unit vector towards samples with the feature, (channels,).

    Parameters
    ----------
    kind : {"pattern", "logistic", "svm"}
        ``"pattern"`` is the signal pattern cov(a, t) / var(t) of activations a and the feature t
        (Haufe et al. 2014; Pahde et al. 2025). The others are the weights of a linear classifier
        (Kim et al. 2018), which also cancel disturbances.
    C : float
        Inverse strength of the classifiers' regularisation, as in scikit-learn, for activations
        divided by their root mean square.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> cav = xe.CAV()
    >>> cav.fit(features).sizes, cav.direction_.argmax()
    ((1, 31), tensor(3))
    """

    def __init__(self, kind: Kind = "pattern", *, C: float = 1.0) -> None:
        self.kind = one_of(kind, get_args(Kind), "kind")
        self.C = positive(C, "C")

    def fit(self, features: Features, attribute: Tensor | None = None) -> Subspaces:
        """Find the direction, see `ContrastivePCA.fit`; ValueError if activations do not differ."""
        has = features.by_vector(features.require_attribute(attribute))
        a = _activations(features)
        direction = self._direction(a, has)
        length = direction.norm()
        if not length > a.shape[1] * torch.finfo(a.dtype).eps * a.abs().max():
            raise ValueError("features: the activations do not differ between the samples")
        self.direction_ = direction / length
        basis = torch.linalg.qr(self.direction_[:, None], mode="complete").Q
        basis[:, 0] = self.direction_
        sizes = (1, len(basis) - 1)[: len(basis)]  # one channel leaves no complement
        with_it = {"with": int(has.sum())}
        return _subspaces(self, len(a), a.mean(0), basis.T, sizes, kind=self.kind, **with_it)

    def _direction(self, a: Tensor, has: Tensor) -> Tensor:
        if self.kind == "pattern":
            t = has.double() - has.double().mean()
            return (a - a.mean(0)).T @ t / t.square().sum()
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        svm = LinearSVC(C=self.C, dual=False, max_iter=10_000)
        classifier = svm if self.kind == "svm" else LogisticRegression(C=self.C, max_iter=1000)
        scale = a.square().mean().sqrt()
        if scale == 0:
            return torch.zeros(a.shape[1]).double()
        classifier.fit((a / scale).numpy(), has.numpy())
        return torch.from_numpy(classifier.coef_[0].copy()).double()


def _activations(features: Features, least: int = 1) -> Tensor:
    a = features.activations.double().cpu()
    require(len(a) >= least, "features", len(a), f"at least {least} vectors are needed")
    return a


def _kept(values: Tensor, count: int | None, name: str, along: str) -> int:
    """Return the number of eigenvalues to keep; each has to be above rounding."""
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    above = int((values > rounding).sum())
    kept = above if count is None else count
    works = f"; give at most {above}, or None for all" if above else ""
    require(
        1 <= kept <= above, name, count, f"{along} {above} direction{'s' * (above != 1)}{works}"
    )
    return kept


def _subspaces(
    finder: object,
    vectors: int,
    mean: Tensor,
    components: Tensor,
    sizes: tuple[int, ...],
    **origin: Any,
) -> Subspaces:
    """Cut components, shape (directions, channels), into blocks."""
    made = {"finder": type(finder).__name__, "vectors": vectors, **origin}
    return Subspaces(components.T.contiguous(), sizes, mean, made)
