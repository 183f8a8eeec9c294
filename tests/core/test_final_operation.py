"""Scores of a model that ends in a softmax, sigmoid or softplus are those of what goes into it."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerDeepLift, LayerGradientXActivation
from torch import nn
from torch.nn import functional as F
from zennit import composites as zc

import xai_edit as xe
from xai_edit.core.layers import run
from xai_edit.core.outputs import outputs_as, outputs_of

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Shared(nn.Module):
    """A network that calls its sigmoid in between and at the end."""

    def __init__(self, final=True):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head, self.act = nn.Linear(4, 5), nn.Linear(5, 3), nn.Sigmoid()
        self.final = final

    def forward(self, x):
        z = self.head(self.act(self.first(x)))
        return self.act(z) if self.final else z


class Ends(nn.Module):
    def __init__(self, end=lambda z: z, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act = nn.Linear(4, 5), nn.ReLU()
        self.head, self.end = nn.Linear(5, classes), end

    def forward(self, x):
        return self.end(self.head(self.act(self.first(x))))


ENDS = {
    "softmax": lambda z: z.softmax(1),
    "a module": nn.Softmax(1),
    "log-softmax": lambda z: F.log_softmax(z, dim=1),
    "the logarithm of a softmax": lambda z: torch.softmax(z, 1).clamp(1e-9).log(),
    "sigmoid": torch.sigmoid,
    "in place": lambda z: z.sigmoid_(),
    "a sigmoid module": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "a key": lambda z: {"logits": F.softplus(z), "other": z.sigmoid() * 2},
    "a view": lambda z: torch.sigmoid(z.unsqueeze(2)).squeeze(2),
    "a sequence": nn.Sequential(nn.Sigmoid(), nn.Flatten()),
}
SCORERS = {
    "LRP": xe.LRP,
    "LRP of Zennit's": lambda: xe.LRP(zc.EpsilonPlusFlat(), canonizers=()),
    "Taylor": xe.Taylor,
    "gradient": lambda: xe.CaptumLayer(LayerGradientXActivation),
    "DeepLift": lambda: xe.CaptumLayer(LayerDeepLift),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", SCORERS)
def test_scores_start_at_what_goes_in_and_say_so(end, kind):
    model = Ends(ENDS[end])
    expected = xe.score_units(Ends(), [(X, Y)], SCORERS[kind](), layers=["first", "head"])
    got = xe.score_units(model, [(X[:3], Y[:3]), (X[3:], Y[3:])], SCORERS[kind](), layers=expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert "output" not in expected.origin
    assert got.origin["output"].startswith("what goes into the final ")
    (found,) = xe.lrp.check_lrp(model, X).findings
    assert found.severity == "warning"
    assert "scores start at what goes into it" in found.message


@pytest.mark.parametrize("kind", ["LRP", "Taylor", "gradient"])
def test_a_module_that_is_also_called_before_the_end_acts_there(kind):
    got, expected = (
        xe.score_units(Shared(final), [(X, Y)], SCORERS[kind](), layers="first")["first"]
        for final in (True, False)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("end", [torch.sigmoid, nn.Sigmoid(), lambda z: torch.sigmoid(z)[:, 0]])
def test_one_sigmoid_is_the_logit_of_class_one(end):
    model, plain, labels = Ends(end, 1), Ends(classes=1), Y % 2
    got = xe.score_units(model, [(X, labels)], xe.LRP(), layers="first", target=1)
    expected = xe.score_units(plain, [(X, labels)], xe.LRP(), layers="first", target=1)
    torch.testing.assert_close(got["first"], expected["first"])
    data = [(X, labels, labels)]
    got = xe.evaluate_groups(model, data).to_dict()
    assert got == xe.evaluate_groups(plain, data).to_dict()


def total(outputs):
    return outputs.reshape(len(outputs), -1).sum(1)


@pytest.mark.parametrize(
    "end",
    [
        lambda z: z.softmax(1) * 2,
        lambda z: z.softmax(1).mul_(2),
        lambda z: torch.stack([1 - z[:, 0].sigmoid(), z[:, 0].sigmoid()], 1),
        lambda z: z.softmax(1)[:, 1],
        lambda z: 1 - z.softmax(1)[:, 1:2],
        lambda z: torch.ones(len(z)) - z.softmax(1)[:, 1],
    ],
)
@pytest.mark.parametrize("scorer", [xe.LRP(), xe.Activation(), xe.Taylor()])
def test_a_class_is_not_explained_by_probabilities(end, scorer):
    model = Ends(end)
    if isinstance(scorer, xe.Taylor) and model(X).squeeze().ndim > 1:
        return  # it takes the gradient of the likelihood
    with pytest.raises(ValueError, match=r"is computed from a s[a-z]*, so that it is no logit"):
        xe.score_units(model, [X], scorer, layers="first", target=1)
    score = xe.score_units(model, [X], xe.Activation(), layers="first", target=total)
    assert "output" not in score.origin


def test_a_softmax_whose_logits_are_overwritten_is_not_explained():
    model = Ends(lambda z: (z.softmax(1), z.add_(1))[0])
    with pytest.raises(ValueError, match="is computed from a softmax"):
        xe.score_units(model, [X], xe.Activation(), layers="first", target=1)


def test_one_probability_has_no_accuracy_at_logit_0():
    for end in (lambda z: z.softmax(1)[:, 1], lambda z: z.softmax(1).select(1, 1)):
        with pytest.raises(ValueError, match="computed from a softmax"):
            xe.evaluate_groups(Ends(end), [(X, Y % 2, Y % 2)])
        with pytest.raises(ValueError, match="computed from a softmax"):
            xe.SingleWeight().plan(Ends(end), [(X, Y % 2)], target=1)


def test_a_gate_at_the_end_stays_as_it_is():
    model, z = Ends(lambda z: z * z.sigmoid()), Ends()(X)
    got = xe.score_units(model, [X], xe.Activation(), layers="first", target=1)
    assert "output" not in got.origin
    torch.testing.assert_close(outputs_of(run(model, X), X), z * z.sigmoid())


def test_outputs_given_by_a_function_are_followed_too():
    model = Ends(lambda z: (z, torch.softmax(torch.cat([z, z], 1), 1)))
    with outputs_as(lambda output: output[1][:, :3]):
        got = xe.score_units(model, [(X, Y)], xe.LRP(), layers="first")
    expected = xe.score_units(Ends(), [(X, Y)], xe.LRP(), layers="first")
    torch.testing.assert_close(got["first"], expected["first"])
