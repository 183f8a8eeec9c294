"""Exact selection against brute force: every dose tried by editing the weight and predicting."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xai_edit import SingleWeight, evaluate_groups
from xai_edit.edits import exact
from xai_edit.edits.exact import accuracy_by_dose, best_dose, removal_doses
from xai_edit.edits.head import HeadFeatures

property_test = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def heads(draw, ties=False, groups=3):
    """A small random head, its features (some zero, some negative), labels and groups."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    samples, d, classes = draw(st.integers(4, 12)), draw(st.integers(1, 4)), draw(st.integers(2, 4))

    def numbers(*shape):
        if ties:  # few different whole numbers: equal logits and equal flips
            return torch.randint(-2, 3, shape, generator=generator).double()
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    x = numbers(samples, d)
    if draw(st.booleans()):
        x = x.clamp(min=0)
    x[torch.rand(samples, d, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0
    labels = torch.randint(0, classes, (samples,), generator=generator)
    labels[:2] = torch.tensor([0, 1])
    member = torch.randint(0, groups, (samples,), generator=generator)
    member = member.unique(return_inverse=True)[1]
    bias = None if ties and draw(st.booleans()) else numbers(classes)
    head = HeadFeatures("head", numbers(classes, d), bias, x, labels, None)
    return head, member, draw(st.integers(0, classes - 1))


def edited_accuracy(head, row, column, dose, groups):
    """Accuracy of each group with the weight edited: plain argmax of the edited head."""
    weight = head.weight.double().clone()
    weight[row, column] += dose
    logits = head.features.double() @ weight.T
    if head.bias is not None:
        logits = logits + head.bias.double()
    right = (logits.argmax(1) == head.labels).double()
    return torch.stack([right[groups == g].mean() for g in groups.unique()])


def brute_doses(head, row, column):
    """A dose between any two neighbouring doses at which some sample ties with some class."""
    logits = head.logits()
    x = head.features[:, column].double()
    at = []
    for s in range(len(x)):
        if x[s] != 0:
            at += [float((z - logits[s, row]) / x[s]) for z in logits[s].tolist()]
    at = sorted(set(at))
    middles = [(low + high) / 2 for low, high in pairwise(at) if high - low > 1e-9]
    return [at[0] - 1, *middles, at[-1] + 1] if at else [0.0]


@given(heads())
@property_test
def test_every_dose_gives_exactly_the_accuracies_promised(problem):
    head, groups, row = problem
    seen = 0
    for start, doses, accuracy in accuracy_by_dose(
        head.features, head.logits(), head.labels, groups, row
    ):
        assert accuracy.shape == (*doses.shape, int(groups.max()) + 1)
        for at, column in doses.isfinite().nonzero().tolist():
            dose = float(doses[at, column])
            found = edited_accuracy(head, row, start + column, dose, groups)
            assert torch.equal(found, accuracy[at, column])
            seen += 1
    assert seen or not head.features.any()


@given(heads(ties=True))
@property_test
def test_doses_are_exact_where_logits_tie_or_flips_coincide(problem):
    head, groups, row = problem
    for start, doses, accuracy in accuracy_by_dose(
        head.features, head.logits(), head.labels, groups, row
    ):
        for at, column in doses.isfinite().nonzero().tolist():
            dose = float(doses[at, column])
            found = edited_accuracy(head, row, start + column, dose, groups)
            assert torch.equal(found, accuracy[at, column])


@given(heads())
@property_test
def test_the_doses_reach_every_outcome_that_any_dose_reaches(problem):
    head, groups, row = problem
    for start, doses, accuracy in accuracy_by_dose(
        head.features, head.logits(), head.labels, groups, row
    ):
        for column in range(doses.shape[1]):
            if not head.features[:, start + column].any():
                continue
            given_ = {
                tuple(a.tolist())
                for a, dose in zip(accuracy[:, column], doses[:, column], strict=True)
                if dose.isfinite()
            }
            brute = {
                tuple(edited_accuracy(head, row, start + column, dose, groups).tolist())
                for dose in brute_doses(head, row, start + column)
            }
            assert given_ == brute


@given(heads())
@property_test
def test_the_best_worst_group_is_the_brute_force_optimum(problem):
    head, groups, row = problem
    columns = head.features.any(0).nonzero().flatten().tolist()
    if not columns:
        return
    column, dose, accuracy = best_dose(head, row, groups, lambda a: a.min(-1).values)
    brute = max(
        float(edited_accuracy(head, row, j, dose, groups).min())
        for j in columns
        for dose in brute_doses(head, row, j)
    )
    assert float(accuracy.min()) == brute
    assert torch.equal(edited_accuracy(head, row, column, dose, groups), accuracy)


@given(heads(), st.sampled_from([0.0, 0.1, 0.5]))
@property_test
def test_the_removal_dose_is_the_brute_force_optimum(problem, tolerance):
    head, _, row = problem
    own = (head.labels == row).long()
    columns = head.features.any(0).nonzero().flatten().tolist()
    if not 0 < int(own.sum()) < len(own) or not columns:
        return
    floor = float(edited_accuracy(head, row, 0, 0.0, own)[0]) - tolerance
    outcomes = [
        tuple(edited_accuracy(head, row, j, dose, own).tolist())
        for j in columns
        for dose in brute_doses(head, row, j)
    ]
    brute = min(removed for retained, removed in outcomes if retained >= floor)
    doses, found = removal_doses(head, row, tolerance=tolerance)
    ((column, dose),) = doses.items()
    assert found["removed"] == brute
    assert found["retained"] >= floor
    assert edited_accuracy(head, row, column, dose, own).tolist() == [
        found["retained"],
        found["removed"],
    ]


@given(heads())
@property_test
def test_among_equals_the_smallest_dose_is_taken(problem):
    head, groups, row = problem
    if not head.features.any():
        return
    _, dose, best = best_dose(head, row, groups, lambda a: a.min(-1).values)
    for _, doses, accuracy in accuracy_by_dose(
        head.features, head.logits(), head.labels, groups, row
    ):
        equal = (accuracy.min(-1).values == best.min()) & doses.isfinite()
        assert not (doses[equal].abs() < abs(dose)).any()


@given(heads())
@property_test
def test_chunks_do_not_matter(problem):
    head, groups, row = problem
    if not head.features.any():
        return
    whole = best_dose(head, row, groups, lambda a: a.min(-1).values)
    before, exact.CHUNK = exact.CHUNK, 1
    try:
        parts = best_dose(head, row, groups, lambda a: a.min(-1).values)
    finally:
        exact.CHUNK = before
    assert whole[:2] == parts[:2]
    assert torch.equal(whole[2], parts[2])


def test_a_dead_feature_has_no_dose():
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0]]).double()
    logits = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()
    labels = groups = torch.tensor([0, 1])
    ((_, doses, _),) = accuracy_by_dose(x, logits, labels, groups, 0)
    assert doses[:, 0].isnan().all()
    assert doses[:, 1].isfinite().all()


