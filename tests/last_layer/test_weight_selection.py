"""The other selections, doses, several weights, cached features: against brute force."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xai_edit import FictitiousClass, SingleWeight, Subspaces, evaluate_head
from xai_edit.last_layer import edge_scores
from xai_edit.last_layer import exact_dose as exact
from xai_edit.last_layer.affected_classes import concept_strength, split_point
from xai_edit.last_layer.exact_dose import removal_doses
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.last_layer.weight_selection import selection_scores

SELECTIONS = ("sca", "ca", "gradient-activation", "relevance", "weight", "random", "exact")


def head_of(seed=0, samples=80, classes=4, width=9):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.double)
    bias = torch.randn(classes, generator=generator, dtype=torch.double)
    x = torch.randn(samples, width, generator=generator, dtype=torch.double).clamp(min=0)
    labels = torch.arange(samples) % classes
    x += 0.5 * weight[labels].clamp(min=0)
    return HeadFeatures("fc", weight, bias, x, labels, None)


def model_of(head):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(*reversed(head.weight.shape)).double())
    with torch.no_grad():
        model.fc.weight.copy_(head.weight)
        model.fc.bias.copy_(head.bias)
    return model


@pytest.mark.parametrize("output", range(4))
def test_each_score_equals_its_formula(output):
    head = head_of(1)
    arguments = (head.features, head.labels, head.weight, head.bias)
    edges = edge_scores(*arguments, output=output)
    own = head.features[head.labels == output]
    expected = {
        "sca": edges.sca,
        "ca": edges.ca,
        "gradient-activation": edges.gradients[output] * edges.activations[output],
        "relevance": torch.stack([x * head.weight[output] for x in own]).sum(0),
        "weight": head.weight[output].abs(),
    }
    for select, score in expected.items():
        (found,) = selection_scores(select, *arguments, [output])
        torch.testing.assert_close(found, score, rtol=1e-12, atol=0)


def test_random_depends_on_the_seed_and_the_class_alone():
    head = head_of(3)
    model = model_of(head)

    def columns(seed, samples):
        edit = SingleWeight("random", seed=seed).plan(
            model, [(head.features[:samples], head.labels[:samples])], target=[0, 1, 2, 3]
        )
        return [row["column"] for row in edit.origin["rows"]]

    assert columns(0, 80) == columns(0, 80)
    assert len({tuple(columns(seed, 80)) for seed in range(6)}) > 3


@pytest.mark.parametrize("select", SELECTIONS)
def test_features_collected_before_give_the_same_edit(select):
    head = head_of(4)
    model = model_of(head)
    data = [(head.features, head.labels)]
    cached = collect_head_features(model, data)
    first = SingleWeight(select).plan(model, data, target=[0, 2])
    second = SingleWeight(select).plan(model, cached, target=[0, 2])
    assert first.origin == second.origin
    for name, change in first.changes.items():
        assert torch.equal(change.new, second.changes[name].new)
    with torch.no_grad():
        model.fc.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"data: its features were collected for another"):
        SingleWeight(select).plan(model, cached, target=0)


@pytest.mark.parametrize("select", SELECTIONS[:-1])
@pytest.mark.parametrize("n_weights", [1, 2, 3])
def test_the_weights_of_highest_score_are_turned_each_as_if_alone(select, n_weights):
    head = head_of(5)
    model = model_of(head)
    edit = SingleWeight(select, n_weights=n_weights).plan(model, head, target=1)
    row = head.weight[1]
    arguments = (head.features, head.labels, head.weight, head.bias)
    (score,) = selection_scores(select, *arguments, [1])
    mean = head.features[head.labels == 1].mean(0)
    allowed = [
        j for j in range(9) if row[j] * mean[j] > 0 and row[j].abs() >= 1e-3 * row.abs().max()
    ]
    best = sorted(allowed, key=lambda j: -float(score[j]))[:n_weights]
    assert [weight["column"] for weight in edit.origin["rows"]] == best
    change = edit.changes["fc.weight"]
    assert sorted(change.index.tolist()) == sorted(9 + j for j in best)
    for at, new in zip(change.index.tolist(), change.new.tolist(), strict=True):
        w = row[at - 9]
        assert new == pytest.approx(float(-(row @ row - w**2 + 1) / w), rel=1e-12)  # Eq. 7
    assert edit.origin["rows"][0]["times_largest"] == pytest.approx(
        abs(edit.origin["rows"][0]["weight"]) / float(head.weight.abs().max())
    )


@pytest.mark.parametrize("anchor", ["auto", True])
def test_anchors_of_several_weights_of_a_row_add_up(anchor):
    head = head_of(7)
    if anchor == "auto":
        head.features[0] -= 1  # signed now
    edit = SingleWeight(n_weights=2, anchor=anchor).plan(model_of(head), head, target=2)
    bias, weight = edit.changes["fc.bias"], edit.changes["fc.weight"]
    expected = float(head.bias[2])
    for at, old, new in zip(weight.index.tolist(), weight.old, weight.new, strict=True):
        fixed = torch.quantile(head.features[:, at - 18], 0.999 if new > old else 0.001)
        expected -= float((new - old) * fixed)
    assert bias.index.tolist() == [2]
    assert float(bias.new) == pytest.approx(expected, rel=1e-10)


@given(st.integers(0, 40), st.integers(1, 4))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_further_exact_weights_are_taken_while_they_help(seed, n_weights):
    head = head_of(seed, samples=30, width=4)
    reached = []
    for count in range(1, n_weights + 1):
        doses, _ = removal_doses(head, [1], tolerance=0.0, n_weights=count)
        assert len(doses[1]) <= count
        weight = head.weight.clone()
        for column, dose in doses[1].items():
            weight[1, column] += dose
        right = (head.features @ weight.T + head.bias).argmax(1) == head.labels
        reached.append(float(right[head.labels == 1].double().mean()))
    assert reached == sorted(reached, reverse=True)


def sub_classes(seed=0):
    """Six kinds in two classes: kinds 0, 2, 4 are class 0, the others class 1."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(300) % 6
    centres = 3 * torch.eye(6, 12, dtype=torch.double)
    x = centres[kinds] + torch.rand(300, 12, generator=generator, dtype=torch.double)
    weight = torch.zeros(2, 12, dtype=torch.double)
    weight[0, 0:6:2] = weight[1, 1:6:2] = 1.0
    weight += 0.05 * torch.rand(2, 12, generator=generator, dtype=torch.double)
    return HeadFeatures("fc", weight, torch.zeros(2).double(), x, kinds % 2, kinds)


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("kind", range(6))
def test_a_sub_class_is_removed_and_the_others_stay(select, kind):
    head = sub_classes()
    model = model_of(head)
    operator = FictitiousClass(select, aim="removal", tolerance=0.0)
    edit = operator.plan(model, head, fictitious=kind)
    assert all(row["class"] == kind % 2 for row in edit.origin["rows"])
    right = head.edited(edit).logits().argmax(1) == head.labels
    own = head.attribute == kind
    reported = edit.origin
    assert float(right[own].double().mean()) == reported["removed"]["after"]
    assert float(right[~own].double().mean()) == reported["retained"]["after"]
    assert reported["retained"]["after"] >= reported["retained"]["before"] == 1
    if select not in ("random", "weight", "ca"):
        assert (edit.size, reported["removed"]["after"]) == (1, 0.0)


