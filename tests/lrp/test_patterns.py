"""Patterns against their invariants, plain loops over patches, and nets of dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import dense
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from zennit.canonizers import NamedMergeBatchNorm
from zennit.core import Composite

from xai_edit import LRP
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.guard import preserved
from xai_edit.lrp import patterns as module
from xai_edit.lrp.pattern_rules import (
    patternattribution,
    patternattribution_two_component,
    patternnet,
    patternnet_two_component,
)
from xai_edit.lrp.patterns import Patterns, fit_patterns

COMPOSITES = [
    patternnet,
    patternnet_two_component,
    patternattribution,
    patternattribution_two_component,
]
SAMPLES = 60

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear on tokens": (lambda: nn.Linear(7, 5), (4, 7)),
    "conv1d, same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), (3, 9)),
    "conv2d, strided": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(0, 1)), (2, 6, 6)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=2), (4, 4, 5)),
    "conv2d, circular": (
        lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="circular", groups=2),
        (2, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
}


def one_layer(kind, seed=0):
    """A layer as a classifier of its own, and inputs with a mean and with correlations."""
    make, shape = LAYERS[kind]
    torch.manual_seed(seed)
    layer = make().double()
    size = torch.Size(shape).numel()
    mixed = torch.randn(SAMPLES, size).double() @ torch.randn(size, size).double() / size**0.5
    return nn.Sequential(layer, nn.Flatten()), layer, (mixed + 0.3).reshape(-1, *shape)


def seen_inputs(layer, x):
    """What each weight of each neuron sees: shape (neurons, samples · positions, weights).

    Found by asking the layer with all weights zero but one.
    """
    probe = copy.deepcopy(layer)
    columns = []
    with torch.no_grad():
        if probe.bias is not None:
            probe.bias.zero_()
        for weight in range(layer.weight[0].numel()):
            probe.weight.zero_()
            probe.weight.flatten(1)[:, weight] = 1
            out = probe(x)
            columns.append(out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1))
    return torch.stack(columns, -1)


def estimated(x, w, bias):
    """a, a₊ and a₋ of one neuron from its inputs x, shape (inputs, weights), by the formulas."""
    y = x @ w
    on = y + bias > 0

    def pattern(chosen):
        numerator = (x[chosen] * y[chosen, None]).mean(0) - x[chosen].mean(0) * y.mean()
        return numerator / (w @ numerator)

    return pattern(torch.ones_like(on)), pattern(on), pattern(~on)


def three(patterns, name):
    return patterns.linear[name], patterns.positive[name], patterns.negative[name]


@pytest.mark.parametrize("kind", LAYERS)
def test_patterns_are_those_of_a_loop_and_leave_nothing_that_covaries_with_the_output(kind):
    model, layer, x = one_layer(kind)
    patterns = fit_patterns(model, [x])
    inputs = seen_inputs(layer, x)
    assert patterns.samples == SAMPLES
    assert patterns.positions == {"0": inputs.shape[1]}
    assert all(a.shape == layer.weight.shape for a in three(patterns, "0"))
    for neuron, w in enumerate(layer.weight.detach().flatten(1)):
        seen, y = inputs[neuron], (inputs[neuron] @ w)[:, None]
        bias = 0.0 if layer.bias is None else layer.bias[neuron].item()
        got = [a[neuron].flatten() for a in three(patterns, "0")]
        for a, expected in zip(got, estimated(seen, w, bias), strict=True):
            torch.testing.assert_close(a, expected, rtol=1e-8, atol=1e-10)
        for signal in (got[0] * y, torch.where(y + bias > 0, got[1], got[2]) * y):
            rest = seen - signal
            covariance = (rest * y).mean(0) - rest.mean(0) * y.mean()
            assert covariance.abs().max() < 1e-9 * seen.var() * layer.weight.norm()


@pytest.mark.parametrize("kind", ["linear on tokens", "conv2d, grouped"])
def test_batches_and_chunks_do_not_matter(kind, monkeypatch):
    model, _, x = one_layer(kind)
    whole = three(fit_patterns(model, [x]), "0")
    many = three(fit_patterns(model, ((part, None) for part in x.split(7))), "0")
    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "BLOCK", 2)
    chunks = three(fit_patterns(model, [x]), "0")
    for a, b, c in zip(whole, many, chunks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_fitted_in_float32(dtype):
    model, _, x = one_layer("conv2d, strided")
    model, x = model.to(dtype), x.to(dtype)
    got = three(fit_patterns(model, [x]), "0")
    exact = three(fit_patterns(copy.deepcopy(model).double(), [x.double()]), "0")
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2.5e-3, atol=1e-3 * b.abs().max().item())


class Net(nn.Module):
    """Convolution, ReLU, pooling, convolution, ReLU, a linear layer with ReLU and one without."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 2, stride=2)
        self.fc, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        return self.head(torch.relu(self.fc(x.flatten(1))))


