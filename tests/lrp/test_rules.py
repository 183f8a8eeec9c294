"""Each rule re-derived as a dense matrix in float64, and the choice of canonizers."""

from __future__ import annotations

import copy
import re
import warnings
from importlib.metadata import version

import pytest
import torch
import torchvision
from torch import nn
from zennit import composites as zc
from zennit import rules as zr
from zennit.canonizers import SequentialMergeBatchNorm

from xai_edit import LRP, Taylor, check_model, fit_patterns, score_units
from xai_edit.core.layers import CONVOLUTIONS
from xai_edit.core.trace import trace
from xai_edit.lrp.canonizers import ExactMergeBatchNorm, choose_canonizers
from xai_edit.lrp.functional_canonizer import FunctionalCanonizer
from xai_edit.lrp.presets import PRESETS, preset

STABILIZER = 1e-6
# Zennit before 1.0 keeps a merged batch norm's eps: each one scales by 1 / sqrt(1 + 1e-5).
SLACK_OF_A_MERGED_NORM = 0.0 if int(version("zennit").split(".")[0]) >= 1 else 5e-6
LOW, HIGH = -1.5, 2.0

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear, no bias": (lambda: nn.Linear(7, 5, bias=False), (7,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 4, 4)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 2)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 2)),
}


def dense(layer, shape):
    """W (outputs, inputs) and b (outputs,) of a layer, from its answers to unit vectors."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    with torch.no_grad():
        offset = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        weight = (layer(units.reshape(-1, *shape)).flatten(1) - offset).T
    return weight, offset


def share(parts, bias):
    """Each input's share of each output: parts (outputs, inputs) over their stabilised sum."""
    total = parts.sum(1) + bias
    return parts / torch.where(total < 0, total - STABILIZER, total + STABILIZER)[:, None]


def lrp_epsilon(x, W, b):
    return share(W * x, b)


def lrp_alpha_beta(alpha, beta):
    def matrix(x, W, b):
        z = W * x
        positive, negative = z.clamp(min=0), z.clamp(max=0)
        return alpha * share(positive, b.clamp(min=0)) - beta * share(negative, b.clamp(max=0))

    return matrix


def lrp_gamma(gamma):
    def matrix(x, W, b):
        z = W * x
        up = share(z + gamma * z.clamp(min=0), b + gamma * b.clamp(min=0))
        down = share(z + gamma * z.clamp(max=0), b + gamma * b.clamp(max=0))
        return torch.where((z.sum(1) + b > 0)[:, None], up, down)

    return matrix


def lrp_box(x, W, b):
    return share(W * x - LOW * W.clamp(min=0) - HIGH * W.clamp(max=0), torch.zeros_like(b))


def lrp_w_square(x, W, b):
    return share(W**2, b**2)


def by_name(rule):
    return zc.NameMapComposite([(["0"], rule)])


def by_type(rule):
    return zc.LayerMapComposite([((*CONVOLUTIONS, nn.Linear), rule)])


