"""The fast hooks against Zennit's own, in Zennit's own attributor."""

from __future__ import annotations

import copy
import functools
import gc
from collections import Counter
from importlib.metadata import version

import pytest
import torch
from networks import residual_network
from torch import nn
from torch.nn import functional as F
from zennit import composites as zc
from zennit import rules as zr
from zennit.core import BasicHook, Hook, Stabilizer
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer
from zennit_reference import assert_as_zennit, assert_lrp_as_zennit, by_zennit, seed_of

from xai_edit import LRP, score_units
from xai_edit.core.layers import CONVOLUTIONS
from xai_edit.lrp import accelerated
from xai_edit.lrp.relevance_at_layers import RULED

TARGETS = torch.tensor([2, 0, 1])


# Networks: (module, shape of a sample)


def convolutional(activation):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 7),
        activation(),
        nn.Linear(7, 3),
    )


def in_place_relu():
    return nn.ReLU(inplace=True)


def many_kinds():
    """Strided, dilated, grouped, depthwise, reflecting and transposed convolutions."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        in_place_relu(),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        in_place_relu(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1),
        in_place_relu(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(100, 3),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.sum = nn.Linear(6, 6), Sum()

    def forward(self, x):
        return self.sum(torch.stack([x, self.fc(x)], -1))


IMAGE = (2, 8, 8)
NETWORKS = {
    "in-place ReLU": (lambda: convolutional(in_place_relu), IMAGE),
    "many kinds": (many_kinds, IMAGE),
    "in-place leaky ReLU": (lambda: convolutional(lambda: nn.LeakyReLU(0.3, inplace=True)), IMAGE),
    "tanh": (lambda: convolutional(nn.Tanh), IMAGE),
    "in-place SiLU": (lambda: convolutional(lambda: nn.SiLU(inplace=True)), IMAGE),
    "ends in ReLU": (lambda: nn.Sequential(*convolutional(in_place_relu), in_place_relu()), IMAGE),
    "identity between": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Identity(), in_place_relu(), nn.Dropout(inplace=True),
            nn.Flatten(), nn.Identity(), nn.Linear(144, 3),
        ),
        IMAGE,
    ),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 3, 2), in_place_relu(), nn.ConvTranspose3d(3, 2, 2), in_place_relu(),
            nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(16, 3),
        ),
        (1, 4, 4, 3),
    ),
    "sums": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Residual(), nn.Linear(6, 3)), (5,)),
    "linear on tokens": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), in_place_relu(), nn.Linear(8, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(20, 3),
        ),
        (5, 6),
    ),
}  # fmt: skip


def scaled_by_its_mean(z):
    """A stabiliser that looks at the whole output, as a function."""
    return z + 0.2 * z.pow(2).mean().sqrt()


def by_layers(conv, linear=None):
    base = zc.layer_map_base()
    rules = [(CONVOLUTIONS, conv), (nn.Linear, linear or zr.Epsilon())]
    return zc.LayerMapComposite([*base, *rules])


COMPOSITES = {
    "epsilon": lambda: LRP("epsilon").composite,
    "gamma+epsilon": lambda: LRP("gamma+epsilon").composite,
    "alpha1beta0": lambda: LRP("alpha1beta0").composite,
    "alpha2beta1": lambda: LRP("alpha2beta1").composite,
    "epsilon-plus": lambda: LRP("epsilon-plus").composite,
    "epsilon-gamma-box": lambda: LRP("epsilon-gamma-box", low=-3.0, high=3.0).composite,
    "EpsilonPlusFlat": zc.EpsilonPlusFlat,
    "BetaSmooth": zc.BetaSmooth,
    "GuidedBackprop": zc.GuidedBackprop,
    "ExcitationBackprop": zc.ExcitationBackprop,
    "gamma everywhere": lambda: by_layers(zr.Gamma(0.6), zr.Gamma(0.1)),
    "αβ everywhere": lambda: by_layers(zr.AlphaBeta(1.5, 0.5), zr.AlphaBeta(3, 2)),
    "z⁺ everywhere": lambda: by_layers(zr.ZPlus(), zr.ZPlus()),
    "w²": lambda: by_layers(zr.WSquare(), zr.WSquare()),
    "stabiliser clips": lambda: by_layers(
        zr.Gamma(0.25, Stabilizer(0.05, clip=True)), zr.Epsilon(Stabilizer(0.05, clip=True))
    ),
    "stabiliser scales, epsilon": lambda: by_layers(
        zr.Epsilon(Stabilizer(0.1, norm_scale=True)), zr.Epsilon(scaled_by_its_mean)
    ),
    "stabiliser is a function": lambda: by_layers(
        zr.ZPlus(scaled_by_its_mean), zr.Gamma(0.25, scaled_by_its_mean)
    ),
    "without bias": lambda: by_layers(
        zr.Epsilon(zero_params="bias"), zr.Epsilon(zero_params=["bias"])
    ),
    "without bias, z⁺": lambda: by_layers(
        zr.ZPlus(zero_params="bias"), zr.AlphaBeta(2, 1, zero_params="bias")
    ),
    "without bias, gamma": lambda: by_layers(
        zr.Gamma(0.25, zero_params="bias"), zr.Gamma(zero_params="bias")
    ),
    "mixed": lambda: zc.MixedComposite(
        [
            zc.NameMapComposite([(["0"], zr.Flat())]),
            zc.SpecialFirstLayerMapComposite(
                [*zc.layer_map_base(), (CONVOLUTIONS, zr.ZPlus()), (nn.Linear, zr.Epsilon())],
                first_map=[((*CONVOLUTIONS, nn.Linear), zr.AlphaBeta(2, 1))],
            ),
        ]
    ),
}


def made(kind):
    """A network in evaluation mode and a batch of signed inputs."""
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    model = make().double().eval()
    return model, torch.randn(3, *shape, dtype=torch.float64)


def weighted(model):
    return [
        name for name, one in model.named_modules() if isinstance(one, (nn.Linear, *CONVOLUTIONS))
    ]


def compare(model, composite, x, targets=TARGETS, layers=None, *, initial="logit", **options):
    """Assert that LRP gives Zennit's relevance at each layer and at the input."""
    outputs = weighted(model) if layers is None else layers
    layers = [name + suffix for name in outputs for suffix in ("", ":input")]
    expected = by_zennit(model, composite, x, targets, layers, initial=initial)
    scorer = LRP(composite, initial=initial, **options)
    assert_lrp_as_zennit(scorer, model, x, targets, expected)


