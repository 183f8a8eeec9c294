"""Clusters are those of the data, and one strategy is an answer."""

import pytest
import torch

from xai_edit.discovery.strategies import (
    ends_of_components,
    mixture,
    spectral,
    two_parts,
)


def blobs(sizes, distance=8.0, channels=10, seed=0):
    """Return points of some Gaussian blobs, and which blob each is of."""
    generator = torch.Generator().manual_seed(seed)
    blob = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = distance * torch.eye(channels)[: len(sizes)]
    points = centres[blob] + torch.randn(len(blob), channels, generator=generator)
    order = torch.randperm(len(blob), generator=generator)
    return points[order], blob[order]


def purity(cluster, blob):
    """Return the share of samples whose cluster's most frequent blob is theirs."""
    right = sum(int(blob[cluster == one].bincount().max()) for one in cluster.unique())
    return right / len(blob)


@pytest.mark.parametrize("divide", [mixture, spectral])
def test_samples_are_divided_as_they_lie(divide):
    points, blob = blobs([200, 40])
    fit = torch.arange(len(points)) % 3 > 0  # the others are assigned
    found = divide(points, fit, seed=0)
    assert purity(found.cluster, blob) > 0.99
    (part, *_) = found.parts
    small, large = blob == 1, blob == 0
    assert torch.equal(part, small) or torch.equal(part, large)
    assert found.points.shape == (240, 2)


def test_one_blob_is_one_strategy_without_parts():
    points, _ = blobs([300])
    found = mixture(points, torch.ones(300, dtype=torch.bool), seed=0)
    assert (found.count, found.parts) == (1, ())


def test_the_least_likely_samples_are_a_part():
    points, _ = blobs([300, 200])
    points[:10] += 40 * torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    found = mixture(points, torch.ones(500, dtype=torch.bool), seed=0)
    assert any(len(part.nonzero()) == 10 and part[:10].sum() >= 8 for part in found.parts)


def test_parts_of_fewer_than_eight_samples_are_left_out():
    points, _ = blobs([300, 7], distance=30.0)
    found = mixture(points, torch.ones(307, dtype=torch.bool), seed=0)
    assert all(8 <= part.sum() <= 299 for part in found.parts)


def test_ends_are_quarters_along_principal_components():
    points, _ = blobs([100])
    points[:, 3] *= 20
    found = ends_of_components(points, torch.ones(100, dtype=torch.bool))
    order = points[:, 3].argsort()
    ends = [{*order[:25].tolist()}, {*order[75:].tolist()}]
    assert all({*part.nonzero()[:, 0].tolist()} in ends for part in found.parts[:2])


def test_a_known_part_is_taken_once():
    wrong = torch.arange(60) < 20
    found = two_parts(wrong, torch.randn(60, 4), torch.ones(60, dtype=torch.bool))
    (part,) = found.parts
    assert torch.equal(part, ~wrong) or torch.equal(part, wrong)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("divide", [mixture, spectral, ends_of_components])
def test_values_that_differ_by_rounding_alone_are_one_strategy(divide):
    rounding = 1e-8 * torch.randn(100, 5, generator=torch.Generator().manual_seed(0)).double()
    found = divide(1 + rounding, torch.arange(100) % 3 > 0)
    assert (found.count, found.parts) == (1, ())


@pytest.mark.filterwarnings("error")
def test_there_are_no_more_strategies_than_different_samples():
    found = mixture(torch.eye(3).repeat(40, 1), torch.ones(120, dtype=torch.bool))
    assert found.count <= 3