@pytest.fixture
def net():
    torch.manual_seed(3)
    net = Net().double()
    for name in ("conv2", "fc"):
        net.get_submodule(name).bias.data += 0.4  # so that most samples have a way through
    return net


@pytest.fixture
def images():
    torch.manual_seed(4)
    return torch.randn(80, 2, 4, 4).double() + 0.2


def matrix(layer, weight, shape):
    """The layer with another weight and without bias as a matrix (outputs, inputs)."""
    probe = copy.deepcopy(layer)
    probe.weight.data, probe.bias = weight.clone(), None
    return dense(probe, shape)[0]


def backward_by_matrices(net, x, target, weights):
    """Backward from one logit a sample, each layer by the matrix of the weights given."""
    if x.ndim == 4:
        pairs = zip(x, target, strict=True)
        return torch.stack([backward_by_matrices(net, *pair, weights) for pair in pairs])
    with torch.no_grad():
        h1 = net.conv1(x[None])
        pooled, switches = F.max_pool2d(h1.relu(), 2, return_indices=True)
        h2 = net.conv2(pooled)
        h3 = net.fc(h2.relu().flatten(1))
        g = torch.zeros(3).double()
        g[target] = net.head(h3.relu())[0, target]
        g = matrix(net.head, weights["head"], (6,)).T @ g
        g = matrix(net.fc, weights["fc"], (5,)).T @ (g * (h3[0] > 0))
        g = matrix(net.conv2, weights["conv2"], (4, 2, 2)).T @ (g * (h2.flatten() > 0))
        unpooled = torch.zeros(4, 16).double().scatter(1, switches[0].flatten(1), g.reshape(4, 4))
        g = unpooled.flatten() * (h1.flatten() > 0)
        return (matrix(net.conv1, weights["conv1"], (2, 4, 4)).T @ g).reshape(2, 4, 4)


def heatmaps(model, composite, x, targets):
    """By Zennit alone: the composite's context, from the logits of the targets."""
    x = x.clone().requires_grad_()
    with preserved(model), composite.context(model), torch.enable_grad():
        out = model(x)
        seed = F.one_hot(targets, out.shape[1]) * out.detach()
        (result,) = torch.autograd.grad(out, x, seed)
    return result


def weights_of(patterns, two_component):
    rectified = patterns.rectified if two_component else ()
    assert set(rectified) <= {"conv1", "conv2", "fc"}
    return {
        name: patterns.positive[name] if name in rectified else a
        for name, a in patterns.linear.items()
    }


@pytest.mark.parametrize("two_component", [False, True])
def test_composites_are_backward_passes_with_w_times_a_and_with_a_in_another_unit(
    net, images, two_component
):
    patterns = fit_patterns(net, [images])
    assert patterns.rectified == ("conv1", "conv2", "fc")
    attribution = patternattribution_two_component if two_component else patternattribution
    signal = patternnet_two_component if two_component else patternnet
    x, targets = images[:5], torch.tensor([0, 1, 2, 0, 1])
    weights = {
        name: (net.get_submodule(name).weight.detach(), a)
        for name, a in weights_of(patterns, two_component).items()
    }
    got = heatmaps(net, attribution(patterns), x, targets)
    products = {name: w * a for name, (w, a) in weights.items()}
    expected = backward_by_matrices(net, x, targets, products)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert got.flatten(1).any(1).sum() >= 4
    scale = 1.0
    for pair in weights.values():
        rows = [one.flatten(1) for one in pair]
        w, a = (one.norm(dim=1) for one in rows)
        gains = [torch.linalg.matrix_norm(F.normalize(one), 2) for one in rows]
        scale *= (w / a).median() * gains[0] / gains[1]
    got = heatmaps(net, signal(patterns), x, targets)
    expected = backward_by_matrices(net, x, targets, {name: a for name, (_, a) in weights.items()})
    # One number for all samples.
    unit = got.norm() / expected.norm()
    assert unit.item() == pytest.approx(scale.item(), rel=0.02)
    torch.testing.assert_close(got, unit * expected, rtol=1e-9, atol=1e-12)