# Every composite on some networks, and some composites on every network.
SOME_NETWORKS = ("in-place ReLU", "many kinds", "tanh", "ends in ReLU")
SOME_COMPOSITES = ("epsilon", "gamma everywhere", "alpha2beta1", "epsilon-plus", "GuidedBackprop")
GRID = [(c, n) for c in COMPOSITES for n in NETWORKS if c in SOME_COMPOSITES or n in SOME_NETWORKS]


@pytest.mark.parametrize(("composite", "kind"), GRID)
def test_relevance_is_zennits_at_every_layer_and_at_the_input(composite, kind):
    model, x = made(kind)
    compare(model, COMPOSITES[composite](), x)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_relevance_at_dead_units_passes_as_in_zennit(composite):
    # The target is silent: Pass hands its relevance on to a unit whose rectified output is zero.
    model, x = made("ends in ReLU")
    targets = model[:-1](x).argmin(1)
    assert (model(x)[range(3), targets] == 0).all()
    compare(model, COMPOSITES[composite](), x, targets, initial="one")


@pytest.mark.parametrize(
    ("make", "canonizers"),
    [
        (lambda: zc.EpsilonAlpha2Beta1Flat(canonizers=[ResNetCanonizer()]), ["ResNetCanonizer"]),
        (
            lambda: zc.EpsilonGammaBox(low=-3.0, high=3.0, canonizers=[ResNetCanonizer()]),
            ["ResNetCanonizer"],
        ),
        (COMPOSITES["alpha2beta1"], ["ExactMergeBatchNorm", "FunctionalCanonizer"]),
        (zc.GuidedBackprop, ["ExactMergeBatchNorm"]),  # a ReLU of a block is called twice
    ],
    ids=["EpsilonAlpha2Beta1Flat", "EpsilonGammaBox", "alpha2beta1", "GuidedBackprop"],
)
def test_a_residual_network_gives_zennits_relevance(make, canonizers, unchanged):
    model = residual_network().double()
    x, targets = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor([1])
    reference, layers = make(), ["0", "1.conv2", "2.downsample.0", "5"]
    if "FunctionalCanonizer" in canonizers:
        reference.canonizers = [ResNetCanonizer()]
    elif not reference.canonizers:
        layers = ["5"]  # ours merges batch norms, Zennit does not
    expected = by_zennit(model, reference, x, targets, layers)
    check = unchanged(model)
    assert_lrp_as_zennit(LRP(make()), model, x, targets, expected, 1e-9)
    scores = score_units(model, [(x, targets)], LRP(make()), layers="5")
    check()
    assert scores.origin["canonizers"] == canonizers


