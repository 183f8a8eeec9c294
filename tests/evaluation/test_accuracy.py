"""Figures by group against scikit-learn, SciPy and counting by hand."""

import json
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import recall_score
from torch import nn

import xai_edit as xe
from xai_edit.evaluation import Accuracy

# By hand: of class 0 9 of 10 and 3 of 5 are right, of class 1 40 of 80 and none of none.
RIGHT, SAMPLES = torch.tensor([[9, 3], [40, 0]]), torch.tensor([[10, 5], [80, 0]])
TRAIN = torch.tensor([[70, 10], [20, 0]])


@pytest.fixture
def sampled():
    """A linear classifier of three classes that is often wrong, samples and their groups."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    labels = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    groups = (x[:, 0] + torch.randn(600, generator=generator) > 0.8).long()
    return nn.Linear(4, 3).double(), x.double(), labels, groups


def evaluated(sampled, **how):
    model, x, labels, groups = sampled
    cut = [(x[at], labels[at], groups[at]) for at in torch.arange(600).split(77)]
    return xe.evaluate_groups(model, cut, **how)


def predictions(sampled):
    model, x, labels, groups = sampled
    return labels.numpy(), model(x).argmax(1).numpy(), groups.numpy()


def test_averages_and_gaps_are_those_counted_by_hand():
    accuracy = Accuracy(RIGHT, SAMPLES, train_samples=TRAIN)
    assert accuracy.groups == {(0, 0): 0.9, (0, 1): 0.6, (1, 0): 0.5}
    weighted = (70 * 0.9 + 10 * 0.6 + 20 * 0.5) / 100
    expected = {"average": 52 / 95, "train_weighted": weighted, "balanced": 2 / 3}
    assert accuracy.averages == pytest.approx(expected, rel=1e-12)
    assert (accuracy.worst, accuracy.worst_group) == (0.5, (1, 0))
    for name, value in expected.items():
        assert accuracy.gap(name) == pytest.approx(value - 0.5, rel=1e-12)
    assert accuracy.gap() == accuracy.gap("average")


def test_without_training_counts_there_is_no_train_weighted_average(sampled):
    accuracy = evaluated(sampled)
    assert accuracy.train_weighted is None
    assert [*accuracy.averages] == ["average", "balanced"]
    assert accuracy.to_dict()["train_weighted"] is None
    with pytest.raises(ValueError, match=r"'train_weighted' given.*needs train_samples"):
        accuracy.gap("train_weighted")
    with pytest.raises(ValueError, match=r"'plain' given; it is one of 'average', 'balanced'$"):
        accuracy.gap("plain")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (torch.tensor([1, 2]), r"shape \(2,\) given; it is \(2, attributes\)"),
        (torch.tensor([[1], [2], [3]]), r"shape \(3, 1\) given; it is \(2, attributes\)"),
        (torch.tensor([[1.0], [2.0]]), "numbers of samples"),
        (torch.tensor([[1], [-2]]), "numbers of samples"),
        (torch.zeros(2, 0).long(), "numbers of samples"),
        (torch.tensor([[1, 1], [1, 7]]), r"group \(1, 1\) has 7, and no samples"),
        (torch.tensor([[1, 1, 7], [1, 0, 0]]), r"group \(0, 2\) has 7, and no samples"),
    ],
)
def test_training_counts_that_do_not_fit_are_refused(train, message):
    with pytest.raises(ValueError, match=f"train_samples: .*{message}"):
        Accuracy(RIGHT, SAMPLES, train_samples=train)
    fewer = Accuracy(RIGHT, SAMPLES, train_samples=torch.tensor([[3], [1]]))  # attributes
    assert fewer.train_weighted == pytest.approx((3 * 0.9 + 0.5) / 4)


def test_training_counts_of_no_kind_are_refused_before_the_data_is_read(sampled):
    with pytest.raises(ValueError, match=r"train_samples: shape \(3,\) given"):
        xe.evaluate_groups(sampled[0], None, train_samples=torch.ones(3))


# intervals


def test_group_intervals_are_scipys_of_wilson_with_a_width_where_all_answers_are_right():
    right, samples = torch.tensor([[30, 0], [50, 3]]), torch.tensor([[40, 10], [500, 3]])
    found = Accuracy(right, samples).intervals(confidence=0.9)
    for group, interval in found.groups.items():
        exact = scipy.stats.binomtest(int(right[group]), int(samples[group]))
        exact = exact.proportion_ci(0.9, method="wilson")
        assert interval == pytest.approx((exact.low, exact.high), rel=1e-9)


def test_intervals_of_all_figures_are_those_of_scipys_bootstrap():
    """SciPy resamples the samples of each group themselves."""
    right, samples = torch.tensor([[80, 60], [65, 32]]), torch.tensor([[100, 100], [110, 40]])
    train = torch.tensor([[60, 3], [7, 30]])
    accuracy = Accuracy(right, samples, train_samples=train)
    found = accuracy.intervals(resamples=20_000)
    groups = [
        np.repeat([1.0, 0.0], [int(k), int(n - k)])
        for k, n in zip(right.flatten(), samples.flatten(), strict=True)
    ]
    sizes, weights = samples.flatten().numpy(), train.flatten().numpy()

    def figures(*drawn, axis):
        shares = np.stack([each.mean(axis) for each in drawn])
        averages = [
            np.tensordot(sizes / sizes.sum(), shares, 1),
            np.tensordot(weights / weights.sum(), shares, 1),
            shares.mean(0),
        ]
        worst = shares.min(0)
        return np.stack([worst, *averages, *(average - worst for average in averages)])

    scipys = scipy.stats.bootstrap(
        groups, figures, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    names = ("average", "train_weighted", "balanced")
    own = [found.worst, *(part[name] for part in (found.averages, found.gaps) for name in names)]
    # Both are Monte Carlo; shares of the worst group come in steps of 1/100 and 1/110.
    assert np.allclose(own, np.transpose(scipys), rtol=0, atol=0.011)


@pytest.mark.parametrize(
    ("right", "samples"),
    [([[0, 29], [16, 30]], [[1, 30], [30, 30]]), ([[0, 10]], [[30, 30]]), ([[7, 19]], [[7, 20]])],
)
def test_a_group_all_right_or_all_wrong_leaves_the_worst_unsure(right, samples):
    """The draws of such a group are binomial with the mean of Beta(k + 1/2, n - k + 1/2)."""
    right, samples = torch.tensor(right), torch.tensor(samples)
    at = scipy.stats.beta(right + 0.5, samples - right + 0.5).mean()
    k, n = right.numpy(), samples.numpy()
    rates = np.where((k == 0) | (k == n), at, k / n)
    drawn = np.random.default_rng(9).binomial(n, rates, size=(40_000, *n.shape)) / n
    expected = np.quantile(drawn.min((1, 2)), [0.025, 0.975])
    found = Accuracy(right, samples).intervals(resamples=40_000).worst
    assert found == pytest.approx(expected, abs=0.034)  # both drawn; shares come in steps of 1/30
    assert found[0] < found[1]


def test_intervals_repeat_with_the_seed_and_widen_with_the_confidence():
    accuracy = Accuracy(RIGHT, SAMPLES)
    assert accuracy.intervals(seed=3) == accuracy.intervals(seed=3)
    assert accuracy.intervals(seed=3) != accuracy.intervals(seed=4)
    narrow, wide = (accuracy.intervals(confidence=share) for share in (0.5, 0.99))
    (low, high), (lower, higher) = narrow.groups[1, 0], wide.groups[1, 0]
    assert lower < low < high < higher


# demographic measures


@pytest.mark.parametrize("positive", [0, 1, 2])
def test_demographic_measures_are_differences_of_rates(sampled, positive):
    labels, predicted, groups = predictions(sampled)
    found = evaluated(sampled).demographics(positive)
    rates = []
    for attribute, one in zip((0, 1), found.rates, strict=True):
        mine = groups == attribute
        true = recall_score(labels[mine] == positive, predicted[mine] == positive)
        rates.append((true, np.mean(predicted[mine] == positive)))
        assert (one.true_positive_rate, one.positive_rate) == pytest.approx(rates[-1])
        assert one.attribute == attribute
        assert one.positives == np.sum(mine & (labels == positive))
        assert one.samples == mine.sum()
    opportunity, parity = np.ptp(rates, axis=0)
    assert opportunity > 0.02
    assert found.equal_opportunity_difference == pytest.approx(opportunity)
    assert found.demographic_parity_difference == pytest.approx(parity)


def test_a_difference_between_many_groups_is_that_of_the_extremes():
    right = torch.tensor([[0, 0, 0, 0], [9, 5, 1, 0]])
    samples = torch.tensor([[10, 10, 10, 0], [10, 10, 10, 0]])
    predicted = torch.tensor([[1, 15, 9, 0], [19, 5, 11, 0]])
    found = Accuracy(right, samples, predicted).demographics(1)
    assert [one.attribute for one in found.rates] == [0, 1, 2]
    assert found.equal_opportunity_difference == pytest.approx(0.8)
    assert found.demographic_parity_difference == pytest.approx(14 / 20)


def test_intervals_of_a_difference_are_those_of_scipys_bootstrap():
    right, samples = torch.tensor([[40, 10], [45, 15]]), torch.tensor([[50, 20], [60, 40]])
    predicted = torch.tensor([[55, 35], [55, 25]])
    found = Accuracy(right, samples, predicted).demographics(1)
    for interval, counts in (
        (found.equal_opportunity_interval, ((45, 60), (15, 40))),
        (found.demographic_parity_interval, ((55, 110), (25, 60))),
    ):
        groups = [np.repeat([1.0, 0.0], [hits, total - hits]) for hits, total in counts]
        scipys = scipy.stats.bootstrap(
            groups,
            lambda one, other, axis: np.abs(one.mean(axis) - other.mean(axis)),
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        assert interval == pytest.approx(tuple(scipys), abs=0.03)


@pytest.mark.parametrize(
    ("accuracy", "positive", "message"),
    [
        (Accuracy(RIGHT, SAMPLES, SAMPLES), 1, "positive: attribute 1 has no samples of class"),
        (Accuracy(RIGHT, SAMPLES, SAMPLES), 2, "class 2 is out of range"),
        (Accuracy(RIGHT, SAMPLES, SAMPLES), "yes", "target: 'y' given"),
        (Accuracy(RIGHT[:, :1], SAMPLES[:, :1], SAMPLES[:, :1]), 1, "samples of 1 attribute"),
        (Accuracy(RIGHT, SAMPLES), 0, "predicted: not counted"),
    ],
)
def test_measures_that_cannot_be_had_are_refused(accuracy, positive, message):
    with pytest.raises(ValueError, match=message):
        accuracy.demographics(positive)


# from cached features


def test_cached_features_give_the_accuracy_of_the_edited_network(plain, batches, unchanged):
    marked = [(x, y, (x.mean((1, 2, 3)) > 0.3).long()) for x, y in batches]
    head = xe.collect_head_features(plain, marked, with_attribute=True)
    edits = [
        xe.ModelEdit({}),
        xe.SingleWeight().plan(plain, batches, target=[3, 5]),
        xe.LogitMask().plan(plain, batches, target=2),
        xe.LastLayerRetraining().plan(plain, marked),
    ]
    check = unchanged(plain)
    averages = set()
    for edit in edits:
        cached = xe.evaluate_head(head.edited(edit))
        with edit.applied(plain):
            network = xe.evaluate_groups(plain, marked)
        averages.add(network.average)
        for name in ("right", "samples", "predicted"):
            assert torch.equal(getattr(cached, name), getattr(network, name)), (name, edit)
    assert len(averages) > 2  # the edits do something
    check()


def test_cached_features_without_attribute_are_counted_by_class(plain, batches):
    train = torch.arange(1, 11)[:, None]
    cached = xe.evaluate_head(xe.collect_head_features(plain, batches), train_samples=train)
    assert cached.samples.shape == (10, 1)
    assert torch.equal(cached.right, xe.evaluate_groups(plain, batches).right)
    assert cached.train_weighted is not None


def test_cached_features_know_nothing_of_other_layers(plain, batches):
    head = xe.collect_head_features(plain, batches)
    edit = xe.PathPerturbation(layer="fc1", share=0.2, scope="neuron").plan(
        plain, batches, target=3
    )
    with pytest.raises(ValueError, match=r"edit: changes 'fc1.*inputs of the layer 'head'"):
        head.edited(edit)
    planned = xe.SingleWeight().plan(plain, batches, target=3)
    with pytest.raises(xe.core.EditMismatchError, match="already holds this edit"):
        head.edited(planned).edited(planned)


def test_logits_that_are_not_finite_are_refused(plain, batches):
    head = xe.collect_head_features(plain, batches)
    head.features[3, 0] = float("nan")
    with pytest.raises(xe.core.NonFiniteError, match="NaN or infinite"):
        xe.evaluate_head(head)


# text and JSON


def test_the_text_has_every_figure_with_its_name():
    accuracy = Accuracy(RIGHT, SAMPLES, train_samples=TRAIN)
    text = str(accuracy)
    found = accuracy.intervals()

    lines = [" ".join(line.split()) for line in text.splitlines()]
    low, high = found.groups[0, 1]
    assert f"class 0, attribute 1 (fewer than 10) 5 0.600 {low:.3f}–{high:.3f}" in lines
    low, high = found.worst
    assert f"worst measured: class 1, attribute 0 80 0.500 {low:.3f}–{high:.3f}" in lines
    assert "class 1, attribute 1 0 not measured" in lines
    (low, high), (down, up) = found.averages["train_weighted"], found.gaps["train_weighted"]
    weighted = f"average, train-weighted 95 0.790 {low:.3f}–{high:.3f} 0.290 {down:.3f}–{up:.3f}"
    assert weighted in lines
    assert max(map(len, text.splitlines())) <= 104


def test_the_text_without_attributes_names_classes_and_of_many_the_lowest():
    samples = torch.full((30, 1), 100)
    text = str(Accuracy(torch.arange(30)[:, None] + 50, samples))
    assert "\nworst: class 0 " in text
    samples[25:] = 0
    assert "  5 of 30 classes" in str(Accuracy(samples, samples))
    assert "accuracy by group, the 20 lowest of 30" in text
    assert "\n  class 19 " in text
    assert "class 20" not in text
    assert "attribute" not in text


def test_the_json_has_every_figure():
    accuracy = Accuracy(RIGHT, SAMPLES, train_samples=TRAIN)
    found = json.loads(json.dumps(accuracy.to_dict()))
    assert found["samples"] == 95
    assert [(one["class"], one["attribute"]) for one in found["groups"]] == [(0, 0), (0, 1), (1, 0)]
    for one, (group, interval) in product(found["groups"], accuracy.intervals().groups.items()):
        if group == (one["class"], one["attribute"]):
            assert (one["right"], one["samples"]) == (RIGHT[group], SAMPLES[group])
            assert one["accuracy"] == accuracy.groups[group]
            assert one["interval"] == [*interval]
    assert found["worst"]["class"] == 1
    assert found["worst"]["interval"] == [*accuracy.intervals().worst]
    for name, value in accuracy.averages.items():
        assert found[name]["accuracy"] == value
        assert found[name]["gap"] == accuracy.gap(name)
    assert (found["missing"], found["absent"]) == ([{"class": 1, "attribute": 1}], [])
    assert found["bootstrap"] == {"confidence": 0.95, "resamples": 2000, "seed": 0}
    people = Accuracy(RIGHT, SAMPLES, SAMPLES).demographics(0)
    plain = json.loads(json.dumps(people.to_dict()))
    assert plain["equal_opportunity_difference"] == people.equal_opportunity_difference
    assert plain["rates"][1]["attribute"] == 1
    assert "equal opportunity difference" in str(people)