def test_only_dead_features_are_a_clear_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    data = [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(ValueError, match="class 0"):
        SingleWeight("exact").plan(model, data, target=0)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_removal_needs_the_class_and_others(labels):
    head = HeadFeatures("h", torch.eye(2), None, torch.rand(3, 2), torch.tensor(labels), None)
    with pytest.raises(ValueError, match="class 0"):
        removal_doses(head, 0, tolerance=0.0)


def test_the_planned_edit_keeps_its_promise_on_the_planning_data(plain, batches):
    model = plain.double()
    data = [(x.double(), y) for x, y in batches]
    before = evaluate_groups(model, data)
    for target in range(10):
        edit = SingleWeight("exact", tolerance=0.01).plan(model, data, target=target)
        (row,) = edit.origin["rows"]
        with edit.applied(model):
            after = evaluate_groups(model, data)
        others = [c for c in range(10) if c != target]
        assert row["removed"] == int(after.right[target]) / int(after.samples[target])
        assert row["retained"] == int(after.right[others].sum()) / int(after.samples[others].sum())
        assert after.rest(target) >= before.rest(target) - 0.01


def test_the_planned_edit_keeps_its_promise_where_features_are_signed(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    images, labels = digits[0].double(), digits[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    edit = SingleWeight("exact").plan(model, [(images, labels)], target=3)
    (row,) = edit.origin["rows"]
    with edit.applied(model):
        after = evaluate_groups(model, [(images, labels)])
    others = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert row["removed"] == int(after.right[3]) / int(after.samples[3])
    assert row["retained"] == int(after.right[others].sum()) / int(after.samples[others].sum())
