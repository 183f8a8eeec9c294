"""Operations that are no modules, against the same network made of modules and against formulas."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from zennit import composites as zc
from zennit import rules as zr
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.core import Hook
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer

from xai_edit import LRP, FunctionalCanonizer, check_model, score_units
from xai_edit.core.layers import CONVOLUTIONS

TARGETS = torch.tensor([2, 0, 1])
PRESETS = ["epsilon", "epsilon-plus", "alpha2beta1", "gamma+epsilon"]


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
        self.relu, self.silu, self.tanh = nn.ReLU(), nn.SiLU(), nn.Tanh()
        self.sum, self.sum2 = Sum(), Sum()
        self.average, self.pool, self.max = (
            nn.AdaptiveAvgPool2d(1),
            nn.AvgPool2d(2),
            nn.MaxPool2d(2),
        )
        self.twice = Passing(lambda x: 2 * x)
        self.minus = Passing(lambda x: -x)
        self.scaled = Passing(lambda x: x * self.scale)
        self.shifted = Sharing(lambda x: x + self.shift)
        self.combine = combine
        self.hidden = nn.LazyLinear(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.relu(self.hidden(self.combine(self, x).flatten(1))))

    def added(self, *values):
        return self.sum(torch.stack(values, -1))


def discarding(operation):
    """The in-place operation on the first branch whose result is not used, but whose effect is."""

    def combine(m, x):
        y = m.a(x)
        operation(m, x, y)
        return y

    return combine


def residual_in_place(m, x):
    y = m.a(x)
    y += m.b(x)
    return y


def read_then_rectified_in_place(m, x):
    y = m.a(x)
    total = y + m.b(x)
    return torch.cat([total, F.relu(y, inplace=True)], 1)


def two_sums(m, x):
    y = m.added(m.a(x), m.b(x))
    return m.sum2(torch.stack([y, m.c(x)], -1))


# name → (network as one writes it, the same network of modules)
PAIRS = {
    "+": (lambda m, x: m.a(x) + m.b(x), lambda m, x: m.added(m.a(x), m.b(x))),
    "+=": (residual_in_place, lambda m, x: m.added(m.a(x), m.b(x))),
    "torch.add": (
        lambda m, x: torch.add(m.a(x), m.b(x)),
        lambda m, x: m.added(m.a(x), m.b(x)),
    ),
    "torch.add, alpha=2": (
        lambda m, x: torch.add(m.a(x), m.b(x), alpha=2),
        lambda m, x: m.added(m.a(x), m.twice(m.b(x))),
    ),
    "add, other=": (
        lambda m, x: torch.add(m.a(x), other=m.b(x)),
        lambda m, x: m.added(m.a(x), m.b(x)),
    ),
    "add, input=, other=": (
        lambda m, x: torch.add(input=m.a(x), other=m.b(x)),
        lambda m, x: m.added(m.a(x), m.b(x)),
    ),
    "add_, result discarded": (
        discarding(lambda m, x, y: y.add_(m.b(x))),
        lambda m, x: m.added(m.a(x), m.b(x)),
    ),
    "add_, alpha=2, result discarded": (
        discarding(lambda m, x, y: y.add_(m.b(x), alpha=2)),
        lambda m, x: m.added(m.a(x), m.twice(m.b(x))),
    ),
    "-": (lambda m, x: m.a(x) - m.b(x), lambda m, x: m.added(m.a(x), m.minus(m.b(x)))),
    "torch.sub, alpha=2": (
        lambda m, x: torch.sub(m.a(x), m.b(x), alpha=2),
        lambda m, x: m.added(m.a(x), m.minus(m.twice(m.b(x)))),
    ),
    "sub_, result discarded": (
        discarding(lambda m, x, y: y.sub_(m.b(x))),
        lambda m, x: m.added(m.a(x), m.minus(m.b(x))),
    ),
    "sum of a list": (lambda m, x: sum([m.a(x), m.b(x), m.c(x)]), two_sums),
    "stack and sum": (
        lambda m, x: torch.stack([m.a(x), m.b(x), m.c(x)]).sum(0),
        lambda m, x: m.added(m.a(x), m.b(x), m.c(x)),
    ),
    "the same twice": (
        lambda m, x: (lambda y: y + y)(m.a(x)),
        lambda m, x: (lambda y: m.added(y, y))(m.a(x)),
    ),
    "a sum of a sum of branches": (lambda m, x: (m.a(x) + m.b(x)) + m.c(x), two_sums),
    "mean((2, 3))": (lambda m, x: m.a(x).mean((2, 3)), lambda m, x: m.average(m.a(x)).flatten(1)),
    "mean of the last axes": (
        lambda m, x: torch.mean(m.a(x), dim=(-1, -2), keepdim=True),
        lambda m, x: m.average(m.a(x)),
    ),
    "mean, input=": (
        lambda m, x: torch.mean(input=m.a(x), dim=(2, 3)),
        lambda m, x: m.average(m.a(x)).flatten(1),
    ),
    "sum over positions": (
        lambda m, x: m.a(x).sum((2, 3)),
        lambda m, x: m.sum(m.a(x).flatten(2)),
    ),
    "F.adaptive_avg_pool2d": (
        lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1),
        lambda m, x: m.average(m.a(x)),
    ),
    "F.avg_pool2d": (lambda m, x: F.avg_pool2d(m.a(x), 2), lambda m, x: m.pool(m.a(x))),
    "F.max_pool2d": (lambda m, x: F.max_pool2d(m.a(x), 2), lambda m, x: m.max(m.a(x))),
    "torch.relu": (lambda m, x: torch.relu(m.a(x)), lambda m, x: m.relu(m.a(x))),
    "x.relu()": (lambda m, x: m.a(x).relu(), lambda m, x: m.relu(m.a(x))),
    "F.relu, input=": (lambda m, x: F.relu(input=m.a(x)), lambda m, x: m.relu(m.a(x))),
    "F.relu in place": (
        lambda m, x: F.relu(m.a(x), inplace=True),
        lambda m, x: m.relu(m.a(x)),
    ),
    "F.relu in place, by position": (
        lambda m, x: F.relu(m.a(x), True),
        lambda m, x: m.relu(m.a(x)),
    ),
    "relu_, result discarded": (
        discarding(lambda m, x, y: y.relu_()),
        lambda m, x: m.relu(m.a(x)),
    ),
    "F.relu in place, result discarded": (
        discarding(lambda m, x, y: F.relu(y, inplace=True)),
        lambda m, x: m.relu(m.a(x)),
    ),
    "F.silu in place": (
        lambda m, x: F.silu(m.a(x), inplace=True),
        lambda m, x: m.silu(m.a(x)),
    ),
    "F.silu in place, result discarded": (
        discarding(lambda m, x, y: F.silu(y, inplace=True)),
        lambda m, x: m.silu(m.a(x)),
    ),
    "tanh_, result discarded": (
        discarding(lambda m, x, y: torch.tanh_(y)),
        lambda m, x: m.tanh(m.a(x)),
    ),
    "a sum, then ReLU in place": (
        lambda m, x: F.relu(m.a(x) + m.b(x), inplace=True),
        lambda m, x: m.relu(m.added(m.a(x), m.b(x))),
    ),
    "a summand rectified in place afterwards": (
        read_then_rectified_in_place,
        lambda m, x: (lambda y: torch.cat([m.added(y, m.b(x)), m.relu(y)], 1))(m.a(x)),
    ),
    "times a number": (lambda m, x: 2 * m.a(x), lambda m, x: m.twice(m.a(x))),
    "over a number": (lambda m, x: m.a(x) / 0.5, lambda m, x: m.twice(m.a(x))),
    "mul_ by a number, result discarded": (
        discarding(lambda m, x, y: y.mul_(2)),
        lambda m, x: m.twice(m.a(x)),
    ),
    "negated": (lambda m, x: -m.a(x), lambda m, x: m.minus(m.a(x))),
    "layer scale": (lambda m, x: m.a(x) * m.scale, lambda m, x: m.scaled(m.a(x))),
    "layer scale first": (lambda m, x: m.scale * m.a(x), lambda m, x: m.scaled(m.a(x))),
    "plus a parameter": (lambda m, x: m.a(x) + m.shift, lambda m, x: m.shifted(m.a(x))),
    "parameter plus": (lambda m, x: m.shift + m.a(x), lambda m, x: m.shifted(m.a(x))),
    "layer scale on a residual branch": (
        lambda m, x: m.a(x) + m.scale * m.b(x),
        lambda m, x: m.added(m.a(x), m.scaled(m.b(x))),
    ),
    "F.dropout": (
        lambda m, x: F.dropout(m.a(x) + m.b(x), training=m.training),
        lambda m, x: m.added(m.a(x), m.b(x)),
    ),
    "chunks added": (
        lambda m, x: (lambda u, v: u + v)(*m.a(x).chunk(2, 1)),
        lambda m, x: m.added(*m.a(x).chunk(2, 1)),
    ),
    "joined, flipped and cut": (
        lambda m, x: torch.cat([m.a(x).flip(1), F.relu(m.b(x))], 1)[:, 1:7].permute(0, 2, 3, 1),
        lambda m, x: torch.cat([m.a(x).flip(1), m.relu(m.b(x))], 1)[:, 1:7].permute(0, 2, 3, 1),
    ),
    "transposed by an attribute": (
        lambda m, x: m.a(x).mT.mT + m.b(x),
        lambda m, x: m.added(m.a(x), m.b(x)),
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


def by_zennit(model, composite, x, targets=TARGETS, layers=()):
    """Relevance at the layers' outputs and the inputs, by Zennit alone."""
    found = {}
    handles = []
    with Gradient(model, composite) as attributor:
        for name in layers:
            handles.append(
                model.get_submodule(name).register_forward_hook(
                    lambda _, __, y, name=name: (
                        y.register_hook(lambda gradient: found.__setitem__(name, gradient.clone()))
                        and None
                    )
                )
            )
        seed = lambda z: F.one_hot(targets, z.shape[1]) * z.detach()  # noqa: E731
        _, found[""] = attributor(x.detach().clone(), seed)
    for handle in handles:
        handle.remove()
    return found


