"""CAV against scikit-learn and the covariance, and the disturbance that patterns see through."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from xai_edit import CAV, Features


def marked(samples=200, channels=5, seed=0, per_sample=1):
    """Activations that move along (1, 2, 0, …) with the feature, and which samples have it."""
    rng = np.random.default_rng(seed)
    has = torch.from_numpy(rng.integers(0, 2, samples))
    has[:2] = torch.tensor([0, 1])
    a = rng.normal(size=(samples, per_sample, channels)) + 3.0
    a[..., :2] += has.numpy()[:, None, None] * np.array([1.0, 2.0])
    a = torch.from_numpy(a.reshape(-1, channels))
    sample = torch.arange(samples).repeat_interleave(per_sample)
    return Features(a, sample=sample, attribute=has)


def classifier(kind, C):
    return (
        LogisticRegression(C=C, max_iter=1000)
        if kind == "logistic"
        else LinearSVC(C=C, dual=False, max_iter=10_000)
    )


@pytest.mark.parametrize("kind", ["logistic", "svm"])
@pytest.mark.parametrize("C", [0.01, 1.0])
@pytest.mark.parametrize("per_sample", [1, 3])
def test_a_classifiers_direction_is_scikit_learns(kind, C, per_sample):
    features = marked(per_sample=per_sample)
    cav = CAV(kind, C=C)
    cav.fit(features)
    a = features.activations.numpy()
    labels = np.repeat(features.attribute.numpy(), per_sample)
    expected = classifier(kind, C).fit(a / np.sqrt((a**2).mean()), labels).coef_[0]
    expected /= np.linalg.norm(expected)
    assert np.allclose(cav.direction_.numpy(), expected, atol=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_pattern_is_the_covariance_with_the_feature(seed, channels, per_sample):
    features = marked(samples=20, channels=max(channels, 2), seed=seed, per_sample=per_sample)
    cav = CAV()
    subspaces = cav.fit(features)
    t = features.attribute[features.sample].double().numpy()
    a = features.activations.numpy()
    expected = np.array([np.cov(column, t)[0, 1] for column in a.T])
    assert np.allclose(cav.direction_.numpy(), expected / np.linalg.norm(expected), atol=1e-10)
    # For yes and no it is the difference of the two means.
    difference = a[t == 1].mean(0) - a[t == 0].mean(0)
    assert np.allclose(cav.direction_.numpy(), difference / np.linalg.norm(difference), atol=1e-10)
    d = a.shape[1]
    assert subspaces.sizes == (1, d - 1)
    assert torch.equal(subspaces.block(0)[:, 0], cav.direction_)
    assert torch.allclose(subspaces.basis @ subspaces.basis.T, torch.eye(d).double(), atol=1e-12)


def test_the_pattern_is_the_features_direction_where_a_classifier_turns_away():
    """Channel 1 holds a disturbance of channel 0: a classifier subtracts it, the pattern is e₀."""
    rng = np.random.default_rng(0)
    has = torch.from_numpy(rng.integers(0, 2, 5000))
    disturbance = rng.normal(size=5000)
    a = np.stack([has.numpy() + disturbance, disturbance, rng.normal(size=5000)], 1)
    features = Features(torch.from_numpy(a), attribute=has)
    cosines = {}
    for kind in ("pattern", "logistic", "svm"):
        cav = CAV(kind)
        cav.fit(features)
        cosines[kind] = float(cav.direction_[0])
    assert cosines["pattern"] > 0.99
    assert max(cosines["logistic"], cosines["svm"]) < 0.8


@pytest.mark.parametrize("kind", ["pattern", "logistic", "svm"])
def test_the_direction_points_to_samples_with_the_feature(kind):
    features = marked()
    (projected, _) = CAV(kind).fit(features).project(features.activations)
    has = features.attribute > 0
    assert projected[has].mean() > 0 > projected[~has].mean()
    opposite = CAV(kind).fit(features, 1 - features.attribute)
    assert torch.allclose(opposite.basis[:, 0], -CAV(kind).fit(features).basis[:, 0], atol=1e-3)
    assert opposite.origin["with"] == int((~has).sum())


@pytest.mark.parametrize("kind", ["pattern", "logistic", "svm"])
def test_the_scale_of_activations_does_not_matter(kind):
    features = marked()
    scaled = Features(1e-6 * features.activations, attribute=features.attribute)
    first, second = CAV(kind), CAV(kind)
    first.fit(features)
    second.fit(scaled)
    assert torch.allclose(first.direction_, second.direction_, atol=1e-6)


def test_one_channel_leaves_no_complement():
    features = Features(torch.tensor([[1.0], [3.0]]), attribute=torch.tensor([1, 0]))
    subspaces = CAV().fit(features)
    assert subspaces.basis.tolist() == [[-1.0]]
    assert subspaces.sizes == (1,)


def test_bad_input_is_refused():
    features = marked()
    plain = Features(features.activations)
    with pytest.raises(ValueError, match="spurious: one yes"):
        CAV().fit(plain)
    for spurious in (torch.ones(200), torch.arange(200), torch.tensor([0, 1]), torch.rand(200)):
        with pytest.raises(ValueError, match="spurious: one yes"):
            CAV().fit(plain, spurious)
    for kind in ("pattern", "logistic", "svm"):
        with pytest.raises(ValueError, match="do not differ"):
            CAV(kind).fit(Features(torch.zeros(4, 3), attribute=torch.tensor([0, 1, 0, 1])))
    with pytest.raises(ValueError, match="kind: 'ridge'"):
        CAV("ridge")
    for C in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="C: "):
            CAV("svm", C=C)