# Per rule: the scorer, its matrix for convolutions and its matrix for linear layers.
RULES = {
    "epsilon": (lambda: LRP("epsilon"), lrp_epsilon, lrp_epsilon),
    "gamma+epsilon": (lambda: LRP("gamma+epsilon"), lrp_gamma(0.25), lrp_epsilon),
    "gamma+epsilon, 0.8": (lambda: LRP("gamma+epsilon", gamma=0.8), lrp_gamma(0.8), lrp_epsilon),
    "alpha1beta0": (lambda: LRP("alpha1beta0"), lrp_alpha_beta(1, 0), lrp_epsilon),
    "alpha2beta1": (lambda: LRP("alpha2beta1"), lrp_alpha_beta(2, 1), lrp_epsilon),
    "epsilon-plus": (lambda: LRP("epsilon-plus"), lrp_alpha_beta(1, 0), lrp_epsilon),
    "epsilon-gamma-box": (
        lambda: LRP("epsilon-gamma-box", low=LOW, high=HIGH),
        lrp_box,
        lrp_epsilon,
    ),
    "user's EpsilonGammaBox": (
        lambda: LRP(
            zc.EpsilonGammaBox(
                low=torch.tensor(LOW, dtype=torch.float64),
                high=torch.tensor(HIGH, dtype=torch.float64),
            )
        ),
        lrp_box,
        lrp_epsilon,
    ),
    "user's LayerMapComposite of Gamma": (
        lambda: LRP(by_type(zr.Gamma(gamma=0.5))),
        lrp_gamma(0.5),
        lrp_gamma(0.5),
    ),
    "user's NameMapComposite of AlphaBeta": (
        lambda: LRP(by_name(zr.AlphaBeta(alpha=2, beta=1))),
        lrp_alpha_beta(2, 1),
        lrp_alpha_beta(2, 1),
    ),
    "user's NameMapComposite of WSquare": (
        lambda: LRP(by_name(zr.WSquare())),
        lrp_w_square,
        lrp_w_square,
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_dense_matrix(rule, kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    model = nn.Sequential(layer, nn.Flatten())
    x = torch.empty(5, *shape, dtype=torch.float64).uniform_(LOW, HIGH)
    W, b = dense(layer, shape)
    scorer, conv_matrix, linear_matrix = RULES[rule]
    matrix = linear_matrix if isinstance(layer, nn.Linear) else conv_matrix
    targets = torch.tensor([0, 1, 2, 3, 1])
    got = scorer().relevance(model, x, targets, ["0:input", "0"])
    logits = x.flatten(1) @ W.T + b
    for sample, target in enumerate(targets.tolist()):
        upper = torch.zeros(len(b), dtype=torch.float64)
        upper[target] = logits[sample, target]
        lower = matrix(x[sample].flatten(), W, b).T @ upper
        torch.testing.assert_close(got["0"][sample].flatten(), upper, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got["0:input"][sample].flatten(), lower, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["epsilon", "gamma+epsilon", "alpha2beta1", "epsilon-plus"])
def test_rules_chain_through_convolution_relu_and_linear_layer(rule):
    torch.manual_seed(1)
    conv, fc = nn.Conv2d(2, 3, 3, padding=1).double(), nn.Linear(48, 4).double()
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), fc)
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    scorer, conv_matrix, linear_matrix = RULES[rule]
    scores = score_units(
        model, [(x, targets)], scorer(), layers=["0", "0:input", "3:input", "3"], aggregate="sum"
    )
    W, b = dense(conv, (2, 4, 4))
    expected = dict.fromkeys(scores, 0.0)
    for sample, target in enumerate(targets.tolist()):
        pixels = x[sample].flatten()
        hidden = (W @ pixels + b).clamp(min=0)
        logits = fc.weight @ hidden + fc.bias
        top = nn.functional.one_hot(torch.tensor(target), 4) * logits.detach()
        middle = linear_matrix(hidden, fc.weight, fc.bias).T @ top
        bottom = conv_matrix(pixels, W, b).T @ middle
        expected["3"] += top
        expected["3:input"] += middle
        expected["0"] += middle.reshape(3, 16).sum(1)
        expected["0:input"] += bottom.reshape(2, 16).sum(1)
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name].detach(), rtol=1e-9, atol=1e-12)


def test_preset_parameters_reach_the_rule():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    model, x = nn.Sequential(layer), torch.randn(1, 7, dtype=torch.float64)
    (got,) = LRP("epsilon", epsilon=0.3)(model, x, torch.tensor([2]), ["0:input"]).values()
    z = layer(x)[0, 2].detach()
    expected = x[0] * layer.weight[2].detach() * z / (z + 0.3 * z.sign())
    torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=1e-14)


def test_every_preset_makes_a_new_composite():
    given = {"epsilon-gamma-box": {"low": 0.0, "high": 1.0}}
    patterns = fit_patterns(nn.Sequential(nn.Linear(2, 2)), [torch.randn(9, 2)])
    given |= {name: {"patterns": patterns} for name in PRESETS if name.startswith("pattern")}
    for name in PRESETS:
        first, second = (preset(name, **given.get(name, {})) for _ in range(2))
        assert isinstance(first, zc.Composite)
        assert first is not second


