"""Captum's layer attributions through `CaptumLayer` against Captum called directly."""

from __future__ import annotations

import captum.attr as ca
import pytest
import torch
from networks import out_of_place
from torch import nn

from xai_edit import CaptumLayer, score_units
from xai_edit.core.guard import preserved

METHODS = {
    "LayerConductance": {"n_steps": 4},
    "LayerIntegratedGradients": {"n_steps": 4},
    "LayerGradientXActivation": {},
    "LayerDeepLift": {},
    "LayerActivation": {},
    "LayerGradCam": {"attr_dim_summation": False},
    "LayerFeatureAblation": {},
    "LayerLRP": {},
}
TARGETS = torch.tensor([2, 0, 1])


class Plain(nn.Sequential):
    """Flattens before the first linear layer by itself, as Captum's LRP has no rule for Flatten."""

    def forward(self, x):
        for module in self:
            x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
        return x


def rectified(activation=lambda: nn.ReLU(inplace=True)):
    torch.manual_seed(0)
    return Plain(
        nn.Conv2d(2, 4, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        activation(),
        nn.Dropout(),
        nn.Linear(20, 6),
        activation(),
        nn.Linear(6, 3),
    )


class Functional(nn.Module):
    """Sums, functional activations and a batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(x + self.b(x)).mean((2, 3)))


class Encoder(nn.Module):
    """Tokens of a sequence through a transformer; the mean token is classified."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.layer(self.embed(x))).mean(1))


IMAGE, SEQUENCE = (2, 8, 8), (4, 5)
UNITS = {  # of the layers of each network
    "in-place ReLU": {"0": 4, "0:input": 2, "3": 5, "3:input": 4, "6": 6, "8": 3, "8:input": 6},
    "tanh": {"0": 4, "3:input": 4, "6": 6, "8": 3},
    "functional": {"a": 4, "b": 4, "b:input": 4, "head": 3},
    "tokens": {"embed": 8, "layer": 8, "layer.linear1": 12, "layer.linear2": 8}
    | {"norm": 8, "norm:input": 8, "head:input": 8},
}
NETWORKS = {
    "in-place ReLU": (rectified, IMAGE),
    "tanh": (lambda: rectified(nn.Tanh), IMAGE),
    "functional": (Functional, IMAGE),
    "tokens": (Encoder, SEQUENCE),
}


def made(kind):
    make, shape = NETWORKS[kind]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()
    return make().double().eval(), x, [*UNITS[kind]]


def directly(method, model, name, x, **arguments):
    """Captum alone, on a copy without in-place activations."""
    twin = out_of_place(model)
    layer = twin.get_submodule(name.removesuffix(":input"))
    if method != "LayerActivation":
        arguments["target"] = TARGETS
    with preserved(twin):  # the fast path of transformer layers calls no module inside
        values = getattr(ca, method)(twin, layer).attribute(
            x, **arguments, attribute_to_layer_input=name.endswith(":input")
        )
    return (values[0] if isinstance(values, tuple) else values).detach()


def by_units(values, *, last):
    """Sum over everything but samples and units, one number at a time."""
    if last:
        values = values.movedim(-1, 1)
    return torch.stack([one.flatten(1).sum(1) for one in values]) if values.ndim > 2 else values


def supported(method, kind):
    """What Captum itself can do: its LRP knows neither sums nor layer norms, DeepLift no reuse and
    no functional activation.
    """
    if method == "LayerLRP":
        return kind in ("in-place ReLU", "tanh")
    return not (method == "LayerDeepLift" and kind in ("tokens", "functional"))


CASES = [(m, k) for m in METHODS for k in NETWORKS if supported(m, k)]


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_method_gives_captums_values_summed_over_positions(method, kind, unchanged):
    model, x, layers = made(kind)
    arguments = METHODS[method]
    check = unchanged(model)
    got = CaptumLayer(getattr(ca, method), **arguments)(model, x, TARGETS, layers)
    check()
    for name, units in UNITS[kind].items():
        expected = directly(method, model, name, x, **arguments)
        expected = by_units(expected, last=kind == "tokens")
        assert got[name].shape == expected.shape == (3, units)
        torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-12)


# What Captum cannot do


def adding(form):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(form(self.a(x), self.b(x)))

    return Adds()


FORMS = {
    "+": lambda a, b: a + b,
    "+=": lambda a, b: a.__iadd__(b),
    "*": lambda a, b: a * torch.sigmoid(b),
    "stacked": lambda a, b: torch.stack([a, b]).sum(0),
    "einsum": lambda a, b: torch.einsum("ni,ni->ni", a, b),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["a", "head"])
def test_captums_lrp_is_refused_where_tensors_are_combined(form, layer, unchanged):
    # LayerLRP hands all relevance to both, unless the layer lies behind.
    model = adding(FORMS[form])
    x, targets = torch.randn(3, 4), TARGETS
    check = unchanged(model)
    try:
        got = score_units(model, [(x, targets)], CaptumLayer(ca.LayerLRP), layers=layer)
    except ValueError as problem:
        assert "in module ''; use xai_edit.LRP" in str(problem)  # noqa: PT017
    else:
        assert layer == "head"
        torch.testing.assert_close(
            got["head"].sum(), model(x)[range(3), targets].sum().detach().double()
        )
    check()


UNFIT = {
    "LayerLRP at a ReLU": (ca.LayerLRP, {}, "in-place ReLU", "1", "has no weights"),
    "LayerLRP through a GELU": (ca.LayerLRP, {}, "GELU", "0", "LayerLRP cannot explain layer '0'"),
    "LayerGradCam summed": (ca.LayerGradCam, {}, "in-place ReLU", "3", "attr_dim_summation=False"),
    "DeepLift of a module called twice": (ca.LayerDeepLift, {}, "called twice", "0", "DeepLift"),
    "baselines that do not fit": (
        ca.LayerConductance,
        {"baselines": torch.zeros(1, 3)},
        "in-place ReLU",
        "0",
        "LayerConductance cannot explain layer '0'",
    ),
}


def unfit(kind):
    torch.manual_seed(0)
    if kind == "GELU":
        return rectified(nn.GELU)
    if kind == "called twice":
        relu = nn.ReLU()
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(64, 3)
        )
    return rectified()


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize("kind", UNFIT)
def test_what_captum_cannot_explain_is_one_clear_error(kind, unchanged):
    method, arguments, network, layer, message = UNFIT[kind]
    model = unfit(network).train()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        score_units(
            model, [(torch.randn(3, *IMAGE), TARGETS)], CaptumLayer(method, **arguments),
            layers=layer,
        )  # fmt: skip
    check()


def test_a_layer_that_takes_no_part_is_one_clear_error():
    model, x, _ = made("functional")
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'unused' takes no part in the model's forward pass"):
        CaptumLayer(ca.LayerActivation)(model, x, TARGETS, ["unused"])
