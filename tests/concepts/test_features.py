"""Features of a layer: the right vectors, from the right samples."""

import pytest
import torch

from xai_edit import collect_features
from xai_edit.concepts import Features
from xai_edit.concepts.collect import values_at


def test_a_linear_layer_gives_one_vector_a_sample(plain, batches):
    features = collect_features(plain, batches, layer="fc1")
    expected = torch.cat([values_at(plain, "fc1", x) for x, _ in batches])
    assert torch.equal(features.activations, expected)
    assert features.sample.tolist() == list(range(200))
    assert torch.equal(features.labels, torch.cat([y for _, y in batches]))
    assert features.attribute is features.contexts is None


@pytest.mark.parametrize("how", ["function", "vector", "third element"])
def test_the_attribute_is_kept_in_data_order(plain, batches, how):
    def bright(x):
        return x[:, 0, 4, 4] > 0.5

    expected = torch.cat([bright(x) for x, _ in batches]).long()
    data = [(x, y, bright(x).long()) for x, y in batches] if how == "third element" else batches
    spurious = {"function": bright, "vector": expected, "third element": None}[how]
    features = collect_features(plain, data, layer="conv1", attribute=spurious)
    assert torch.equal(features.attribute, expected)


def test_labels_or_attribute_in_some_batches_only_are_refused(plain, batches):
    with pytest.raises(ValueError, match="label"):
        collect_features(plain, [batches[0], batches[1][0]], layer="fc1")
    x, y = batches[0]
    with pytest.raises(ValueError, match=r"spurious|third|group"):
        collect_features(plain, [(x, y, y % 2), (x, y)], layer="fc1")


def test_the_model_is_as_before(plain, batches, unchanged):
    plain.train()
    check = unchanged(plain)
    features = collect_features(plain, batches, layer="conv2")
    check()
    plain.eval()
    again = collect_features(plain, batches, layer="conv2")
    assert torch.equal(features.activations, again.activations)


def test_without_sample_numbers_each_vector_is_a_sample():
    features = Features(torch.zeros(3, 2))
    assert features.samples == 3
    assert features.per_sample(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"activations": torch.zeros(2, 2, 2)}, "activations"),
        ({"contexts": torch.full((2, 2), torch.inf)}, "contexts: NaN or infinite"),
        ({"sample": torch.tensor([0.0, 1.0])}, "sample: .*int64"),
        ({"sample": torch.tensor([0, -1])}, r"sample: \(-1, 0\) given"),
        ({"sample": torch.tensor([0, 2]), "labels": torch.zeros(2)}, "sample: .* from 0 to 1"),
        ({"labels": torch.zeros(2), "attribute": torch.zeros(3)}, "attribute"),
        ({"labels": torch.zeros(2, 1)}, "labels"),
    ],
)
def test_shapes_and_numbers_that_do_not_fit_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Features(**({"activations": torch.zeros(2, 2)} | arguments))