def for_modules(preset):
    """The preset with a rule for the modules of the module form."""
    composite = LRP(preset).composite
    composite.layer_map += [(Passing, zr.Pass()), (Sharing, zr.Norm())]
    return composite


def assert_close(got, expected, tolerance=1e-10):
    scale = float(expected.abs().max())
    error = float((got - expected).abs().max())
    assert error <= tolerance * scale, f"off by {error:.2g} where the largest is {scale:.2g}"


@pytest.mark.parametrize("operation", PAIRS)
def test_the_logits_stay_those_of_the_network(operation):
    model, twin = networks(*PAIRS[operation])
    x = images()
    logits = model(x).detach()
    torch.testing.assert_close(twin(x).detach(), logits, rtol=1e-12, atol=1e-12)
    found = LRP("epsilon")(model, x, TARGETS, ["head"])["head"]
    torch.testing.assert_close(found.sum(1), logits[range(3), TARGETS], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", PAIRS)
@pytest.mark.parametrize("preset", PRESETS)
def test_an_operation_gets_the_relevance_of_its_module(preset, operation):
    model, twin = networks(*PAIRS[operation])
    x = images()
    layers = ["a", "hidden", "head"]
    expected = by_zennit(twin, for_modules(preset), x, layers=layers)
    scorer = LRP(preset)
    got = scorer.relevance(model, x, TARGETS, layers)
    got[""] = scorer.heatmap(model, x, TARGETS)
    for name in (*layers, ""):
        assert_close(got[name], expected[name])


@pytest.mark.parametrize("operation", PAIRS)
def test_the_canonizer_serves_a_plain_composite_of_zennit(operation, unchanged):
    # Its parameters need gradients here, but they are no data.
    model, twin = networks(*PAIRS[operation])
    x = images()
    expected = by_zennit(twin, for_modules("epsilon-plus"), x, layers=["a"])
    check = unchanged(model)
    got = by_zennit(model, zc.EpsilonPlus(canonizers=[FunctionalCanonizer()]), x, layers=["a"])
    if version("zennit").startswith("0."):
        check()  # Zennit 1.0 by itself leaves parameters as new objects (zennit#237)
    assert "forward" not in vars(model)
    for name in expected:
        assert_close(got[name], expected[name])


@pytest.mark.parametrize("operation", ["+", "+=", "mean((2, 3))", "layer scale", "chunks added"])
def test_the_stabiliser_is_that_of_the_composites_sums(operation):
    model, twin = networks(*PAIRS[operation])
    x = images()
    layer_map = [
        *zc.layer_map_base(stabilizer=0.2),
        ((*CONVOLUTIONS, nn.Linear), zr.Epsilon()),
        (Passing, zr.Pass()),
    ]
    expected = by_zennit(twin, zc.LayerMapComposite(layer_map), x)[""]
    assert_close(LRP(zc.LayerMapComposite(layer_map)).heatmap(model, x, TARGETS), expected)
    alone = zc.LayerMapComposite(layer_map, canonizers=[FunctionalCanonizer(0.2)])
    assert_close(by_zennit(model, alone, x)[""], expected)


# Rules by their formulas, in the canonizer alone: the input is split into a and b


class Halves(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return self.function(a, b)


E = 1e-6


def stable(z):
    return torch.where(z < 0, z - E, z + E)


def summed(a, b, R, z):
    return a * R / stable(z), b * R / stable(z)


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


def positions(x):
    return x.mean((2, 3), keepdim=True)


# name → (function of a and b, (a, b, R, z) → relevance of a and of b)
FORMULAS = {
    "a + b": (lambda a, b: a + b, summed),
    "a - b": (
        lambda a, b: a - b,
        lambda a, b, R, z: (a * R / stable(z), -b * R / stable(z)),
    ),
    "a * b": (lambda a, b: a * b, halved),
    "a * a": (lambda a, b: a * a + 0 * b, None),
    "a * sigmoid(gate)": (
        lambda a, b: a * torch.sigmoid(positions(b)),
        to_the_first,
    ),
    "gate * b": (lambda a, b: torch.sigmoid(positions(a)) * b, to_the_second),
    "a / (1 + sigmoid(b))": (lambda a, b: a / (1 + torch.sigmoid(b)), to_the_first),
    "a.mul_(gate)": (lambda a, b: a.clone().mul_(torch.sigmoid(positions(b))), to_the_first),
    "3 a": (lambda a, b: 3 * a, to_the_first),
    "a + 3": (lambda a, b: a + 3, lambda a, b, R, z: (R * a / stable(z), 0 * b)),
    "3 - b": (
        lambda a, b: torch.sub(torch.full_like(b, 3.0), b),
        lambda a, b, R, z: (0 * a, -R * b / stable(z)),
    ),
    "0 + a": (lambda a, b: 0 + a, to_the_first),
    "tanh(b)": (lambda a, b: torch.tanh(b), to_the_second),
    "layer norm": (lambda a, b: F.layer_norm(a, a.shape[1:]), normed),
    "layer norm of the last axis": (
        lambda a, b: F.layer_norm(a, (6,), torch.full((6,), 2.0, dtype=a.dtype)),
        lambda a, b, R, z: normed(a, b, R, z, dims=3),
    ),
    "mean of b": (
        lambda a, b: b.mean((2, 3)),
        lambda a, b, R, z: (0 * a, b / 36 * (R / stable(z))[:, :, None, None]),
    ),
    "joined": (
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b, R, z: (R[:, :2], R[:, 2:]),
    ),
    "softmax": (  # AttnLRP, Eq. 13
        lambda a, b: torch.softmax(a, 1),
        lambda a, b, R, z: (a * (R - torch.softmax(a, 1) * R.sum(1, keepdim=True)), 0 * b),
    ),
    "matmul": (  # AttnLRP, Eq. 15
        lambda a, b: torch.matmul(a, b),
        lambda a, b, R, z: (
            a * torch.einsum("ncik,ncjk->ncij", R / stable(z) / 2, b),
            b * torch.einsum("ncij,ncik->ncjk", a, R / stable(z) / 2),
        ),
    ),
    "einsum": (
        lambda a, b: torch.einsum("ncij,ncjk->ncik", a, b),
        lambda a, b, R, z: (
            a * torch.einsum("ncik,ncjk->ncij", R / stable(z) / 2, b),
            b * torch.einsum("ncij,ncik->ncjk", a, R / stable(z) / 2),
        ),
    ),
    "outer sum": (
        lambda a, b: a[:, :, :1] + b[:, :, :, :1],
        lambda a, b, R, z: (
            F.pad((a[:, :, :1] * R / stable(z)).sum(2, True), (0, 0, 0, 5)),
            F.pad((b[:, :, :, :1] * R / stable(z)).sum(3, True), (0, 5)),
        ),
    ),
}


@pytest.mark.parametrize("name", sorted({*FORMULAS} - {"a * a"}))
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


def test_a_square_gets_all_the_relevance():
    model = Module(lambda x: x * x)
    (instance,) = FunctionalCanonizer().apply(model)
    x = images().requires_grad_()
    R = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    (got,) = torch.autograd.grad(model(x), x, R)
    instance.remove()
    torch.testing.assert_close(got, R, rtol=1e-12, atol=0)


class Excited(nn.Module):
    """Squeeze and excitation at some resolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 1, bias=False)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = self.conv(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head((gate * x).mean((2, 3)))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_gate_gets_no_relevance_at_any_resolution(size):
    model = Excited().double()
    x = images(size=size)
    got = LRP("epsilon", epsilon=1e-14)(model, x, TARGETS, ["conv", "squeeze", "excite", "head"])
    assert not got["squeeze"].any()
    assert not got["excite"].any()
    logits = model(x)[range(3), TARGETS].detach()
    torch.testing.assert_close(got["conv"].sum(1), logits, rtol=1e-9, atol=0)


class Attention(nn.Module):
    """One head of attention over the positions, written in three ways."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 1, bias=False, batch_first=True)
        self.head = nn.Linear(4, 3, bias=False)
        self.form = form

    def forward(self, x):
        if self.form == "module":
            x, _ = self.attention(x, x, x, need_weights=False)
            return self.head(x.mean(1))
        q, k, v = F.linear(x, self.attention.in_proj_weight).chunk(3, -1)
        if self.form == "function":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        return self.head(F.linear(x, self.attention.out_proj.weight).mean(1))


def attention_by_hand(model, x, target, epsilon):
    """AttnLRP of one head and one sample, in matrices (Achtibat et al. 2024, Eq. 8, 13 and 15)."""

    def shared(z, R):
        return R / (z + epsilon * torch.where(z < 0, -1.0, 1.0))

    W_in, W_out, W = (
        model.attention.in_proj_weight,
        model.attention.out_proj.weight,
        model.head.weight,
    )
    qkv = x @ W_in.T
    q, k, v = qkv.chunk(3, -1)
    scores = q @ k.T / 2
    A = torch.softmax(scores, -1)
    mixed = A @ v
    out = mixed @ W_out.T
    pooled = out.mean(0)
    z = W @ pooled
    R = pooled * W[target] * shared(z[target], z[target])
    R = out / len(x) * shared(pooled, R)
    R = mixed * (shared(out, R) @ W_out)
    ratio = shared(mixed, R) / 2
    R_A, R_v = A * (ratio @ v.T), v * (A.T @ ratio)
    R_scores = scores * (R_A - A * R_A.sum(-1, keepdim=True))
    raw = q @ k.T
    ratio = shared(raw, R_scores) / 2
    R_q, R_k = q * (ratio @ k), k * (ratio.T @ q)
    return x * (shared(qkv, torch.cat([R_q, R_k, R_v], -1)) @ W_in)


@pytest.mark.parametrize("form", ["module", "function", "written out"])
def test_attention_follows_attnlrp(form):
    model = Attention(form).double().eval()
    x = images()[:, 0, :5, :4]
    got = LRP("epsilon", epsilon=1e-9).heatmap(model, x, TARGETS)
    for sample, target in enumerate(TARGETS.tolist()):
        expected = attention_by_hand(model, x[sample], target, 1e-9).detach()
        torch.testing.assert_close(got[sample], expected, rtol=1e-5, atol=1e-9)


# Conservation


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.grow = nn.Conv2d(8, 4, 1, bias=False)
        self.gate = nn.Conv2d(4, 4, 1, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.7))
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
    "in place": lambda m, conv, x: F.relu_(conv(x).add_(x)),
    "difference": lambda m, conv, x: x - m.scale * F.relu(conv(x)),
    "dense": lambda m, conv, x: m.grow(torch.cat([x, F.relu(conv(x))], 1)),
    "excited": lambda m, conv, x: x + conv(x) * torch.sigmoid(m.gate(x.mean((2, 3), True))),
    "shuffled": lambda m, conv, x: torch.cat(
        (lambda u, v: (u, v + conv(x).chunk(2, 1)[1]))(*x.chunk(2, 1)), 1
    ).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "squared": lambda m, conv, x: x + conv(x) * conv(x),
    "normalised": lambda m, conv, x: x + conv(F.layer_norm(x, x.shape[1:])),
    "divided": lambda m, conv, x: (x + conv(x)) / (1 + torch.sigmoid(x)),
    "interpolated": lambda m, conv, x: F.relu(
        x + F.interpolate(F.avg_pool2d(conv(x), 2), scale_factor=2.0)
    ),
}  # fmt: skip


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
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            tensor.data.zero_()
    return model.double().eval()


