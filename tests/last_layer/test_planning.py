"""What every operator keeps: the model as it came, the same file each time, clear errors."""

import random

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
from xai_edit.comparisons import LEACE
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
reads_all = pytest.mark.parametrize(
    "plan",
    [p for n, p in OPERATORS.items() if n != "mask"],
    ids=[n for n in OPERATORS if n != "mask"],
)


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


@reads_all
def test_an_iterator_that_raises_half_way_leaves_the_model_untouched(plain, data, plan, unchanged):
    def loader():
        yield data[0]
        yield data[1]
        raise OSError("disk gone")

    plain.train()
    check = unchanged(plain)
    with pytest.raises(OSError, match="disk gone"):
        plan(plain, loader())
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
