"""Last-layer retraining against scikit-learn pipelines written out here."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from xai_edit import LastLayerRetraining

GRID = [1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01]
RENAMED = LogisticRegression().get_params()["penalty"] == "deprecated"
L1 = {"l1_ratio": 1.0} if RENAMED else {"penalty": "l1"}


def biased(classes=2, values=2, samples=300, d=5, seed=0):
    """Features that tell the class weakly and the attribute strongly; groups of unequal size."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=samples)
    a = np.where(rng.random(samples) < 0.7, y % values, rng.integers(values, size=samples))
    x = rng.normal(size=(samples, d)) * np.arange(1, d + 1) + rng.normal(size=d)
    x[:, 0] += 1.5 * y
    x[:, 1] += 4 * a
    return x, y, a


def batches(x, y, a):
    return [tuple(map(torch.from_numpy, (x, y, a)))]


def linear(x, classes):
    return nn.Linear(x.shape[1], classes).double()


def balanced(y, a, rng):
    members = [
        np.flatnonzero((y == label) & (a == value))
        for label in np.unique(y)
        for value in np.unique(a)
    ]
    smallest = min(map(len, members))
    return np.concatenate([rng.choice(own, smallest, replace=False) for own in members])


def pipeline(x, y, rows, C, seed, tuned=True):
    """A one-against-rest lasso on features standardised over all samples, or one plain fit."""
    if not tuned:
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
        return plain.fit(x[rows], y[rows])
    lasso = LogisticRegression(C=C, solver="liblinear", max_iter=1000, random_state=seed, **L1)
    scaler = StandardScaler().fit(x)
    fitted = OneVsRestClassifier(lasso).fit(scaler.transform(x[rows]), y[rows])
    return make_pipeline(scaler, fitted)


def outputs(model, edit, x):
    with edit.applied(model):
        return model(torch.from_numpy(x)).detach().numpy()


@pytest.mark.parametrize("C", ["auto", 0.1, 1.0])
@pytest.mark.parametrize(("classes", "values", "repeats"), [(2, 2, 1), (3, 2, 4), (4, 3, 1)])
def test_repeats_average_the_pipelines(classes, values, repeats, C):
    x, y, a = biased(classes, values)
    model = linear(x, classes)
    edit = LastLayerRetraining(repeats=repeats, C=C, seed=3).plan(model, batches(x, y, a))
    assert {*edit.changes} == {"weight", "bias"}
    rng = np.random.default_rng(3)
    expected = []
    for _ in range(repeats):
        rows = balanced(y, a, rng)
        fitted = pipeline(x, y, rows, edit.origin["C"], seed=3, tuned=C == "auto")
        expected.append(fitted.decision_function(x))
    assert edit.origin["per_group"] == len(rows) / (classes * values)
    assert "missing" not in edit.origin
    logits = outputs(model, edit, x)
    if classes == 2:  # scikit-learn has one row
        logits = logits[:, 1] - logits[:, 0]
    assert np.allclose(logits, np.mean(expected, axis=0), rtol=1e-9, atol=1e-9)


def test_the_edit_names_the_groups_that_it_was_not_fitted_on():
    x, y, a = biased(3, 2)
    kept = (y != 1) | (a != 0)
    edit = LastLayerRetraining(repeats=1).plan(linear(x, 3), batches(x[kept], y[kept], a[kept]))
    assert edit.origin["missing"] == [[1, 0]]


def test_the_strength_is_the_best_on_the_half_that_was_not_fitted():
    x, y, a = biased(samples=400, d=30)
    edit = LastLayerRetraining(repeats=2, C="auto", seed=1).plan(linear(x, 2), batches(x, y, a))
    rng, fit, held = np.random.default_rng(1), [], []
    for label in (0, 1):
        for value in (0, 1):
            rows = rng.permutation(np.flatnonzero((y == label) & (a == value)))
            fit.extend(rows[: (len(rows) + 1) // 2])
            held.extend(rows[(len(rows) + 1) // 2 :])
    fit, held = np.array(fit), np.array(held)
    assert sorted([*fit, *held]) == list(range(len(y)))
    worst = {}
    for C in GRID:
        rng = np.random.default_rng(1)
        margins = [
            pipeline(x[fit], y[fit], balanced(y[fit], a[fit], rng), C, seed=1).decision_function(
                x[held]
            )
            for _ in range(2)
        ]
        right = (np.mean(margins, axis=0) > 0) == y[held]
        worst[C] = min(
            right[(y[held] == label) & (a[held] == value)].mean()
            for label in (0, 1)
            for value in (0, 1)
        )
    assert len(set(worst.values())) > 2
    assert edit.origin["tuned"] == {str(C): pytest.approx(value) for C, value in worst.items()}
    assert edit.origin["C"] == max(GRID, key=lambda C: worst[C])
    assert edit.origin["C"] != GRID[0]  # tuning did choose


def test_a_group_of_one_sample_cannot_be_tuned_on():
    x, y, a = biased()
    keep = ~((y == 1) & (a == 0))
    keep[np.flatnonzero(~keep)[0]] = True
    data = batches(x[keep], y[keep], a[keep])
    with pytest.raises(ValueError, match=r"one sample of \(class, feature\) \(1, 0\)"):
        LastLayerRetraining(C="auto").plan(linear(x, 2), data)
    LastLayerRetraining().plan(linear(x, 2), data)
