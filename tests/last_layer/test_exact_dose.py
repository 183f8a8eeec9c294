"""Exact selection against brute force: every dose tried by editing the weight and predicting."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xai_edit.last_layer import exact_dose as exact
from xai_edit.last_layer.exact_dose import (
    accuracy_by_dose,
    best_dose,
    doses_between,
    planned_removal,
    removal_doses,
)
from xai_edit.last_layer.head import HeadFeatures

property_test = settings(max_examples=40, deadline=None, derandomize=True)


@contextmanager
def patched(**constants):
    before = {name: getattr(exact, name) for name in constants}
    vars(exact).update(constants)
    try:
        yield
    finally:
        vars(exact).update(before)


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


def edited_right(head, doses):
    """Which samples are right with weights edited: plain argmax of the edited head."""
    weight = head.weight.double().clone()
    for row, added in doses.items():
        for column, dose in added.items():
            weight[row, column] += dose
    bias = 0 if head.bias is None else head.bias.double()
    return ((head.features.double() @ weight.T + bias).argmax(1) == head.labels).double()


def edited_accuracy(head, row, column, dose, groups):
    """Accuracy of each group with one weight edited."""
    right = edited_right(head, {row: {column: dose}})
    return torch.stack([right[groups == g].mean() for g in groups.unique()])


def by_dose(head, groups, row):
    """Chunks of features: the first, a dose in each interval, the accuracies promised there."""
    arguments = (head.features, head.logits(), head.labels, groups, row)
    for start, flips, accuracy in accuracy_by_dose(*arguments):
        yield start, doses_between(flips), accuracy


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


@given(heads() | heads(ties=True), st.sampled_from([1, exact.CHUNK]))
@property_test
def test_every_dose_gives_exactly_the_accuracies_promised(problem, chunk):
    head, groups, row = problem
    seen = 0
    with patched(CHUNK=chunk):
        parts = [*by_dose(head, groups, row)]
    for start, doses, accuracy in parts:
        assert accuracy.shape == (*doses.shape, int(groups.max()) + 1)
        for at, column in doses.isfinite().nonzero().tolist():
            dose = float(doses[at, column])
            found = edited_accuracy(head, row, start + column, dose, groups)
            assert torch.equal(found, accuracy[at, column])
            seen += 1
    assert seen or not head.features.any()


def worst(accuracy):
    return accuracy.min(-1).values


@given(heads(), st.sampled_from([0.3, 1.5, 50.0]))
@property_test
def test_the_best_worst_group_is_the_brute_force_optimum_within_the_bound(problem, largest):
    head, groups, row = problem
    columns = head.features.any(0).nonzero().flatten().tolist()
    if not columns:
        return
    limit = largest * float(head.weight.abs().max())
    outcomes = {True: [], False: []}  # by whether the weight is within the bound
    for j in columns:
        weight = float(head.weight[row, j])
        ends = [-limit - weight + 1e-9, limit - weight - 1e-9]
        for dose in brute_doses(head, row, j) + ends:
            inside = abs(weight + dose) <= limit
            outcomes[inside].append(float(edited_accuracy(head, row, j, dose, groups).min()))
    with patched(LARGEST=largest):
        found, promised = best_dose(head, row, groups, worst)
    assert abs(float(head.weight[row, found.column]) + found.dose) <= limit
    assert float(promised.min()) == max(outcomes[True])
    assert found.bounded == (max([0.0, *outcomes[False]]) > max(outcomes[True]))
    assert torch.equal(edited_accuracy(head, row, found.column, found.dose, groups), promised)


def jointly(head, doses):
    """Accuracy on the classes that stay and on those removed, all doses applied together."""
    right, gone = edited_right(head, doses), torch.isin(head.labels, torch.tensor([*doses]))
    return float(right[~gone].mean()), float(right[gone].mean())


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
    with patched(LARGEST=1e9):
        doses, bounded = removal_doses(head, [row], tolerance=tolerance)
    retained, removed = jointly(head, doses)
    assert removed == brute
    assert retained >= floor
    assert bounded == []


def three_classes():
    """Classes 0 and 1 each run to the other when one of them is lowered; class 2 is apart.

    One feature a class. With each edit planned alone, class 0 is lowered below class 1 only, and
    class 1 below class 0 only: applied together, one of them wins again.
    """
    x = torch.tensor([[4.0, 3, 1], [4, 3, 1], [3, 4, 1], [3, 4, 1], [0, 0, 4], [0, 0, 4]])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    return HeadFeatures("fc", torch.eye(3).double(), None, x.double(), labels, None)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_classes_that_run_to_each_other_are_removed_together(order):
    head = three_classes()
    alone = {row: removal_doses(head, [row], tolerance=0.0)[0][row] for row in order}
    assert [jointly(head, {row: alone[row]})[1] for row in order] == [0, 0]
    assert jointly(head, alone)[1] > 0  # the edits planned alone bring a class back
    together, _ = removal_doses(head, order, tolerance=0.0)
    assert jointly(head, together) == (1.0, 0.0)


@given(heads(), st.integers(1, 3), st.booleans())
@property_test
def test_figures_of_several_classes_are_those_of_all_edits_together(problem, n_weights, few):
    head, _, _ = problem
    labels = torch.arange(len(head.labels)) % head.classes
    head = replace(head, features=head.features.abs() + 0.01, labels=labels)
    rows = list(range(1, head.classes))[: 1 if few else None]
    doses, reported = planned_removal(head, rows, tolerance=0.0, n_weights=n_weights)
    retained, removed = jointly(head, doses)
    assert reported["planned"] == {"retained": retained, "removed": removed}
    assert retained >= jointly(head, {row: {} for row in rows})[0]
    for row in rows:  # positive features: every class can go, each dose stays within the bound
        assert all(
            abs(float(head.weight[row, column]) + dose) <= 50 * float(head.weight.abs().max())
            for column, dose in doses[row].items()
        )
    if not reported["bounded"]:
        assert removed == 0


def test_the_margin_goes_beyond_the_last_sample_by_a_quantile_of_the_margins():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    x = torch.rand(60, 2, generator=generator, dtype=torch.double) + 0.5
    x[torch.arange(60), labels] += 2
    head = HeadFeatures("fc", torch.eye(2).double(), None, x, labels, None)
    margins = (x[:, 0] - x[:, 1]).abs()
    edge, _ = removal_doses(head, [0], tolerance=0.0)
    ((column, at_edge),) = edge[0].items()
    own = labels == 0
    for quantile in (0.1, 0.5):
        doses, _ = removal_doses(head, [0], tolerance=0.0, quantile=quantile, columns=edge)
        ((same, dose),) = doses[0].items()
        last = (x[own, 0] + dose * x[own, column] - x[own, 1]).max()
        assert same == column
        assert dose < at_edge
        assert last < -torch.quantile(margins, quantile) < 0.9 * last  # just beyond


def test_the_cross_validated_figure_is_that_of_edits_planned_on_the_other_folds():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(45) % 3
    x = torch.rand(45, 4, generator=generator, dtype=torch.double)
    x[torch.arange(45), labels] += 0.6
    weight = torch.rand(3, 4, generator=generator, dtype=torch.double) + torch.eye(3, 4)
    head = HeadFeatures("fc", weight, None, x, labels, None)
    doses, reported = planned_removal(head, [1, 2], tolerance=0.0, n_weights=1)
    best, figures = None, {}
    for quantile in exact.MARGINS:
        right = torch.zeros(45, dtype=torch.bool)
        for held in range(5):
            # Folds of each removed class and of the others, dealt out in turn.
            out = torch.zeros(45, dtype=torch.bool)
            for kind in range(3):
                out[torch.nonzero(labels == kind).flatten()[held::5]] = True
            part = head[~out]
            edge, _ = removal_doses(part, [1, 2], tolerance=0.0)
            planned = removal_doses(part, [1, 2], tolerance=0.0, quantile=quantile, columns=edge)
            edited = exact.edited_logits(head.logits(), head, planned[0])
            right[out] = (edited.argmax(1) == labels)[out]
        gone = labels > 0
        kept, removed = right[~gone].double().mean(), right[gone].double().mean()
        floor = jointly(head, {1: {}, 2: {}})[0]
        figures[quantile] = {"retained": float(kept), "removed": float(removed)}
        score = float(1 - removed if kept >= floor else kept - 1)
        if best is None or score > best[0]:
            best = (score, quantile)
    assert reported["margin"] == best[1]
    assert reported["cross_validated"] == figures[best[1]]
    assert jointly(head, doses)[1] == reported["planned"]["removed"]


def test_a_class_of_one_sample_cannot_be_cross_validated():
    head = three_classes()[torch.tensor([0, 2, 4, 5])]
    _, reported = planned_removal(head, [0], tolerance=0.0, n_weights=1)
    assert reported["cross_validated"] is None
    assert reported["margin"] == 0.0


@given(heads())
@property_test
def test_among_equals_the_smallest_dose_is_taken(problem):
    head, groups, row = problem
    if not head.features.any():
        return
    found, reached = best_dose(head, row, groups, worst)
    for _, doses, accuracy in by_dose(head, groups, row):
        equal = (worst(accuracy) == reached.min()) & doses.isfinite()
        assert not (doses[equal].abs() < abs(found.dose)).any()


def test_a_dead_feature_has_no_dose():
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0]]).double()
    weight = torch.tensor([[1.0, 1.0], [0.0, 3.0]]).double()
    labels = groups = torch.tensor([0, 1])
    ((_, doses, _),) = by_dose(HeadFeatures("h", weight, None, x, labels, None), groups, 0)
    assert doses[:, 0].isnan().all()
    assert doses[:, 1].isfinite().any()
    dead = HeadFeatures("h", weight, None, 0 * x, labels, None)
    with pytest.raises(ValueError, match="class 0: every feature is zero"):
        removal_doses(dead, [0], tolerance=0.0)


@pytest.mark.parametrize(
    ("labels", "rows"), [([0, 0, 0], [0]), ([1, 1, 1], [0]), ([0, 1, 1], [0, 1])]
)
def test_removal_needs_the_class_and_others(labels, rows):
    head = HeadFeatures("h", torch.eye(2), None, torch.rand(3, 2), torch.tensor(labels), None)
    with pytest.raises(ValueError, match=f"class {rows[0]} needs samples"):
        removal_doses(head, rows, tolerance=0.0)