@pytest.mark.parametrize("composite", SOME_COMPOSITES)
def test_an_accelerated_composite_works_in_zennits_attributor(composite, unchanged):
    # Without our guard: parameters that need gradients, and hooks that come off with the context.
    model, x = made("identity between")
    expected = by_zennit(model, COMPOSITES[composite](), x, TARGETS, weighted(model))
    check = unchanged(model)
    got = by_zennit(
        model, accelerated(COMPOSITES[composite]()), x, TARGETS, weighted(model), twin=model
    )
    for name, values in expected.items():
        assert_as_zennit(got[name], values, 1e-10, name)
    check()


# That the fast way is taken, and only where it holds


@pytest.fixture
def counted(monkeypatch):
    """Calls of Zennit's own rules, and forward passes of layers, by class name."""
    rules, layers = Counter(), Counter()
    backward = BasicHook.backward

    def counting(self, *arguments):
        rules[type(self).__name__] += 1
        return backward(self, *arguments)

    monkeypatch.setattr(BasicHook, "backward", counting)
    for kind in (nn.Conv2d, nn.Linear):
        forward = kind.forward

        @functools.wraps(forward)  # the module it is from tells whose forward pass it is
        def counting_forward(self, *arguments, forward=forward, kind=kind):
            layers[kind.__name__] += 1
            return forward(self, *arguments)

        monkeypatch.setattr(kind, "forward", counting_forward)
    return rules, layers


FAST = ("Epsilon", "ZPlus", "AlphaBeta", "Gamma")
# How often a session of one batch runs each layer: its own pass and one a further set of weights.
PASSES = {
    "epsilon": (1, 1),
    "epsilon-plus": (2, 1),
    "alpha1beta0": (2, 1),
    "alpha2beta1": (3, 1),
    "gamma+epsilon": (2, 1),
}


@pytest.mark.parametrize("composite", PASSES)
def test_on_rectified_networks_no_rule_of_zennit_and_no_needless_forward_pass_runs(
    counted, composite
):
    model, x = made("in-place ReLU")
    rules, layers = counted
    with LRP(composite).session(model, x, ["0:input"]) as (score, _):
        layers.clear()
        score(x.abs(), TARGETS)
    a_conv, a_linear = PASSES[composite]
    assert layers == {"Conv2d": 2 * a_conv, "Linear": 2 * a_linear}
    assert not {name: count for name, count in rules.items() if name in FAST}


def fallbacks(counted, model, composite, x, **options):
    counted[0].clear()
    LRP(composite, **options).heatmap(model, x, TARGETS)
    return {name: count for name, count in counted[0].items() if name in FAST}


@pytest.mark.parametrize(
    ("composite", "rule"), [("alpha2beta1", "AlphaBeta"), ("gamma+epsilon", "Gamma")]
)
def test_signed_inputs_go_to_zennits_own_rule(counted, composite, rule):
    model, x = made("in-place ReLU")
    assert fallbacks(counted, model, composite, x) == {rule: 1}  # the first layer alone
    model, x = made("tanh")
    assert fallbacks(counted, model, composite, x) == {rule: 2}
    assert fallbacks(counted, model, "epsilon", x) == {}
    assert fallbacks(counted, model, "epsilon-plus", x) == {}


