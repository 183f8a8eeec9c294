"""Class removal by one weight: Eq. 7 and 8, the guards, real digits, signed features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xai_edit import SingleWeight
from xai_edit.core import NonFiniteError
from xai_edit.last_layer.head import collect_head_features
from xai_edit.last_layer.single_weight import editable, orthogonal_weight

property_test = settings(max_examples=60, deadline=None, derandomize=True)
numbers = st.floats(-10, 10).filter(lambda w: abs(w) > 1e-3)
rows = st.lists(numbers, min_size=2, max_size=8)


def head_net(activation, digits, seed=0, dtype=torch.double, bias=True):
    """A small network of digits whose head sees ``activation``."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), activation, nn.Linear(16, 10, bias=bias)
    ).double()
    images, labels = digits[0].double(), digits[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.requires_grad_(False).eval().to(dtype), [(images.to(dtype), labels)]


@pytest.fixture(scope="module")
def tanh(digits):
    return head_net(nn.Tanh(), digits)


def same_edit(left, right):
    assert left.changes.keys() == right.changes.keys()
    for name, change in left.changes.items():
        for part in ("index", "old", "new"):
            assert torch.equal(getattr(change, part), getattr(right.changes[name], part))


@given(rows, st.data())
@property_test
def test_eq_7_makes_the_normals_orthogonal(row, data):
    w = torch.tensor(row, dtype=torch.double)
    column = data.draw(st.integers(0, len(w) - 1))
    after = w.clone()
    after[column] = orthogonal_weight(w, column)
    one = torch.ones(1, dtype=torch.double)
    product = torch.cat([w, -one]) @ torch.cat([after, -one])
    scale = torch.cat([w, one]).norm() * torch.cat([after, one]).norm()
    assert abs(float(product / scale)) < 1e-12


def test_only_weights_that_add_to_the_class_and_are_not_tiny_may_be_edited():
    row = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 0.0019, 0.0021, 0.0])
    mean = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0])
    assert editable(row, mean).tolist() == [True, False, False, True, False, False, True, False]


@pytest.mark.parametrize("rate", [1.0, 0.25, 0.001])
@pytest.mark.parametrize("target", [0, 3, 9])
def test_the_edit_is_one_weight_of_the_row_turned_by_eq_8(plain, batches, target, rate):
    edit = SingleWeight(rate=rate).plan(plain, batches, target=target)
    assert [*edit.changes] == ["head.weight"]
    change = edit.changes["head.weight"]
    row, column = divmod(int(change.index), 12)
    assert row == target
    w = plain.head.weight[target].detach().double()
    assert change.old.item() == w[column].item()
    expected = w[column] - rate * (w @ w + 1) / w[column]
    assert change.new.item() == expected.float().item()
    head = collect_head_features(plain, batches)
    assert w[column] * head.features[head.labels == target].mean(0)[column] > 0
    reported = edit.origin["rows"][0]
    assert (reported["class"], reported["column"], reported["anchored"]) == (target, column, False)


def test_several_classes_at_once_equal_one_after_another(plain, batches):
    operator = SingleWeight()
    at_once = operator.plan(plain, batches, target=[7, 1, 4])
    parts = [operator.plan(plain, batches, target=target) for target in (7, 1, 4)]
    same_edit(at_once, parts[0] | parts[1] | parts[2])
    assert [row["class"] for row in at_once.origin["rows"]] == [7, 1, 4]
    alone = operator.plan(plain, batches, target=7)
    with alone.applied(plain):
        parts[1].check(plain)
        same_edit(parts[1], operator.plan(plain, batches, target=1))


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_where_features_are_positive_no_other_class_loses_a_sample(plain, digits, select):
    before = collect_head_features(plain, [digits])
    edit = SingleWeight(select).plan(plain, before[torch.arange(900)], target=[0, 3, 6, 8])
    assert edit.size == 4
    old, new = before.logits(), before.edited(edit).logits()
    assert (new <= old).all()
    stays = ~torch.isin(before.labels, torch.tensor([0, 3, 6, 8]))
    right = (old.argmax(1) == before.labels) & stays
    assert (new.argmax(1) == before.labels)[right].all()


def test_auto_anchors_only_where_the_feature_is_negative_somewhere(plain, batches, tanh):
    assert [*SingleWeight().plan(plain, batches, target=3).changes] == ["head.weight"]
    model, data = tanh
    edit = SingleWeight().plan(model, data, target=3)
    assert {*edit.changes} == {"3.weight", "3.bias"}
    assert edit.origin["rows"][0]["anchored"] is True
    plainly = SingleWeight(anchor=False).plan(model, data, target=3)
    assert [*plainly.changes] == ["3.weight"]


def test_an_anchor_needs_a_bias(digits):
    model, data = head_net(nn.Tanh(), digits, bias=False)
    with pytest.raises(ValueError, match="no bias"):
        SingleWeight().plan(model, data, target=3)
    assert SingleWeight(anchor=False).plan(model, data, target=3).size == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_edited_in_its_own_dtype(digits, dtype):
    model, data = head_net(nn.ReLU(), digits, dtype=dtype)
    edit = SingleWeight(anchor=False).plan(model, data, target=3)
    (row,) = edit.origin["rows"]
    new = orthogonal_weight(model[3].weight[3], row["column"]).to(dtype)
    assert torch.equal(edit.changes["3.weight"].new, new[None])


def test_a_value_that_half_precision_cannot_hold_is_a_clear_error():
    model = nn.Sequential(nn.Linear(2, 2)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[200.0, 0.0], [0.5, 250.0]]))
        model[0].bias.zero_()
    data = [(torch.tensor([[0.01, 0.0], [1.0, 0.0]]).half(), torch.tensor([0, 1]))]
    with pytest.raises(NonFiniteError, match=r"'0.weight'.*float16.*smaller rate"):
        SingleWeight().plan(model, data, target=1)
    assert SingleWeight(rate=0.01).plan(model, data, target=1).size == 1


def test_a_row_without_an_editable_weight_is_refused(plain, batches):
    with torch.no_grad():
        plain.head.weight[3] = -plain.head.weight[3].abs()
    with pytest.raises(ValueError, match="class 3: no weight"):
        SingleWeight().plan(plain, batches, target=3)


def test_a_head_of_zeros_has_no_largest_weight_to_compare_with(batches):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    edit = SingleWeight("exact").plan(model, batches, target=3)
    (row,) = edit.origin["rows"]
    assert row["old"] == 0
    assert row["weight"] != 0
    assert row["times_largest"] is None
