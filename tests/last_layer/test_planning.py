"""What every operator keeps: the model as it came, the same file each time, clear errors."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from xai_edit import (
    ConceptAwarePruning,
    FictitiousClass,
    LastLayerRetraining,
    LogitMask,
    ModelEdit,
    PathPerturbation,
    RelevancePruning,
    SingleWeight,
    Subspaces,
)
from xai_edit.comparisons import LEACE, SelectiveSynapticDampening
from xai_edit.core import NonFiniteError

OPERATORS = {
    "sca": lambda m, d: SingleWeight().plan(m, d, target=3),
    "exact": lambda m, d: SingleWeight("exact").plan(m, d, target=[3, 5]),
    "fictitious": lambda m, d: FictitiousClass().plan(m, d, target=3),
    "fictitious exact": lambda m, d: FictitiousClass("exact").plan(m, d, target=3),
    "path": lambda m, d: PathPerturbation().plan(m, d, target=3),
    "path count": lambda m, d: PathPerturbation(rank="count", k=3, scope="class_row").plan(
        m, d, target=3
    ),
    "pruning": lambda m, d: RelevancePruning(0.3).plan(m, d),
    "concept pruning": lambda m, d: ConceptAwarePruning("conv1", SUBSPACES, [0], 0.3).plan(m, d),
    "mask": lambda m, d: LogitMask().plan(m, d, target=3),
    "last layer": lambda m, d: LastLayerRetraining(repeats=2).plan(m, d),
    "last layer tuned": lambda m, d: LastLayerRetraining(repeats=1, C="auto").plan(m, d),
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
def test_planning_keeps_training_mode_hooks_gradients_and_frozen_parameters(
    plain, data, plan, unchanged, tmp_path
):
    expected = content(plan(plain, data), tmp_path / "expected")
    calls = []
    plain.train()
    plain.conv2.weight.requires_grad_(False)
    plain.head.requires_grad_(False)
    plain.conv1.register_forward_hook(lambda *_: calls.append(1))
    plain.fc1.register_full_backward_hook(lambda *_: None)
    plain.fc1.weight.grad = torch.ones_like(plain.fc1.weight)
    check = unchanged(plain)
    edit = plan(plain, data)
    check()
    assert calls
    assert plain.fc1.weight.grad.eq(1).all()
    assert content(edit, tmp_path / "edit") == expected


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "mask"])  # reads all
def test_an_iterator_that_raises_half_way_leaves_the_model_untouched(plain, data, name, unchanged):
    def loader():
        yield data[0]
        yield data[1]
        raise OSError("disk gone")

    plain.train()
    check = unchanged(plain)
    with pytest.raises(OSError, match="disk gone"):
        OPERATORS[name](plain, loader())
    check()


@every_operator
def test_planning_twice_gives_the_same_file_and_uses_no_global_generator(
    plain, data, plan, tmp_path
):
    files = []
    for at in range(2):
        torch.manual_seed(at)
        before = torch.get_rng_state(), random.getstate()
        samples = iter(data) if at else data  # a loader that can be read once is enough
        files.append(content(plan(plain, samples), tmp_path / str(at)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
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


@every_operator
def test_the_edit_survives_a_file(plain, data, plan, tmp_path, unchanged):
    edit = plan(plain, data)
    edit.save(tmp_path / "edit")
    loaded = ModelEdit.load(tmp_path / "edit")
    assert loaded.origin == edit.origin
    check = unchanged(plain)
    with edit.applied(plain):
        pass
    check()
    edit.apply(plain)
    loaded.undo(plain)
    check()


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


NAN = float("nan")
WRONG = {
    SingleWeight: [
        *(("select", "SCA"), ("anchor", "yes"), ("seed", 2.0), ("n_weights", 0)),
        *(("n_weights", True), ("tolerance", "a"), ("tolerance", 2), ("rate", 1.5), ("rate", NAN)),
    ],
    FictitiousClass: [
        *(("select", "best"), ("rate", "least"), ("rate", {0: 50}), ("aim", "fairness")),
        ("tolerance", -0.1),
    ],
    PathPerturbation: [
        *(("share", share) for share in (0, 1.2, NAN, "0.2", None)),
        *(("rank", "most"), ("k", 3), ("scope", "all"), ("bound", 1.0), ("bound", NAN)),
        *(("noise", "uniform"), ("scale", 0)),
    ],
    LastLayerRetraining: [
        *(("repeats", 0), ("repeats", 2.5), ("C", 0.0), ("C", None), ("C", "tuned"), ("seed", 1.5)),
    ],
    SelectiveSynapticDampening: [("alpha", 0), ("lambda_", -1), ("chunk_size", 0)],
}


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [(operator, *pair) for operator, pairs in WRONG.items() for pair in pairs],
)
def test_an_argument_out_of_range_is_refused_by_name(operator, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: .* given"):
        operator(**{name: value})
