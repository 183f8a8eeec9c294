"""Operations that are no modules, against the same network made of modules and against formulas."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
import torchvision
from networks import without_biases
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from zennit import composites as zc
from zennit import rules as zr
from zennit.layer import Sum
from zennit_reference import assert_as_zennit, assert_lrp_as_zennit, by_zennit

from xai_edit import LRP, FunctionalCanonizer, score_units
from xai_edit.core.layers import CONVOLUTIONS

TARGETS = torch.tensor([2, 0, 1])
PRESETS = ["epsilon", "alpha2beta1"]


def images(samples=3, *, channels=2, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(samples, channels, size, size, generator=generator, dtype=dtype)


class Module(nn.Module):
    """A function as a module, so that Zennit can give it a rule."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Passing(Module):
    """A function that hands relevance on as it is."""


class Sharing(Module):
    """A function that shares relevance out as the linear map with a bias that it is."""


class Frame(nn.Module):
    """Three branches, what is made of them, and a head; the modules of the module form."""

    def __init__(self, combine):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(2, 4, 3, padding=1) for _ in "abc")
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 1.5])[:, None, None])
        self.shift = nn.Parameter(torch.tensor([0.1, -0.2, 0.3, 0.0])[:, None, None])
        self.relu, self.relu2, self.silu, self.tanh = nn.ReLU(), nn.ReLU(), nn.SiLU(), nn.Tanh()
        self.sum, self.sum2 = Sum(), Sum()
        self.average, self.pool = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2)
        self.twice = Passing(lambda x: 2 * x)
        self.minus = Passing(lambda x: -x)
        self.scaled = Passing(lambda x: x * self.scale)
        self.shifted = Sharing(lambda x: x + self.shift)
        self.combine = combine
        self.hidden = nn.LazyLinear(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.relu2(self.hidden(self.combine(self, x).flatten(1))))

    def added(self, *values):
        return self.sum(torch.stack(values, -1))


def discarding(operation):
    """The in-place operation on the first branch whose result is not used, but whose effect is."""

    def combine(m, x):
        y = m.a(x)
        operation(m, x, y)
        return y

    return combine


def read_then_rectified_in_place(m, x):
    y = m.a(x)
    total = y + m.b(x)
    return torch.cat([total, F.relu(y, inplace=True)], 1)


def two_sums(m, x):
    y = m.added(m.a(x), m.b(x))
    return m.sum2(torch.stack([y, m.c(x)], -1))


def a_plus_b(m, x):
    return m.added(m.a(x), m.b(x))


def doubled(m, x):
    return m.twice(m.a(x))


def rectified(m, x):
    return m.relu(m.a(x))


