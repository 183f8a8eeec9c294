"""The average precisions of a subspace against scikit-learn on scores made by hand."""

import importlib
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from xai_edit import Subspaces, predictiveness
from xai_edit.concepts import Features

# The function of the same name hides the module.
module = importlib.import_module("xai_edit.concepts.predictiveness")

SAMPLE = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 9])
HAS = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 1])
LABELS = torch.tensor([4, 4, 2, 2, 4, 2, 4, 0, 4, 4])


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    subspaces = Subspaces(
        torch.from_numpy(basis[:, :4].copy()), (1, 2, 1), torch.from_numpy(rng.normal(size=5))
    )
    a, c = (torch.from_numpy(rng.normal(size=(16, 5))) for _ in range(2))
    return subspaces, a, c


def scores_by_hand(subspaces, a, c):
    """One row a subspace."""
    scores = np.zeros((len(subspaces), 10))
    for k in range(len(subspaces)):
        U, mean = subspaces.block(k).numpy(), subspaces.mean.numpy()
        for vector, sample in enumerate(SAMPLE.tolist()):
            if c is None:
                scores[k, sample] += np.sum(((a[vector].numpy() - mean) @ U) ** 2)
            else:
                scores[k, sample] += (a[vector].numpy() @ U) @ (c[vector].numpy() @ U)
    return scores


def columns_by_hand(scores, has, of_class):
    has = has == 1
    every = np.full(len(has), True)
    return {
        name: average_precision_score(truth[among], scores[among])
        for name, truth, among in (
            ("spurious", has, every),
            ("spurious_in_class", has, of_class),
            ("spurious_in_rest", has, ~of_class),
            ("class", of_class, every),
            ("class_with", of_class, has),
            ("class_without", of_class, ~has),
            ("rest_with", ~of_class, has),
            ("rest_without", ~of_class, ~has),
        )
    }


@pytest.mark.parametrize(("explained", "target"), [(0, 0), (2, 2), (7, 4), ("label", 4), (None, 4)])
def test_the_class_is_the_one_that_the_contexts_explain(problem, explained, target):
    """Else the one that has the feature most."""
    subspaces, a, c = problem
    features = Features(a, c, SAMPLE, LABELS, HAS, {"target": explained})
    assert predictiveness(subspaces, features).target == target


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize("target", [None, 2, 4])
def test_all_are_scikit_learns_of_relevance_or_energy(problem, contexts, target):
    subspaces, a, c = problem
    c = c if contexts else None
    table = predictiveness(subspaces, Features(a, c, SAMPLE, LABELS, HAS), target=target)
    # Of class 4 four in six samples have the feature, of 2 one in three, of 0 none.
    assert table.target == (4 if target is None else target)
    of_class = LABELS.numpy() == table.target
    for k, scores in enumerate(scores_by_hand(subspaces, a, c)):
        expected = columns_by_hand(scores, HAS.numpy(), of_class)
        assert {name: entry.value for name, entry in table.rows[k].items()} == pytest.approx(
            expected, abs=1e-12
        )
    assert table.column("spurious") == [row["spurious"].value for row in table.rows]
    assert len({*table.column("spurious")}) > 1
    assert table.score == ("relevance" if contexts else "energy")


def test_chance_is_the_share_of_positive_samples(problem):
    subspaces, a, c = problem
    table = predictiveness(subspaces, Features(a, c, SAMPLE, LABELS, HAS))
    assert [*table.groups.values()] == [4, 2, 1, 3]
    expected = [5 / 10, 4 / 6, 1 / 4, 6 / 10, 4 / 5, 2 / 5, 1 / 5, 3 / 5]
    assert [*table.chance.values()] == pytest.approx(expected)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    """The value of all samples together against intervals from parts of them."""
    generator = torch.Generator().manual_seed(1)
    has = torch.arange(40_000) % 2
    a = (torch.randn(40_000, generator=generator).double() + has)[:, None]
    subspaces = Subspaces(torch.eye(1).double(), (1,), torch.full((1,), -10.0).double())
    truth = average_precision_score(has.numpy(), a[:, 0].numpy())
    held = 0
    for part in range(200):
        rows = slice(200 * part, 200 * (part + 1))
        features = Features(a[rows], attribute=has[rows])
        low, high = predictiveness(subspaces, features, resamples=400).rows[0]["spurious"].interval
        held += low <= truth <= high
    assert 0.9 <= held / 200 <= 0.99


