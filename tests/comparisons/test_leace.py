"""LEACE against its defining properties: nothing left, least change, exact in the model."""

import numpy as np
import pytest
import torch
from scipy.linalg import null_space
from sklearn.covariance import ledoit_wolf
from torch import nn

from xai_edit import collect_head_features
from xai_edit.comparisons import LEACE
from xai_edit.concepts.erasure import erasure


def correlated(samples=400, d=6, values=2, seed=0):
    """Features with their own covariance, and an attribute that some of them tell."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    a = np.digitize(x[:, 0] + rng.normal(size=samples), np.linspace(-1, 1, values - 1))
    return torch.from_numpy(x), torch.from_numpy(a)


def moments(x, a):
    z = np.eye(int(a.max()) + 1)[a.numpy()]
    centred = x.numpy() - x.numpy().mean(0)
    return centred.T @ centred / len(x), centred.T @ (z - z.mean(0)) / len(x)


def projection(covariance, cross):
    left, right = erasure(torch.from_numpy(covariance), torch.from_numpy(cross))
    return np.eye(len(covariance)) - (left @ right).numpy()


def whole(model, data, **arguments):
    """The weight and bias of a linear model after the edit, in numpy."""
    with LEACE().plan(model, data, **arguments).applied(model):
        return model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()


@pytest.fixture
def eye():
    """A linear model whose logits are its inputs, so that the edited layer is the map itself."""
    model = nn.Linear(6, 6).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(6))
        model.bias.zero_()
    return model


@pytest.mark.parametrize("values", [2, 3, 5])
def test_no_value_of_the_attribute_is_correlated_with_a_feature_any_more(eye, values):
    x, a = correlated(values=values)
    w, b = whole(eye, [x[:150], x[150:]], attribute=a)
    before = moments(x, a)[1]
    after = moments(torch.from_numpy(x.numpy() @ w.T + b), a)[1]
    assert np.abs(before).max() > 0.1
    assert np.abs(after).max() < 1e-12
    assert np.linalg.matrix_rank(np.eye(6) - w) == values - 1
    assert np.allclose(w @ w, w, atol=1e-10)  # a projection: twice is once
    assert np.allclose((x.numpy() @ w.T + b).mean(0), x.numpy().mean(0))


def test_the_class_stays_where_the_attribute_goes_with_it(eye):
    """Feature 0 tells the class, feature 1 the attribute; 1 of 20 samples has the other value."""
    torch.manual_seed(0)
    y = torch.arange(2000) % 2
    a = torch.where(torch.arange(2000) % 40 < 2, 1 - y, y)
    x = torch.randn(2000, 6).double()
    x[:, 0] += 6 * y
    x[:, 1] += 6 * a
    w, b = whole(eye, [(x, y, a)])
    after = x.numpy() @ w.T + b
    groups = [(y == c) & (a == v) for c in (0, 1) for v in (0, 1)]
    means = np.stack([after[group.numpy()].mean(0) for group in groups])
    # The groups alike: the attribute moves no feature, the class moves its own.
    assert np.abs(means[[0, 2]].mean(0) - means[[1, 3]].mean(0)).max() < 1e-9
    assert means[2:, 0].mean() - means[:2, 0].mean() > 5
    with pytest.warns(UserWarning, match="2 of 4 groups of class and attribute have no samples"):
        whole(eye, [(x, y, y)])


def test_a_rare_attribute_is_erased_too(eye):
    torch.manual_seed(0)
    x = torch.randn(20_000, 6).double()
    rare = torch.zeros(20_000).long()
    rare[:20] = 1
    x[:20, 0] += 1
    w, b = whole(eye, [x], attribute=rare)
    after = x.numpy() @ w.T + b
    assert x[:20, 0].mean() > 0.5
    assert np.allclose(after[:20].mean(0), after[20:].mean(0), atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_other_erasing_map_changes_the_features_less(seed):
    x, a = correlated(d=4, values=3, seed=seed)
    covariance, cross = moments(x, a)
    # Σ tr: E|x − A x|² of all A with A·Σ_xz = 0, solved row by row as constrained least squares.
    free = null_space(cross.T)  # rows of A are combinations of its columns
    best = np.linalg.solve(free.T @ covariance @ free, free.T @ covariance).T @ free.T
    assert np.allclose(projection(covariance, cross), best, atol=1e-9)


def test_the_covariance_is_that_of_ledoit_and_wolf(eye):
    x, a = correlated(samples=12)
    covariance, shrinkage = ledoit_wolf(x.numpy())
    assert shrinkage > 0.05
    w, _ = whole(eye, [x], attribute=a)
    assert np.allclose(w, projection(covariance, moments(x, a)[1]), atol=1e-9)
    assert LEACE().plan(eye, [x], attribute=a).origin["shrinkage"] == pytest.approx(shrinkage)


def test_features_without_variance_or_that_repeat_others_do_no_harm():
    x, a = correlated()
    wide = torch.cat([x, x[:, :2], torch.full((len(x), 1), 3.0)], 1)
    covariance, cross = moments(wide, a)
    A = projection(covariance, cross)
    assert np.abs(A @ cross).max() < 1e-10
    own = x.numpy() @ projection(*moments(x, a)).T
    assert np.allclose((wide.numpy() @ A.T)[:, :6], own)  # as if they were not there
    assert np.array_equal(A[8], np.eye(9)[8])


def test_the_edited_model_gives_the_logits_of_the_erased_features(plain, digits):
    images = digits[0].double()
    marked = images[:, 0, 3, 3] > 0.4
    model = plain.double()
    features = collect_head_features(model, [images]).features
    x = features.numpy()
    covariance, cross = ledoit_wolf(x)[0], moments(features, marked.long())[1]
    erased = x.mean(0) + (x - x.mean(0)) @ projection(covariance, cross).T
    halves = [images[:900], images[900:]]
    edit = LEACE().plan(model, halves, attribute=lambda b: b[:, 0, 3, 3] > 0.4)
    assert {*edit.changes} == {"head.weight", "head.bias"}
    assert edit.origin["values"] == {"0": int((~marked).sum()), "1": int(marked.sum())}
    assert edit.origin["directions"] == 1
    expected = erased @ model.head.weight.detach().numpy().T + model.head.bias.detach().numpy()
    with edit.applied(model):
        logits = model(images).detach().numpy()
    assert np.allclose(logits, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(moments(torch.from_numpy(logits), marked.long())[1]).max() < 1e-9


def test_nothing_to_erase_is_an_edit_of_nothing(eye):
    x = torch.randn(50, 6).double().repeat(2, 1)
    edit = LEACE().plan(eye, [x], attribute=torch.arange(100) // 50)
    assert edit.size == 0
    assert edit.origin["directions"] == 0