def test_a_composite_serves_again_by_copies_of_its_hooks_and_in_lrp(net, images):
    patterns = fit_patterns(net, [images])
    original = patternattribution(patterns)
    copied = Composite(
        module_map=lambda ctx, name, layer: (
            hook.copy().copy() if (hook := original.module_map(ctx, name, layer)) else None
        )
    )
    targets = torch.tensor([0, 1])
    expected = heatmaps(net, original, images[:2], targets)
    for composite in (copied, original):
        assert torch.equal(heatmaps(net, composite, images[:2], targets), expected)
    by_lrp = LRP(original).heatmap(net, images[:2], targets)
    torch.testing.assert_close(by_lrp, expected, rtol=1e-9, atol=1e-12)


class Spelled(nn.Module):
    """A layer and one way to go on."""

    def __init__(self, layer, then):
        super().__init__()
        self.layer, self.head, self.then = layer, nn.LazyLinear(2), then

    def forward(self, x):
        return self.head(self.then(self.layer(x)).flatten(1))


RECTIFIED = {
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "clamp": lambda x: x.clamp(min=0),
    "after a merged batch norm": nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
    "after max-pooling and dropout": nn.Sequential(nn.MaxPool2d(2), nn.Dropout(), nn.ReLU()),
}
NOT_RECTIFIED = {
    "nn.LeakyReLU": nn.LeakyReLU(),
    "clamp to [-1, 1]": lambda x: x.clamp(-1, 1),
    "after average pooling": nn.Sequential(nn.AvgPool2d(2), nn.ReLU()),
    "after a sum": lambda x: F.relu(x + x),
    "after a sum in place": lambda x: F.relu(x.add_(1)),
    "after a batch norm of the batch": nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()
    ),
}


@pytest.mark.parametrize("way", [*RECTIFIED, *NOT_RECTIFIED])
def test_relus_are_found_in_every_spelling(way):
    torch.manual_seed(0)
    then = {**RECTIFIED, **NOT_RECTIFIED}[way]
    model = Spelled(nn.Conv2d(2, 3, 2), copy.deepcopy(then))
    x = torch.randn(10, 2, 5, 5)
    model.eval()(x)  # the lazy layer takes its shape
    assert fit_patterns(model, [x]).rectified == (("layer",) if way in RECTIFIED else ())


def test_batch_norms_count_as_part_of_their_layer(norm, batches, unchanged):
    folded = copy.deepcopy(norm)
    for conv, bn in ((0, 1), (3, 4)):
        folded.body[conv] = fuse_conv_bn_eval(folded.body[conv], folded.body[bn])
        folded.body[bn] = nn.Identity()
    check = unchanged(norm)
    got, expected = fit_patterns(norm, batches), fit_patterns(folded, batches)
    check()
    assert got.rectified == expected.rectified == ("body.0", "body.3")
    for name in expected.linear:
        for a, b in zip(three(got, name), three(expected, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    canonizer = NamedMergeBatchNorm([(["body.0"], "body.1"), (["body.3"], "body.4")])
    x, targets = batches[0][0][:5], torch.arange(5)
    for build in COMPOSITES:
        reference = heatmaps(folded, build(expected), x, targets)
        alone = heatmaps(norm, build(got, canonizers=[canonizer]), x, targets)
        tolerance = 1e-3 * reference.abs().max().item()
        torch.testing.assert_close(alone, reference, rtol=1e-3, atol=tolerance)
        by_lrp = LRP(build(got)).heatmap(norm, x, targets)
        torch.testing.assert_close(by_lrp, reference, rtol=1e-3, atol=tolerance)
    with pytest.raises(ValueError, match=r"'body\.3' are of other weights .* canonizers"):
        heatmaps(norm, patternnet(got), x, targets)


def test_neurons_whose_pattern_the_data_do_not_tell():
    torch.manual_seed(0)
    layer = nn.Linear(4, 5).double()
    x = torch.randn(50, 4).double()
    x[:, 3] = 2.0
    with torch.no_grad():
        layer.bias[:] = torch.tensor([0.1, -100.0, 100.0, 0.3, 0.3])
        layer.weight[3] = torch.tensor([0.0, 0.0, 0.0, 0.7])  # y = 1.4 for every sample
        layer.weight[4] = 0
    w = layer.weight.detach().clone()
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 3).double())
    patterns = fit_patterns(model, [x])
    a, positive, negative = three(patterns, "0")
    assert torch.equal(positive[1], a[1])  # never active
    assert torch.equal(negative[2], a[2])  # always active
    assert not torch.allclose(positive[0], a[0])
    for every in (a, positive, negative):
        torch.testing.assert_close(every[3], w[3] / (w[3] @ w[3]))
        assert torch.equal(every[4], torch.zeros(4).double())
    torch.testing.assert_close((w * a).sum(1)[:4], torch.ones(4).double())
    for build in COMPOSITES:
        assert torch.isfinite(heatmaps(model, build(patterns), x[:3], torch.arange(3))).all()


