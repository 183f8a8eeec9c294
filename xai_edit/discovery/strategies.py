"""Strategies of a class: how its images divide by the relevance of a layer's channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

COMPONENTS = 16  # principal components, at most, that are clustered
PER_COMPONENT = 20  # samples for each of them, at least
MOST = 6  # strategies
STARTS = 5  # of the expectation maximisation
SMALLEST, SMALLEST_SHARE = 8, 0.01  # samples of a cluster that is looked at
ROUNDING = 1e-6  # of the largest value; what differs less is constant
UNLIKELY = 0.02  # share of samples that count as the least likely


@dataclass(frozen=True, eq=False)
class Strategies:
    """How the samples of one class divide.

    Attributes
    ----------
    cluster : Tensor, int64, shape (samples,)
        The strategy of each sample.
    count : int
    points : Tensor, shape (samples, 2)
        The first two principal components, for a picture.
    parts : tuple of Tensor, bool, shape (samples,)
        Parts of the samples that may have, or lack, a feature.
    """

    cluster: Tensor
    count: int
    points: Tensor
    parts: tuple[Tensor, ...]


def mixture(values: Tensor, fit: Tensor, seed: int = 0) -> Strategies:
    """Divide samples by a Gaussian mixture with diagonal covariances on principal components.

    The number of components, 1 to 6, is that of the lowest Bayesian information criterion
    (Schwarz 1978). The parts are the clusters of at least 8 samples and 1 %, and the least likely
    2 %; there are none where there is one strategy.

    Parameters
    ----------
    values : Tensor, shape (samples, channels)
        Such as relevance by channel, of each sample divided by its sum of absolute values.
    fit : Tensor, bool, shape (samples,)
        The samples to fit to; the others are assigned.
    seed : int
    """
    from sklearn.mixture import GaussianMixture

    projected = _projected(values, fit)
    if not projected.any():
        return _one_strategy(len(values))
    fitted = projected[fit.numpy()]
    regularised = 1e-6 * float(np.trace(np.cov(fitted.T).reshape(fitted.shape[1], -1)))
    regularised = max(regularised / fitted.shape[1], np.finfo(float).tiny ** 0.5)
    distinct = len(np.unique(fitted, axis=0))
    models = [
        GaussianMixture(
            count,
            covariance_type="diag",
            n_init=STARTS,
            reg_covar=regularised,
            random_state=seed,
        ).fit(fitted)
        for count in range(1, min(MOST, len(fitted) // SMALLEST, distinct) + 1)
    ]
    best = min(models, key=lambda one: one.bic(fitted))
    cluster = torch.from_numpy(best.predict(projected))
    parts = _clusters(cluster, fit)
    if parts:
        likelihood = torch.from_numpy(best.score_samples(projected))
        unlikely = likelihood <= likelihood[fit].quantile(UNLIKELY)
        parts += [unlikely] if _large_enough(unlikely, fit) else []
    return Strategies(cluster, best.n_components, _points(projected), tuple(parts))


def spectral(values: Tensor, fit: Tensor, seed: int = 0) -> Strategies:
    """Divide samples by spectral clustering, with as many clusters as the largest eigengap says.

    SpRAy (Lapuschkin et al. 2019) on relevance maps, ``values`` of shape (samples, pixels): nearest
    neighbours as the graph, the normalised Laplacian's eigenvalues, k-means on its eigenvectors.
    A sample that was not fitted to takes the cluster of its nearest neighbour.
    """
    from scipy.sparse import csgraph
    from sklearn.cluster import SpectralClustering
    from sklearn.neighbors import KNeighborsClassifier, kneighbors_graph

    projected = _projected(values, fit)
    if not projected.any():
        return _one_strategy(len(values))
    fitted = projected[fit.numpy()]
    near = max(2, min(round(np.log(len(fitted))) + 1, len(fitted) - 1))
    graph = kneighbors_graph(fitted, near, include_self=True)
    affinity = (0.5 * (graph + graph.T)).toarray()
    eigenvalues = np.linalg.eigvalsh(csgraph.laplacian(affinity, normed=True))[: MOST + 1]
    count = int(np.argmax(np.diff(eigenvalues))) + 1
    own = np.zeros(len(fitted), dtype=np.int64)
    if count > 1:
        own = SpectralClustering(count, affinity="precomputed", random_state=seed).fit_predict(
            affinity
        )
    nearest = KNeighborsClassifier(1).fit(fitted, own).predict(projected)
    nearest[fit.numpy()] = own
    cluster = torch.from_numpy(nearest).long()
    parts = _clusters(cluster, fit) if count > 1 else []
    return Strategies(cluster, count, _points(projected), tuple(parts))


def ends_of_components(values: Tensor, fit: Tensor) -> Strategies:
    """Take the samples at both ends of each of the first principal components as parts.

    Neural PCA (Neuhaus et al. 2023): ``values`` are w_k ⊙ φ, the products of a class's weights and
    the head's inputs, shape (samples, features). An end is the outermost quarter.
    """
    projected = _projected(values, fit)
    ends = []
    for column in torch.from_numpy(projected).T[:MOST]:
        low, high = column[fit].quantile(torch.tensor([0.25, 0.75], dtype=column.dtype))
        both = (column >= high, column <= low)
        ends += [one for one in both if _large_enough(one, fit) and _large_enough(~one, fit)]
    one = torch.zeros(len(values), dtype=torch.long)
    return Strategies(one, 1, _points(projected), tuple(ends))


def two_parts(part: Tensor, values: Tensor, fit: Tensor) -> Strategies:
    """Take a known part of the samples, such as the wrong answers, and the others."""
    parts = _clusters(part.long(), fit)
    return Strategies(part.long(), 2, _points(_projected(values, fit)), tuple(parts))


def _clusters(cluster: Tensor, fit: Tensor) -> list[Tensor]:
    """Return masks of the large enough clusters, of two that are complements only one."""
    parts: list[Tensor] = []
    for number in cluster.unique().tolist():
        part = cluster == number
        known = any(torch.equal(~part, one) for one in parts)
        if not known and _large_enough(part, fit) and _large_enough(~part, fit):
            parts.append(part)
    return parts


def _large_enough(part: Tensor, fit: Tensor) -> bool:
    """Return whether a part has enough samples among those to fit to."""
    return int((part & fit).sum()) >= max(SMALLEST, SMALLEST_SHARE * int(fit.sum()))


def _one_strategy(samples: int) -> Strategies:
    return Strategies(torch.zeros(samples).long(), 1, torch.zeros(samples, 2), ())


def _projected(values: Tensor, fit: Tensor) -> Array:
    """Return principal components, zeros where the values differ by no more than rounding."""
    from sklearn.decomposition import PCA

    known = values[fit].double().numpy()
    if np.ptp(known, 0).max() <= ROUNDING * np.abs(known).max():
        return np.zeros((len(values), 1))
    most = min(COMPONENTS, len(known) // PER_COMPONENT, known.shape[1])
    analysis = PCA(max(1, most), svd_solver="full").fit(known)
    return np.asarray(analysis.transform(values.double().numpy()))


def _points(projected: Array) -> Tensor:
    points = torch.zeros(len(projected), 2)
    columns = torch.from_numpy(projected[:, :2]).float()
    points[:, : columns.shape[1]] = columns
    return points
