"""The inputs of the head, kept once."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from xai_edit.core import NonFiniteError
from xai_edit.last_layer.head import collect_head_features, head_features


@pytest.fixture
def inputs():
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def test_labels_in_some_batches_only_are_refused(plain, batches):
    mixed = [batches[0], batches[1][0]]
    with pytest.raises(ValueError, match="some have none"):
        collect_head_features(plain, mixed)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(plain, batches, label):
    x, y = batches[0]
    with pytest.raises(ValueError, match=f"class {label} is out of range"):
        collect_head_features(plain, [(x, torch.full_like(y, label))]).require_labels()


def test_a_buffer_that_the_loader_uses_again_does_not_reach_the_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    buffer = torch.empty(2, 4)

    def loader():
        for value in (1.0, 2.0):
            yield buffer.fill_(value)

    head = collect_head_features(model, loader())
    assert head.features[:, 0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "vector",
    [
        *(torch.tensor([0.3, 1.0, 0.7]), torch.tensor([0.0, torch.nan, 1.0])),
        *(torch.ones(3, 1), torch.ones(2), torch.ones(4)),
    ],
    ids=["fractions", "nan", "column", "short", "long"],
)
def test_a_vector_that_does_not_fit_is_refused_with_batches_and_features(inputs, vector):
    model, data = nn.Linear(6, 3), [inputs[:3]]
    for samples in (data, collect_head_features(model, data)):
        with pytest.raises(ValueError, match=r"^attribute: "):
            head_features(model, samples, attribute=vector, with_attribute=True)


def test_features_without_the_attribute_are_refused_where_it_is_needed(inputs):
    model = nn.Linear(6, 3)
    head = collect_head_features(model, [inputs])
    with pytest.raises(ValueError, match=r"^attribute: not given, and the features were collected"):
        head_features(model, head, with_attribute=True)
    assert head_features(model, head) is head


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(inputs, value):
    model = nn.Linear(6, 3)
    head = collect_head_features(model, [inputs])
    spoilt = replace(head, features=head.features.index_fill(0, torch.tensor(2), value))
    with pytest.raises(NonFiniteError, match="validation: features: NaN or infinite"):
        head_features(model, spoilt, name="validation")
