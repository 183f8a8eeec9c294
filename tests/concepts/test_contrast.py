"""Contrastive PCA against generalised definitions, planted directions and what it refuses."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from xai_edit import CAV, ContrastivePCA, Features


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


def test_planted_directions_are_found_although_their_mean_is_none():
    features, basis = planted()
    found = ContrastivePCA(3).fit(features)
    assert np.cos(subspace_angles(found.basis.numpy(), basis.numpy())).min() > 0.99
    # A direction of the mean, as CAV has it, cannot be there: signs cancel.
    direction = CAV().fit(features).block(0)
    assert (basis.T @ direction).norm() < 0.9


def test_it_maximises_the_difference_of_second_moments_within_classes():
    features, _ = planted(channels=6, size=2)
    finder = ContrastivePCA(6 - 3)
    found = finder.fit(features)
    a, sample = features.activations, features.sample
    has, labels = features.attribute[sample] == 1, features.labels[sample]

    def contrast(direction):
        energy = (a @ direction).square()
        return (
            sum(
                energy[(labels == c) & has].mean() - energy[(labels == c) & ~has].mean()
                for c in (0, 1)
            )
            / 2
        )

    for at, direction in enumerate(found.basis.T):
        assert abs(contrast(direction) - finder.contrast_[at]) < 1e-9
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = torch.nn.functional.normalize(torch.randn(6, generator=generator).double(), dim=0)
        assert contrast(other) <= finder.contrast_[0] + 1e-9


def test_without_labels_all_samples_are_compared():
    features, _basis = planted()
    bare = Features(features.activations, sample=features.sample, attribute=features.attribute)
    found = ContrastivePCA(4).fit(bare)
    first = torch.eye(24).double()[:, :1]  # the class's energy enters
    assert np.cos(subspace_angles(found.basis.numpy(), first.numpy())).min() > 0.7
    given = ContrastivePCA(4).fit(
        Features(bare.activations, sample=bare.sample), spurious=features.attribute
    )
    assert torch.equal(found.basis, given.basis)


def test_what_is_refused():
    features, _ = planted()
    with pytest.raises(ValueError, match="size"):
        ContrastivePCA(0)
    with pytest.raises(ValueError, match=r"size: 24 given; .* in \d+ of 24"):
        ContrastivePCA(24).fit(features)
    apart = Features(
        features.activations,
        sample=features.sample,
        labels=features.attribute,
        attribute=features.attribute,
    )
    with pytest.raises(ValueError, match="no class has samples both"):
        ContrastivePCA().fit(apart)
    with pytest.raises(ValueError, match="spurious"):
        ContrastivePCA().fit(Features(features.activations, sample=features.sample))