@pytest.mark.parametrize("rule", FAST)
def test_what_a_shortcut_does_not_cover_goes_to_zennits_own_rule(counted, rule):
    arguments = {"AlphaBeta": (2, 1)}.get(rule, ())
    kind = getattr(zr, rule)

    class Own(kind):
        pass

    torch.manual_seed(0)
    x = torch.rand(3, 6, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    without_bias = by_layers(zr.Epsilon(), kind(*arguments, zero_params="bias"))
    assert fallbacks(counted, plain, by_layers(zr.Epsilon(), kind(*arguments)), x) == {}
    assert fallbacks(counted, plain, without_bias, x) == {rule: 2}
    compare(plain, by_layers(zr.Epsilon(), Own(*arguments)), x)


@pytest.fixture
def live_tensors():
    """Count the tensors made since the test began."""
    gc.collect()
    gc.freeze()  # what is there already is not looked at

    def count():
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    yield count
    gc.unfreeze()


@pytest.mark.parametrize(
    ("composite", "kind"),
    [
        ("epsilon", "in-place SiLU"),
        ("alpha2beta1", "identity between"),
        ("gamma+epsilon", "in-place ReLU"),
    ],
)
def test_a_session_gives_the_same_bits_again_and_no_tensor_outlives_its_batch(
    composite, kind, live_tensors
):
    model, x = made(kind)
    layers = [*weighted(model), "0:input"]
    with LRP(COMPOSITES[composite]()).session(model, x, layers) as (score, _):
        first = score(x, TARGETS)
        score(x[:1], TARGETS[:1])
        before = live_tensors()
        for _ in range(5):
            score(x, TARGETS)
        assert live_tensors() <= before
        again = score(x, TARGETS)
    for name in layers:
        assert torch.equal(first[name], again[name])
    state = vars(RULED)
    sizes = {name: len(kept) for name, kept in state.items() if hasattr(kept, "__len__")}
    score_units(model, [(x, TARGETS)] * 5, LRP(COMPOSITES[composite]()), layers=layers)
    assert {name: len(kept) for name, kept in state.items() if name in sizes} == sizes


@pytest.mark.parametrize("guarded", [True, False])
def test_in_place_activations_are_off_inside_and_on_again_after_an_exception(guarded):
    model, x = made("in-place SiLU")
    activations = [module for module in model.modules() if isinstance(module, nn.SiLU)]
    composite, seen = LRP("epsilon").composite, []

    def fail(*_):
        seen.extend(module.inplace for module in activations)
        raise Stop

    def run():
        if guarded:
            with LRP(composite).session(model, x, ["0"]) as (score, _):
                model[-1].register_forward_hook(fail)
                score(x, TARGETS)
        with accelerated(composite).context(model):
            model[-1].register_forward_hook(fail)
            model(x.requires_grad_())

    with pytest.raises(Stop):
        run()
    assert seen == [False] * len(activations) != []
    assert all(module.inplace is True for module in activations)


# Forward passes that Zennit's hooks or a shortcut could get wrong


class Unrolled(nn.Module):
    """A network that calls its layers twice, or has two modules with the same weights."""

    def __init__(self, *, shared):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = self.a if shared else copy.deepcopy(self.a)
        self.relus = nn.ModuleList([in_place_relu()] * 3 if shared else [nn.ReLU() for _ in "abc"])
        self.flat = nn.Flatten()
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        x = self.relus[0](self.first(x))
        x = self.relus[1](self.a(x))
        x = self.relus[2](self.b(x))
        return self.head(self.flat(x))


@pytest.mark.parametrize("composite", [*SOME_COMPOSITES, "w²"])
def test_a_module_called_twice_is_two_modules_with_the_same_weights(composite):
    x = torch.randn(3, *IMAGE, dtype=torch.float64)
    layers = ["first", "first:input", "head", "head:input"]
    twice, twin = Unrolled(shared=True).double(), Unrolled(shared=False).double()
    expected = by_zennit(twin, COMPOSITES[composite](), x, TARGETS, layers)
    assert_lrp_as_zennit(LRP(COMPOSITES[composite]()), twice, x, TARGETS, expected)


class Between(nn.Module):
    """A hidden layer, an operation on it that is no module, and a head."""

    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Linear(6, 8)
        self.side = nn.Linear(6, 8)
        self.relu = in_place_relu()
        self.head = nn.Linear(8, 3)
        self.operation = operation

    def forward(self, x):
        return self.head(self.operation(self, x))


def after(operation):
    return lambda model, x: operation(model.body(x))


OVERWRITING = {
    "mul_, negative": after(lambda y: y.mul_(-1)),
    "F.relu in place": after(lambda y: F.relu(y, inplace=True)),
    "mul_, then ReLU in place": lambda model, x: model.relu(model.body(x).mul_(-1)),
    "ReLU in place of a part": lambda model, x: torch.cat(
        [model.relu(half) for half in torch.tensor_split(model.body(x), 2, 1)], 1
    ),
    "zeros written": after(lambda y: y.masked_fill_(y < 0.1, 0.0)),
    "output read before it is overwritten": lambda model, x: (
        lambda y: torch.cat([y[:, :4].clone(), model.relu(y)[:, 4:]], 1)
    )(model.body(x)),
}


@pytest.mark.parametrize("operation", OVERWRITING)
@pytest.mark.parametrize("composite", ["epsilon", "gamma everywhere", "αβ everywhere"])
def test_an_output_overwritten_in_place_gives_zennits_relevance(composite, operation):
    model = Between(OVERWRITING[operation]).double()
    x = torch.rand(3, 6, dtype=torch.float64)
    # Without a canonizer functional operations keep their gradient here as there.
    compare(model, COMPOSITES[composite](), x, layers=["body", "head"], canonizers=())


@pytest.mark.parametrize("composite", ["epsilon", "gamma everywhere", "αβ everywhere"])
def test_an_input_overwritten_after_the_layer_is_one_clear_error_or_zennits(composite):
    def operation(model, x):
        hidden = torch.sigmoid(x) - 0.5
        first = model.body(hidden)
        return torch.cat([first[:, :4], model.side(hidden.mul_(2))[:, 4:]], 1)

    model = Between(operation).double().requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = by_zennit(model, COMPOSITES[composite](), x, TARGETS)[""]
    try:
        got = LRP(COMPOSITES[composite](), canonizers=()).heatmap(model, x, TARGETS)
    except (RuntimeError, ValueError) as problem:
        assert "was overwritten in place after the layer had read it" in str(problem)  # noqa: PT017
    else:
        assert_as_zennit(got, expected, 1e-10, "heat map")


def standardised(weight):
    return weight - weight.mean((1, 2, 3), keepdim=True)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), standardised(self.weight), self.bias)


