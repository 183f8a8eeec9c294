"""Scores over a data set against brute force, and one clear error for each bad input."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from xai_edit import LRP, Activation, Random, Taylor, UnitScores, WeightMagnitude, score_units
from xai_edit.core import NonFiniteError, UnknownLayerError


def echo(model, inputs, targets, layers):
    """A scorer whose answer is known: the inputs are the scores, the target is added to unit 0."""
    scores = inputs.flatten(1).clone()
    scores[:, 0] += targets
    return {name: scores * (position + 1) for position, name in enumerate(layers)}


class Table(nn.Module):
    """A classifier of 6 features into 4 classes, two linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture
def table():
    torch.manual_seed(0)
    return Table().double().eval()


def integers(samples=23, seed=0):
    """Scores in −3 … 3, so that sums are exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (samples, 6), generator=generator).double()
    return x, torch.randint(0, 4, (samples,), generator=generator)


def cut(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


REDUCE = {
    "sum": lambda column: sum(column),
    "mean": lambda column: sum(column) / len(column),
    "abs": lambda column: sum(abs(value) for value in column),
    "positive": lambda column: sum(max(value, 0.0) for value in column),
}


@pytest.mark.parametrize("aggregate", REDUCE)
@pytest.mark.parametrize("size", [1, 5, 23])
def test_each_aggregate_is_its_sum_written_out(table, aggregate, size):
    x, y = integers()
    scores = score_units(table, cut(x, y, size), echo, aggregate=aggregate)
    rows = x.tolist()
    for row, label in zip(rows, y.tolist(), strict=True):
        row[0] += label
    expected = [REDUCE[aggregate]([row[unit] for row in rows]) for unit in range(6)]
    assert scores["first"].tolist() == expected
    assert scores["second"].tolist() == pytest.approx([2 * value for value in expected], rel=1e-15)
    assert scores.samples == 23
    assert scores.aggregate == aggregate
    assert (scores.counts, scores.k) == ({}, None)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("size", [1, 5, 23])
@pytest.mark.parametrize("aggregate", ["sum", "abs", "positive"])
def test_occurrence_counts_equal_a_count_by_hand(table, k, size, aggregate):
    x, y = integers(seed=k)
    scores = score_units(table, cut(x, y, size), echo, layers="first", k=k, aggregate=aggregate)
    counts = [0] * 6
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        row[0] += label
        row = [REDUCE[aggregate]([value]) for value in row]
        for unit in sorted(range(6), key=lambda unit: (-row[unit], unit))[:k]:
            counts[unit] += 1
    assert scores.counts["first"].tolist() == counts
    assert scores.counts["first"].dtype == torch.int64
    assert sum(counts) == 23 * k
    assert scores.k == k


@pytest.mark.parametrize("scorer", [LRP("epsilon"), Taylor()])
def test_targets_are_a_class_the_labels_or_the_predictions(plain, batches, scorer):
    relabelled = {
        "label": batches,
        "predicted": [(x, plain(x).argmax(1)) for x, _ in batches],
        3: [(x, torch.full((len(x),), 3)) for x, _ in batches],
    }
    found = []
    for target, data in relabelled.items():
        bare = batches if target == "label" else [inputs for inputs, _ in batches]
        got = score_units(plain, bare, scorer, target=target)
        expected = score_units(plain, data, scorer, target="label")
        for name in got:
            assert torch.equal(got[name], expected[name])
        found.append(got["fc1"])
        assert got.origin["target"] == target
    assert not torch.equal(found[0], found[2])


def test_a_users_function_gets_the_targets_as_classes(table):
    x, y = integers()
    seen = []

    def scorer(model, inputs, targets, layers):
        assert not model.training
        assert targets.dtype == torch.int64
        seen.extend(targets.tolist())
        return dict.fromkeys(layers, inputs)

    expected = {"label": y.tolist(), "predicted": table(x).argmax(1).tolist(), 2: [2] * 23}
    for target, classes in expected.items():
        seen.clear()
        score_units(table.train(), cut(x, y, 5), scorer, target=target)
        assert seen == classes


def test_by_default_all_convolutions_and_linear_layers_are_scored(plain, norm, batches):
    assert score_units(plain, batches, LRP()).layers == ["conv1", "conv2", "fc1", "head"]
    assert score_units(norm, batches, LRP()).layers == ["body.0", "body.3", "fc"]


def test_layers_keep_the_order_asked_for(plain, batches):
    layers = ["head", "pool1", "fc1:input", "conv1"]
    scores = score_units(plain, batches, LRP(), layers=layers)
    assert scores.layers == [*scores] == layers
    assert [len(scores[name]) for name in scores] == [10, 4, 24, 4]
    assert "pool1" in scores
    assert "conv2" not in scores


@pytest.mark.parametrize("scorer", [LRP(), Taylor(), Activation(), echo])
def test_scorers_of_samples_say_that_they_need_data(plain, scorer):
    with pytest.raises(ValueError, match=r"data: None given, but .* scores samples"):
        score_units(plain, None, scorer)


# Merging, saving


@pytest.mark.parametrize("aggregate", REDUCE)
def test_two_halves_merge_to_the_whole_to_the_bit(table, aggregate):
    x, y = integers()
    whole, first, second = (
        score_units(table, cut(x[part], y[part], 4), echo, aggregate=aggregate, k=2)
        for part in (slice(None), slice(9), slice(9, None))
    )
    merged = first.merge(second)
    assert merged.samples == whole.samples == 23
    for name in whole:
        assert torch.equal(merged[name], whole[name])
        assert torch.equal(merged.counts[name], whole.counts[name])
    assert (merged.aggregate, merged.k, merged.origin) == (aggregate, 2, whole.origin)


@pytest.mark.parametrize(
    "other",
    [
        {"aggregate": "abs"},
        {"k": 2},
        {"layers": ["body.0"]},
        {"layers": ["fc", "body.0"]},
        {"target": 3},
        {"scorer": Taylor()},
        {"scorer": LRP("epsilon", initial="one")},
        {"scorer": LRP("epsilon", epsilon=0.5)},
        {"scorer": LRP("epsilon", canonizers=())},
    ],
    ids=str,
)
def test_scores_made_differently_do_not_merge(norm, batches, other):
    call = {"scorer": LRP("epsilon"), "layers": ["body.0", "fc"]}
    first = score_units(norm, batches, **call)
    second = score_units(norm, batches, **(call | other))
    with pytest.raises(ValueError, match="merge: scores 0 and 1 were made differently"):
        first.merge(second)


class Mine:
    """A user's scorer that says nothing about itself."""

    def __call__(self, model, inputs, targets, layers):
        return dict.fromkeys(layers, inputs)


