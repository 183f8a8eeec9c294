"""Finders in closed form against scikit-learn, brute force and planted directions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA as ScikitPCA
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from xai_edit import CAV, PCA, PRCA, ContrastivePCA, collect_features, concepts
from xai_edit.concepts import Features

property_test = settings(max_examples=30, deadline=None, derandomize=True)


def parallel(found, expected):
    """Whether two matrices have the same unit columns, whatever their signs."""
    return np.allclose(np.abs((np.asarray(found) * np.asarray(expected)).sum(0)), 1, atol=1e-9)


def of_falling_variance(dtype=torch.float64):
    rng = np.random.default_rng(0)
    scale = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    return torch.from_numpy(rng.normal(size=(300, 6)) * scale @ turn.T + 7.0).to(dtype)


def related(vectors=300, channels=6, seed=0):
    """Activations off the origin, and contexts that agree with them in part."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(vectors, channels)) + 2.0
    c = a @ rng.normal(size=(channels, channels)) + rng.normal(size=(vectors, channels))
    return Features(torch.from_numpy(a), torch.from_numpy(c))


def marked(samples=200, channels=5, seed=0, per_sample=1):
    """Activations that move along (1, 2, 0, …) with the feature, and which samples have it."""
    rng = np.random.default_rng(seed)
    has = torch.from_numpy(rng.integers(0, 2, samples))
    has[:2] = torch.tensor([0, 1])
    a = rng.normal(size=(samples, per_sample, channels)) + 3.0
    a[..., :2] += has.numpy()[:, None, None] * np.array([1.0, 2.0])
    sample = torch.arange(samples).repeat_interleave(per_sample)
    return Features(torch.from_numpy(a.reshape(-1, channels)), sample=sample, attribute=has)