class OfTheWeight(nn.Module):
    def forward(self, weight):
        return standardised(weight)


def own_forward(conv):
    own = Standardised(conv.in_channels, conv.out_channels, 3).double()
    own.load_state_dict(conv.state_dict())
    return own


def replaced_forward(conv):
    conv.forward = lambda x: F.conv2d(x, standardised(conv.weight), conv.bias, padding=1)
    return conv


def parametrized(conv):
    return nn.utils.parametrize.register_parametrization(conv, "weight", OfTheWeight())


def by_old_hook(conv):
    with torch.no_grad():
        conv.weight.copy_(standardised(conv.weight))
    return nn.utils.weight_norm(conv)


@pytest.mark.parametrize("form", [own_forward, replaced_forward, parametrized, by_old_hook])
@pytest.mark.parametrize("composite", ["epsilon", "epsilon-plus", "alpha2beta1", "gamma+epsilon"])
def test_a_rule_acts_on_the_weight_that_the_operation_uses(form, composite):
    model, x = made("in-place ReLU")
    plain, conv = copy.deepcopy(model), model[3]
    with torch.no_grad():
        plain[3].weight.copy_(standardised(conv.weight))
    model[3] = form(conv)
    expected = by_zennit(plain, COMPOSITES[composite](), x, TARGETS, ["0"])
    assert_lrp_as_zennit(LRP(composite), model, x, TARGETS, expected)


class KeepsItsOutput(BasicHook):
    """A rule of a user's own, with a forward hook of its own."""

    def forward(self, module, inputs, output):
        named = ({},) if int(version("zennit").split(".")[0]) >= 1 else ()
        super().forward(module, inputs, *named, output)
        self.stored_tensors["output"] = output.detach().clone()

    def backward(self, module, grad_input, grad_output):
        gate = self.stored_tensors["output"] > 0
        return super().backward(module, grad_input, (grad_output[0] * gate,))


class GradientTimesInput(Hook):
    """The how-to of Zennit: a hook that is no BasicHook."""

    def forward(self, module, inputs, output):
        self.stored_tensors["input"] = inputs

    def backward(self, module, grad_input, grad_output):
        return (self.stored_tensors["input"][0] * grad_input[0],)


