"""Relevance through each weight, against dense matrices and the relevance of units."""

from __future__ import annotations

import pytest
import torch
from networks import without_biases
from torch import nn
from zennit import composites as zc
from zennit import rules as zr

from xai_edit import LRP, edge_relevance, score_units

SCORERS = {
    "epsilon": lambda: LRP("epsilon"),
    "gamma+epsilon": lambda: LRP("gamma+epsilon"),
    "alpha1beta0": lambda: LRP("alpha1beta0"),
    "alpha2beta1": lambda: LRP("alpha2beta1"),
    "epsilon-plus": lambda: LRP("epsilon-plus"),
    "epsilon-gamma-box": lambda: LRP("epsilon-gamma-box", low=-1.0, high=1.0),
    "flat": lambda: LRP(zc.EpsilonPlusFlat()),
    "w square": lambda: LRP(
        zc.LayerMapComposite([(nn.Conv2d, zr.WSquare()), (nn.Linear, zr.Flat())])
    ),
}


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1", "head"])
def test_over_the_outputs_it_sums_to_the_relevance_of_the_inputs(plain, digits, kind, name):
    images, labels = digits[0][:12].double(), digits[1][:12]
    model, data = plain.double(), [(images[:5], labels[:5]), (images[5:], labels[5:])]
    edges = edge_relevance(model, data, SCORERS[kind](), layers=name)
    units = score_units(model, data, SCORERS[kind](), layers=name + ":input")[name + ":input"]
    assert edges.samples == 12
    assert edges[name].shape == model.get_submodule(name).weight.shape
    by_input = edges[name].sum([axis for axis in range(edges[name].ndim) if axis != 1])
    torch.testing.assert_close(by_input, units, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1", "head"])
def test_without_biases_it_sums_over_the_inputs_to_the_relevance_of_the_outputs(
    plain, digits, name
):
    images, labels = digits[0][:12].double(), digits[1][:12]
    model = without_biases(plain)
    scorer = LRP("epsilon", epsilon=1e-12)
    edges = edge_relevance(model, [(images, labels)], scorer, layers=name)
    units = score_units(model, [(images, labels)], scorer, layers=name)
    torch.testing.assert_close(edges[name].flatten(1).sum(1), units[name], rtol=1e-7, atol=1e-9)


def test_through_a_linear_layer_it_is_x_w_r_over_z():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    z = layer(x).detach()
    top = nn.functional.one_hot(torch.tensor([0, 2, 1, 2]), 3) * z
    expected = sum(
        layer.weight.detach() * x[n] * (top[n] / (z[n] + 1e-6 * z[n].sign()))[:, None]
        for n in range(4)
    )
    edges = edge_relevance(
        nn.Sequential(layer), [(x, torch.tensor([0, 2, 1, 2]))], LRP("epsilon"), layers="0"
    )
    torch.testing.assert_close(edges["0"], expected, rtol=1e-12, atol=1e-12)
    best = expected.flatten().argsort(descending=True)[:3]
    assert edges.top("0", 3) == [(int(i) // 5, int(i) % 5) for i in best]


@pytest.mark.parametrize("kind", ["epsilon", "alpha2beta1", "gamma+epsilon"])
def test_a_convolution_equals_the_sum_over_its_positions(kind):
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 3, 3, padding=1).double(), nn.Linear(3 * 16, 4).double()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head)
    x, labels = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    edges = edge_relevance(model, [(x, labels)], LRP(kind), layers="0")["0"]
    # The same convolution as a linear layer on its patches, whose rule is that of the convolution.
    rule = LRP(kind).composite.module_map({}, "0", conv)

    class OnPatches(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Linear(18, 3).double()
            self.kernel.weight.data = conv.weight.data.flatten(1)
            self.kernel.bias.data = conv.bias.data
            self.relu, self.head = nn.ReLU(), head

        def forward(self, x):
            patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2)
            return self.head(self.relu(self.kernel(patches)).transpose(1, 2).flatten(1))

    composite = zc.MixedComposite([zc.NameMapComposite([(["kernel"], rule)]), LRP(kind).composite])
    patches = edge_relevance(
        OnPatches(), [(x, labels)], LRP(composite, canonizers=()), layers="kernel"
    )
    torch.testing.assert_close(edges.flatten(1), patches["kernel"], rtol=1e-9, atol=1e-9)


def test_the_model_stays_and_batch_norms_are_merged(norm, digits, unchanged):
    images, labels = digits[0][:6], digits[1][:6]
    norm.train()
    check = unchanged(norm)
    edges = edge_relevance(norm, [(images, labels)], LRP("epsilon-plus"))
    check()
    assert edges.origin["canonizers"] == ["ExactMergeBatchNorm"]
    units = score_units(norm, [(images, labels)], LRP("epsilon-plus"), layers="body.3:input")
    torch.testing.assert_close(
        edges["body.3"].sum((0, 2, 3)), units["body.3:input"], rtol=1e-4, atol=1e-4
    )
