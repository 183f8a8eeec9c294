"""Removal of a class's subspace, against NumPy's SVD, its defining properties and plain loops."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from xai_edit import (
    ClassSubspaceRemoval,
    ModelEdit,
    collect_head_features,
    evaluate_groups,
    with_identity,
)
from xai_edit.concepts.collect import values_at

TARGET = 3


def vectors(model, layer, x):
    """The vectors of a layer at all positions, (samples, positions, channels), in NumPy."""
    values = values_at(model, layer, x).double()
    return values.flatten(2).movedim(1, 2).numpy() if values.ndim == 4 else values[:, None].numpy()


def joined(batches):
    return (torch.cat(part) for part in zip(*batches, strict=True))


def bits(model, x):
    return model(x).detach().numpy().tobytes()


@pytest.mark.parametrize("layer", ["conv1", "relu2", "pool2", "fc1", "relu3"])
def test_an_identity_changes_no_bit_and_holds_an_edit_that_can_be_undone(
    plain, batches, layer, tmp_path
):
    x, _ = joined(batches)
    place = with_identity(plain, layer, x)
    assert bits(place, x) == bits(plain, x)
    edit = ClassSubspaceRemoval(layer, "esc", directions=2).plan(place, batches, target=TARGET)
    assert edit.origin["kept"] == "a layer"
    edit.save(tmp_path / "edit.safetensors")
    ModelEdit.load(tmp_path / "edit.safetensors").apply(place)
    assert bits(place, x) != bits(plain, x)
    with pytest.raises(ValueError, match=f"'{layer}' holds a removal already; undo it"):
        ClassSubspaceRemoval(layer, "esc", directions=1).plan(place, batches, target=1)
    assert bits(edit.undo(place), x) == bits(plain, x)


@pytest.mark.parametrize("kind", ["positions", "mean"])
@pytest.mark.parametrize("layer", ["relu1", "conv2", "fc1"])
def test_esc_projects_the_leading_directions_of_numpys_svd_out(plain, batches, layer, kind):
    model, data = plain.double(), [(x.double(), y) for x, y in batches]
    x, y = joined(data)
    before = vectors(model, layer, x)
    own = before[(y == TARGET).numpy()]
    own = own.reshape(-1, own.shape[-1]) if kind == "positions" else own.mean(1)
    U = np.linalg.svd(own, full_matrices=False)[2][:2].T
    place = with_identity(model, layer, x)
    operator = ClassSubspaceRemoval(layer, "esc", directions=2, vectors=kind)
    with operator.plan(place, data, target=TARGET).applied(place):
        after = vectors(place, layer, x)
    assert np.allclose(after, before - before @ U @ U.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("target", [3, (3, 7)])
@pytest.mark.parametrize("layer", ["pool1", "relu3"])
def test_leace_leaves_no_covariance_with_the_class(plain, batches, layer, target):
    model, data = plain.double(), [(x.double(), y) for x, y in batches]
    x, y = joined(data)
    place = with_identity(model, layer, x)
    operator = ClassSubspaceRemoval(layer, directions=np.size(target))
    with operator.plan(place, data, target=target).applied(place):
        after = vectors(place, layer, x)
    before = vectors(model, layer, x)
    for one in np.atleast_1d(target):
        has = np.repeat((y == one).numpy(), before.shape[1])
        before_and_after = (v.reshape(-1, v.shape[-1]) for v in (before, after))
        told = [np.abs(np.cov(v.T, has)[-1, :-1]).max() for v in before_and_after]
        assert told[0] > 1e-3
        assert told[1] < 1e-10
    assert np.allclose(after.mean((0, 1)), before.mean((0, 1)))
    difference = (after - before).reshape(-1, after.shape[-1])
    assert np.linalg.matrix_rank(difference, tol=1e-8) == np.size(target)


@pytest.mark.parametrize("method", ["esc", "leace"])
@pytest.mark.parametrize(
    ("network", "layer", "changed"),
    [
        ("plain", "conv2", {"conv2.weight", "conv2.bias"}),  # its own weights, whatever follows
        ("plain", "fc1", {"fc1.weight", "fc1.bias"}),
        ("plain", "relu3", {"head.weight", "head.bias"}),
        ("norm", "body.5", {"fc.weight", "fc.bias"}),  # an average over positions is between
        ("norm", "pool", {"fc.weight", "fc.bias"}),
    ],
)
def test_folded_into_weights_it_gives_the_logits_of_the_layer(
    request, batches, network, layer, changed, method
):
    model = request.getfixturevalue(network).double()
    data = [(x.double(), y) for x, y in batches]
    x, _ = joined(data)
    place = with_identity(model, layer, x)
    operator = ClassSubspaceRemoval(layer, method, directions=1)
    folded, kept = (operator.plan(one, data, target=TARGET) for one in (model, place))
    assert {*folded.changes} <= changed
    with folded.applied(model), kept.applied(place):
        assert torch.allclose(model(x), place(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", ["fc1", "relu3"])
def test_in_half_precision_it_is_folded_as_in_float32(plain, batches, layer, dtype):
    operator = ClassSubspaceRemoval(layer, directions=1)
    expected = operator.plan(plain, batches, target=TARGET)
    half = copy.deepcopy(plain).to(dtype)
    edit = operator.plan(half, [(x.to(dtype), y) for x, y in batches], target=TARGET)
    edited = edit.apply(copy.deepcopy(half))
    for name, change in expected.changes.items():
        old, new = (one.get_parameter(name).flatten()[change.index] for one in (half, edited))
        moved, found = change.new - change.old, (new.double() - old.double()).float()
        assert (found - moved).norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("bias", [0.0, -1e4])
def test_a_masked_class_does_not_hide_that_a_fold_is_not_exact(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[3].bias[2] = bias  # as of LogitMask
    data = [(torch.randn(60, 6), torch.arange(60) % 3)]
    operator = ClassSubspaceRemoval("1", "esc", directions=1)
    with pytest.raises(ValueError, match="'1' cannot be folded into '3' exactly"):
        operator.plan(model, data, target=0)  # ReLU is between


def test_an_identity_takes_what_the_model_takes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
            self.attention = nn.MultiheadAttention(4, 1)

        def forward(self, x=None, y=None):
            return self.fc(self.a(x) * y + self.attention(x, x, x)[0])

    x, y = torch.randn(2, 6, 4)
    model = Two().eval()
    for given in ((x, y), {"x": x, "y": y}):
        assert torch.equal(with_identity(model, "a", given)(x, y), model(x, y))
    with pytest.raises(ValueError, match=r"'attention\.out_proj' takes no part"):
        with_identity(model, "attention.out_proj", (x, y))


def test_a_layer_that_is_called_by_another_reference_is_refused(plain, batches):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = plain
            self.stages = [plain]  # no ModuleList

        def forward(self, x):
            return self.stages[0](x)

    with pytest.raises(ValueError, match="'network' given, which the model calls by another"):
        with_identity(Listed(), "network", batches[0][0])


def test_no_more_directions_are_taken_than_the_class_has(plain, batches):
    x, y = joined(batches)
    kept = (y != TARGET) | ((y == TARGET).cumsum(0) <= 3)  # three samples of the class
    data = [(x[kept], y[kept])]
    operator = ClassSubspaceRemoval("fc1", "esc", directions=4, vectors="mean")
    with pytest.raises(ValueError, match="directions: 4 given; it is a whole number from 1 to 3"):
        operator.plan(plain, data, target=TARGET)


def test_at_the_inputs_of_the_last_layer_the_fold_is_that_of_the_layer_before(plain, batches):
    named = ClassSubspaceRemoval("relu3", "esc", directions=2).plan(plain, batches, target=TARGET)
    for data in (batches, collect_head_features(plain, batches)):
        edit = ClassSubspaceRemoval(None, "esc", directions=2).plan(plain, data, target=TARGET)
        for name, change in named.changes.items():
            assert torch.allclose(edit.changes[name].new, change.new, atol=1e-5)


@pytest.mark.parametrize("layer", ["relu3", None, "pool1"])
def test_auto_takes_the_first_number_that_is_silent_at_no_cost(plain, digits, batches, layer):
    x, _ = joined(batches)
    held = [(digits[0][1000:], digits[1][1000:])]
    model = plain if layer is None else with_identity(plain, layer, x)
    swept = ClassSubspaceRemoval(layer, "esc").sweep(model, batches, target=TARGET, validation=held)
    for row in swept[1:]:
        operator = ClassSubspaceRemoval(layer, "esc", directions=row["directions"])
        with operator.plan(model, batches, target=TARGET).applied(model):
            accuracy = evaluate_groups(model, held)
        assert row["A_t"] == pytest.approx(accuracy.of(TARGET))
        assert row["A_g"] == pytest.approx(accuracy.rest(TARGET))
    assert [row["directions"] for row in swept] == [*range(len(swept))]
    assert all(row["A_t"] > 0.02 for row in swept[:-1])
    given = {"target": TARGET, "validation": held}
    n = (held[0][1] != TARGET).sum().item()
    p, z = swept[0]["A_g"], 1.959964
    low = (p + z * z / 2 / n - z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5) / (1 + z * z / n)
    if swept[-1]["A_t"] <= 0.02 and all(row["A_g"] >= low for row in swept[1:]):
        edit = ClassSubspaceRemoval(layer, "esc").plan(model, batches, **given)
        assert edit.origin["tried"] == swept
        assert edit.origin["directions"] == swept[-1]["directions"]
    else:
        with pytest.raises(
            ValueError, match=r"does not bring A_t to 0\.02 at no cost to the others"
        ):
            ClassSubspaceRemoval(layer, "esc").plan(model, batches, **given)


class Toy(nn.Module):
    """Logits that are the inputs, so that what a direction does is known."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(4, 4)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(4))
            self.head.bias.copy_(torch.tensor([0.0, 0, 0, 0.6]))

    def forward(self, x):
        return self.head(self.body(x))


def test_auto_in_a_closed_form():
    """One direction silences class 0 of unit vectors and leaves the others what they are."""
    x, y = torch.eye(4).repeat(20, 1), torch.arange(4).repeat(20)
    edit = ClassSubspaceRemoval(None, "esc").plan(Toy().eval(), [(x, y)], target=0)
    assert edit.origin["directions"] == 1
    assert edit.origin["tried"][1:] == [{"directions": 1, "A_t": 0.0, "A_g": 1.0, "rest": 60}]
    assert edit.changes["head.weight"].position(0) == [0, 0]
    assert edit.size == 1
    mixed = x.clone()
    mixed[y == 0] = torch.tensor([1.0, 0.9, 0, 0])  # the direction takes class 1 along
    with pytest.raises(ValueError, match=r"with 1 A_t is 0.000 and A_g 0\.\d+, 1.000 before"):
        ClassSubspaceRemoval(None, "esc").plan(Toy().eval(), [(mixed, y)], target=0)
