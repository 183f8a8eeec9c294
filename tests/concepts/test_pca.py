"""PCA against scikit-learn and the eigenvectors of the covariance."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as ScikitPCA

from xai_edit import PCA, Features, collect_features


def planted(dtype=torch.float64):
    rng = np.random.default_rng(0)
    scale = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    return torch.from_numpy(rng.normal(size=(300, 6)) * scale @ turn.T + 7.0).to(dtype)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_components_are_the_eigenvectors_of_the_covariance(n):
    a = planted()
    pca = PCA(n)
    subspaces = pca.fit(Features(a))
    values, vectors = np.linalg.eigh(np.cov(a.numpy().T))
    assert np.allclose(pca.explained_variance_.numpy(), values[::-1][:n], rtol=1e-10)
    for k in range(n):
        cosine = float(subspaces.block(k)[:, 0] @ torch.from_numpy(vectors[:, -1 - k].copy()))
        assert abs(cosine) == pytest.approx(1, abs=1e-10)
    assert torch.allclose(subspaces.mean, a.mean(0), rtol=1e-12)
    assert subspaces.sizes == (1,) * n


@pytest.mark.parametrize("n", [1, 4])
def test_components_are_scikit_learns(n, plain, batches):
    features = collect_features(plain, batches, layer="conv2", positions=None)
    pca = PCA(n)
    subspaces = pca.fit(features)
    expected = ScikitPCA(n, svd_solver="full").fit(features.activations.double().numpy())
    assert np.array_equal(pca.components_.numpy(), expected.components_)
    assert np.array_equal(subspaces.basis.numpy(), expected.components_.T)
    assert pca.components_.dtype == subspaces.basis.dtype == torch.float64
    assert subspaces.origin == {"finder": "PCA", "vectors": len(features.activations)}


def test_projections_are_uncorrelated_with_the_variances_named():
    a = planted()
    pca = PCA(4)
    projected = torch.cat(pca.fit(Features(a)).project(a), 1)
    assert torch.allclose(projected.T.cov(), pca.explained_variance_.diag(), rtol=0, atol=1e-9)


def test_fitting_twice_gives_the_same_bits_and_keeps_the_first_result():
    pca = PCA(2)
    first = pca.fit(Features(planted(torch.float32)))
    kept = first.basis.clone()
    assert torch.equal(pca.fit(Features(planted(torch.float32))).basis, kept)
    pca.fit(Features(-planted()[:50].flip(1)))
    assert torch.equal(first.basis, kept)


@pytest.mark.parametrize(("n", "vectors"), [(7, 300), (3, 3), (1, 1)])
def test_more_subspaces_than_the_data_determines_are_refused(n, vectors):
    with pytest.raises(ValueError, match=r"vary in|two or more"):
        PCA(n).fit(Features(planted()[:vectors]))


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
def test_a_number_of_subspaces_that_is_not_positive_and_whole_is_refused(n):
    with pytest.raises(ValueError, match="n_subspaces"):
        PCA(n)


def test_directions_without_variance_are_not_components():
    activations = planted()
    dead = torch.cat([activations, torch.zeros(len(activations), 3)], dim=1)
    found, expected = (PCA(None).fit(Features(part)) for part in (dead, activations))
    assert len(found) == len(expected) == activations.shape[1]
    with pytest.raises(ValueError, match=f"vary in {activations.shape[1]} directions"):
        PCA(activations.shape[1] + 1).fit(Features(dead))