# name → (network as one writes it, the same network of modules)
PAIRS = {
    "+": (lambda m, x: m.a(x) + m.b(x), a_plus_b),
    "+=": (discarding(lambda m, x, y: y.__iadd__(m.b(x))), a_plus_b),
    "torch.add, alpha=2": (
        lambda m, x: torch.add(m.a(x), m.b(x), alpha=2),
        lambda m, x: m.added(m.a(x), m.twice(m.b(x))),
    ),
    "add, input=, other=": (lambda m, x: torch.add(input=m.a(x), other=m.b(x)), a_plus_b),
    "add_, result discarded": (discarding(lambda m, x, y: y.add_(m.b(x))), a_plus_b),
    "-": (lambda m, x: m.a(x) - m.b(x), lambda m, x: m.added(m.a(x), m.minus(m.b(x)))),
    "sum of a list": (lambda m, x: sum([m.a(x), m.b(x), m.c(x)]), two_sums),
    "stack and sum": (
        lambda m, x: torch.stack([m.a(x), m.b(x), m.c(x)]).sum(0),
        lambda m, x: m.added(m.a(x), m.b(x), m.c(x)),
    ),
    "the same twice": (
        lambda m, x: (lambda y: y + y)(m.a(x)),
        lambda m, x: (lambda y: m.added(y, y))(m.a(x)),
    ),
    "mean((2, 3))": (lambda m, x: m.a(x).mean((2, 3)), lambda m, x: m.average(m.a(x)).flatten(1)),
    "F.adaptive_avg_pool2d": (
        lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1),
        lambda m, x: m.average(m.a(x)),
    ),
    "F.avg_pool2d": (lambda m, x: F.avg_pool2d(m.a(x), 2), lambda m, x: m.pool(m.a(x))),
    "F.relu in place, by position": (lambda m, x: F.relu(m.a(x), True), rectified),
    "relu_, result discarded": (discarding(lambda m, x, y: y.relu_()), rectified),
    "F.silu in place, result discarded": (
        discarding(lambda m, x, y: F.silu(y, inplace=True)),
        lambda m, x: m.silu(m.a(x)),
    ),
    "a summand rectified in place afterwards": (
        read_then_rectified_in_place,
        lambda m, x: (lambda y: torch.cat([m.added(y, m.b(x)), m.relu(y)], 1))(m.a(x)),
    ),
    "times a number": (lambda m, x: 2 * m.a(x), doubled),
    "mul_ by a number, result discarded": (discarding(lambda m, x, y: y.mul_(2)), doubled),
    "negated": (lambda m, x: -m.a(x), lambda m, x: m.minus(m.a(x))),
    "plus a parameter": (lambda m, x: m.a(x) + m.shift, lambda m, x: m.shifted(m.a(x))),
    "F.dropout": (lambda m, x: F.dropout(m.a(x) + m.b(x), training=m.training), a_plus_b),
    "joined, flipped and cut": (
        lambda m, x: torch.cat([m.a(x).flip(1), F.relu(m.b(x))], 1)[:, 1:7].permute(0, 2, 3, 1),
        lambda m, x: torch.cat([m.a(x).flip(1), m.relu(m.b(x))], 1)[:, 1:7].permute(0, 2, 3, 1),
    ),
    "a slice added in place": (
        discarding(lambda m, x, y: y[:, :2].add_(m.b(x)[:, :2])),
        lambda m, x: (
            lambda y: torch.cat([m.added(y[:, :2], m.b(x)[:, :2]), y[:, 2:]], 1)
        )(m.a(x)),
    ),
}  # fmt: skip


def networks(combine, of_modules):
    """A network as one writes it, and one of modules with the same weights."""
    mine, theirs = Frame(combine).double(), Frame(of_modules).double()
    for model in (mine, theirs):
        model(images())  # the size of the lazy layer
    theirs.load_state_dict(mine.state_dict())
    return mine.eval(), theirs.eval()


def for_modules(preset):
    """The preset with a rule for the modules of the module form."""
    composite = LRP(preset).composite
    composite.layer_map += [(Passing, zr.Pass()), (Sharing, zr.Norm())]
    return composite


@pytest.mark.parametrize("operation", PAIRS)
@pytest.mark.parametrize("preset", PRESETS)
def test_an_operation_gets_the_relevance_of_its_module(preset, operation):
    model, twin = networks(*PAIRS[operation])
    x = images()
    torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)
    expected = by_zennit(twin, for_modules(preset), x, TARGETS, ["a", "hidden", "head"])
    assert_lrp_as_zennit(LRP(preset), model, x, TARGETS, expected)


@pytest.mark.parametrize("operation", ["+=", "mean((2, 3))", "relu_, result discarded"])
def test_the_canonizer_serves_a_plain_composite_of_zennit(operation, unchanged):
    # Its parameters need gradients here, but they are no data.
    model, twin = networks(*PAIRS[operation])
    x = images()
    expected = by_zennit(twin, for_modules("epsilon-plus"), x, TARGETS, layers=["a"])
    check = unchanged(model)
    composite = zc.EpsilonPlus(canonizers=[FunctionalCanonizer()])
    got = by_zennit(model, composite, x, TARGETS, ["a"], twin=model)
    if version("zennit").startswith("0."):
        check()  # Zennit 1.0 by itself leaves parameters as new objects (zennit#237)
    assert "forward" not in vars(model)
    for name in expected:
        assert_as_zennit(got[name], expected[name])