def test_a_scorers_name_is_the_same_in_every_process(table):
    first, second = (score_units(table, [integers()], Mine()) for _ in range(2))
    assert first.origin == second.origin
    assert "Mine" in first.origin["scorer"]
    assert "0x" not in first.origin["scorer"]
    assert first.merge(second).samples == 46
    assert score_units(table, [integers()], echo).origin["scorer"] == "echo"
    lrp = score_units(table, [integers()], LRP("gamma+epsilon", initial="one"))
    assert "gamma+epsilon" in lrp.origin["scorer"]
    assert "one" in lrp.origin["scorer"]


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("target", [3, "label"])
def test_saved_scores_come_back_whole(norm, batches, tmp_path, k, target):
    path = tmp_path / "scores.safetensors"
    scores = score_units(norm, batches, LRP(), aggregate="mean", k=k, target=target)
    scores.save(path)
    loaded = UnitScores.load(path)
    assert loaded.layers == scores.layers
    for of in ("sums", "counts"):
        assert getattr(loaded, of).keys() == getattr(scores, of).keys()
        for name, values in getattr(scores, of).items():
            assert torch.equal(getattr(loaded, of)[name], values)
            assert getattr(loaded, of)[name].dtype == values.dtype
    for field in ("samples", "aggregate", "k", "origin"):
        assert getattr(loaded, field) == getattr(scores, field)
    assert str(loaded) == str(scores)
    assert json.loads(json.dumps(scores.origin)) == scores.origin
    assert loaded.merge(scores).samples == 2 * scores.samples
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.safetensors"]


# Ranking


@pytest.mark.parametrize("seed", range(5))
def test_ranks_break_ties_by_relevance_then_by_unit_order(seed):
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.randint(-2, 3, (40,), generator=generator).double()
    counts = torch.randint(0, 4, (40,), generator=generator)
    scores = UnitScores({"fc": relevance}, 9, counts={"fc": counts}, k=3)
    r, c = relevance.tolist(), counts.tolist()
    by_sum = sorted(range(40), key=lambda unit: (-r[unit], unit))
    by_count = sorted(range(40), key=lambda unit: (-c[unit], -r[unit], unit))
    assert scores.rank("fc").tolist() == by_sum
    assert scores.rank("fc", by="count").tolist() == by_count
    assert scores.top("fc", count=7).tolist() == by_sum[:7]
    assert scores.top("fc", count=7, by="count").tolist() == by_count[:7]


