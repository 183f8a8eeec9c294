"""Every scorer against an independent source, and networks that a score would be wrong for."""

from __future__ import annotations

import copy
import math

import captum.attr as ca
import pytest
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from networks import dense, out_of_place, value_and_gradient
from torch import nn
from zennit import rules as zr
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.core import Composite

from xai_edit import LRP, Activation, CaptumLayer, Random, Taylor, WeightMagnitude, score_units
from xai_edit.core import NonFiniteError

LAYERS = {
    kind: [name + suffix for name in names for suffix in ("", ":input")]
    for kind, names in (
        ("plain", ["conv1", "conv2", "fc1", "head"]),
        ("norm", ["body.0", "body.3", "fc"]),
    )
}


@pytest.fixture(params=LAYERS)
def network(request):
    """A model and its layers' names, outputs and inputs."""
    return request.getfixturevalue(request.param), LAYERS[request.param]


@pytest.fixture
def batches(digits):
    """24 digits in two uneven batches."""
    images, labels = digits
    return [(images[:10], labels[:10]), (images[10:24], labels[10:24])]


@pytest.fixture
def pairs(digits):
    return digits[0][:24].double(), digits[1][:24]


def over_positions(values):
    values = values[0] if isinstance(values, tuple) else values
    return values.detach().flatten(2).sum(2) if values.ndim > 2 else values.detach()


def relative_error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def with_captums_epsilon(model, epsilon):
    """A copy for Captum, which takes the rules off again after each pass."""
    twin = out_of_place(model)
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.rule = EpsilonRule(epsilon=epsilon)
    return twin


# LRP beside Captum


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
@pytest.mark.parametrize("name", LAYERS["plain"])
def test_lrp_epsilon_equals_captums_lrp(plain, pairs, name, epsilon):
    model, (inputs, labels) = plain.double(), pairs
    got = LRP("epsilon", epsilon=epsilon)(model, inputs, labels, [name])[name]
    twin = with_captums_epsilon(model, epsilon)
    method = ca.LayerLRP(twin, twin.get_submodule(name.removesuffix(":input")))
    expected = over_positions(
        method.attribute(inputs, target=labels, attribute_to_layer_input=name.endswith(":input"))
    )
    # What is left is Captum's pooling and ReLU, which always keep its 1e-9.
    assert relative_error(got, expected) < 1e-7


def test_relevance_comes_in_the_shape_of_the_layers_values(plain, pairs):
    inputs, labels = pairs
    layers = ["conv1", "conv1:input", "pool1", "fc1:input", "head"]
    full = LRP("epsilon").relevance(plain.double(), inputs, labels, layers)
    shapes = [tuple(full[name].shape[1:]) for name in layers]
    assert shapes == [(4, 8, 8), (1, 8, 8), (4, 4, 4), (24,), (10,)]
    summed = LRP("epsilon")(plain, inputs, labels, layers)
    for name in layers:
        torch.testing.assert_close(summed[name], over_positions(full[name]), rtol=1e-12, atol=0)
    heatmap = LRP("epsilon").heatmap(plain, inputs, labels)
    torch.testing.assert_close(heatmap, full["conv1:input"], rtol=1e-12, atol=0)


# Captum's layer attributions


def test_arguments_of_the_constructor_go_to_it(plain, pairs):
    inputs, labels = pairs
    twin = out_of_place(plain.double())
    scorer = CaptumLayer(ca.LayerGradientXActivation, multiply_by_inputs=False)
    method = ca.LayerGradientXActivation(twin, twin.fc1, multiply_by_inputs=False)
    expected = method.attribute(inputs, target=labels).detach()
    got = scorer(plain, inputs, labels, ["fc1"])["fc1"]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


# The usual comparisons, against autograd and closed forms


def test_taylor_is_activation_times_likelihood_gradient(network, pairs):
    (model, layers), (inputs, labels) = network, pairs
    got = Taylor()(model.double(), inputs, labels, layers)
    for name in layers:
        value, gradient = value_and_gradient(
            model, inputs, name, lambda z: -nn.functional.cross_entropy(z, labels, reduction="sum")
        )
        expected = over_positions(value * gradient)
        torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-12)


