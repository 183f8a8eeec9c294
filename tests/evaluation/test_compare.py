"""Comparisons of scorers against SciPy, brute force and the closed form before the output."""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xai_edit as xe
from xai_edit.evaluation.compare import compare_scorers
from xai_edit.evaluation.deletion_curve import deletion_curve
from xai_edit.report.comparison_figures import (
    deletion_curves,
    map_grid,
    rank_matrices,
    relevance_maps,
)

DOCS = Path(__file__).parents[2] / "docs"
RULES = ["epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1"]


class Fixed:
    """A scorer that gives what it was given, whatever the network."""

    needs_data = False

    def __init__(self, **scores):
        self.scores = {name: torch.as_tensor(values)[None] for name, values in scores.items()}

    def __call__(self, model, inputs, targets, layers):
        return {name: self.scores[name] for name in layers}


def compared(plain, rows, **options):
    named = {f"s{number}": Fixed(fc1=row) for number, row in enumerate(rows)}
    return compare_scorers(plain, None, named, layers="fc1", **options)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_are_those_of_scipy(plain, ties):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    if ties:
        rows = rows.mul(1.5).round()
    found = compared(plain, rows).rank_correlation["fc1"]
    assert found.shape == (5, 5)
    assert found.dtype == torch.float64
    for i, j in itertools.product(range(5), repeat=2):
        assert float(found[i, j]) == pytest.approx(spearmanr(rows[i], rows[j]).statistic)


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_the_overlap_is_that_of_two_sets(plain, share):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    found = compared(plain, rows, share=share).overlap["fc1"]
    count = max(1, round(12 * share))
    tops = [set(sorted(range(12), key=lambda unit: -row[unit])[:count]) for row in rows.tolist()]
    for i, j in itertools.product(range(4), repeat=2):
        assert float(found[i, j]) == pytest.approx(len(tops[i] & tops[j]) / count)


