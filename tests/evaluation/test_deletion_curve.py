"""Deletion curves against networks whose weights are set to zero by hand."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, auc

import xai_edit as xe
from xai_edit.evaluation.deletion_curve import deletion_curve

SHARES = (0, 0.2, 0.5, 1)


def scores_of(model, layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name in layers:
        width = len(xe.score_units(model, None, xe.Random(), layers=name)[name])
        scores[name] = torch.randn(width, generator=generator, dtype=torch.float64)
    return xe.UnitScores(scores, 1)


def zeroed(model, layer, units):
    """A copy with some units off, one parameter after the other."""
    edited = copy.deepcopy(model)
    module = edited.get_submodule(layer.removesuffix(":input"))
    for unit in units:
        if layer.endswith(":input"):
            module.weight.data[:, unit] = 0
            continue
        module.weight.data[unit] = 0
        if module.bias is not None:
            module.bias.data[unit] = 0
        if layer in ("body.0", "body.3"):
            norm = edited.body[int(layer[-1]) + 1]
            norm.weight.data[unit] = norm.bias.data[unit] = 0
    return edited


def by_hand(model, data, target):
    """Accuracy, mean logit, mean probability of the target's samples; accuracy of the rest."""
    logits = torch.cat([model(x) for x, _ in data]).detach().double().numpy()
    labels = torch.cat([y for _, y in data]).numpy()
    mine = np.full(len(labels), True) if target is None else labels == target
    own = logits[mine, labels[mine]]
    powers = np.exp(logits[mine])
    rest = accuracy_score(labels[~mine], logits[~mine].argmax(1)) if (~mine).any() else None
    return (
        accuracy_score(labels[mine], logits[mine].argmax(1)),
        own.mean(),
        (powers[range(len(own)), labels[mine]] / powers.sum(1)).mean(),
        rest,
    )


def agrees(curve, point, expected):
    found = (curve.accuracy, curve.logit, curve.probability, curve.rest)
    for figures, number in zip(found, expected, strict=True):
        if number is None:
            assert figures is None
        else:
            assert figures[point] == pytest.approx(number, rel=1e-5, abs=1e-6)


PLAIN = [("plain", layer) for layer in ("conv2", "fc1", "head:input", "fc1:input")]
NORM = [("norm", layer) for layer in ("body.0", "body.3", "fc:input")]  # a batch norm behind it


@pytest.mark.parametrize(("order", "target"), [("most", 3), ("most", None), ("least", 3)])
@pytest.mark.parametrize(("name", "layer"), PLAIN + NORM)
def test_each_point_is_the_network_with_weights_zeroed_by_hand(
    request, batches, name, layer, target, order, unchanged
):
    model = request.getfixturevalue(name)
    check = unchanged(model)
    scores = scores_of(model, [layer])
    curve = deletion_curve(model, batches, scores, target=target, shares=SHARES, order=order)
    ranked = np.argsort(scores[layer].numpy() * (1 if order == "least" else -1))
    for point, share in enumerate(SHARES):
        off = ranked[: round(len(ranked) * share)]
        assert curve.units[point] == len(off)
        agrees(curve, point, by_hand(zeroed(model, layer, off), batches, target))
    assert curve.shares == SHARES
    assert (curve.layers, curve.target, curve.order) == ((layer,), target, order)
    check()


@pytest.mark.parametrize("layers", [["conv1", "conv2", "fc1"], ["fc1", "fc1:input", "head:input"]])
def test_of_several_layers_each_loses_a_share(plain, batches, layers):
    """Also where one weight leads from one of the layers to another."""
    scores = scores_of(plain, [*layers, "head"])
    curve = deletion_curve(plain, batches, scores, shares=(0, 0.5))
    assert curve.layers == tuple(layers)  # all but the output
    edited, units = plain, 0
    for name in layers:
        off = scores.top(name, share=0.5).tolist()
        edited, units = zeroed(edited, name, off), units + len(off)
    assert curve.units == (0, units)
    agrees(curve, 1, by_hand(edited, batches, None))


def test_the_area_is_that_of_scikit_learn(plain, batches):
    shares = (0.1, 0.15, 0.4, 0.9)
    own = [(x[y == 1], y[y == 1]) for x, y in batches]
    curve = deletion_curve(plain, own, scores_of(plain, ["conv1"]), target=1, shares=shares)
    assert curve.units == (1, 1, 2, 4)  # of four, at least one
    assert curve.rest is None
    assert curve.area == pytest.approx(auc(shares, curve.accuracy) / 0.8)
    flat = dataclasses.replace(curve, accuracy=(0.3,) * 4)
    assert flat.area == pytest.approx(0.3)
    told = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert told["area"] == curve.area
    assert told["accuracy"] == [*curve.accuracy]


def test_a_loader_a_dataset_and_an_iterator_are_read_once(plain, batches):
    scores = scores_of(plain, ["fc1"])
    data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
    read = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            read.append(index)
            return data[index]

    expected = deletion_curve(plain, batches, scores, shares=SHARES)
    shuffled = torch.utils.data.DataLoader(data, batch_size=70, shuffle=True)
    for given in (Counted(), shuffled, iter(batches)):
        curve = deletion_curve(plain, given, scores, shares=SHARES)
        assert curve.accuracy == pytest.approx(expected.accuracy)
        assert curve.logit == pytest.approx(expected.logit, rel=1e-5)
    assert read == [*range(len(data))]


def test_bad_data_is_refused(plain, norm, batches, unchanged):
    check = unchanged(plain)
    scores = scores_of(plain, ["fc1"])
    short = xe.UnitScores({"fc1": torch.zeros(11)}, 1)
    for data, given, error, message in (
        ([x for x, _ in batches], scores, ValueError, "no labels"),
        ([(x[y != 4], y[y != 4]) for x, y in batches], scores, ValueError, "no samples of class 4"),
        ([], scores, ValueError, "no samples"),
        (batches, short, ValueError, "11 for the 12 units of layer 'fc1'"),
        (batches, scores_of(norm, ["body.0"]), ValueError, r"body\.0.*not found"),
    ):
        with pytest.raises(error, match=message):
            deletion_curve(plain, data, given, target=4)
    check()
