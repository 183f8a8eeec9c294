"""What networks outside torchvision are made of, against the input times a gradient."""

from __future__ import annotations

import pytest
import torch
from _by_gradient import by_gradient
from torch import nn
from torch.nn import functional as F

from xai_edit import LRP

TARGETS = torch.tensor([0, 2, 1])


class Of(nn.Module):
    """A convolution, what is tested, and a head; with a function or a module of the features."""

    def __init__(self, middle, *modules, size=(3, 6, 6), channels=8):
        super().__init__()
        dims = len(size) - 1
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.stem = convolution(size[0], channels, 3, padding=1)
        self.inner = nn.ModuleList(modules)
        self.middle = middle
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        x = self.middle(self.stem(x), *self.inner)
        return self.head(x.flatten(2).mean(2))


class NormWithActivation(nn.BatchNorm2d):
    """A norm that ends in an activation, as timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(x)


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def response_norm(x):
    energy = x.norm(dim=(2, 3), keepdim=True)
    return x + torch.addcmul(torch.ones(1).double(), x, energy / (energy.mean(1, keepdim=True) + 1))


def squeezed(x, layer):
    return x * layer(x.mean((2, 3))).sigmoid()[..., None, None]


def by_channel(x, layer):  # as ECA
    gate = layer(x.mean((2, 3))[:, None]).sigmoid()
    return x * gate.transpose(1, 2)[..., None].expand_as(x)


def by_place(x, layer):  # as CBAM
    return x * layer(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid().expand_as(x)


def upsampled_gate(x, layer):  # as GhostNet's
    return x * F.interpolate(layer(F.avg_pool2d(x, 2)).sigmoid(), size=x.shape[-2:])


def selected(x, first, second):  # as selective kernels
    both = torch.stack([first(x), second(x)], 1)
    shares = both.sum(1).mean((2, 3), keepdim=True)[:, None].expand(-1, 2, -1, -1, -1)
    return (both * torch.softmax(shares * torch.tensor([1.0, 2]).view(2, 1, 1, 1), 1)).sum(1)


def swish_gated(x, one, other):
    tokens = x.flatten(2).mT
    return (F.silu(one(tokens)) * other(tokens)).mT


def rotary(x, query, key):
    tokens = x.flatten(2).mT
    angle = torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] / 7

    def turned(values):
        left, right = values.chunk(2, -1)
        half = torch.cat((-right, left), -1)
        return values * angle.cos() + half * angle.sin()

    return F.scaled_dot_product_attention(turned(query(tokens)), turned(key(tokens)), tokens).mT


def written_in_part(x, layer):
    x = layer(x)
    shifted = x[:, :, 1:] + x[:, :, :-1]
    x[:, :, 1:] = shifted
    return x


def linear(inputs=8, outputs=8):
    return nn.Linear(inputs, outputs)


def norm_free(x, layer):
    return x * torch.rsqrt(x.var(1, keepdim=True) + 1e-6) + layer(x)


def constant(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def linear_attention(x, query, key):
    tokens = x.flatten(2).mT
    q, k = F.elu(query(tokens)) + 1, F.elu(key(tokens)) + 1
    return ((q @ (k.mT @ tokens)) * (1 / (q @ k.sum(1, keepdim=True).mT + 1e-6))).mT


def normed_by_hand(x, layer):
    centred = x - x.mean(1, keepdim=True)
    return layer(centred * torch.rsqrt((centred**2).mean(1, keepdim=True) + 1e-5))


def highway(x, layer, gate):
    gate = gate(x).sigmoid()
    return (1 - gate) * x.mul(0.5) + x.mul(0.5) * torch.rsub(gate, 1) + gate * layer(x)


NETWORKS = {
    "highway": lambda: Of(highway, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)),
    "einsum with a constant": lambda: Of(
        lambda x: x + torch.einsum("nchw,cd->ndhw", x, constant(8, 8)).relu()
    ),
    "matmul with a constant": lambda: Of(lambda x: constant(8, 8) @ x.flatten(2)),
    "one of two branches": lambda: Of(
        lambda x, one, two: torch.where(x > 0, one(x), two(x)),
        *(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)),
    ),
    "dilated decoder": lambda: Of(
        lambda x, one, two: two(F.leaky_relu(one(x), 0.1)),
        nn.ConvTranspose2d(8, 8, 3, 2, dilation=2),
        nn.ConvTranspose2d(8, 8, 2, 2, groups=4),
    ),
    "linear attention": lambda: Of(linear_attention, linear(), linear()),
    "normed by hand": lambda: Of(normed_by_hand, nn.Conv2d(8, 8, 1)),
    "sigmoid before a layer": lambda: Of(lambda x, layer: layer(x.sigmoid()), nn.Conv2d(8, 8, 1)),
    "GroupNorm": lambda: Of(lambda x, norm: norm(x), nn.GroupNorm(2, 8)),
    "InstanceNorm": lambda: Of(lambda x, norm: norm(x), nn.InstanceNorm2d(8, affine=True)),
    "batch norm without statistics": lambda: Of(
        lambda x, norm: norm(x), nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "batch norm after a sum": lambda: Of(lambda x, norm: norm(x + x.relu()), nn.BatchNorm2d(8)),
    "norm with activation": lambda: Of(lambda x, norm: norm(x), NormWithActivation(8)),
    "norm with activation after a sum": lambda: Of(
        lambda x, norm: norm(x + x.relu()), NormWithActivation(8)
    ),
    "RMSNorm": lambda: Of(lambda x, norm: norm(x.movedim(1, -1)).movedim(-1, 1), nn.RMSNorm(8)),
    "RMS by hand": lambda: Of(rms),
    "variance by hand": lambda: Of(norm_free, nn.Conv2d(8, 8, 1)),
    "global response norm": lambda: Of(response_norm),
    "global response norm of one place": lambda: Of(
        lambda x: response_norm(x.mean((2, 3), keepdim=True))
    ),
    "squeeze and excitation": lambda: Of(squeezed, linear()),
    "gate by channel": lambda: Of(by_channel, nn.Conv1d(1, 1, 3, padding=1)),
    "gate by place": lambda: Of(by_place, nn.Conv2d(2, 1, 3, padding=1)),
    "upsampled gate": lambda: Of(upsampled_gate, nn.Conv2d(8, 8, 1)),
    "selective kernels": lambda: Of(selected, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)),
    "GLU": lambda: Of(lambda x, layer: F.glu(layer(x), 1), nn.Conv2d(8, 16, 1)),
    "SwiGLU": lambda: Of(swish_gated, linear(), linear()),
    "signed root": lambda: Of(lambda x: x.sign() * x.abs().sqrt() + x.atan()),
    "StarReLU": lambda: Of(lambda x: 0.9 * x.relu() ** 2 - 0.4),
    "layer scale": lambda: Of(
        lambda x, layer: x + layer(x) * torch.arange(8.0).double().view(-1, 1, 1),
        nn.Conv2d(8, 8, 1),
    ),
    "rotary embeddings": lambda: Of(rotary, linear(), linear()),
    "written in part": lambda: Of(written_in_part, nn.Conv2d(8, 8, 1)),
    "a signal": lambda: Of(lambda x, norm: norm(x).relu(), nn.BatchNorm1d(8), size=(2, 9)),
    "a volume": lambda: Of(lambda x, norm: norm(x).relu(), nn.BatchNorm3d(8), size=(1, 3, 4, 5)),
}
SIZES = {"a signal": (2, 9), "a volume": (1, 3, 4, 5)}
EXACT = {
    "epsilon": {"epsilon": 1e-14},
    "epsilon-plus": {"epsilon": 1e-14, "stabilizer": 1e-14},
}


@pytest.mark.parametrize("composite", EXACT)
@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_is_that_of_a_network_with_constant_gates_and_deviations(name, composite):
    model, x = of_random_weights(NETWORKS[name](), SIZES.get(name, (3, 6, 6)))
    assert_by_gradient(
        LRP(composite, **EXACT[composite]).heatmap(model, x, TARGETS), model, x, composite
    )


def of_random_weights(model, size=(3, 6, 6)):
    torch.manual_seed(0)
    for parameter in model.double().eval().parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(3, *size, dtype=torch.float64)


def assert_by_gradient(got, model, x, composite):
    plus = None
    if composite == "epsilon-plus":
        if any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules()):
            pytest.skip("what is positive depends on the merge; see test_accelerated")
        plus = model
    expected = by_gradient(lambda v: model(v).gather(1, TARGETS[:, None]), x, positive=plus)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def response(x):
    squares = F.pad(x.square()[:, None], (0, 0, 0, 0, 1, 1))
    return (1 + 0.5 * F.avg_pool3d(squares, (3, 1, 1), stride=1)[:, 0]).pow(0.75)


def moments(x, layer, variance, mean):
    return layer((x - mean) * torch.rsqrt(variance + 1e-5))


def of_two_tokens(x, layer):
    tokens = x.flatten(2).mT
    return layer(tokens, tokens.flip(1)).mT


def of_two_tokens_by_products(x, layer):
    tokens = x.flatten(2).mT
    left = torch.einsum("nti,oij->ntoj", tokens, layer.weight.detach())
    return (torch.einsum("ntoj,ntj->nto", left, tokens.flip(1)) + layer.bias).mT


GRID = constant(1, 4, 4, 2)
# name → (an operation, the operations that it consists of, modules)
CONSISTING = {
    "lerp": (
        lambda x, layer: torch.lerp(x, layer(x), 0.3),
        lambda x, layer: 0.7 * x + 0.3 * layer(x),
        nn.Conv2d(8, 8, 1),
    ),
    "lerp by a gate": (
        lambda x, layer, gate: x.lerp(layer(x), weight=gate(x).sigmoid()),
        lambda x, layer, gate: (1 - gate(x).sigmoid()) * x + gate(x).sigmoid() * layer(x),
        *(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)),
    ),
    "lerp by a sum": (
        lambda x, layer, weight: x.lerp(layer(x), weight(x)),
        lambda x, layer, weight: (1 - weight(x)) * x + weight(x) * layer(x),
        *(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)),
    ),
    "addcdiv": (
        lambda x, layer: torch.addcdiv(x, layer(x), x.norm(dim=1, keepdim=True) + 1, value=2),
        lambda x, layer: x + 2 * layer(x) / (x.norm(dim=1, keepdim=True) + 1),
        nn.Conv2d(8, 8, 1),
    ),
    "bilinear": (of_two_tokens, of_two_tokens_by_products, nn.Bilinear(8, 8, 8)),
    "tensordot": (
        lambda x: torch.tensordot(x, constant(8, 8), dims=([1], [0])).movedim(-1, 1),
        lambda x: torch.einsum("nchw,cd->ndhw", x, constant(8, 8)),
    ),
    "cosine similarity": (
        lambda x, layer: F.cosine_similarity(x, layer(x), dim=1)[:, None] * constant(8, 1, 1),
        lambda x, layer: torch.einsum(
            "nchw,nchw->nhw", F.normalize(x, dim=1), F.normalize(layer(x), dim=1)
        )[:, None] * constant(8, 1, 1),
        nn.Conv2d(8, 8, 1),
    ),
    "local response norm": (
        lambda x: F.local_response_norm(x, 3, alpha=0.5), lambda x: x / response(x)
    ),
    "var_mean": (
        lambda x, layer: moments(x, layer, *torch.var_mean(x, 1, keepdim=True, correction=0)),
        lambda x, layer: moments(
            x, layer, x.var(1, keepdim=True, correction=0), x.mean(1, keepdim=True)
        ),
        nn.Conv2d(8, 8, 1),
    ),
    "power pooling": (
        lambda x: F.lp_pool2d(x, 2, 2), lambda x: (4 * F.avg_pool2d(x.square(), 2)).sqrt()
    ),
    "sampled on a grid": 2 * (
        lambda x: F.grid_sample(x, GRID.expand(len(x), -1, -1, -1), align_corners=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("composite", EXACT)
@pytest.mark.parametrize("name", CONSISTING)
def test_an_operation_is_ruled_as_those_that_it_consists_of(name, composite):
    operation, written_out, *modules = CONSISTING[name]
    model, x = of_random_weights(Of(operation, *modules))
    got = LRP(composite, **EXACT[composite]).heatmap(model, x, TARGETS)
    of_the_operation, model.middle = model(x), written_out
    torch.testing.assert_close(model(x), of_the_operation)
    assert_by_gradient(got, model, x, composite)


class OfPixels(nn.Module):
    """A network of whole-number pixels that it rescales itself, with tokens beside them or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, pixels):
        x = (pixels / 255 - 0.5) * 2 if pixels.dtype == torch.uint8 else pixels
        return self.head(self.stem(x).relu().mean((2, 3)))


@pytest.mark.parametrize("composite", ["epsilon", "epsilon-plus"])
def test_a_network_of_whole_numbers_is_scored_like_one_of_their_values(composite):
    pixels = torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8)
    layers = ["stem:input", "stem", "head"]
    got = LRP(composite).relevance(OfPixels(), pixels, TARGETS, layers)
    expected = LRP(composite).relevance(OfPixels(), (pixels / 255 - 0.5) * 2, TARGETS, layers)
    for name in layers:
        torch.testing.assert_close(got[name], expected[name])
