"""Each rule re-derived as a dense matrix in float64, and the choice of canonizers."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import pytest
import torch
from networks import Crosswise, dense, without_biases
from torch import nn
from zennit import composites as zc
from zennit import rules as zr
from zennit.canonizers import SequentialMergeBatchNorm

from xai_edit import LRP, fit_patterns, score_units
from xai_edit.core.layers import CONVOLUTIONS
from xai_edit.core.trace import trace
from xai_edit.lrp.canonizers import choose_canonizers
from xai_edit.lrp.functional_canonizer import FunctionalCanonizer
from xai_edit.lrp.presets import PRESETS, preset

STABILIZER = 1e-6
# Zennit before 1.0 keeps a merged batch norm's eps: each one scales by 1 / sqrt(1 + 1e-5).
SLACK_OF_A_MERGED_NORM = 0.0 if int(version("zennit").split(".")[0]) >= 1 else 5e-6
LOW, HIGH = -1.5, 2.0

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 2)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 2)),
}


def share(parts, bias, stabilizer=STABILIZER):
    """Each input's share of each output: parts (outputs, inputs) over their stabilised sum."""
    total = parts.sum(1) + bias
    return parts / torch.where(total < 0, total - stabilizer, total + stabilizer)[:, None]


def lrp_epsilon(x, W, b):
    return share(W * x, b)


def lrp_alpha_beta(alpha, beta):
    def matrix(x, W, b):
        z = W * x
        positive, negative = z.clamp(min=0), z.clamp(max=0)
        return alpha * share(positive, b.clamp(min=0)) - beta * share(negative, b.clamp(max=0))

    return matrix


def lrp_gamma(gamma, with_bias=1.0):
    def matrix(x, W, b):
        z, c = W * x, with_bias * b
        up = share(z + gamma * z.clamp(min=0), c + gamma * c.clamp(min=0))
        down = share(z + gamma * z.clamp(max=0), c + gamma * c.clamp(max=0))
        return torch.where((z.sum(1) + b > 0)[:, None], up, down)

    return matrix


def lrp_box(x, W, b):
    return share(W * x - LOW * W.clamp(min=0) - HIGH * W.clamp(max=0), torch.zeros_like(b))


def lrp_w_square(x, W, b):
    return share(W**2, b**2)


def lrp_flat(x, W, b):
    return share((W != 0).double(), torch.zeros_like(b))


def without_bias(matrix):
    return lambda x, W, b: matrix(x, W, torch.zeros_like(b))


def by_type(rule):
    return zc.LayerMapComposite([((*CONVOLUTIONS, nn.Linear), rule)])