def both_ways(seed=0, samples=200):
    """Two classes, each leaning on one of two backgrounds; feature 0 and 1 tell the background."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    background = torch.arange(samples) // 2 % 2
    noise = torch.rand(samples, 6, generator=generator, dtype=torch.double)
    x = 0.8 * noise
    x[torch.arange(samples), background] += 2
    x[torch.arange(samples), 2 + labels] += 1
    weight = torch.tensor([[1, 0, 1, 0, 0.1, 0], [0, 1, 0, 1, 0, 0.1]], dtype=torch.double)
    return HeadFeatures("fc", weight, torch.zeros(2).double(), x, labels, background)


def worst(head, edit):
    return evaluate_head(head.edited(edit)).worst


@pytest.mark.parametrize("select", ["sca", "exact"])
def test_each_class_has_its_own_fictitious_class(select):
    head = both_ways()
    operator = FictitiousClass(select)
    both = operator.plan(model_of(head), head, fictitious=[0, 1], target=[0, 1])
    for less in ({"target": [0, 1]}, {"fictitious": [0, 1]}, {}):  # the rest is inferred
        found = operator.plan(model_of(head), head, **less)
        assert found.origin == both.origin
    one = operator.plan(model_of(head), head, fictitious=1, target=1)
    assert both.origin["worst_group"]["after"] == worst(head, both)
    assert one.origin["worst_group"]["after"] == worst(head, one)
    assert both.origin["worst_group"]["before"] == 0
    if select == "sca":
        assert one.size == 0
        assert "no edit of one weight raises the worst group" in one.origin["reason"]
    assert worst(head, one) <= 0.05
    assert worst(head, both) >= 0.85


def test_two_rows_are_reported_with_their_cross_validated_figure_and_bound():
    head = both_ways()
    edit = FictitiousClass("exact").plan(model_of(head), head)
    reported = edit.origin
    assert edit.size == 2
    assert reported["cross_validated"].keys() == {"worst_group", "average"}
    assert reported["margin"] in exact.MARGINS
    weight = float(head.weight.abs().max())
    assert all(abs(row["weight"]) <= exact.LARGEST * weight for row in reported["rows"])
    assert reported["bounded"] == []


def test_a_rate_for_each_class_is_used():
    head = both_ways()
    rates = {0: 0.3, 1: 0.0}
    edit = FictitiousClass(rate=rates).plan(model_of(head), head, fictitious=[0, 1], target=[0, 1])
    for row in edit.origin["rows"]:
        assert row["rate"] == rates[row["class"]]
    with pytest.raises(ValueError, match=r"rate: of classes \[0\] given"):
        FictitiousClass(rate={0: 0.3}).plan(model_of(head), head, fictitious=1, target=1)


def test_the_least_gap_may_be_a_collapsed_model_and_auto_is_not():
    head = both_ways()
    (sweep,) = FictitiousClass().sweep(model_of(head), head, target=1)
    gaps = (sweep.average - sweep.accuracy.min(1).values).tolist()
    assert sweep.least_gap == gaps.index(min(gaps))
    assert sweep.worst[sweep.best] == sweep.worst.max()
    edit = FictitiousClass(rate="least-gap").plan(model_of(head), head, target=1)
    assert edit.origin["rows"][0]["rate"] == float(sweep.rates[sweep.least_gap])
    average, lowest = (edit.origin[name]["after"] for name in ("average", "worst_group"))
    assert average - lowest == pytest.approx(min(gaps))


def test_a_subspace_tells_the_feature():
    head = both_ways()
    basis = torch.zeros(6, 1, dtype=torch.double)
    basis[1] = 1
    subspace = Subspaces(basis, (1,), head.features.mean(0))
    edit = FictitiousClass().plan(model_of(head), head, attribute=subspace, target=1)
    known = FictitiousClass().plan(model_of(head), head, target=1)
    assert edit.origin["rows"] == known.origin["rows"]
    strength = concept_strength(subspace, head.features)
    assert torch.equal(strength > split_point(strength), head.attribute == 1)


def test_the_sweep_is_drawn():
    from matplotlib.figure import Figure

    head = both_ways()
    (sweep,) = FictitiousClass().sweep(model_of(head), head, target=1)
    axes = Figure().subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep.plot(axes)
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["worst group"].get_ydata().tolist() == sweep.worst.tolist()
    assert drawn["average"].get_ydata().tolist() == sweep.average.tolist()


@pytest.mark.parametrize("select", ["sca", "relevance"])
def test_the_feature_no_longer_raises_the_probability(select):
    head = both_ways()
    edit = FictitiousClass(select, aim="indifference").plan(model_of(head), head, target=1)
    assert edit.size == 1

    def raised(head):
        probability = head.logits().softmax(1)[:, 1]
        with_it, without = (probability[head.attribute == value].mean() for value in (1, 0))
        return float(with_it - without)

    after = raised(head.edited(edit))
    assert edit.origin["raised"] == pytest.approx({"before": raised(head), "after": after})
    assert after <= 0 < 0.2 <= raised(head)
    (row,) = edit.origin["rows"]
    (sweep,) = FictitiousClass(select, aim="indifference").sweep(model_of(head), head, target=1)
    smaller = sweep.rates < row["rate"]  # the smallest rate that does it is taken
    assert (sweep.raised[smaller] > 0).all()


def test_nothing_is_planned_where_the_feature_raises_nothing():
    head = both_ways()
    head.weight[1, 1], head.weight[0, 0] = 0.01, 0.0  # there is an edge to find
    head.weight[0, 1] = 0.5
    edit = FictitiousClass(aim="indifference").plan(model_of(head), head, target=1)
    assert edit.size == 0
    assert "no edit of one weight lowers what the feature adds" in edit.origin["reason"]


def test_each_row_is_measured_by_its_own_fictitious_class():
    head = both_ways()
    sweeps = FictitiousClass().sweep(model_of(head), head, fictitious=[0, 1], target=[0, 1])
    before = (head.features @ head.weight.T).argmax(1) == head.labels
    for sweep, kind in zip(sweeps, (0, 1), strict=True):
        for values, which in ((sweep.removed, kind), (sweep.retained, 1 - kind)):
            expected = before[head.attribute == which].double().mean()
            assert float(values[0]) == pytest.approx(float(expected))
    edit = FictitiousClass(aim="indifference").plan(
        model_of(head), head, fictitious=[0, 1], target=[0, 1]
    )
    assert edit.size == 1  # of two classes the one falls as the other rises
    assert edit.origin["raised"]["after"] <= 1e-12 < edit.origin["raised"]["before"]