def test_memory_bounds_change_no_value_and_the_seed_fixes_the_intervals(problem, monkeypatch):
    subspaces, a, c = problem
    features = Features(a, c, SAMPLE, LABELS, HAS)
    table = predictiveness(subspaces, features)
    assert predictiveness(subspaces, features) == table
    assert predictiveness(subspaces, features, seed=1) != table
    monkeypatch.setattr(module, "VECTORS", 3)
    for row, other in zip(table.rows, predictiveness(subspaces, features).rows, strict=True):
        for name, entry in row.items():
            assert entry.value == pytest.approx(other[name].value, abs=1e-12)


@pytest.mark.parametrize("spurious", [HAS, HAS.bool(), HAS.numpy(), HAS.tolist(), HAS.double()])
def test_what_is_given_goes_before_the_features_own(problem, spurious):
    subspaces, a, c = problem
    expected = predictiveness(subspaces, Features(a, c, SAMPLE, LABELS, HAS))
    features = Features(a, c, SAMPLE, LABELS.flip(0), 1 - HAS)
    found = predictiveness(subspaces, features, attribute=spurious, labels=LABELS)
    assert found == expected


def test_without_labels_only_the_feature_is_looked_for(problem):
    subspaces, a, c = problem
    table = predictiveness(subspaces, Features(a, c, SAMPLE, attribute=HAS))
    assert table.target is None
    known = {name for name, entry in table.rows[0].items() if entry is not None}
    assert known == {name for name, chance in table.chance.items() if chance is not None}
    assert known == {"spurious"}
    with pytest.raises(ValueError, match="column: 'class' given; there are"):
        table.column("class")


def test_a_column_of_samples_that_are_all_alike_is_not_known(problem):
    """Every sample of the class has the feature, so nothing is to be told within it."""
    subspaces, a, c = problem
    table = predictiveness(subspaces, Features(a, c, SAMPLE, HAS, HAS))
    known = [name for name, entry in table.rows[0].items() if entry is not None]
    assert known == ["spurious", "class"]
    alike = predictiveness(subspaces, Features(a, c, SAMPLE, torch.full((10,), 3), HAS))
    known = [name for name, entry in alike.rows[0].items() if entry is not None]
    assert known == ["spurious", "spurious_in_class"]
    assert "–" in str(alike)


def test_the_table_is_text_and_json(problem):
    subspaces, a, c = problem
    table = predictiveness(subspaces, Features(a, c, SAMPLE, LABELS, HAS), resamples=50)
    told = json.loads(json.dumps(table.to_dict()))
    assert told["target"] == 4
    assert told["bootstrap"] == {"confidence": 0.95, "resamples": 50, "seed": 0}
    assert [row["class"]["value"] for row in told["subspaces"]] == table.column("class")
    lines = str(table).splitlines()
    assert "for class 4" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2", "chance"]
    assert f"{table.column('spurious')[1]:.3f}" in lines[4]


def test_of_many_subspaces_the_text_shows_those_that_tell_the_feature_best():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 30, generator=generator)
    subspaces = Subspaces(torch.eye(30).double(), (1,) * 30, torch.zeros(30).double())
    table = predictiveness(subspaces, Features(a, attribute=torch.arange(60) % 2), resamples=20)
    shown = [int(line.split()[0]) for line in str(table).splitlines()[3:-1]]
    best = np.argsort(-np.array(table.column("spurious")), kind="stable")[:20]
    assert shown == sorted(best.tolist())


@pytest.mark.parametrize(
    "spurious",
    [None, torch.zeros(10), torch.ones(10), HAS[:9], torch.arange(10), HAS + 1],
    ids=["none", "never", "always", "short", "many", "one and two"],
)
def test_a_feature_that_is_missing_or_not_yes_or_no_is_refused(problem, spurious):
    subspaces, a, c = problem
    with pytest.raises(ValueError, match="attribute: one yes"):
        predictiveness(subspaces, Features(a, c, SAMPLE), attribute=spurious)