@pytest.mark.parametrize("operation", ["+=", "mean((2, 3))"])
def test_the_stabiliser_is_that_of_the_composites_sums(operation):
    model, twin = networks(*PAIRS[operation])
    x = images()
    layer_map = [
        *zc.layer_map_base(stabilizer=0.2),
        ((*CONVOLUTIONS, nn.Linear), zr.Epsilon()),
        (Passing, zr.Pass()),
    ]
    expected = by_zennit(twin, zc.LayerMapComposite(layer_map), x, TARGETS)[""]
    assert_as_zennit(LRP(zc.LayerMapComposite(layer_map)).heatmap(model, x, TARGETS), expected)
    alone = zc.LayerMapComposite(layer_map, canonizers=[FunctionalCanonizer(0.2)])
    assert_as_zennit(by_zennit(model, alone, x, TARGETS)[""], expected)


# Rules by their formulas, in the canonizer alone: the input is split into a and b


class Halves(Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return self.function(a, b)


E = 1e-6


def stable(z):
    return torch.where(z < 0, z - E, z + E)


def halved(a, b, R, z):
    return R / 2, R / 2


def to_the_first(a, b, R, z):
    return R, torch.zeros_like(b)


def to_the_second(a, b, R, z):
    return torch.zeros_like(a), R


def normed(a, b, R, z, dims=(1, 2, 3)):
    """Ali et al. 2022: a linear map, the deviation a constant."""
    deviation = (a.var(dims, keepdim=True, unbiased=False) + 1e-5).sqrt()
    scale = 2 if dims == 3 else 1
    ratio = R / stable(z) * scale / deviation
    return a * (ratio - ratio.mean(dims, keepdim=True)), 0 * b


def of_a_product(a, b, R, z):
    """AttnLRP, Eq. 15."""
    ratio = R / stable(z) / 2
    return (
        a * torch.einsum("ncik,ncjk->ncij", ratio, b),
        b * torch.einsum("ncij,ncik->ncjk", a, ratio),
    )


def positions(x):
    return x.mean((2, 3), keepdim=True)


# name → (function of a and b, (a, b, R, z) → relevance of a and of b)
FORMULAS = {
    "a * b": (lambda a, b: a * b, halved),
    "a * a": (lambda a, b: a * a, to_the_first),
    "a * sigmoid(gate)": (lambda a, b: a * torch.sigmoid(positions(b)), to_the_first),
    "a * sigmoid(b)": (lambda a, b: a * torch.sigmoid(b), to_the_first),
    "gate * b": (lambda a, b: torch.sigmoid(positions(a)) * b, to_the_second),
    "a / (1 + sigmoid(b))": (lambda a, b: a / (1 + torch.sigmoid(b)), to_the_first),
    "3 - b": (
        lambda a, b: torch.sub(torch.full_like(b, 3.0), b),
        lambda a, b, R, z: (0 * a, -R * b / stable(z)),
    ),
    "0 + a": (lambda a, b: 0 + a, to_the_first),
    "layer norm": (lambda a, b: F.layer_norm(a, a.shape[1:]), normed),
    "layer norm of the last axis": (
        lambda a, b: F.layer_norm(a, (6,), torch.full((6,), 2.0, dtype=a.dtype)),
        lambda a, b, R, z: normed(a, b, R, z, dims=3),
    ),
    "softmax": (  # AttnLRP, Eq. 13
        lambda a, b: torch.softmax(a, 1),
        lambda a, b, R, z: (a * (R - torch.softmax(a, 1) * R.sum(1, keepdim=True)), 0 * b),
    ),
    "matmul": (torch.matmul, of_a_product),
    "einsum": (lambda a, b: torch.einsum("ncij,ncjk->ncik", a, b), of_a_product),
    "outer sum": (
        lambda a, b: a[:, :, :1] + b[:, :, :, :1],
        lambda a, b, R, z: (
            F.pad((a[:, :, :1] * R / stable(z)).sum(2, True), (0, 0, 0, 5)),
            F.pad((b[:, :, :, :1] * R / stable(z)).sum(3, True), (0, 5)),
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_operation_follows_its_formula(name):
    function, formula = FORMULAS[name]
    model = Halves(function)
    x = images(channels=4)
    z = model(x)
    R = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    (instance,) = FunctionalCanonizer(E).apply(model)
    pixels = x.clone().requires_grad_()
    output = model(pixels)
    (got,) = torch.autograd.grad(output, pixels, R)
    instance.remove()
    torch.testing.assert_close(output.detach(), z, rtol=1e-12, atol=1e-14)
    expected = torch.cat(formula(*x.chunk(2, 1), R, z), 1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# Conservation


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.gate = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(4, 3, bias=False)
        self.block = block

    def forward(self, x):
        x = F.relu(self.stem(x))
        for conv in self.convs:
            x = self.block(self, conv, x)
        return self.head(x.mean((2, 3)))


BLOCKS = {
    "post-activation": lambda m, conv, x: F.relu(x + conv(x)),
    "pre-activation": lambda m, conv, x: x + conv(F.relu(x)),
    "excited": lambda m, conv, x: x + conv(x) * torch.sigmoid(m.gate(x.mean((2, 3), True))),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_relevance_is_conserved_at_every_cut(block):
    model = Residual(BLOCKS[block]).double().eval()
    x = images()
    logits = model(x)[range(3), TARGETS].detach()
    scorer = LRP("epsilon", epsilon=1e-15)
    got = scorer(model, x, TARGETS, ["stem", "stem:input", "head:input", "head"])
    got[""] = scorer.heatmap(model, x, TARGETS).sum((2, 3))
    for values in got.values():
        torch.testing.assert_close(values.sum(1), logits, rtol=1e-9, atol=1e-12)


def calibrated(model, x):
    """Batch norms that fit the data, all biases and means zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
            module.train()
    with torch.no_grad():
        model(x)
    return without_biases(model)


FAMILIES = {
    "mobilenet_v3_small": 32,
    "densenet121": 32,
    "shufflenet_v2_x0_5": 32,
    "resnet18": 32,
    "googlenet": 64,
    "efficientnet_b0": 32,
}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_conserved_in_torchvisions_families(family):
    torch.manual_seed(0)
    made = getattr(torchvision.models, family)(num_classes=5).eval()
    x = torch.rand(4, 3, FAMILIES[family], FAMILIES[family])
    model = calibrated(made, x)
    x = x[:1].double()
    logits = model(x)[0].detach()
    best = logits.abs().argmax()
    heatmap = LRP("epsilon", epsilon=1e-9).heatmap(model, x, best[None])
    torch.testing.assert_close(heatmap.sum(), logits[best], rtol=1e-3, atol=0)


# The canonizer as an object


def test_remove_gives_the_forward_pass_back():
    model = Residual(BLOCKS["post-activation"]).double()
    x = images()
    before = model(x).detach()
    for _ in range(2):
        instances = FunctionalCanonizer().apply(model)
        assert "forward" in vars(model)
        for instance in instances:
            instance.remove()
        assert "forward" not in vars(model)
    assert torch.equal(model(x).detach(), before)
    mine = lambda x: x.sum((1, 2, 3))[:, None] * torch.ones(3, dtype=x.dtype)  # noqa: E731
    model.forward = mine
    (instance,) = FunctionalCanonizer().apply(model)
    assert model.forward is not mine
    instance.remove()
    assert model.forward is mine


class Stop(Exception):
    pass


def test_an_error_in_the_forward_pass_leaves_no_rules_on():
    def fail(m, conv, x):
        raise Stop

    model = Residual(fail).double()
    (instance,) = FunctionalCanonizer().apply(model)
    with pytest.raises(Stop):
        model(images())
    assert _get_current_function_mode() is None
    a = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad((a + 2 * a).sum(), a)
    assert gradient.tolist() == [3, 3, 3]
    instance.remove()


def test_without_gradients_the_canonized_model_is_the_plain_one():
    model = Residual(BLOCKS["excited"]).double()
    x = images()
    expected = model(x).detach()
    FunctionalCanonizer().apply(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x).detach(), expected)


def with_a_sum(activation):
    """A network with a sum and an activation, and its twin with the sum as a module."""
    return networks(
        lambda m, x: activation(m)(m.a(x) + m.b(x)),
        lambda m, x: activation(m)(m.added(m.a(x), m.b(x))),
    )


@pytest.mark.parametrize("make", [zc.GuidedBackprop, zc.BetaSmooth])
@pytest.mark.parametrize("twin", [False, True])
def test_composites_that_are_no_lrp_keep_the_gradient_at_sums(make, twin):
    model, x = with_a_sum(lambda m: m.relu)[twin], images()
    expected = by_zennit(model, make(), x, TARGETS)[""]
    assert_as_zennit(LRP(make()).heatmap(model, x, TARGETS), expected)
    origin = score_units(model, [(x, TARGETS)], LRP(make()), layers="head").origin
    assert origin["canonizers"] == []


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_excitation_backprop_changes_sums_alone(activation):
    model, twin = with_a_sum(lambda m: getattr(m, activation))
    x = images()
    expected = by_zennit(twin, zc.ExcitationBackprop(), x, TARGETS)[""]
    assert_as_zennit(LRP(zc.ExcitationBackprop()).heatmap(model, x, TARGETS), expected)


def test_a_composite_by_names_conserves_relevance_at_sums_too():
    model = Residual(BLOCKS["pre-activation"]).double().eval()
    x = images()
    names = [name for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    by_names = LRP(zc.NameMapComposite([(names, zr.Epsilon(1e-14))]))
    logits = model(x)[range(3), TARGETS].detach()
    got = by_names(model, x, TARGETS, ["stem"])["stem"].sum(1)
    torch.testing.assert_close(got, logits, rtol=1e-2, atol=0)  # sums keep Zennit's 1e-6


# A view of a tensor sees what is written into the tensor afterwards.
VIEWED = {
    "a number": lambda m, x: (lambda y: (y.flatten(1), y.mul_(2))[0])(m.a(x)),
    "a sum": lambda m, x: (lambda y: (y[:, :2], y.add_(m.b(x)))[0])(m.a(x)),
    "tanh_": lambda m, x: (lambda y: (y.transpose(1, 2), torch.tanh_(y))[0])(m.a(x)),
    "relu_": lambda m, x: (lambda y: (y.flatten(1), torch.relu_(y))[0])(m.a(x)),
    "two views": lambda m, x: (lambda y: (y[:, :2], y[:, 1:3].mul_(3))[0])(m.a(x)),
    "a list": lambda m, x: (lambda y: (sum([y, m.b(x)]), y.mul_(2))[0])(m.a(x)),
}


@pytest.mark.parametrize("operation", VIEWED)
def test_a_view_written_through_is_respected_or_refused(operation):
    model = Frame(VIEWED[operation]).double()
    x = images()
    model(x)
    logits = model(x)[range(3), TARGETS].detach()
    try:
        got = LRP("epsilon")(model, x, TARGETS, ["a", "head"])
    except (RuntimeError, ValueError) as problem:
        assert "in place" in str(problem)  # noqa: PT017
    else:
        torch.testing.assert_close(got["head"].sum(1), logits, rtol=1e-9, atol=0)


class Handed(nn.Module):
    """A tensor that an operation replaces, or overwrites before it is handed to a module."""

    def __init__(self, operation, *, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.side = nn.Linear(6, 8), nn.Linear(6, 8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.activation = nn.ELU(inplace=in_place)
        self.operation, self.in_place = operation, in_place

    def forward(self, x):
        y = self.first(x)
        result = self.operation(self, y, self.side(x))
        return self.head(torch.relu(self.second(y if self.in_place else result)))


# name → (operation in place whose result is not used, the same out of place)
HANDED = {
    "add_, then tanh_": (
        lambda m, y, other: y.add_(other).tanh_(),
        lambda m, y, other: torch.tanh(y + other),
    ),
    "twice": (lambda m, y, other: (y.mul_(2), y.sub_(other)), lambda m, y, other: 2 * y - other),
    "F.silu": (lambda m, y, _: F.silu(y, inplace=True), lambda m, y, _: F.silu(y)),
    "a module": (lambda m, y, _: m.activation(y), lambda m, y, _: m.activation(y)),
}


@pytest.mark.parametrize("operation", HANDED)
def test_a_layer_reads_what_was_written_before(operation):
    model, twin = (
        Handed(one, in_place=in_place).double()
        for one, in_place in zip(HANDED[operation], (True, False), strict=True)
    )
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=0)
    layers = ["first", "second:input", "second", "head:input", "head"]
    if operation in ("add_, then tanh_", "twice"):
        layers.append("side")
    for preset in PRESETS:
        expected = LRP(preset).relevance(twin, x, TARGETS, layers)
        assert_lrp_as_zennit(LRP(preset), model, x, TARGETS, expected)