def test_an_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match="composite: 'epsilom' is not a preset") as problem:
        LRP("epsilom")
    assert all(repr(name) in str(problem.value) for name in PRESETS)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("epsilon", {"gamma": 0.1}, "preset 'epsilon': got an unexpected keyword argument 'gamma'"),
        ("alpha2beta1", {"alpha": 3}, "preset 'alpha2beta1': .*unexpected keyword argument 'alpha"),
        ("epsilon-gamma-box", {}, "preset 'epsilon-gamma-box': missing a required argument: 'low'"),
        ("epsilon-gamma-box", {"low": 0.0}, "missing a required argument: 'high'"),
        ("epsilon-gamma-box", {"high": 0.0}, "missing a required argument: 'low'"),
    ],
)
def test_a_wrong_or_missing_preset_parameter_is_named(name, parameters, message):
    with pytest.raises(TypeError, match=message):
        LRP(name, **parameters)


@pytest.mark.parametrize("given", [zc.EpsilonPlus, zr.Epsilon(), 3, None])
def test_what_is_no_composite_is_a_type_error(given):
    with pytest.raises(TypeError, match=r"is neither a preset .*nor an instance of a Zennit comp"):
        LRP(given)


def test_parameters_beside_a_composite_are_a_type_error():
    with pytest.raises(TypeError, match=re.escape("['gamma'] go with a preset name")):
        LRP(zc.EpsilonPlus(), gamma=0.1)


def test_an_unknown_initial_relevance_is_an_error():
    with pytest.raises(ValueError, match="initial: 'two' given; it is one of 'logit', 'one'"):
        LRP("epsilon", initial="two")


class LinearWithRule(nn.Linear):
    """A linear layer that carries a rule of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lrp_rule = zr.WSquare()


class Scale(nn.Module):
    """Elementwise weights: no composite has a rule for it."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1.9, size))
        self.lrp_rule = zr.Pass()

    def forward(self, x):
        return x * self.weight


def test_a_modules_own_rule_is_used_where_the_composite_has_none():
    torch.manual_seed(0)
    model = nn.Sequential(Scale(7), nn.Linear(7, 4)).double()
    x = torch.randn(3, 7, dtype=torch.float64)
    got = LRP("epsilon").relevance(model, x, torch.tensor([0, 1, 2]), ["0:input", "0"])
    torch.testing.assert_close(got["0:input"], got["0"], rtol=0, atol=0)
    assert got["0"].abs().min() > 0