def planted(channels=24, size=3, samples=400, positions=5, seed=0):
    """Vectors of class-dependent noise; with the feature, one position has planted directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(channels, size, generator=generator).double()).Q
    labels = torch.arange(samples) % 2
    has = torch.rand(samples, generator=generator) < torch.where(labels == 1, 0.8, 0.2)
    a = torch.randn(samples, positions, channels, generator=generator).double()
    a[:, :, 0] += 3 * labels[:, None]  # a class of more energy, which goes with the feature
    signs = torch.randn(samples, size, generator=generator).double() * 5
    a[:, 0] += has[:, None] * (signs @ basis.T)
    sample = torch.arange(samples).repeat_interleave(positions)
    features = Features(a.flatten(0, 1), sample=sample, labels=labels, attribute=has.long())
    return features, basis


# PCA.


def test_pca_components_are_scikit_learns_bits_again_and_again(plain, batches):
    features = collect_features(plain, batches, layer="conv2", positions=None)
    pca = PCA(4)
    first = pca.fit(features)
    expected = ScikitPCA(4, svd_solver="full").fit(features.activations.double().numpy())
    for subspaces in (first, pca.fit(features)):
        assert np.array_equal(pca.components_.numpy(), expected.components_)
        assert np.array_equal(subspaces.basis.numpy(), expected.components_.T)
        assert np.array_equal(subspaces.mean.numpy(), expected.mean_)
        assert np.array_equal(pca.explained_variance_.numpy(), expected.explained_variance_)
    pca.fit(Features(-features.activations[:50].flip(1)))
    assert np.array_equal(first.basis.numpy(), expected.components_.T)
    assert first.origin == {"finder": "PCA", "vectors": len(features.activations)}


def test_directions_without_variance_are_not_pca_components():
    activations = of_falling_variance()
    dead = torch.cat([activations, torch.zeros(len(activations), 3)], dim=1)
    assert len(PCA(None).fit(Features(dead))) == activations.shape[1]
    for asked, vectors in ((7, 300), (3, 3)):
        with pytest.raises(ValueError, match=rf"{asked} given; .* vary in {min(6, vectors - 1)}"):
            PCA(asked).fit(Features(dead[:vectors]))
    with pytest.raises(ValueError, match="features: 1 given; at least 2"):
        PCA(1).fit(Features(dead[:1]))


# PRCA.


def brute_force(features):
    """Eigenvalues, falling, and eigenvectors of E[a cᵀ + c aᵀ], one outer product at a time."""
    a, c = features.activations.double().numpy(), features.contexts.double().numpy()
    outer = [np.outer(x, y) + np.outer(y, x) for x, y in zip(a, c, strict=True)]
    values, vectors = np.linalg.eigh(sum(outer) / len(a))
    return values[::-1], vectors[:, ::-1]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_prca_components_are_the_eigenvectors_of_the_symmetrised_cross_covariance(n):
    features = related()
    prca = PRCA(n)
    subspaces = prca.fit(features)
    values, vectors = brute_force(features)
    assert np.allclose(prca.relevance_.numpy(), values[:n] / 2, rtol=1e-10)
    assert parallel(subspaces.basis, vectors[:, :n])
    largest = subspaces.basis.abs().argmax(0, keepdim=True)
    assert (subspaces.basis.gather(0, largest) > 0).all()
    parts, _ = subspaces.split(features.activations, features.contexts)
    assert torch.allclose(parts.mean(0), prca.relevance_, rtol=1e-10)
    assert torch.allclose(subspaces.mean, features.activations.mean(0))
    assert torch.equal(subspaces.basis, prca.components_.T)
    assert subspaces.origin == {"finder": "PRCA", "vectors": 300}


def test_prca_refuses_more_directions_than_have_positive_relevance():
    features = related()
    positive = int((brute_force(features)[0] > 0).sum())
    assert positive < 6
    with pytest.raises(ValueError, match=f"positive along {positive} directions"):
        PRCA(positive + 1).fit(features)
    assert len(PRCA(None).fit(features)) == positive
    with pytest.raises(ValueError, match="positive along 0 directions"):
        PRCA(None).fit(Features(features.activations, -features.activations))
    with pytest.raises(ValueError, match="features: 0 given"):
        PRCA(1).fit(Features(torch.zeros(0, 3), torch.zeros(0, 3)))
    with pytest.raises(ValueError, match="features: they have no contexts"):
        PRCA(1).fit(Features(features.activations))


# Contrastive PCA.


def test_it_maximises_the_difference_of_second_moments_within_classes():
    features, _ = planted(channels=6, size=2)
    taken = (features.labels == 1) | (features.attribute == 0)
    taken[(~taken).nonzero()[:2, 0]] = True  # two samples of class 0 have the feature
    features = features.of(taken)
    finder = ContrastivePCA(3)
    found = finder.fit(features)
    a, sample = features.activations, features.sample
    has, labels = features.attribute[sample] == 1, features.labels[sample]

    def contrast(direction):
        energy = (a @ direction).square()
        parts = [[energy[(labels == c) & (has == kind)] for kind in (1, 0)] for c in (0, 1)]
        # What the inverse variance of a difference of two means is proportional to.
        weights = [1 / (1 / len(one) + 1 / len(other)) for one, other in parts]
        each = [one.mean() - other.mean() for one, other in parts]
        return (weights[0] * each[0] + weights[1] * each[1]) / sum(weights)

    for at, direction in enumerate(found.basis.T):
        assert abs(contrast(direction) - finder.contrast_[at]) < 1e-9
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = torch.nn.functional.normalize(torch.randn(6, generator=generator).double(), dim=0)
        assert contrast(other) <= finder.contrast_[0] + 1e-9


def test_without_labels_all_samples_are_compared():
    features, _ = planted()
    bare = Features(features.activations, sample=features.sample, attribute=features.attribute)
    found = ContrastivePCA(4).fit(bare)
    first = torch.eye(24).double()[:, :1]  # the class's energy enters
    assert np.cos(subspace_angles(found.basis.numpy(), first.numpy())).min() > 0.7
    unnamed = Features(bare.activations, sample=bare.sample)
    again = ContrastivePCA(4).fit(unnamed, attribute=features.attribute)
    assert torch.equal(found.basis, again.basis)


# Concept activation vectors.


@pytest.mark.parametrize("kind", ["logistic", "svm"])
@pytest.mark.parametrize(("C", "per_sample"), [(0.01, 1), (1.0, 3)])
def test_a_classifiers_direction_is_scikit_learns(kind, C, per_sample):
    features = marked(per_sample=per_sample)
    cav = CAV(kind, C=C)
    cav.fit(features)
    a = features.activations.numpy()
    labels = np.repeat(features.attribute.numpy(), per_sample)
    classifiers = {
        "logistic": LogisticRegression(C=C, max_iter=1000),
        "svm": LinearSVC(C=C, dual=False, max_iter=10_000),
    }
    expected = classifiers[kind].fit(a / np.sqrt((a**2).mean()), labels).coef_[0]
    assert np.allclose(cav.direction_.numpy(), expected / np.linalg.norm(expected), atol=1e-6)


@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 3))
@property_test
def test_the_pattern_is_the_covariance_with_the_feature(seed, channels, per_sample):
    features = marked(samples=20, channels=channels, seed=seed, per_sample=per_sample)
    cav = CAV()
    subspaces = cav.fit(features)
    t = features.attribute[features.sample].double().numpy()
    a = features.activations.numpy()
    covariance = np.array([np.cov(column, t)[0, 1] for column in a.T])
    difference = a[t == 1].mean(0) - a[t == 0].mean(0)
    for expected in (covariance, difference):  # the same direction for yes and no
        expected /= np.linalg.norm(expected)
        assert np.allclose(cav.direction_.numpy(), expected, atol=1e-10)
    assert subspaces.sizes == (1, channels - 1)
    assert torch.equal(subspaces.block(0)[:, 0], cav.direction_)
    whole = subspaces.basis @ subspaces.basis.T
    assert torch.allclose(whole, torch.eye(channels).double(), atol=1e-12)


@pytest.mark.parametrize("kind", ["pattern", "logistic", "svm"])
def test_the_direction_points_to_samples_with_the_feature_at_any_scale(kind):
    features = marked()
    found = CAV(kind).fit(features)
    (projected, _) = found.project(features.activations)
    has = features.attribute > 0
    assert projected[has].mean() > 0 > projected[~has].mean()
    opposite = CAV(kind).fit(features, 1 - features.attribute)
    assert torch.allclose(opposite.basis[:, 0], -found.basis[:, 0], atol=1e-3)
    assert opposite.origin["with"] == int((~has).sum())
    scaled = CAV(kind).fit(Features(1e-6 * features.activations, attribute=features.attribute))
    assert torch.allclose(scaled.basis[:, 0], found.basis[:, 0], atol=1e-6)
    with pytest.raises(ValueError, match="do not differ"):
        CAV(kind).fit(Features(torch.zeros(4, 3), attribute=torch.tensor([0, 1, 0, 1])))


def test_one_channel_leaves_no_complement():
    features = Features(torch.tensor([[1.0], [3.0]]), attribute=torch.tensor([1, 0]))
    subspaces = CAV().fit(features)
    assert subspaces.basis.tolist() == [[-1.0]]
    assert subspaces.sizes == (1,)


@pytest.mark.parametrize(
    "text",
    [
        "PCA(n_subspaces=None)",
        "PRCA(n_subspaces=2)",
        "ContrastivePCA(size=3)",
        "CAV(kind='svm', C=0.5)",
        "DRSA(n_subspaces=2, size=None, n_init=3, max_iter=9, tol=0.0, seed=1)",
    ],
)
def test_a_finder_prints_as_what_makes_it_also_when_fitted(text):
    finder = eval(text, vars(concepts).copy())
    finder.components_ = torch.ones(2)
    assert repr(finder) == text