# Per rule: the scorer, its matrix for convolutions and its matrix for linear layers.
RULES = {
    "epsilon": (lambda: LRP("epsilon"), lrp_epsilon, lrp_epsilon),
    "gamma+epsilon": (lambda: LRP("gamma+epsilon"), lrp_gamma(0.25), lrp_epsilon),
    "alpha2beta1": (lambda: LRP("alpha2beta1"), lrp_alpha_beta(2, 1), lrp_epsilon),
    "epsilon-plus": (lambda: LRP("epsilon-plus"), lrp_alpha_beta(1, 0), lrp_epsilon),
    "epsilon-gamma-box": (
        lambda: LRP("epsilon-gamma-box", low=LOW, high=HIGH),
        lrp_box,
        lrp_epsilon,
    ),
    "user's LayerMapComposite of Gamma": (
        lambda: LRP(by_type(zr.Gamma(gamma=0.5))),
        lrp_gamma(0.5),
        lrp_gamma(0.5),
    ),
    "user's NameMapComposite of WSquare": (
        lambda: LRP(zc.NameMapComposite([(["0"], zr.WSquare())])),
        lrp_w_square,
        lrp_w_square,
    ),
}
OF_ZENNIT = {
    "Epsilon(0.5)": (zr.Epsilon(0.5), lambda x, W, b: share(W * x, b, 0.5)),
    "Epsilon, no bias": (zr.Epsilon(zero_params="bias"), without_bias(lrp_epsilon)),
    "Gamma(2), no bias": (zr.Gamma(2.0, zero_params="bias"), lrp_gamma(2.0, with_bias=0.0)),
    "ZPlus, no bias": (zr.ZPlus(zero_params="bias"), without_bias(lrp_alpha_beta(1, 0))),
    "AlphaBeta(3, 2)": (zr.AlphaBeta(3, 2), lrp_alpha_beta(3, 2)),
    "WSquare, no bias": (zr.WSquare(zero_params="bias"), without_bias(lrp_w_square)),
    "Flat": (zr.Flat(), lrp_flat),
    "Norm": (zr.Norm(), lrp_epsilon),
}
RULES |= {
    name: (lambda rule=rule: LRP(by_type(rule)), matrix, matrix)
    for name, (rule, matrix) in OF_ZENNIT.items()
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_dense_matrix(rule, kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    assert_dense(rule, nn.Sequential(layer, nn.Flatten()), shape)


NORMS = {
    "linear": nn.BatchNorm1d,
    "conv2d, grouped": nn.BatchNorm2d,
    "conv3d": nn.BatchNorm3d,
    "transposed conv2d": nn.BatchNorm2d,
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("rule", ["epsilon", "AlphaBeta(3, 2)", "Gamma(2), no bias"])
def test_a_rule_with_a_batch_norm_behind_is_that_of_the_product_of_both(rule, kind, unchanged):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    units = layer(torch.zeros(1, *shape)).shape[1]
    norm = NORMS[kind](units)
    with torch.no_grad():
        for values in (*norm.parameters(), norm.running_var):
            values.uniform_(0.5, 1.5)
        norm.running_mean.normal_()
    model = nn.Sequential(layer, norm, nn.Flatten()).double().eval()
    check = unchanged(model)
    assert_dense(rule, model, shape, 1e-9 + 10 * SLACK_OF_A_MERGED_NORM)
    check()


@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        (zr.Pass(), lambda x, R: R),
        (zr.ReLUDeconvNet(), lambda x, R: R.clamp(min=0)),
        (zr.ReLUGuidedBackprop(), lambda x, R: R.clamp(min=0) * (x > 0)),
        (zr.ReLUBetaSmooth(3.0), lambda x, R: R * torch.sigmoid(3 * x)),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_rule_of_an_activation_is_its_formula(rule, formula):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    x, targets = torch.randn(5, 7).double(), torch.tensor([0, 1, 2, 3, 1])
    scorer = LRP(zc.LayerMapComposite([(nn.ReLU, rule)]))
    got = scorer.relevance(model, x, targets, ["1:input", "1"])
    expected = formula(model[0](x).detach(), got["1"])
    torch.testing.assert_close(got["1:input"], expected, rtol=1e-12, atol=1e-14)


def assert_dense(rule, model, shape, tolerance=1e-9):
    """Compare the relevance at the first layer with the rule's matrix of the whole, linear model.

    With these rules, relevance at the layer's output is the logit of the target.
    """
    x = torch.empty(5, *shape, dtype=torch.float64).uniform_(LOW, HIGH)
    W, b = dense(model, shape)
    scorer, conv_matrix, linear_matrix = RULES[rule]
    matrix = linear_matrix if isinstance(model[0], nn.Linear) else conv_matrix
    targets = torch.tensor([0, 1, 2, 3, 1])
    got = scorer().relevance(model, x, targets, ["0:input", "0"])
    logits = x.flatten(1) @ W.T + b
    for sample, target in enumerate(targets.tolist()):
        upper = torch.zeros(len(b), dtype=torch.float64)
        upper[target] = logits[sample, target]
        lower = matrix(x[sample].flatten(), W, b).T @ upper
        at_output, at_input = got["0"][sample].flatten(), got["0:input"][sample].flatten()
        torch.testing.assert_close(at_output, upper, rtol=tolerance, atol=1e-12)
        torch.testing.assert_close(at_input, lower, rtol=tolerance, atol=1e-12)


def test_every_preset_makes_a_new_composite():
    parameters = {"epsilon-gamma-box": {"low": 0.0, "high": 1.0}}
    patterns = fit_patterns(nn.Sequential(nn.Linear(2, 2)), [torch.randn(9, 2)])
    parameters |= {name: {"patterns": patterns} for name in PRESETS if name.startswith("pattern")}
    for name in PRESETS:
        first, second = (preset(name, **parameters.get(name, {})) for _ in range(2))
        assert isinstance(first, zc.Composite)
        assert first is not second


def test_a_rule_of_the_composite_goes_before_the_modules_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 4)).double()
    x, targets = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 1, 2])
    (expected,) = LRP("epsilon").relevance(model, x, targets, ["0:input"]).values()
    model[0].lrp_rule = zr.WSquare()
    (got,) = LRP("epsilon").relevance(model, x, targets, ["0:input"]).values()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