FAMILIES = {
    "resnet18": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "densenet121": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64,
    "googlenet": 64,
    "efficientnet_b0": 32,
    "mnasnet0_5": 32,
    "regnet_y_400mf": 32,
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


@pytest.mark.parametrize("preset", ["epsilon", "alpha2beta1"])
def test_a_resnet_needs_no_canonizer_of_its_own(preset):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.eps = 0.0  # which Zennit 0.5 leaves in a merged batch norm
    x, targets = images(1, channels=3, size=32), torch.tensor([1])
    layers = ["conv1", "layer1.0.conv1", "layer3.0.downsample.0", "fc"]
    composite = LRP(preset).composite
    composite.canonizers = [ResNetCanonizer()]
    expected = by_zennit(copy.deepcopy(model), composite, x, targets, layers)
    scorer = LRP(preset)
    got = scorer.relevance(model, x, targets, layers)
    for name in layers:
        assert_close(got[name], expected[name], 1e-9)


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
    pixels = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels)[:, 0].sum(), pixels)
    twin = Residual(BLOCKS["post-activation"]).double()
    other = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin(other)[:, 0].sum(), other)
    assert torch.equal(gradient, expected)
    assert torch.equal(model(x).detach(), before)


def test_remove_gives_a_users_own_forward_back():
    model = Residual(BLOCKS["post-activation"]).double()
    mine = lambda x: x.sum((1, 2, 3))[:, None] * torch.ones(3, dtype=x.dtype)  # noqa: E731
    model.forward = mine
    (instance,) = FunctionalCanonizer().apply(model)
    assert model.forward is not mine
    instance.remove()
    assert model.forward is mine


