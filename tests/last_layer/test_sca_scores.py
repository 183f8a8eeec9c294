"""Class-association scores against per-sample autograd and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xai_edit.last_layer import EdgeScores, edge_scores


def last_layer(seed, *, samples=60, classes=5, features=7, signed=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(samples, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    labels = torch.arange(samples) % classes
    return x if signed else x.clamp(min=0), labels, weight, bias


def per_sample(x, labels, weight, bias):
    """∂ cross-entropy / ∂W of each sample by autograd, shape (samples, K, d)."""

    def loss(W, features, label):
        return nn.functional.cross_entropy((W @ features + bias)[None], label[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_accumulated_gradients_equal_autograd_of_each_sample(seed, signed, biased):
    x, labels, weight, bias = last_layer(seed, signed=signed)
    bias = bias if biased else torch.zeros_like(bias)
    gradients = per_sample(x, labels, weight, bias)
    for output in range(5):
        scores = edge_scores(x, labels, weight, bias if biased else None, output=output)
        for c in range(5):
            torch.testing.assert_close(
                scores.gradients[c], gradients[labels == c, output].abs().sum(0), rtol=1e-6, atol=0
            )
            torch.testing.assert_close(
                scores.activations[c], x[labels == c].abs().sum(0), rtol=1e-12, atol=0
            )
        assert scores.output == output


def test_the_own_class_keeps_its_gradient_where_the_probability_is_one():
    # Softmax of (60, 0) gives 1 in every dtype, yet 1 - p is e^-60 / (1 + e^-60).
    weight = torch.tensor([[60.0], [0.0]])
    scores = edge_scores(torch.ones(2, 1), torch.tensor([0, 1]), weight, None, output=0)
    exact = math.exp(-60) / (1 + math.exp(-60))
    assert scores.gradients[0, 0].item() == pytest.approx(exact, rel=1e-12)
    assert scores.gradients[1, 0].item() == pytest.approx(1.0, rel=1e-12)


def entropy(numbers):
    total = sum(numbers)
    return -sum(n / total * math.log(n / total) for n in numbers if n) if total else 0.0


@pytest.mark.parametrize(
    ("activations", "gradients", "expected"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], 1.0),
        ([1, 1, 1, 1], [5, 5, 0, 0], math.log(2) / math.log(4)),
        ([2, 2, 0, 0], [3, 3, 3, 3], math.log(4) / math.log(2)),
        ([1, 1, 1, 1], [0, 7, 0, 0], 0.0),
        ([1, 3, 0, 0], [1, 1, 0, 0], math.log(2) / entropy([1, 3])),
        # One class alone uses the feature: H(A) = 0 counts as 1e-3.
        ([0, 9, 0, 0], [1, 1, 1, 1], math.log(4) / 1e-3),
        ([0, 9, 0, 0], [0, 4, 0, 0], 0.0),
        # A dead feature.
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),
        ([1, 1, 1, 1], [0, 0, 0, 0], 0.0),
        ([1e-300, 1e-300, 0, 0], [1e-300, 0, 1e-300, 0], 1.0),
    ],
)
def test_class_association_of_known_distributions(activations, gradients, expected):
    A, G = (torch.tensor([row], dtype=torch.float64).T for row in (activations, gradients))
    scores = EdgeScores(1, A, G)
    assert scores.ca.item() == pytest.approx(expected, rel=1e-12)
    assert scores.sca.item() == pytest.approx(
        expected * gradients[1] * activations[1], rel=1e-12, abs=1e-300
    )


def test_another_class_may_be_absent():
    x, labels, weight, bias = last_layer(5)
    keep = labels != 3
    scores = edge_scores(x[keep], labels[keep], weight, bias, output=0)
    assert scores.activations[3].eq(0).all()
    assert scores.gradients[3].eq(0).all()
    assert scores.ca.isfinite().all()


@pytest.mark.parametrize(
    ("classes", "output", "message"),
    [
        ([0, 1, 2, 4], 3, "target: class 3 is absent from the data"),
        ([3], 3, "only class 3 has samples; SCA compares classes"),
        ([3], 1, "target: class 1 is absent"),
        ([0, 5], 0, "class 5 "),
        ([0, -1], 0, "class -1 "),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(classes, output, message):
    x, labels, weight, bias = last_layer(5)
    labels = torch.tensor(classes)[labels % len(classes)]
    with pytest.raises(ValueError, match=message):
        edge_scores(x, labels, weight, bias, output=output)
