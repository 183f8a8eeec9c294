"""The least change of features that leaves them uncorrelated with an attribute (LEACE)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Singular values below this share of the attribute's own scale are rounding.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Erasure:
    """The map x ↦ x − left · right (x − mean).

    Attributes
    ----------
    left, right, mean : Tensor, float64, shapes (d, directions), (directions, d) and (d,)
    shrinkage : float
        Of the Ledoit–Wolf estimate of the covariance, 0 to 1.
    """

    left: Tensor
    right: Tensor
    mean: Tensor
    shrinkage: float


def fitted_erasure(features: Tensor, attribute: Tensor, weights: Tensor) -> Erasure:
    """Return the map of Belrose et al. 2023, Theorem 4.3, with a Ledoit–Wolf estimate of Σ_xx.

    ``features`` have the shape (samples, d), ``attribute`` (samples, values), 0 or 1, and
    ``weights`` (samples,), of sum 1; all float64.
    """
    from sklearn.covariance import ledoit_wolf

    x, z, w = features, attribute, weights[:, None]
    mean, rate = (w * x).sum(0), (w * z).sum(0)
    centred = (len(w) * w).sqrt() * (x - mean)
    covariance, shrinkage = ledoit_wolf(centred.numpy(), assume_centered=True)
    cross = (w * (x - mean)).T @ (z - rate)
    scale = float((rate - rate.square()).sum().sqrt())
    left, right = erasure(torch.from_numpy(np.asarray(covariance)), cross / scale)
    return Erasure(left, right, mean, float(shrinkage))


def erasure(covariance: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors W⁺ U and Uᵀ W of the projection I − A = W⁺ P W (Thm. 4.3).

    The columns of U span those of W Σ_xz; float64, shapes (d, directions) and (directions, d).
    ``covariance`` is Σ_xx, (d, d), ``cross`` Σ_xz, (d, k), of an attribute of about unit scale.
    Directions without variance are not changed.
    """
    variances, v = torch.linalg.eigh(covariance)
    kept = variances > variances[-1].clamp(min=0) * len(variances) * torch.finfo(torch.double).eps
    deviations, v = variances[kept].sqrt(), v[:, kept]
    u, s, _ = torch.linalg.svd((v.T @ cross) / deviations[:, None], full_matrices=False)
    u = u[:, s > ROUNDING]
    return v @ (deviations[:, None] * u), (u / deviations[:, None]).T @ v.T