def test_signals_stay_finite_in_a_deep_network():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(50)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    body = [part for layer in layers for part in (layer, nn.ReLU())]
    model = nn.Sequential(*body, nn.Linear(64, 3))
    x, targets = torch.rand(200, 64), torch.tensor([0, 1, 2])
    patterns = fit_patterns(model, [x])
    unscaled = torch.ones(1, 3)
    for a in reversed(patterns.linear.values()):
        unscaled = unscaled @ a
    assert not torch.isfinite(unscaled).all()
    for build in COMPOSITES:
        result = heatmaps(model, build(patterns), x[:3], targets)
        assert torch.isfinite(result).all()
        assert result.flatten(1).any(1).all()


def test_save_and_load_are_the_same_to_the_bit(net, images, tmp_path):
    patterns = fit_patterns(net, [images])
    patterns.save(tmp_path / "net.safetensors")
    patterns.save(tmp_path / "again.safetensors")
    loaded = Patterns.load(tmp_path / "net.safetensors")
    for name in ("conv1", "conv2", "fc", "head"):
        for a, b in zip(three(loaded, name), three(patterns, name), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    for field in ("rectified", "samples", "positions"):
        assert getattr(loaded, field) == getattr(patterns, field)
    assert [*loaded.linear] == [*patterns.linear]
    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("net", "again"))
    assert first == second


def test_the_model_stays_as_it_was(plain, norm, batches, unchanged):
    for model in (plain, norm):
        model.train()
        check = unchanged(model)
        fit_patterns(model, batches)
        check()
        with pytest.raises(NonFiniteError):
            fit_patterns(model, [*batches, batches[0][0] * torch.nan])
        check()


def test_some_layers_are_enough(plain, batches):
    whole, some = fit_patterns(plain, batches), fit_patterns(plain, batches, layers=["fc1"])
    assert [*some.linear] == [*some.positive] == [*some.negative] == ["fc1"]
    assert some.rectified == ("fc1",)
    assert torch.equal(some.linear["fc1"], whole.linear["fc1"])


def test_a_layer_that_does_not_run_is_refused_if_it_is_asked_for(plain, batches):
    plain.spare = nn.Linear(3, 2)
    patterns = fit_patterns(plain, batches)
    w = plain.spare.weight.detach()
    torch.testing.assert_close(patterns.linear["spare"], w / (w**2).sum(1, keepdim=True))
    assert patterns.positions["spare"] == 0
    with pytest.raises(ValueError, match="'spare' takes no part"):
        fit_patterns(plain, batches, layers=["conv1", "spare"])


def test_computed_weights_are_refused(net, images):
    patterns = fit_patterns(net, [images])
    prune.l1_unstructured(net.fc, "weight", amount=0.5)
    with pytest.raises(ValueError, match="'fc' computes its weight from other parameters"):
        fit_patterns(net, [images])
    with pytest.raises(ValueError, match="'fc' computes its weight"):
        heatmaps(net, patternnet(patterns), images[:1], torch.tensor([0]))


def test_patterns_of_another_model_are_refused(plain, net, batches, images):
    build = patternnet
    x, target = batches[0][0][:1], torch.tensor([0])
    with pytest.raises(ValueError, match=r"layer 'conv1' needs some of shape \(4, 1, 3, 3\)"):
        heatmaps(plain, build(fit_patterns(net, [images])), x, target)
    some = fit_patterns(plain, batches, layers=["conv1", "conv2", "head"])
    with pytest.raises(ValueError, match=r"layer 'fc1' needs some of shape .* there are none"):
        heatmaps(plain, build(some), x, target)
    patterns = fit_patterns(plain, batches)
    with torch.no_grad():
        plain.conv2.weight[2] *= 1.5
    with pytest.raises(ValueError, match="'conv2' are of other weights"):
        heatmaps(plain, build(patterns), x, target)