def test_constant_scores_are_undefined_and_say_so_without_a_warning(plain):
    rows = [torch.arange(12.0), torch.full((12,), 0.1), torch.arange(12.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compared(plain, rows)
        table = comparison.to_dict()["layers"]["fc1"]
    for matrix in (comparison.rank_correlation["fc1"], comparison.overlap["fc1"]):
        assert matrix.isnan().tolist() == [[i == 1 or j == 1 for j in range(3)] for i in range(3)]
        assert float(matrix[0, 2]) == pytest.approx(1)
    assert table["rank_correlation"][1] == [None] * 3
    json.dumps(comparison.to_dict(), allow_nan=False)
    assert "nan" in str(comparison)


# How the data is read.


@pytest.fixture
def scorers():
    return {"LRP": xe.LRP("alpha1beta0"), "Taylor": xe.Taylor(), "weights": xe.WeightMagnitude()}


@pytest.mark.parametrize(
    ("kind", "aggregate"),
    [("list", "mean"), ("iterator", "sum"), ("loader", "abs"), ("dataset", "sum")],
)
def test_every_scorer_has_the_scores_of_its_own_pass(
    plain, batches, scorers, kind, aggregate, unchanged
):
    whole = TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
    data = {
        "list": batches,
        "iterator": iter(batches),
        "loader": DataLoader(whole, batch_size=60),
        "dataset": whole,
    }[kind]
    check = unchanged(plain)
    comparison = compare_scorers(plain, data, scorers, aggregate=aggregate, target=3)
    assert comparison.names == [*scorers]
    assert comparison.layers == ["conv1", "conv2", "fc1", "head"]
    for name, scorer in scorers.items():
        alone = xe.score_units(plain, batches, scorer, aggregate=aggregate, target=3)
        assert comparison.scores[name].samples == alone.samples
        for layer in alone:
            assert torch.allclose(comparison.scores[name][layer], alone[layer], rtol=1e-6), layer
    check()


def test_scorers_name_themselves_in_a_sequence(plain, batches):
    comparison = compare_scorers(plain, batches, ["epsilon", xe.Taylor(), xe.Random(seed=3)])
    assert comparison.names == ["epsilon", "Taylor()", "Random(seed=3)"]
    assert comparison.scores["epsilon"].origin["scorer"] == repr(xe.LRP("epsilon"))


def test_a_layer_that_takes_no_part_is_left_out_where_none_are_named(batches):
    class Resting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.unused, self.fc2 = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x):
            return self.fc2(self.fc1(x.flatten(1)).relu())

    comparison = compare_scorers(Resting().eval(), batches, [xe.Random(), "epsilon"])
    assert comparison.layers == ["fc1", "fc2"]


# Deletion curves of a comparison.


def test_curves_are_those_of_deletion_curve(plain, batches, scorers, unchanged):
    held_out = [(batches[0][0].flip(0), batches[0][1].flip(0))]
    shares = (0, 0.25, 0.5)
    check = unchanged(plain)
    options = {"target": 3, "deletion": shares, "held_out": iter(held_out)}  # read once
    comparison = compare_scorers(plain, batches, scorers, **options)
    assert [*comparison.deletion] == ["conv1", "conv2", "fc1"]  # not the output
    for layer, curves in comparison.deletion.items():
        assert [*curves] == comparison.names
        for name, curve in curves.items():
            scores, options = comparison.scores[name], {"target": 3, "shares": shares}
            assert curve == deletion_curve(plain, held_out, scores, layers=layer, **options)
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    told = json.loads(text)["layers"]["fc1"]["deletion"]["LRP"]
    assert told["accuracy"] == [*comparison.deletion["fc1"]["LRP"].accuracy]
    check()


def test_curves_of_labels_are_over_all_samples_and_of_the_layers_asked_for(plain, batches):
    options = {"deletion": (0, 0.5), "deletion_layers": "fc1", "held_out": batches}
    comparison = compare_scorers(plain, batches, RULES, **options)
    assert [*comparison.deletion] == ["fc1"]
    first, *others = comparison.deletion["fc1"].values()
    assert first.target is None
    assert first.rest is None
    assert all(curve is first for curve in others)  # ranked alike: measured once


def test_the_table_names_every_scorer_and_layer(plain, batches, scorers):
    comparison = compare_scorers(plain, batches, scorers, deletion=(0, 0.5), held_out=batches)
    lines = str(comparison).splitlines()
    for name in scorers:
        assert sum(name in line for line in lines) >= 1
    for layer in ("conv1", "conv2", "fc1"):
        assert sum(line.startswith(layer) for line in lines) == 2
    rho = float(comparison.rank_correlation["fc1"][0, 1])
    assert f"{rho:.3f} / {float(comparison.overlap['fc1'][0, 1]):.2f}" in str(comparison)


# What is refused.


# Pictures.


def test_maps_are_the_heatmaps_of_those_that_have_one(plain, batches, unchanged):
    x, y = batches[0][0][:3], batches[0][1][:3]
    check = unchanged(plain)
    maps = relevance_maps(plain, x, [*RULES, xe.Random()], targets=y)
    assert [*maps] == RULES
    for rule, values in maps.items():
        assert torch.equal(values, xe.LRP(rule).heatmap(plain, x, y))
    check()
    with pytest.raises(ValueError, match="heatmap"):
        relevance_maps(plain, x, [xe.Random(), xe.Taylor()], targets=y)


def test_pictures_are_the_same_bytes_for_the_same_figures(plain, batches):
    x, y = batches[0][0][:2], batches[0][1][:2]
    scorers = {"epsilon": xe.LRP("epsilon"), "none": Fixed(conv1=[1.0] * 4, fc1=[1.0] * 12)}
    options = {"layers": ["conv1", "fc1"], "deletion": (0, 0.5), "held_out": batches}
    comparison = compare_scorers(plain, batches, scorers, **options)
    maps = relevance_maps(plain, x, RULES[:2], targets=y)
    for draw in (
        lambda: map_grid(x, maps),
        lambda: map_grid(x.expand(-1, 3, -1, -1), maps),
        lambda: rank_matrices(comparison),
        lambda: rank_matrices(comparison, layers=["fc1"]),
        lambda: deletion_curves(comparison.deletion),
    ):
        picture = draw()
        assert picture.startswith(b"\x89PNG")
        assert draw() == picture
    with pytest.raises(ValueError, match="nothing to draw"):
        deletion_curves({})


# The page.


@pytest.fixture(scope="module")
def results():
    return json.loads((DOCS / "results" / "compare-rules.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page():
    return (DOCS / "comparing-rules.md").read_text(encoding="utf-8")


def cell(value):
    text = f"{abs(value):.2f}"
    return f"−{text}" if value < 0 and text != "0.00" else text


def pair(left, right):
    return f"{cell(left)} / {cell(right)}"


@pytest.mark.parametrize("part", ["digits", "cifar10"])
def test_the_page_shows_the_committed_figures(results, page, part):
    shown, at = 0, results["shares"].index(0.1)
    assert results["top_share"] == 0.1
    assert results["command"] in page
    for layer, figures in results[part]["layers"].items():
        cells = map(pair, figures["rank_correlation"][0][1:], figures["overlap"][0][1:])
        row = f"| `{layer}` | {figures['units']} | {' | '.join(cells)} |"
        shown += row in page
        assert row in page or f"| `{layer}` | {figures['units']} |" not in page, layer
        if curves := figures.get("deletion"):
            assert [*curves] == results[part]["names"]
            cells = [pair(one["accuracy"][at], one["rest"][at]) for one in curves.values()]
            assert f"| `{layer}`, 10 % off | {' | '.join(cells)} |" in page
            cells = [cell(one["area"]) for one in curves.values()]
            assert f"| `{layer}`, area | {' | '.join(cells)} |" in page
    assert shown >= 4


def test_the_page_shows_the_committed_figures_before_the_output(results, page):
    found = results["before_output"]
    assert found["smallest_input"] == 0
    assert found["left_out_for_a_negative_logit"] == 1
    assert f"{found['samples'] - 1:,} samples (one with a negative logit" in page
    for name, row in found["lowest"].items():
        each = pair(row["sample_rank_correlation"], row["sample_overlap"])
        total = pair(row["sum_rank_correlation"], row["sum_overlap"])
        assert f"| {name} | {each} | {total} |" in page
