"""Rounding in float32 is told from canonizers that make another network."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from zennit.canonizers import Canonizer
from zennit.composites import EpsilonPlus

from xai_edit import LRP

X = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([0, 2])


def cancelling(offset):
    """A network whose batch norm subtracts what the layer before it has added."""
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.0)
    layer.bias.data.fill_(offset)
    norm.running_mean.fill_(offset)
    norm.running_var.fill_(1e-2)
    return nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, 3, bias=False)).eval()


def error_of_rounding(model):
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(X[:1].double())
        return float((model(X[:1]) - exact).abs().max() / exact.abs().max())


def test_rounding_is_warned_of_with_its_size_and_float64_is_silent():
    model = cancelling(5e4)
    error = error_of_rounding(model)
    assert 1e-3 < error < 0.05
    for _ in range(2):
        with pytest.warns(UserWarning, match="rounding in float32 changes its logits") as caught:
            LRP().heatmap(model, X, TARGETS)
        shown = float(re.search(r"by ([\d.]+)%", str(caught[0].message))[1]) / 100
        assert shown == pytest.approx(error, abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LRP().heatmap(model.double(), X.double(), TARGETS)
        LRP().heatmap(cancelling(10.0), X, TARGETS)


def test_rounding_that_makes_relevance_noise_is_refused_with_what_works(unchanged):
    model = cancelling(3e6)
    assert error_of_rounding(model) > 0.1
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"rounding in float32 .*\.double\(\)"):
        LRP()(model, X, TARGETS, ["0"])
    check()


def test_a_masked_class_does_not_hide_that_canonizers_make_another_network():
    class Doubling(Canonizer):
        def apply(self, root_module):
            root_module[1].weight.data *= 2
            return [self]

        def register(self):
            """Nothing is undone, as the guard does it."""

        def remove(self):
            """Nothing is undone."""

        def copy(self):
            return Doubling()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).eval()
    composite = EpsilonPlus(canonizers=[Doubling()])
    for bias in (0.0, -1e4):
        model[1].bias.data[1] = bias
        with pytest.warns(UserWarning, match="make another network of the model"):
            LRP(composite).heatmap(model, X, TARGETS)