# Not alpha2beta1: a unit without negative contributions loses that share of its relevance.
@pytest.mark.parametrize("preset_name", ["epsilon", "gamma+epsilon", "alpha1beta0"])
@pytest.mark.parametrize("initial", ["logit", "one"])
def test_relevance_is_conserved_without_biases(norm, digits, preset_name, initial):
    model, layers = without_biases(norm), ["body.0", "body.3", "fc", "fc:input"]
    images, labels = digits[0][:20].double(), digits[1][:20]
    relevance = LRP(preset_name, initial=initial)(model, images, labels, layers)
    logits = model(images)[range(20), labels].detach()
    expected = logits if initial == "logit" else torch.ones_like(logits)
    # The stabiliser of 1e-6 keeps back a share of it at every unit that is nearly silent.
    for name in relevance:
        torch.testing.assert_close(relevance[name].sum(1), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("scorer", "named"),
    [
        (LRP("epsilon"), ["ExactMergeBatchNorm"]),
        (LRP("epsilon", canonizers=()), []),
        (LRP("epsilon", canonizers=[SequentialMergeBatchNorm()]), ["SequentialMergeBatchNorm"]),
        (LRP(zc.EpsilonPlus()), ["ExactMergeBatchNorm"]),
        (
            LRP(zc.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])),
            ["SequentialMergeBatchNorm"],
        ),
    ],
    ids=["auto", "none", "given", "auto for a composite", "the composite's own"],
)
def test_origin_names_the_canonizers_that_were_applied(plain, norm, batches, scorer, named):
    assert score_units(plain, batches[:1], LRP("epsilon")).origin["canonizers"] == []
    assert score_units(norm, batches[:1], scorer).origin["canonizers"] == named


def test_batch_norms_are_merged_along_the_data_and_the_network_stays_the_same():
    model, x = Crosswise().spoil().eval(), torch.rand(8, 3, 8, 8)
    canonizer, _ = choose_canonizers(model, trace(model, x))
    assert canonizer.name_map == [(["one"], "first"), (["two"], "second")]
    scores = score_units(model, [x], LRP("epsilon"), layers="fc", target=1)
    logits = model(x)[:, 1].double()
    torch.testing.assert_close(scores["fc"][1], logits.sum(), rtol=1e-4, atol=1e-4)


def test_canonizers_that_make_another_network_are_warned_of_at_every_call():
    model, data = Crosswise().spoil().eval(), torch.rand(2, 3, 8, 8)
    wrong = LRP(canonizers=[SequentialMergeBatchNorm(), FunctionalCanonizer()])
    for _ in range(2):
        with pytest.warns(UserWarning, match="SequentialMergeBatchNorm.* make another network"):
            score_units(model, [data], wrong, layers=["one"], target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_units(model, [data], LRP(), layers=["one"], target=0)
        score_units(model, [data], LRP(canonizers=()), layers=["fc"], target=0)


class Noisy(Crosswise):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


def test_a_network_that_computes_something_else_at_each_call_is_refused():
    with pytest.raises(ValueError, match="something else at each call"):
        score_units(Noisy().eval(), [torch.rand(2, 3, 8, 8)], LRP(), layers=["fc"], target=0)


class LaterFirst(nn.Module):
    """A network whose last convolution was registered first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.later, self.first = nn.Conv2d(4, 4, 3), nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.later(self.first(x).relu()).relu().flatten(1))


def test_the_rule_of_the_first_layer_is_that_of_the_first_on_the_way_of_the_data():
    model = LaterFirst().double()
    ordered = nn.Sequential(
        *(model.first, nn.ReLU(), model.later, nn.ReLU(), nn.Flatten(), model.head)
    )
    x, targets = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    scorer = LRP("epsilon-gamma-box", low=0.0, high=1.0)
    expected = scorer.heatmap(ordered, x, targets)
    torch.testing.assert_close(scorer.heatmap(model, x, targets), expected)
