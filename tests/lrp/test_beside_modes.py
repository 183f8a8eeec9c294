"""What function modes know of a tensor stays known where a hook returns another in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zennit.core import Stabilizer
from zennit.rules import Pass

from xai_edit import LRP, FunctionalCanonizer
from xai_edit.lrp.propagation import quotient


class Squashed(nn.Module):
    """A gate that is a module of its own."""

    def forward(self, x):
        return torch.sigmoid(x)


class Gated(nn.Module):
    """A signal times a gate of the same shape, and a softmax with a module behind it."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.signal, self.inner, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.gate, self.last = Squashed(), last

    def forward(self, x):
        logits = self.head(self.signal(x) * self.gate(self.inner(x)))
        return logits if self.last is None else self.last(torch.softmax(logits, 1))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = torch.zeros(5, dtype=torch.int64)


def test_a_gate_stays_one_where_its_layer_is_scored():
    model = Gated(None).double()
    alone = LRP()(model, X, TARGETS, ["signal"])["signal"]
    beside = LRP()(model, X, TARGETS, ["signal", "gate"])
    assert torch.equal(beside["signal"], alone)
    assert not beside["gate"].any()
    torch.testing.assert_close(
        alone.sum(1), LRP()(model, X, TARGETS, ["head:input"])["head:input"].sum(1)
    )


@pytest.mark.parametrize("last", [nn.Dropout(), nn.Flatten()])
def test_a_softmax_before_a_module_with_a_rule_is_still_the_last_operation(last):
    last.lrp_rule = Pass()
    scores, plain = (
        LRP()(Gated(one).double(), X, TARGETS, ["signal", "head"]) for one in (last, None)
    )
    for name, expected in plain.items():
        assert torch.equal(scores[name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quotient_is_zennits_bit_by_bit(dtype):
    z = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 2.0, -3.0], dtype=dtype)
    relevance = torch.arange(1.0, 7.0, dtype=dtype)
    for stabilizer in (
        Stabilizer(1e-6),
        Stabilizer(1e-3, clip=True),
        Stabilizer(norm_scale=True, dim=0),
    ):
        assert torch.equal(quotient(relevance, z, stabilizer), relevance / stabilizer(z))
    positive = z.abs()
    expected = relevance / Stabilizer(1e-6)(positive)
    assert torch.equal(quotient(relevance, positive, Stabilizer(1e-6), positive=True), expected)


def test_two_backward_passes_of_one_graph_are_the_same():
    class Scored(nn.Module):
        def forward(self, x):
            return torch.matmul(x, x.mT) + x.mean()

    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    FunctionalCanonizer().apply(model := Scored())
    output = model(x)
    first, second = (
        torch.autograd.grad(output, x, output.detach(), retain_graph=True)[0] for _ in range(2)
    )
    assert first.any()
    assert torch.equal(first, second)
