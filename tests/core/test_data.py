"""Batches from what a user has, and one clear error for what is no data."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from xai_edit.core.data import Batch, attribute_of, batches, model_device, peek
from xai_edit.core.errors import NonFiniteError

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
G = torch.tensor([1, 0, 1, 0, 1, 0])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, G, strict=True))


class Pairs(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], int(Y[index]), int(G[index])


WHOLE = {
    "list of tuples": lambda: [(X[:4], Y[:4], G[:4]), (X[4:], Y[4:], G[4:])],
    "list of lists": lambda: [[X[:4], Y[:4], G[:4]], [X[4:], Y[4:], G[4:]]],
    "tuple of tuples": lambda: ((X[:4], Y[:4], G[:4]), (X[4:], Y[4:], G[4:])),
    "generator": lambda: ((X[i : i + 1], Y[i : i + 1], G[i : i + 1]) for i in range(6)),
    "loader": lambda: DataLoader(TensorDataset(X, Y, G), batch_size=4),
    "tensor dataset": lambda: TensorDataset(X, Y, G),
    "dataset": Pairs,
    "iterable dataset": Stream,
    "empty batch between": lambda: [
        (X[:4], Y[:4], G[:4]),
        (X[:0], Y[:0], G[:0]),
        (X[4:], Y[4:], G[4:]),
    ],
    "labels as lists": lambda: [(X, Y.tolist(), G.tolist())],
    "labels as numpy": lambda: [(X, Y.numpy().astype(np.uint8), G.numpy().astype(bool))],
    "whole labels as floats": lambda: [(X, Y.double(), G.float())],
}


@pytest.mark.parametrize("kind", WHOLE)
def test_every_kind_of_data_gives_the_same_samples_in_order(kind):
    read = list(batches(WHOLE[kind]()))
    assert torch.equal(torch.cat([batch.inputs for batch in read]), X)
    for name, expected in (("labels", Y), ("groups", G)):
        values = torch.cat([getattr(batch, name) for batch in read])
        assert torch.equal(values, expected)
        assert values.dtype == torch.int64
    assert all(len(batch) for batch in read)


@pytest.mark.parametrize("raw", [X, (X,), [X], (X, None), (X, None, None)])
def test_labels_and_groups_may_be_missing(raw):
    (batch,) = batches([raw])
    assert torch.equal(batch.inputs, X)
    assert batch.labels is None
    assert batch.groups is None


def test_a_dataset_is_read_64_at_a_time_in_its_order():
    many = torch.arange(130.0)[:, None]
    read = [batch.inputs for batch in batches(TensorDataset(many))]
    assert [len(part) for part in read] == [64, 64, 2]
    assert torch.equal(torch.cat(read), many)


def test_batches_are_cut_from_the_users_graph():
    inputs = X.clone().requires_grad_()
    (batch,) = batches([(inputs * 2, Y)])
    assert not batch.inputs.requires_grad


def test_batches_are_read_lazily():
    def endless():
        while True:
            yield X, Y

    stream = batches(endless())
    assert [len(next(stream)) for _ in range(3)] == [6, 6, 6]


@pytest.mark.parametrize("keep", [torch.tensor([4, 0]), G.bool()])
def test_a_batch_is_cut_in_all_its_parts(keep):
    part = Batch(X, Y, G)[keep]
    assert torch.equal(part.inputs, X[keep])
    assert torch.equal(part.labels, Y[keep])
    assert torch.equal(part.groups, G[keep])
    assert Batch(X)[keep].labels is None


@pytest.mark.parametrize("once", [False, True])
def test_peek_loses_no_sample(once):
    data = [(X[:0], Y[:0]), (X[:4], Y[:4]), (X[4:], Y[4:])]
    data = iter(data) if once else data
    first, whole = peek(data)
    assert torch.equal(first.inputs, X[:4])
    assert torch.equal(torch.cat([batch.inputs for batch in batches(whole)]), X)


EMPTY = TensorDataset(X[:0], Y[:0])


@pytest.mark.parametrize(
    "empty",
    [[], [(X[:0], Y[:0])], iter(()), DataLoader(EMPTY), EMPTY],
    ids=["list", "only an empty batch", "used-up iterator", "loader", "dataset"],
)
@pytest.mark.parametrize("read", [lambda data: list(batches(data)), peek])
def test_no_sample_at_all_is_an_error(empty, read):
    with pytest.raises(ValueError, match="no samples; the loader is empty, or an iterator already"):
        read(empty)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, "a tensor was given; give an iterable of batches"),
        ((X, Y), "one tuple of tensors was given; give an iterable of batches"),
        (3, "int is not iterable; give an iterable of batches"),
        (nn.Linear(2, 2), "Linear is not iterable"),
        ([(X.numpy(), Y)], r"batch 0 is tuple of ['ndarray', 'Tensor']; expected inputs,"),
        ({"x": X, "labels": Y}, "one dict of tensors was given; give an iterable of batches"),
        ([{"x": X.numpy()}], "batch 0 is dict of {'x': 'ndarray'}; expected inputs"),
        ([(X, Y, G, G)], "batch 0 is tuple of ['Tensor', 'Tensor', 'Tensor', 'Tensor']"),
        ([()], "batch 0 is tuple of []"),
        ([1.0, 2.0], "batch 0 is float of ['float']"),
        ([(X, ["cat"] * 6)], "batch 0 has labels that are not numbers"),
    ],
)
@pytest.mark.parametrize("read", [lambda data: list(batches(data)), peek])
def test_data_of_another_kind_is_a_type_error(data, message, read):
    with pytest.raises(TypeError, match=re.escape(message)):
        read(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_batch_number(value):
    bad = X.clone()
    bad[3, 1] = value
    with pytest.raises(NonFiniteError, match="batch 1 has inputs that are NaN or infinite"):
        list(batches([(X, Y), (bad, Y)]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ((X, Y[:5]), "batch 0 has labels of shape (5,) for 6 inputs; expected (6,)"),
        ((X, Y[:5, None]), "labels of shape (5, 1) for 6 inputs; expected (6,)"),
        ((X, nn.functional.one_hot(Y) * 2), "labels of shape (6, 3) that are not 0 and 1"),
        ((X, 3), "labels of shape () for 6 inputs"),
        ((X, Y, G[:2]), "groups of shape (2,) for 6 inputs"),
        ((X, Y + 0.5), "batch 0 has labels that are not whole numbers"),
        ((X, Y, G / 3), "batch 0 has groups that are not whole numbers"),
        ((X, Y * float("nan")), "batch 0 has labels that are not whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(raw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(batches([raw]))


@pytest.mark.parametrize(
    ("model", "device"),
    [
        (nn.Linear(2, 2), "cpu"),
        (nn.Linear(2, 2, device="meta"), "meta"),
        (nn.BatchNorm1d(2, affine=False, device="meta"), "meta"),
        (nn.ReLU(), "cpu"),
    ],
)
def test_the_models_device_is_that_of_its_first_tensor(model, device):
    assert model_device(model) == torch.device(device)


@pytest.mark.parametrize(
    ("attribute", "start", "expected"),
    [
        (lambda inputs: inputs[:, 0] > 3, 0, [0, 0, 1, 1, 1, 1]),
        (lambda inputs: (inputs[:, 0] > 3).tolist(), 0, [0, 0, 1, 1, 1, 1]),
        (torch.arange(10), 3, [3, 4, 5, 6, 7, 8]),
        (None, 0, G.tolist()),
    ],
)
def test_an_attribute_is_a_function_a_vector_or_the_third_element(attribute, start, expected):
    values = attribute_of(attribute, Batch(X, Y, G), start, "marked")
    assert values.tolist() == expected
    assert values.dtype == torch.int64


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (None, "not given, and the data has no third element"),
        (torch.arange(10), "(5,) values for 6 samples; give one value a sample"),
        (lambda inputs: inputs, "(6, 2) values for 6 samples"),
        (lambda inputs: inputs[:, 0] / 5, "values that are not whole numbers"),
        (lambda inputs: inputs[:, 0] * float("nan"), "values that are not whole numbers"),
    ],
)
def test_an_attribute_without_one_value_a_sample_is_an_error(attribute, message):
    with pytest.raises(ValueError, match="^marked: .*" + re.escape(message)):
        attribute_of(attribute, Batch(X, Y), 5, "marked")
