"""Logistic regression on the inputs of a head, as the rows W and b of a new one."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def standardised_regression(x: Array, y: Array, C: float, **more: Any) -> tuple[Array, Array]:
    """Return weight and bias, for raw features, of a regression on standardised ones.

    ``x`` are the features, shape (samples, d), ``y`` the classes, (samples,), and C the inverse
    strength of the L2 penalty; ``more`` goes to scikit-learn. The weight has the shape (classes,
    d), the bias (classes,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    fitted = LogisticRegression(C=C, max_iter=2000, **more).fit(scaler.transform(x), y)
    return raw_rows(fitted.coef_, fitted.intercept_, scaler)


def raw_rows(coefficients: Array, intercept: Array, scaler: Any) -> tuple[Array, Array]:
    """Return one row a class, for features before a fitted ``StandardScaler``."""
    weight, bias = one_row_a_class(coefficients, intercept)
    weight = weight / scaler.scale_
    return weight, bias - weight @ scaler.mean_


def halves(cells: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Return the indices of two random halves of the samples of each cell, the first the larger."""
    parts = [
        np.array_split(generator.permutation(np.flatnonzero(cells == cell)), 2)
        for cell in np.unique(cells)
    ]
    first, second = (np.concatenate(part) for part in zip(*parts, strict=True))
    return first, second


def one_row_a_class(weight: Any, bias: Any) -> tuple[Any, Any]:
    """Return both rows where scikit-learn has, of two classes, that of the second alone."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