def test_two_canonizers_come_off_in_reverse_order():
    model = Residual(BLOCKS["post-activation"]).double()
    x = images().requires_grad_()
    (first,) = FunctionalCanonizer().apply(model)
    (second,) = FunctionalCanonizer(0.5).apply(model)
    model(x)
    second.remove()
    first.remove()
    assert "forward" not in vars(model)


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
    instance.remove()
    a = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad((a + 2 * a).sum(), a)
    assert gradient.tolist() == [3, 3, 3]


def test_the_rules_act_in_the_canonized_model_alone():
    model = Residual(BLOCKS["post-activation"]).double()
    FunctionalCanonizer().apply(model)
    a = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad((a + 2 * a).sum(), a)
    assert gradient.tolist() == [3, 3, 3]


def test_without_gradients_the_canonized_model_is_the_plain_one():
    model = Residual(BLOCKS["excited"]).double()
    x = images()
    expected = model(x).detach()
    FunctionalCanonizer().apply(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x).detach(), expected)


def test_a_merging_canonizer_goes_beside_it():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).double().eval()
    x, targets = images(1, channels=3, size=32), torch.tensor([1])
    canonizers = [SequentialMergeBatchNorm(), FunctionalCanonizer()]
    got = by_zennit(model, zc.EpsilonPlus(canonizers=canonizers), x, targets)[""]
    expected = by_zennit(model, zc.EpsilonPlus(canonizers=[ResNetCanonizer()]), x, targets)[""]
    assert_close(got, expected)