def test_a_rule_of_the_composite_goes_before_the_modules_own():
    torch.manual_seed(0)
    model = nn.Sequential(LinearWithRule(7, 4)).double()
    twin = nn.Sequential(nn.Linear(7, 4)).double()
    twin.load_state_dict(model.state_dict())
    x, targets = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 1, 2])
    (got,) = LRP("epsilon").relevance(model, x, targets, ["0:input"]).values()
    (expected,) = LRP("epsilon").relevance(twin, x, targets, ["0:input"]).values()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def no_bias(model):
    """Zero every bias and every batch-norm mean, so that relevance has nowhere to go."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            tensor.data.zero_()
    return model.double().eval()


def resnet(make):
    torch.manual_seed(0)
    return no_bias(make(num_classes=5))


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def residual(request):
    from torchvision import models

    return resnet(getattr(models, request.param))


def tight_epsilon():
    """The epsilon preset with every stabiliser at 1e-12, so that nothing else is kept back."""
    rule = zr.Epsilon(epsilon=1e-12)
    base = zc.layer_map_base(stabilizer=1e-12)
    return zc.LayerMapComposite([*base, ((*CONVOLUTIONS, nn.Linear), rule)])


@pytest.mark.parametrize(
    ("composite", "kept_back"),
    [(tight_epsilon(), 1e-7), ("epsilon", 1e-3)],
    ids=["tight", "preset"],
)
def test_relevance_is_conserved_in_a_residual_network_by_the_chosen_canonizer(
    residual, unchanged, composite, kept_back
):
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check = unchanged(residual)
    scorer = LRP(composite)
    targets = torch.tensor([1, 3])
    layers = ["conv1", "fc:input", "fc"]
    logits = residual(x)[range(2), targets].detach()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in residual.modules())
    rtol = kept_back + norms * SLACK_OF_A_MERGED_NORM
    relevance = scorer(residual, x, targets, layers)
    for name in layers:
        torch.testing.assert_close(relevance[name].sum(1), logits, rtol=rtol, atol=0)
    check()
    origin = score_units(residual, [(x, targets)], scorer, layers="fc").origin
    assert origin["canonizers"] == ["ExactMergeBatchNorm", "FunctionalCanonizer"]
    check()


def test_without_a_canonizer_a_resnet18_hands_out_relevance_many_times(unchanged):
    from torchvision import models

    model = resnet(models.resnet18)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scorer = LRP("epsilon", epsilon=1e-12, canonizers=())
    relevance = scorer(model, x, torch.tensor([1]), ["conv1"])["conv1"].sum()
    assert relevance.abs() > 50 * model(x)[0, 1].abs()


# Not alpha2beta1: a unit without negative contributions loses that share of its relevance.
@pytest.mark.parametrize("preset_name", ["epsilon", "gamma+epsilon", "epsilon-plus", "alpha1beta0"])
@pytest.mark.parametrize("kind", ["plain", "norm"])
@pytest.mark.parametrize("initial", ["logit", "one"])
def test_relevance_is_conserved_without_biases(request, digits, kind, preset_name, initial):
    model = no_bias(request.getfixturevalue(kind))
    images, labels = digits[0][:20].double(), digits[1][:20]
    layers = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    last = layers[-1]
    relevance = LRP(preset_name, initial=initial)(model, images, labels, [*layers, f"{last}:input"])
    logits = model(images)[range(20), labels].detach()
    expected = logits if initial == "logit" else torch.ones_like(logits)
    # The stabiliser of 1e-6 keeps back a share of it at every unit that is nearly silent.
    for name in relevance:
        torch.testing.assert_close(relevance[name].sum(1), expected, rtol=2e-3, atol=1e-4)


BOTH = [ExactMergeBatchNorm, FunctionalCanonizer]


def chosen(model, inputs):
    return choose_canonizers(model, trace(model, inputs))


def test_canonizers_are_chosen_by_the_modules_present(plain, norm, residual):
    x = torch.rand(2, 1, 8, 8)
    colour = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    wrapped = nn.Sequential(residual)
    assert chosen(plain, x) == []
    assert [type(one) for one in chosen(norm, x)] == [ExactMergeBatchNorm]
    assert [type(one) for one in chosen(residual, colour)] == BOTH
    assert [type(one) for one in chosen(wrapped, colour)] == BOTH


class OddOrder(nn.Module):
    """Batch norms defined away from the convolutions they follow, one of them behind a ReLU."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)
        for norm in (self.bn1, self.bn2, self.bn3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.fc(self.bn3(self.conv3(x).relu()).mean((2, 3)))


def test_batch_norms_are_merged_along_the_data_and_the_network_stays_the_same():
    model = OddOrder().eval()
    x = torch.rand(8, 1, 8, 8)
    canonizer, functional = chosen(model, x)
    assert isinstance(functional, FunctionalCanonizer)
    assert canonizer.name_map == [(["conv1"], "bn1"), (["conv2"], "bn2")]
    scores = score_units(model, [x], LRP("epsilon"), layers="fc", target=3)
    logits = model(x)[:, 3].double()
    torch.testing.assert_close(scores["fc"][3], logits.sum(), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_without_running_statistics_is_not_merged():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(4, 1, 8, 8)
    assert chosen(model, x) == []
    scores = score_units(model, [x], LRP("epsilon"), layers="3", target=1)
    torch.testing.assert_close(scores["3"][1], model(x)[:, 1].double().sum(), rtol=1e-4, atol=1e-4)


def test_a_dense_network_whose_norms_come_before_their_convolutions_is_scored():
    torch.manual_seed(0)
    model = torchvision.models.densenet121(num_classes=5).eval()
    x = torch.rand(2, 3, 32, 32)
    scores = score_units(model, [x], LRP("epsilon"), layers="classifier", target=1)
    expected = model(x)[:, 1].double().sum()
    torch.testing.assert_close(scores["classifier"][1], expected, rtol=1e-3, atol=1e-3)


def test_a_merged_batch_norm_gives_the_scores_of_the_network_folded_by_hand(norm, digits):
    images, labels = digits[0][:10].double(), digits[1][:10]
    norm.double()
    convs, norms = norm.body[0::3], norm.body[1::3]
    folded = []
    for conv, batch_norm in zip(convs, norms, strict=True):
        scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()
        new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).double()
        new.weight.data = conv.weight.data * scale.data[:, None, None, None]
        new.bias.data = batch_norm.bias.data - batch_norm.running_mean * scale.data
        folded += [new, nn.ReLU()]
    twin = nn.Sequential(*folded, norm.pool, nn.Flatten(), copy.deepcopy(norm.fc)).eval()
    for name in ("epsilon", "epsilon-plus", "alpha2beta1", "gamma+epsilon"):
        scorer = LRP(name)
        got = scorer(norm, images, labels, ["body.0:input", "body.3:input", "fc:input"])
        expected = scorer(twin, images, labels, ["0:input", "2:input", "6:input"])
        for mine, theirs in zip(got.values(), expected.values(), strict=True):
            error = (mine - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-9 + 10 * SLACK_OF_A_MERGED_NORM


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
def test_origin_names_the_canonizers_that_were_applied(norm, batches, scorer, named):
    assert score_units(norm, batches[:1], scorer).origin["canonizers"] == named


def test_a_composites_own_canonizer_is_not_applied_twice(norm, batches):
    own = LRP(zc.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]))
    chosen = LRP("epsilon-plus")
    first, second = (score_units(norm, batches, scorer) for scorer in (own, chosen))
    for name in first:
        slack = 20 * SLACK_OF_A_MERGED_NORM
        torch.testing.assert_close(first[name], second[name], rtol=1e-5 + slack, atol=1e-3)


