"""Operators on data that are empty, not finite or read once, and with numbers of other kinds."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from xai_edit import (
    ClassSubspaceRemoval,
    ConceptAwarePruning,
    FictitiousClass,
    LastLayerRetraining,
    LogitMask,
    PathPerturbation,
    RelevancePruning,
    SingleWeight,
    Subspaces,
)
from xai_edit.comparisons import LEACE
from xai_edit.core import NonFiniteError

OPERATORS = {
    "sca": lambda m, d: SingleWeight().plan(m, d, target=3),
    "exact": lambda m, d: SingleWeight("exact").plan(m, d, target=[3, 5]),
    "fictitious": lambda m, d: FictitiousClass().plan(m, d, target=3),
    "fictitious exact": lambda m, d: FictitiousClass("exact").plan(m, d, target=3),
    "path": lambda m, d: PathPerturbation().plan(m, d, target=3),
    "path count": lambda m, d: PathPerturbation(rank="count", k=3, scope="neuron").plan(
        m, d, target=3
    ),
    "pruning": lambda m, d: RelevancePruning(0.3).plan(m, d),
    "concept pruning": lambda m, d: ConceptAwarePruning(
        "conv1", SUBSPACES, [0], 0.3, criterion="ablated"
    ).plan(m, d),
    "mask": lambda m, d: LogitMask().plan(m, d, target=3),
    "last layer": lambda m, d: LastLayerRetraining(repeats=2).plan(m, d),
    "last layer tuned": lambda m, d: LastLayerRetraining(repeats=1, C="auto").plan(m, d),
    "class subspace": lambda m, d: ClassSubspaceRemoval(directions=1).plan(m, d, target=3),
    "class subspace at a layer": lambda m, d: ClassSubspaceRemoval(
        "conv2", "esc", directions=1, vectors="mean"
    ).plan(m, d, target=3),
    "leace": lambda m, d: LEACE().plan(m, d),
}
SUBSPACES = Subspaces(torch.eye(4).double()[:, :2], (1, 1), torch.zeros(4).double())
every_operator = pytest.mark.parametrize("plan", OPERATORS.values(), ids=[*OPERATORS])


@pytest.fixture
def data(digits):
    """Labelled batches with a yes/no third element; every (class, feature) group has samples."""
    images, labels = digits
    has = (images[:, 0, 3, 3] > 0.4).long()
    rows = torch.arange(400)
    return [(images[part], labels[part], has[part]) for part in rows.split(150)]


def content(edit, path):
    edit.save(path)
    return path.read_bytes()


@every_operator
def test_a_loader_that_can_be_read_once_is_enough(plain, data, plan, tmp_path):
    files = [content(plan(plain, one), tmp_path / "edit") for one in (data, iter(data))]
    assert files[0] == files[1]


@every_operator
@pytest.mark.parametrize("empty", [[], [(torch.zeros(0, 1, 8, 8), torch.zeros(0).long())]])
def test_no_samples_or_no_batches_are_a_clear_error(plain, plan, empty, unchanged):
    check = unchanged(plain)
    with pytest.raises(ValueError, match="no samples"):
        plan(plain, empty)
    for other in (None, 3, torch.zeros(3, 1, 8, 8)):
        with pytest.raises(TypeError, match="data: "):
            plan(plain, other)
    check()


@every_operator
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_a_clear_error(plain, data, plan, value, unchanged):
    x, y, has = data[0]
    x = x.clone()
    x[3, 0, 2, 2] = value
    check = unchanged(plain)
    with pytest.raises(NonFiniteError, match="batch 0"):
        plan(plain, [(x, y, has), *data[1:]])
    check()


@every_operator
@pytest.mark.parametrize("name", ["conv1.weight", "head.weight"])
def test_weights_that_are_not_finite_are_a_clear_error(plain, data, plan, name):
    with torch.no_grad():
        plain.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match="model"):
        plan(plain, data)


NUMBERS = {
    "numpy": lambda value: (np.int64 if isinstance(value, int) else np.float32)(value),
    "torch": torch.tensor,
    "fraction": lambda value: value if isinstance(value, int) else Fraction(value),
}
NUMBERED = [
    (SingleWeight, {"rate": 0.5, "n_weights": 2, "tolerance": 0.25}, {"target": 3}),
    (SingleWeight, {"select": "random", "seed": 3}, {"target": 3}),
    (FictitiousClass, {"rate": 0.5}, {"target": 3, "fictitious": 1}),
    (FictitiousClass, {"rate": {3: 0.5}}, {"target": 3, "fictitious": 1}),
    (PathPerturbation, {"share": 0.25, "noise": "gaussian", "scale": 0.5}, {"target": 3}),
    (PathPerturbation, {"share": "auto", "bound": 0.5}, {"target": 3}),
    (LastLayerRetraining, {"repeats": 2, "C": 0.5, "seed": 1}, {}),
]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize(("operator", "arguments", "where"), NUMBERED)
def test_numbers_of_other_libraries_are_plain_ones_in_the_saved_edit(
    plain, data, tmp_path, operator, arguments, where, kind
):
    def odd(value):
        if isinstance(value, dict):
            return {np.int64(row): odd(one) for row, one in value.items()}
        return value if isinstance(value, str) else NUMBERS[kind](value)

    edit = operator(**{name: odd(value) for name, value in arguments.items()}).plan(
        plain, data, **{name: odd(value) for name, value in where.items()}
    )
    expected = content(operator(**arguments).plan(plain, data, **where), tmp_path / "plain")
    assert content(edit, tmp_path / "odd") == expected