def test_a_tie_in_counts_is_broken_by_differences_that_single_precision_does_not_see():
    relevance = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1e12], dtype=torch.float64)
    scores = UnitScores({"fc": relevance}, 1, counts={"fc": torch.tensor([50, 50, 50, 1])}, k=1)
    assert scores.rank("fc", by="count").tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("share", "units"),
    [(0.2, 2), (0.25, 2), (0.26, 3), (0.34, 3), (1, 10), (1.0, 10), (0.01, 1), (0.05, 1)],
)
def test_a_share_is_rounded_and_at_least_one_unit(share, units):
    scores = UnitScores({"fc": torch.arange(10.0).double()}, 1)
    assert scores.top("fc", share=share).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0][:units]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "share, count: None and None given; give one of them"),
        ({"share": 0.5, "count": 1}, "share, count: 0.5 and 1 given; give one of them"),
        ({"share": 20}, "share: 20 given; it is a fraction in (0, 1]; is it in percent?"),
        ({"count": 0}, "count: 0 given; it is a whole number from 1 to 10"),
        ({"count": 11}, "count: 11 given; it is a whole number from 1 to 10"),
        ({"count": 1, "by": "relevance"}, "by: 'relevance' given; it is one of 'sum', 'count'"),
        ({"count": 1, "by": "count"}, "by: 'count' given; it needs occurrence counts; give k to"),
    ],
)
def test_a_choice_of_units_that_cannot_be_is_an_error(call, message):
    scores = UnitScores({"fc": torch.arange(10.0).double()}, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        scores.top("fc", **call)


def test_normalized_scores_have_the_norm_one_and_silent_layers_stay_zero():
    scores = UnitScores({"a": torch.tensor([3.0, -1.0]).double(), "b": torch.zeros(2).double()}, 1)
    assert scores.normalized("a").tolist() == [0.75, -0.25]
    assert scores.normalized("b").tolist() == [0, 0]


def test_printed_scores_name_the_layers_and_their_best_units(table):
    text = str(score_units(table, [integers()], echo))
    first, *rows = text.splitlines()
    assert first == "sum over 23 samples, echo"
    assert [row.split()[0] for row in rows] == ["first", "second"]
    best = score_units(table, [integers()], echo).top("first", count=5).tolist()
    assert re.findall(r"(\d+): ", rows[0]) == [str(unit) for unit in best]


# Bad input


@pytest.mark.parametrize(
    ("layer", "guess"), [("conv3", "conv"), ("hed", "head"), ("fc1:inputs", "fc1"), ("fcc1", "fc1")]
)
def test_an_unknown_layer_gets_the_nearest_name(plain, batches, layer, guess):
    message = rf"layer '{layer}' not found; did you mean '{guess}\w*'\?.*: conv1, conv2, fc1, head"
    with pytest.raises(UnknownLayerError, match=message):
        score_units(plain, batches, LRP(), layers=[layer])


def test_a_layer_that_was_not_scored_is_an_unknown_one(plain, batches):
    scores = score_units(plain, batches, LRP(), layers=["fc1", "head"])
    for look_up in (scores.__getitem__, scores.rank, scores.normalized):
        with pytest.raises(UnknownLayerError, match="layer 'fc2' not found; did you mean 'fc1'"):
            look_up("fc2")
    with pytest.raises(KeyError):
        scores["fc2"]
    with pytest.raises(ValueError, match=r"^layer 'fc2' not found"):
        scores["fc2"]


def test_a_model_without_layers_to_score_is_an_error(batches):
    with pytest.raises(ValueError, match="linear layer to score; the model has none"):
        score_units(nn.Flatten(), batches, LRP())


@pytest.mark.parametrize("name", ["conv2.weight", "head.bias"])
@pytest.mark.parametrize("scorer", [LRP(), WeightMagnitude(), Random()])
def test_a_weight_that_is_nan_is_named(plain, batches, unchanged, name, scorer):
    with torch.no_grad():
        plain.get_parameter(name).view(-1)[1] = float("nan")
    with pytest.raises(NonFiniteError, match=f"model: '{name}': NaN or infinite values"):
        score_units(plain, batches, scorer)


class Windows(nn.Module):
    """Two halves of each sample, one after the other or those of all samples by turns."""

    def __init__(self, *, samples_first):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(8, 3)
        self.samples_first = samples_first

    def forward(self, x):
        halves = x.unflatten(1, (2, 3))
        if self.samples_first:
            return self.head(self.inner(halves.flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1))
        return self.head(
            self.inner(halves.transpose(0, 1).flatten(0, 1))
            .unflatten(0, (2, -1))
            .transpose(0, 1)
            .flatten(1)
        )


@pytest.mark.parametrize("aggregate", ["sum", "abs"])
def test_the_windows_of_a_sample_are_summed(aggregate):
    model = Windows(samples_first=True).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    data = [(x, torch.tensor([0, 1, 2, 0, 1]))]
    got = score_units(model, data, LRP(), layers="inner", aggregate=aggregate)
    each = [
        score_units(model, [(x[i : i + 1], data[0][1][i : i + 1])], LRP(), layers="inner")["inner"]
        for i in range(5)
    ]
    each = torch.stack(each)
    torch.testing.assert_close(got["inner"], (each.abs() if aggregate == "abs" else each).sum(0))


def test_windows_that_are_not_in_the_order_of_the_samples_are_an_error():
    data = [(torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))]
    with pytest.raises(ValueError, match="'inner' has 2 rows for one sample"):
        score_units(Windows(samples_first=False), data, LRP(), layers="inner")
