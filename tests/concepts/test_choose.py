"""Which subspace is taken: the poster's cases, and planted features with every kind of leaning."""

import pytest
import torch

from xai_edit import Subspaces, choose_spurious, predictiveness
from xai_edit.concepts import Features

SAMPLES = 400
LABELS = torch.arange(SAMPLES) % 2
HAS = (torch.arange(SAMPLES) // 2) % 2


def table_of(*columns, labels=LABELS, has=HAS):
    """Average precisions of single directions whose values are given."""
    a = torch.stack(columns, 1).double()
    eye = torch.eye(a.shape[1]).double()
    subspaces = Subspaces(eye, (1,) * a.shape[1], torch.zeros(a.shape[1]).double())
    return predictiveness(subspaces, Features(a, torch.ones_like(a), None, labels, has), target=1)


def noise(seed, samples=SAMPLES):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def test_the_subspace_of_the_feature_alone_is_taken():
    table = table_of(noise(0), HAS + 0.3 * noise(1), LABELS + 0.3 * noise(2))
    choice = choose_spurious(table)
    assert choice.indices == (1,)
    assert "those that predict the spurious feature and not the class: 1" in str(choice)


def test_of_several_the_best_comes_first():
    table = table_of(HAS + 0.5 * noise(0), HAS + 0.1 * noise(1))
    assert choose_spurious(table).indices == (1, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_that_tells_the_class_too_is_refused_with_the_reason(sign):
    table = table_of(3 * HAS + sign * LABELS + 0.2 * noise(0), noise(1))
    choice = choose_spurious(table)
    assert choice.indices == ()
    assert "but also average precision" in choice.reason
    assert ("for the class" if sign > 0 else "for the rest") in choice.reason


def test_one_that_tells_the_feature_weakly_is_refused_as_on_the_poster():
    choice = choose_spurious(table_of(HAS + 1.6 * noise(0)))
    assert choice.indices == ()
    assert "has to be above the middle" in choice.reason


def test_what_goes_with_the_class_in_biased_data_alone_is_no_reason():
    # Nearly all of the class has the feature, nearly none of the rest.
    has = torch.where(noise(5) > 1, 1 - LABELS, LABELS)
    table = table_of(has + 0.2 * noise(0), LABELS + 0.2 * noise(1), has=has)
    assert table.rows[1]["spurious"].value > 0.7  # the class predicts it over all samples
    assert choose_spurious(table).indices == (0,)


def test_too_few_samples_to_tell_are_told():
    few = slice(0, 16)
    table = table_of(HAS[few] + 0.0, labels=LABELS[few], has=HAS[few])
    choice = choose_spurious(table)
    assert choice.indices == ()
    assert "it takes 10 samples each" in choice.reason
    without = choose_spurious(table_of(HAS + 0.0, labels=torch.ones(SAMPLES).long()))
    assert without.indices == ()