def test_activation_is_the_mean_rectified_value(network, pairs):
    (model, layers), (inputs, labels) = network, pairs
    got = Activation()(model.double(), inputs, labels, layers)
    for name in layers:
        value, _ = value_and_gradient(model, inputs, name, torch.sum)
        value = value.flatten(2) if value.ndim > 2 else value[:, :, None]
        expected = [[sum(max(0.0, v) for v in u) / len(u) for u in s] for s in value.tolist()]
        torch.testing.assert_close(
            got[name], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


WEIGHTED = {
    "linear": (nn.Linear(4, 6), 6, 4),
    "conv1d": (nn.Conv1d(4, 6, 3), 6, 4),
    "grouped conv2d": (nn.Conv2d(4, 6, 3, groups=2), 6, 4),
    "grouped transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), 6, 4),
}


def dense_weight(layer, inputs):
    """|W| summed over the kernel, (outputs, inputs): the layer's answer to one lit channel."""
    twin = copy.deepcopy(layer).double()
    twin.weight.data.abs_()
    positions = [5] * (layer.weight.ndim - 2)
    weight, _ = dense(twin, (inputs, *positions))
    weight = weight.reshape(6, -1, inputs, math.prod(positions))
    return weight[..., weight.shape[-1] // 2].sum(1)  # the middle sees each kernel entry once


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weight_magnitude_is_the_l1_norm_of_a_units_weights(kind):
    layer, outputs, inputs = WEIGHTED[kind]
    model = nn.Sequential(layer)
    scores = score_units(model, None, WeightMagnitude(), layers=["0", "0:input"])
    expected = dense_weight(layer, inputs)
    torch.testing.assert_close(scores["0"], expected.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores["0:input"], expected.sum(0), rtol=1e-6, atol=0)
    assert scores.samples == 1
    drawn = score_units(model, None, Random(), layers=["0", "0:input"])
    assert [len(drawn["0"]), len(drawn["0:input"])] == [outputs, inputs]


def test_random_depends_on_the_seed_and_the_layers_name_alone(plain, norm, batches):
    first = score_units(plain, None, Random(seed=3))
    plain.requires_grad_(False).head.weight.zero_()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = score_units(plain, batches, Random(seed=3), layers=["head", "conv2", "fc1", "conv1"])
    other = score_units(plain, None, Random(seed=4))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert ((first[name] >= 0) & (first[name] < 1)).all()
    assert not torch.equal(first["fc1"][:10], first["head"])


@pytest.mark.parametrize("scorer", [WeightMagnitude(), Random()])
def test_a_layer_without_weights_of_its_units_is_an_error(norm, scorer):
    for name in ("body.1", "body.2"):
        with pytest.raises(
            ValueError, match=rf"layer '{name}' \(\w+\) has no weights of its units"
        ):
            score_units(norm, None, scorer, layers=name)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("last", "canonizers"),
    [("body.3", []), ("fc", [SequentialMergeBatchNorm()])],
    ids=["early", "late"],
)
def test_a_composite_that_raises_while_it_registers_leaves_the_model_as_it_was(
    norm, batches, unchanged, last, canonizers
):
    def mapping(ctx, name, module):
        if name == last:
            raise Stop
        return zr.Epsilon() if isinstance(module, (nn.Linear, nn.Conv2d)) else None

    norm.train()
    check = unchanged(norm)
    scorer = LRP(Composite(module_map=mapping, canonizers=canonizers))
    for _ in range(2):
        with pytest.raises(Stop):
            score_units(norm, batches, scorer)
        check()


# Networks that a score would be wrong for


class Odd(nn.Module):
    """Two calls of one layer, a layer without influence, one without gradients, a recurrent one."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4)
        self.ignored = nn.Linear(4, 4)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        states, _ = self.recurrent(x[:, None])  # first: what follows a layer needs a rule
        self.ignored(x)
        with torch.no_grad():
            offset = self.frozen(x)
        return self.head(self.twice(torch.relu(self.twice(x))) + offset + states[:, 0])


DATA_SCORERS = {
    "LRP": lambda: LRP("epsilon"),
    "Taylor": Taylor,
    "LayerConductance": lambda: CaptumLayer(ca.LayerConductance, n_steps=4),
    "Activation": Activation,
}


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd().eval(), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]


@pytest.mark.parametrize("kind", ["LRP", "Taylor"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("twice", "'twice' is called more than once in a forward"),
        ("twice:input", "'twice:input' is called more than once in a forward"),
        ("ignored", "layer 'ignored' has no influence on the model's output"),
        ("frozen", r"'frozen'.*torch\.no_grad\(\)"),
        ("recurrent", "layer 'recurrent' passes on a tuple, not one tensor"),
    ],
)
def test_a_layer_without_one_score_a_unit_is_an_error(odd, kind, layers, message, unchanged):
    model, data = odd
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        score_units(model, data, DATA_SCORERS[kind](), layers=layers)
    check()


class Returns(nn.Module):
    """A linear layer whose output is handed on in some other form."""

    def __init__(self, form):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.form = form

    def forward(self, x):
        return self.form(self.fc(x))


FORMS = {
    "three axes": (lambda z: z[:, :, None], r"\(5, 3, 1\)"),
    "too few rows": (lambda z: z[:2], r"\(2, 3\)"),
    "no tensor": (lambda z: {"scores": z}, "dict"),
}


@pytest.mark.parametrize("kind", DATA_SCORERS)
@pytest.mark.parametrize("form", FORMS)
def test_an_output_that_is_not_one_row_of_logits_a_sample_is_an_error(odd, form, kind):
    handed, shown = FORMS[form]
    with pytest.raises(ValueError, match=f"model: its output is {shown}.* one row of logits a sam"):
        score_units(Returns(handed), odd[1], DATA_SCORERS[kind](), layers="fc")


@pytest.mark.parametrize("kind", DATA_SCORERS)
def test_logits_that_are_not_finite_are_an_error(odd, kind):
    model = Returns(lambda z: z / 0)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        score_units(model, odd[1], DATA_SCORERS[kind](), layers="fc")


def test_models_of_whole_number_inputs_are_scored_behind_their_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    words, labels = torch.randint(0, 7, (5, 2)), torch.tensor([0, 1, 2, 0, 1])
    scores = score_units(model, [(words, labels)], LRP("epsilon", epsilon=1e-14), layers="2:input")
    hidden = model[:2](words)
    expected = sum(
        x * model[2].weight[c]  # the logit is spread over its summands, and back
        for x, c in zip(hidden, labels, strict=True)
    )
    torch.testing.assert_close(scores["2:input"], expected.detach(), rtol=1e-9, atol=1e-12)
