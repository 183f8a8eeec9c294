"""PRCA against a brute-force eigendecomposition, and what its components promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xai_edit import LRP, PRCA, Features, collect_features


def related(vectors=300, channels=6, seed=0):
    """Activations off the origin, and contexts that agree with them more or less."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(vectors, channels)) + 2.0
    c = a @ rng.normal(size=(channels, channels)) + rng.normal(size=(vectors, channels))
    return Features(torch.from_numpy(a), torch.from_numpy(c))


def brute_force(features):
    """Eigenvalues, rising, and eigenvectors of E[a cᵀ + c aᵀ], one outer product at a time."""
    a, c = features.activations.double().numpy(), features.contexts.double().numpy()
    return np.linalg.eigh(
        sum(np.outer(x, y) + np.outer(y, x) for x, y in zip(a, c, strict=True)) / len(a)
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_components_are_the_eigenvectors_of_the_symmetrised_cross_covariance(n):
    features = related()
    prca = PRCA(n)
    subspaces = prca.fit(features)
    values, vectors = brute_force(features)
    assert np.allclose(prca.relevance_.numpy(), values[::-1][:n] / 2, rtol=1e-10)
    for k in range(n):
        cosine = float(subspaces.block(k)[:, 0] @ torch.from_numpy(vectors[:, -1 - k].copy()))
        assert abs(cosine) == pytest.approx(1, abs=1e-10)
        largest = subspaces.block(k)[:, 0].abs().argmax()
        assert subspaces.block(k)[largest, 0] > 0
    assert torch.allclose(subspaces.mean, features.activations.mean(0))
    assert torch.equal(subspaces.basis, prca.components_.T)
    assert subspaces.origin == {"finder": "PRCA", "vectors": 300}


def test_relevance_is_what_the_subspaces_split_off():
    features = related()
    prca = PRCA(3)
    parts, _ = prca.fit(features).split(features.activations, features.contexts)
    assert torch.allclose(parts.mean(0), prca.relevance_, rtol=1e-10)


@given(st.integers(0, 2**31), st.integers(1, 3))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_no_other_directions_hold_more_relevance(seed, n):
    features = related(vectors=40, channels=5, seed=seed)
    positive = int((brute_force(features)[0] > 1e-8).sum())
    if positive < n:
        return
    prca = PRCA(n)
    prca.fit(features)
    rng = np.random.default_rng(seed)
    a, c = features.activations.numpy(), features.contexts.numpy()
    for _ in range(20):
        other, _ = np.linalg.qr(rng.normal(size=(5, n)))
        held = ((a @ other) * (c @ other)).sum(1).mean()
        assert held <= float(prca.relevance_.sum()) + 1e-9


def test_with_contexts_equal_to_activations_it_is_uncentred_pca():
    a = related().activations
    prca = PRCA(4)
    subspaces = prca.fit(Features(a, a))
    _, singular, right = np.linalg.svd(a.numpy(), full_matrices=False)
    assert np.allclose(prca.relevance_.numpy(), singular[:4] ** 2 / len(a), rtol=1e-10)
    cosines = (subspaces.basis.numpy() * right[:4].T).sum(0)
    assert np.allclose(np.abs(cosines), 1, atol=1e-9)


def test_activations_without_relevance_do_not_count():
    """PCA would take the large direction first; no relevance is in it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=generator, dtype=torch.double)
    c = torch.zeros_like(a)
    c[:, 2] = a[:, 2]
    a[:, 0] *= 100
    direction = PRCA(1).fit(Features(a, c)).basis[:, 0]
    assert direction.abs().argmax() == 2
    # Some of channel 0 by chance, as E[a₀c₂] is not quite zero in 500 vectors.
    assert direction[[1, 3, 4, 5]].abs().max() < 0.1


def test_on_a_network_the_components_hold_the_relevance(plain, batches):
    scorer = LRP("epsilon", initial="one")
    features = collect_features(plain, batches[:1], layer="relu2", scorer=scorer, positions=None)
    prca = PRCA(None)
    subspaces = prca.fit(features)
    values, _ = brute_force(features)
    assert len(subspaces) == (values > 1e-12).sum()
    assert np.allclose(prca.relevance_.numpy(), values[::-1][: len(subspaces)] / 2, atol=1e-10)


def test_bad_input_is_refused():
    features = related()
    with pytest.raises(ValueError, match="features: they have no contexts"):
        PRCA(1).fit(Features(features.activations))
    positive = int((brute_force(features)[0] > 0).sum())
    assert positive < 6
    with pytest.raises(ValueError, match=f"positive along {positive} directions"):
        PRCA(positive + 1).fit(features)
    assert len(PRCA(None).fit(features)) == positive
    with pytest.raises(ValueError, match="positive along 0 directions"):
        PRCA(None).fit(Features(features.activations, -features.activations))
    with pytest.raises(ValueError, match="no vectors"):
        PRCA(1).fit(Features(torch.zeros(0, 3), torch.zeros(0, 3)))
    for n in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="n_subspaces"):
            PRCA(n)
