"""Average precision per subspace against scikit-learn on scores made by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from xai_edit import PCA, Features, Subspaces, collect_features, predictiveness

SAMPLE = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 9])
HAS = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 1])


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    subspaces = Subspaces(
        torch.from_numpy(basis[:, :4].copy()), (1, 2, 1), torch.from_numpy(rng.normal(size=5))
    )
    a, c = (torch.from_numpy(rng.normal(size=(16, 5))) for _ in range(2))
    return subspaces, a, c


def by_hand(subspaces, a, c):
    precision = []
    for k in range(len(subspaces)):
        U, mean = subspaces.block(k).numpy(), subspaces.mean.numpy()
        scores = np.zeros(10)
        for vector, sample in enumerate(SAMPLE.tolist()):
            if c is None:
                scores[sample] += np.sum(((a[vector].numpy() - mean) @ U) ** 2)
            else:
                scores[sample] += (a[vector].numpy() @ U) @ (c[vector].numpy() @ U)
        precision.append(average_precision_score(HAS.numpy(), scores))
    return precision


@pytest.mark.parametrize("contexts", [True, False])
def test_it_is_the_average_precision_of_relevance_or_energy(problem, contexts):
    subspaces, a, c = problem
    c = c if contexts else None
    expected = by_hand(subspaces, a, c)
    features = Features(a, c, SAMPLE, attribute=HAS)
    assert predictiveness(subspaces, features) == expected
    assert len({*expected}) > 1


@pytest.mark.parametrize("spurious", [HAS, HAS.bool(), HAS.numpy(), HAS.tolist(), HAS.double()])
def test_the_feature_given_goes_before_the_features_own(problem, spurious):
    subspaces, a, c = problem
    features = Features(a, c, SAMPLE, attribute=1 - HAS)
    assert predictiveness(subspaces, features, spurious) == by_hand(subspaces, a, c)


def test_a_direction_that_is_the_feature_has_average_precision_one():
    has = torch.tensor([0, 1, 0, 1, 1, 0])
    a = torch.stack([5.0 * has, torch.tensor([3.0, 0, 3, 0, 0, 3])], 1)
    subspaces = Subspaces(torch.eye(2).double(), (1, 1), torch.zeros(2).double())
    assert predictiveness(subspaces, Features(a, attribute=has)) == [1.0, pytest.approx(0.5)]


def test_a_planted_feature_is_found_in_a_real_layer(plain, digits):
    images, labels = digits[0][:300].clone(), digits[1][:300]
    has = torch.arange(300) % 3 == 0
    images[has, 0, :, 0] = 3.0
    features = collect_features(
        plain, [(images, labels, has.long())], layer="conv1", positions=None
    )
    table = predictiveness(PCA(3).fit(features), features)
    assert max(table) >= 0.9
    assert all(0 <= value <= 1 for value in table)


@pytest.mark.parametrize(
    "spurious",
    [None, torch.zeros(10), torch.ones(10), HAS[:9], torch.arange(10), HAS[:, None].repeat(2, 1)],
    ids=["none", "never", "always", "short", "many", "long"],
)
def test_a_feature_that_is_missing_or_not_yes_or_no_is_refused(problem, spurious):
    subspaces, a, c = problem
    with pytest.raises(ValueError, match="spurious"):
        predictiveness(subspaces, Features(a, c, SAMPLE), spurious)


@pytest.mark.parametrize("values", [(1, 2), (-1, -2)])
def test_two_values_that_are_not_yes_and_no_are_refused(problem, values):
    subspaces, a, c = problem
    with pytest.raises(ValueError, match="spurious"):
        predictiveness(subspaces, Features(a, c, SAMPLE), torch.tensor(values)[HAS])
