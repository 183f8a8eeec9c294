"""DeepLift is refused where its attributions do not add up to f(x) − f(baseline)."""

from __future__ import annotations

import captum.attr as ca
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xai_edit import CaptumLayer, score_units
from xai_edit.scoring.completeness import baseline_of, difference, error_at_inputs, relative_error

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 0, 1])


class Net(nn.Module):
    def __init__(self, act, beside=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.head = nn.Linear(3, 6), act, nn.Linear(6, 2)
        self.beside = nn.Linear(3, 2) if beside else None
        self.double()

    def forward(self, x):
        z = self.head(self.act(self.first(x)))
        return z if self.beside is None else z + self.beside(x)


WRONG = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "PReLU": nn.PReLU(),
    "norm": nn.LayerNorm(6),
}
deep_lift = CaptumLayer(ca.LayerDeepLift)
pytestmark = pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")


@pytest.mark.parametrize("kind", WRONG)
def test_deep_lift_is_refused_where_it_does_not_add_up(kind):
    act = WRONG[kind]
    model = Net((lambda x: act(x)) if callable(act) and not isinstance(act, nn.Module) else act)
    values = ca.LayerDeepLift(model, model.first).attribute(X, target=Y).sum(1)
    expected = (model(X) - model(0 * X)).gather(1, Y[:, None])[:, 0]
    figure = float((values - expected).abs().sum() / expected.abs().sum())
    assert figure > 0.01
    with pytest.raises(ValueError, match=r"does not add up .* 'first' .* differ by [\d.]+%"):
        score_units(model, [(X, Y)], deep_lift, layers="first")
    score_units(model, [(X, Y)], deep_lift, layers="head:input")  # behind it, it adds up


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("baseline", [None, 0.5, torch.ones(1, 3).double(), X.flip(0)])
def test_with_modules_it_is_the_rescale_rule(baseline, beside):
    model = Net(nn.ReLU(), beside)
    scorer = CaptumLayer(ca.LayerDeepLift, **({} if baseline is None else {"baselines": baseline}))
    got = score_units(model, [(X, Y)], scorer, layers="first")["first"]
    b = torch.zeros_like(X) + (0 if baseline is None else baseline)
    a, a0 = model.first(X), model.first(b)
    slope = (a.relu() - a0.relu()) / (a - a0)
    expected = ((a - a0) * slope * model.head.weight[Y]).sum(0)
    torch.testing.assert_close(got, expected.detach())


def test_several_baselines_are_averaged():
    model, baselines = Net(nn.ReLU()), torch.randn(5, 3).double()
    given = {"target": Y}
    expected = (model(X) - model(baselines).mean(0)).gather(1, Y[:, None])[:, 0]
    torch.testing.assert_close(difference(model, [X], baselines, given), expected)
    scorer = CaptumLayer(ca.LayerDeepLiftShap, baselines=baselines)
    assert score_units(model, [(X, Y)], scorer, layers="first")["first"].any()
    with pytest.raises(ValueError, match="LayerDeepLiftShap does not add up"):
        score_units(Net(lambda x: x.relu()), [(X, Y)], scorer, layers="first")


def test_the_error_is_relative_to_the_sum_of_differences():
    assert relative_error(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -2.0])) == 6 / 4
    assert torch.equal(baseline_of(lambda: X, X), X)
    # Of one functional ReLU Captum takes the gradient times x − baseline.
    model = Net(lambda x: x.relu())
    x = X.clone().requires_grad_()
    z = model(x).gather(1, Y[:, None]).sum()
    sums = (torch.autograd.grad(z, x)[0] * X).sum(1)
    expected = relative_error(sums, difference(model, [X], None, {"target": Y}))
    got = error_at_inputs(ca.DeepLift, model, [X], {"target": Y})
    assert got == pytest.approx(expected, rel=1e-9)


def test_a_mask_or_token_numbers_are_no_obstacle():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.act, self.head = nn.Embedding(9, 4), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, tokens, mask):
            return self.head((self.act(self.embed(tokens)) * mask[:, :, None]).mean(1))

    inputs = {"tokens": torch.randint(9, (4, 5)), "mask": torch.ones(4, 5), "labels": Y}
    data = [inputs]
    assert score_units(Tokens(), data, deep_lift, layers="embed")["embed"].any()
