"""Accuracy by class and group against counting by hand."""

import pytest
import torch

from xai_edit import evaluate_groups
from xai_edit.core import NonFiniteError


def attribute_of(images):
    return (images[:, 0].mean((1, 2)) * 10).long() % 3


def brute(model, data, attribute):
    """Right answers and samples, one sample at a time."""
    counts = {}
    for batch in data:
        for sample in range(len(batch[0])):
            x, label = batch[0][sample : sample + 1], int(batch[1][sample])
            group = int(attribute(x))
            right = int(model(x).argmax()) == label
            hit, total = counts.get((label, group), (0, 0))
            counts[label, group] = (hit + right, total + 1)
    return dict(sorted(counts.items()))


@pytest.fixture
def model(plain):
    """Not perfect, so that right and wrong both occur in most groups."""
    with torch.no_grad():
        plain.head.bias[:5] -= 3
    return plain.double()


@pytest.fixture
def data(batches):
    return [(x.double(), y) for x, y in batches]


@pytest.mark.parametrize("how", ["none", "function", "vector", "third element", "bool"])
def test_counts_are_those_of_one_sample_at_a_time(model, data, how):
    groups = {
        "function": attribute_of,
        "vector": torch.cat([attribute_of(x) for x, _ in data]),
        "bool": lambda x: attribute_of(x) == 1,
    }.get(how)
    given = [(x, y, attribute_of(x)) for x, y in data] if how == "third element" else data
    accuracy = evaluate_groups(model, given, groups=groups)
    attribute = {"none": lambda x: 0, "bool": groups}.get(how, attribute_of)
    expected = brute(model, data, attribute)
    assert accuracy.right.dtype == accuracy.samples.dtype == torch.int64
    assert accuracy.samples.shape[0] == 10
    for (label, group), (hit, total) in expected.items():
        assert accuracy.right[label, group] == hit
        assert accuracy.samples[label, group] == total
    assert int(accuracy.samples.sum()) == 200 == sum(total for _, total in expected.values())
    assert [*accuracy.groups] == [*expected]


@pytest.mark.parametrize("classes", [[3], [3, 7]])
def test_accuracy_on_some_classes_and_on_the_rest_is_over_their_samples(model, data, classes):
    accuracy = evaluate_groups(model, data, groups=attribute_of)
    counts = brute(model, data, attribute_of)

    def over(labels):
        own = [pair for (label, _), pair in counts.items() if label in labels]
        return sum(hit for hit, _ in own) / sum(total for _, total in own)

    assert accuracy.groups == {group: hit / total for group, (hit, total) in counts.items()}
    assert accuracy.of(*classes) == over(classes)
    assert accuracy.rest(*classes) == over({*range(10)} - {*classes})


def test_the_first_of_equally_bad_groups_is_the_worst_one(model, data):
    with torch.no_grad():
        model.head.bias[[2, 6]] = -1e6
    accuracy = evaluate_groups(model, data)
    assert accuracy.worst == 0
    assert accuracy.worst_group == (2, 0)


def test_groups_that_appear_later_are_counted(model, data):
    (x, y), *_ = data
    late = [(x, y, torch.zeros(64).long()), (x, y, torch.full((64,), 4))]
    accuracy = evaluate_groups(model, late)
    assert accuracy.samples.shape == (10, 5)
    assert accuracy.samples[:, 0].tolist() == accuracy.samples[:, 4].tolist()
    assert accuracy.right[:, 0].tolist() == accuracy.right[:, 4].tolist()
    assert accuracy.samples[:, 1:4].sum() == 0


def test_data_that_cannot_be_counted_is_refused(model, data):
    x, y = data[0]
    for batches, groups, message in (
        ([(x, y.where(y != 3, -1))], None, "class -1 is out of range"),
        ([(x, y.where(y != 3, 10))], None, "class 10 is out of range"),
        (data, lambda x: attribute_of(x) - 1, r"groups: -1.*numbered from 0"),
        (data, torch.zeros(199).long(), "values"),
        (data, torch.zeros(201).long(), "values"),
        ([(x, y, y % 2), (x, y)], None, "some batches have groups and some have none"),
        ([x], None, "data: has no labels"),
        ([], None, "no samples"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_groups(model, batches, groups=groups)


@pytest.mark.parametrize("classes", [[], [9]])
def test_a_figure_over_no_samples_is_refused(model, data, classes):
    accuracy = evaluate_groups(model, [(x[y != 9], y[y != 9]) for x, y in data])
    with pytest.raises(ValueError, match="no samples"):
        accuracy.of(*classes)


def test_values_that_are_not_finite_are_refused(model, data):
    x, y = data[0]
    with pytest.raises(NonFiniteError, match="batch 0"):
        evaluate_groups(model, [(x / 0, y)])
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="logits"):
        evaluate_groups(model, data)


def test_the_model_is_as_before_and_judged_in_evaluation_mode(norm, batches, unchanged):
    expected = evaluate_groups(norm, batches)
    norm.train()
    check = unchanged(norm)
    accuracy = evaluate_groups(norm, batches)
    check()
    assert torch.equal(accuracy.right, expected.right)