@pytest.mark.parametrize(
    "rule",
    [
        KeepsItsOutput,
        GradientTimesInput,
        lambda: BasicHook(
            input_modifiers=[lambda x: x, torch.ones_like],
            param_modifiers=[lambda p, name: p.abs(), lambda p, name: p],
            gradient_mapper=lambda out, outputs: [out / (1 + o.abs()) for o in outputs],
        ),
    ],
    ids=["keeps its output", "Hook", "BasicHook"],
)
def test_a_users_own_rule_gives_what_it_gives_in_zennit(rule):
    model, x = made("in-place ReLU")
    compare(model, by_layers(rule(), zr.Epsilon()), x)


@pytest.mark.parametrize("rule", [zr.Norm, zr.Pass, zr.Flat])
def test_a_rule_on_a_block_with_rules_inside_gives_zennits_heat_map(rule):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), in_place_relu(), nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(5, 6), in_place_relu(), block, nn.Linear(6, 3)).double()
    composite = zc.MixedComposite(
        [zc.NameMapComposite([(["2"], rule())]), COMPOSITES["gamma everywhere"]()]
    )
    compare(model, composite, torch.randn(3, 5, dtype=torch.float64), layers=["0", "3"])


class Calls(nn.Module):
    """A layer that is called in a way of its own."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2)
        self.head = nn.LazyLinear(3)
        self.call = call

    def forward(self, x):
        return self.head(self.call(self.up, x).flatten(1))


@pytest.mark.parametrize(
    "call", [lambda up, x: up(x, output_size=[18, 18]), lambda up, x: up(x, [18, 18])]
)
def test_a_layer_called_with_further_arguments_is_refused(call):
    x, model = torch.rand(3, *IMAGE), Calls(call)
    model(x)
    with pytest.raises(ValueError, match=r"'up' is called with 2 arguments"):
        LRP("epsilon-plus").heatmap(model, x, TARGETS)


# Registered elsewhere, or already, or half way


def test_a_composite_registered_on_another_model_works_here_too():
    model, x = made("in-place ReLU")
    other, _ = made("in-place ReLU")
    composite = zc.EpsilonPlus()
    expected = by_zennit(model, zc.EpsilonPlus(), x, TARGETS, ["0"])
    with composite.context(other):
        elsewhere = other(x.clone().requires_grad_())
        got = LRP(composite).relevance(model, x, TARGETS, ["0"])
        pixels = x.clone().requires_grad_()
        logits = other(pixels)
        (there,) = torch.autograd.grad(logits, pixels, seed_of(TARGETS, "logit")(logits))
        assert torch.equal(elsewhere.detach(), logits.detach())
    assert_as_zennit(got["0"], expected["0"], 1e-10, "0")
    assert_as_zennit(there, expected[""], 1e-10, "the other model's")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("same", [True, False])
def test_a_composite_registered_on_this_model_is_refused(unchanged, fast, same):
    model, x = made("in-place ReLU")
    composite = zc.EpsilonPlus()
    registered = accelerated(composite) if fast else composite
    with registered.context(model):
        check = unchanged(model)
        scorer = LRP(registered) if same else LRP("epsilon")
        with pytest.raises(ValueError, match=r"registered on it already.*composite\.remove"):
            scorer.heatmap(model, x, TARGETS)
        check()
    scorer.heatmap(model, x, TARGETS)


class Stop(Exception):
    pass


def test_a_backward_pass_that_fails_leaves_nothing_behind(unchanged):
    model, x = made("in-place ReLU")
    fails = {"now": True}

    def stabiliser(z):
        if fails["now"]:
            raise Stop
        return z + 1e-6

    scorer = LRP(by_layers(zr.Gamma(0.25, stabiliser), zr.Epsilon()))
    check = unchanged(model)
    with pytest.raises(Stop):
        scorer.heatmap(model, x, TARGETS)
    check()
    fails["now"] = False
    compare(model, scorer.composite, x)


def test_the_composite_given_is_not_changed():
    model, x = made("in-place ReLU")
    plus = zc.EpsilonPlus()
    layer_map = list(plus.layer_map)
    LRP(plus).heatmap(model, x, TARGETS)
    assert plus.layer_map == layer_map
    assert not plus.handles
    assert not plus.hook_refs
    assert all(not hook.stored_tensors for _, hook in layer_map)