@pytest.mark.parametrize("form", ["sum", "Sum"])
@pytest.mark.parametrize("make", [zc.GuidedBackprop, zc.DeconvNet, zc.BetaSmooth])
def test_composites_that_are_no_lrp_keep_the_gradient_at_sums(make, form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
            self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
            self.sum = Sum()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = self.relu1(self.a(x))
            y = self.b(x)
            both = x + y if form == "sum" else self.sum(torch.stack([x, y], -1))
            return self.head(self.relu2(both))

    model = Net().double()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = by_zennit(model, make(), x)[""]
    assert_close(LRP(make()).heatmap(model, x, TARGETS), expected)
    origin = score_units(model, [(x, TARGETS)], LRP(make()), layers="head").origin
    assert origin["canonizers"] == []


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_excitation_backprop_changes_sums_alone(activation):
    class Net(nn.Module):
        def __init__(self, add):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
            self.one, self.two = activation(), activation()
            self.sum = Sum()
            self.head = nn.Linear(6, 3)
            self.add = add

        def forward(self, x):
            x = self.one(self.a(x))
            return self.head(self.two(self.add(self, x, self.b(x))))

    model = Net(lambda m, x, y: x + y).double()
    twin = Net(lambda m, x, y: m.sum(torch.stack([x, y], -1))).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = by_zennit(twin, zc.ExcitationBackprop(), x)[""]
    assert_close(LRP(zc.ExcitationBackprop()).heatmap(model, x, TARGETS), expected)


def test_a_composite_by_names_conserves_relevance_at_sums_too():
    model = Residual(BLOCKS["pre-activation"]).double().eval()
    x = images()
    names = [name for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    by_names = LRP(zc.NameMapComposite([(names, zr.Epsilon(1e-14))]))
    logits = model(x)[range(3), TARGETS].detach()
    got = by_names(model, x, TARGETS, ["stem"])["stem"].sum(1)
    torch.testing.assert_close(got, logits, rtol=1e-2, atol=0)  # sums keep Zennit's 1e-6


class GradientTimesInput(Hook):
    """A user's own hook, which builds on the gradient of its module."""

    def forward(self, module, inputs, output):
        self.stored_tensors["input"] = inputs

    def backward(self, module, grad_input, grad_output):
        return (self.stored_tensors["input"][0] * grad_input[0],)


@pytest.mark.parametrize(
    "layer_map",
    [
        [*zc.layer_map_base(), ((*CONVOLUTIONS, nn.Linear), GradientTimesInput())],
        [
            (Sum, zr.Norm()),
            (nn.ReLU, zr.ReLUGuidedBackprop()),
            ((*CONVOLUTIONS, nn.Linear), zr.Epsilon()),
        ],
    ],
    ids=["on layers", "guided ReLU"],
)
@pytest.mark.parametrize("canonizers", ["auto", [FunctionalCanonizer()]])
def test_a_hook_that_builds_on_the_gradient_keeps_it_beside_a_sum(layer_map, canonizers):
    def combine(add):
        return lambda m, x: m.relu(add(m, m.a(x), m.b(x)))

    model, twin = networks(combine(lambda m, a, b: a + b), combine(lambda m, a, b: m.added(a, b)))
    x = images()
    expected = by_zennit(twin, zc.LayerMapComposite(layer_map), x, layers=["hidden"])
    scorer = LRP(zc.LayerMapComposite(layer_map), canonizers=canonizers)
    got = scorer.relevance(model, x, TARGETS, ["hidden"])
    assert_close(got["hidden"], expected["hidden"])
    assert_close(scorer.heatmap(model, x, TARGETS), expected[""])


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
    """A tensor overwritten in place and handed to a module as it is."""

    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.side = nn.Linear(6, 8), nn.Linear(6, 8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.operation = operation

    def forward(self, x):
        y = self.first(x)
        self.operation(y, self.side(x))
        return self.head(torch.relu(self.second(y)))


HANDED = {
    "mul_": (lambda y, other: y.mul_(2), lambda y, other: 2 * y),
    "add_": (lambda y, other: y.add_(other), lambda y, other: y + other),
    "add_, then tanh_": (lambda y, other: y.add_(other).tanh_(), lambda y, o: torch.tanh(y + o)),
    "relu_": (lambda y, other: y.relu_(), lambda y, other: torch.relu(y)),
    "twice": (lambda y, other: (y.mul_(2), y.sub_(other)), lambda y, other: 2 * y - other),
    "F.silu": (lambda y, other: F.silu(y, inplace=True), lambda y, other: F.silu(y)),
}


@pytest.mark.parametrize("operation", HANDED)
def test_a_layer_reads_what_was_written_before(operation):
    in_place, out_of_place = HANDED[operation]
    model = Handed(in_place).double()
    twin = Handed(None).double()
    twin.forward = lambda x: twin.head(
        torch.relu(twin.second(out_of_place(twin.first(x), twin.side(x))))
    )
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=0)
    layers = ["first", "second:input", "second", "head:input", "head"]
    if operation in ("add_", "add_, then tanh_", "twice"):
        layers.append("side")
    for preset in PRESETS:
        got = LRP(preset)(model, x, TARGETS, layers)
        expected = LRP(preset)(twin, x, TARGETS, layers)
        for name in layers:
            assert_close(got[name], expected[name])
        for name in layers:
            (alone,) = LRP(preset)(model, x, TARGETS, [name]).values()
            assert_close(alone, expected[name])


class Unpacked(nn.Module):
    """Tensors that come out of one in the ways of Python."""

    def __init__(self, unpack):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8, bias=False), nn.LazyLinear(3, bias=False)
        self.unpack = unpack

    def forward(self, x):
        return self.head(self.unpack(self.body(x)))


def unpacked(y):
    a, b = y.unflatten(1, (2, 4)).transpose(0, 1)
    return a + b


UNPACKED = {
    "assignment": unpacked,
    "iteration": lambda y: torch.stack([row * 2 for row in y]),
    "unbind": lambda y: sum(y.unflatten(1, (2, 4)).unbind(1)),
    "named values": lambda y: y.unflatten(1, (4, 2)).max(2).values,
    "split": lambda y: (lambda a, b: a - b)(*y.split([4, 4], 1)),
    "a dictionary": lambda y: {"y": y + y.flip(1)}["y"],
    "indices": lambda y: y[torch.arange(len(y)), None, :].flatten(1) + y,
}


@pytest.mark.parametrize("way", UNPACKED)
def test_tensors_are_followed_through_python(way):
    model = Unpacked(UNPACKED[way]).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    logits = model(x)[range(3), TARGETS].detach()
    got = LRP("epsilon", epsilon=1e-14).heatmap(model, x, TARGETS)
    torch.testing.assert_close(got.sum(1), logits, rtol=1e-9, atol=1e-12)


class Words(nn.Module):
    """A residual network over word numbers, through which no gradient reaches the inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, words):
        x = self.embedding(words)
        x = x + self.a(x)
        x = x + F.relu(self.b(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize("layer", ["embedding", "head:input"])
def test_relevance_is_conserved_behind_an_embedding(layer):
    model = Words().double()
    words = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(0))
    logits = model(words)[range(3), TARGETS].detach()
    got = LRP("epsilon", epsilon=1e-14)(model, words, TARGETS, [layer])[layer]
    torch.testing.assert_close(got.sum(1), logits, rtol=1e-9, atol=1e-12)


class Adds(torch.autograd.Function):
    """An operation that nothing can look into."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor):
        return a + b

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


UNKNOWN = {
    "pow": lambda m, x: m.a(x) ** 2,
    "clamp": lambda m, x: m.a(x).clamp(min=0),
    "where": lambda m, x: torch.where(m.a(x) > 0, m.a(x), m.b(x)),
    "rsub": lambda m, x: 1 - m.a(x),
    "lerp": lambda m, x: torch.lerp(m.a(x), m.b(x), 0.5),
    "cumsum": lambda m, x: m.a(x).cumsum(1),
    "exp": lambda m, x: m.a(x).exp(),
    "var": lambda m, x: m.a(x).var((2, 3)),
    "addcmul": lambda m, x: torch.addcmul(m.a(x), m.b(x), m.c(x)),
    "a function of autograd": lambda m, x: Adds.apply(m.a(x), m.b(x)),
    "group norm": lambda m, x: F.group_norm(m.a(x), 2),
}


@pytest.mark.parametrize("operation", UNKNOWN)
def test_an_operation_without_a_rule_is_refused_or_conserves(operation, unchanged):
    model = Frame(UNKNOWN[operation]).double()
    x = images()
    model(x)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    model.eval()
    check = unchanged(model)
    scorer = LRP("epsilon", epsilon=1e-14)
    try:
        got = scorer.heatmap(model, x, TARGETS)
    except ValueError as problem:
        assert "there is no relevance rule" in str(problem)  # noqa: PT017
        assert not check_model(model, x, scorer).ok
        scorer(model, x, TARGETS, ["hidden", "head"])  # behind the trouble
    else:
        logits = model(x)[range(3), TARGETS].detach()
        torch.testing.assert_close(got.sum((1, 2, 3)), logits, rtol=1e-6, atol=1e-9)
    check()