class Crosswise(nn.Module):
    """A network whose norms were defined in another order than they run."""

    def __init__(self):
        super().__init__()
        self.one, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.two, self.first = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        for norm, scale in ((self.first, 0.2), (self.second, 5)):
            nn.init.constant_(norm.running_var, scale)
            nn.init.constant_(norm.bias, scale)

    def forward(self, x):
        x = self.first(self.one(x)).relu()
        return self.fc(self.second(self.two(x)).relu().mean((2, 3)))


def test_canonizers_that_make_another_network_are_warned_of():
    model, data = Crosswise().eval(), torch.rand(2, 3, 8, 8)
    wrong = LRP(canonizers=[SequentialMergeBatchNorm(), FunctionalCanonizer()])
    with pytest.warns(UserWarning, match="SequentialMergeBatchNorm.* make another network"):
        score_units(model, [data], wrong, layers=["one"], target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_units(model, [data], LRP(), layers=["one"], target=0)
        score_units(model, [data], LRP(canonizers=()), layers=["fc"], target=0)


class Noisy(Crosswise):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


def test_a_network_that_is_another_at_each_call_is_refused():
    with pytest.raises(ValueError, match="another at each call"):
        score_units(Noisy().eval(), [torch.rand(2, 3, 8, 8)], LRP(), layers=["fc"], target=0)


class PositionBias(nn.Module):
    """As in a Swin v2: a layer makes biases out of a table of positions."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Linear(2, 5), nn.Linear(5, 3)
        self.register_buffer("positions", torch.rand(7, 2))

    def forward(self, x):
        return self.fc((x + self.table(self.positions).mean(0)).relu())


def test_layers_that_no_sample_reaches_are_not_scored_unless_named():
    model, data = PositionBias().eval(), torch.rand(4, 5)
    assert score_units(model, [data], LRP(), target=0).layers == ["fc"]
    assert score_units(model, [data], Taylor(), target=0).layers == ["fc"]
    assert list(check_model(model, data).ratios) == ["fc"]
    with pytest.raises(ValueError, match="table"):
        score_units(model, [data], LRP(), target=0, layers=["table"])
