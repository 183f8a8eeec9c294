"""Functions of the logits as targets: closed forms, Captum, and what is refused."""

from __future__ import annotations

import functools

import captum.attr as ca
import numpy as np
import pytest
import torch
from networks import out_of_place
from torch import nn
from torch.nn import functional as F

from xai_edit import (
    LRP,
    Activation,
    CaptumLayer,
    Random,
    Taylor,
    WeightMagnitude,
    score_units,
)
from xai_edit.core import NonFiniteError
from xai_edit.core.targets import (
    class_list,
    describe_target,
    weights_of,
)

LAYERS = ["conv1:input", "conv1", "conv2", "fc1:input", "fc1", "head:input", "head"]
PRESETS = ["epsilon", "alpha2beta1"]


@pytest.fixture
def pairs(digits):
    return digits[0][:12].double(), digits[1][:12]


def runner_up(logits):
    return logits.topk(2, dim=1).indices[:, 1]


def difference(logits):
    return logits[:, 3] - logits[:, 5]


def constant(label):
    return torch.full((12,), label)


# A class for each sample


SCORERS = {
    "LRP": lambda: LRP("epsilon"),
    "Taylor": Taylor,
    "Activation": Activation,
    "LayerGradientXActivation": lambda: CaptumLayer(ca.LayerGradientXActivation),
    "LayerConductance": lambda: CaptumLayer(ca.LayerConductance, n_steps=4),
    "LayerActivation": lambda: CaptumLayer(ca.LayerActivation),
    "LayerLRP": lambda: CaptumLayer(ca.LayerLRP),
    "user's function": lambda: (
        lambda model, inputs, targets, layers: {
            name: F.one_hot(targets, 10) * model(inputs) for name in layers
        }
    ),
}


@pytest.mark.parametrize("kind", SCORERS)
def test_a_function_that_returns_classes_explains_these_classes(plain, pairs, kind):
    inputs, labels = pairs
    second = runner_up(plain.double()(inputs))
    assert not torch.equal(second, labels)
    halves = [inputs[:5], inputs[5:]]
    got = score_units(plain, halves, SCORERS[kind](), layers=["fc1", "head"], target=runner_up)
    expected = score_units(plain, [(inputs, second)], SCORERS[kind](), layers=["fc1", "head"])
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-11)
    if kind == "LRP":
        heatmaps = [LRP("epsilon").heatmap(plain, inputs, one) for one in (runner_up, second)]
        assert torch.equal(*heatmaps)


# A number for each sample


FUNCTIONS = {
    "difference": difference,
    "weighted sum": lambda z: 0.5 * z[:, 0] - 2 * z[:, 1] + z[:, 2:5].mean(1),
    "log-probability": lambda z: torch.log_softmax(z, 1)[:, 2],
    "probability": lambda z: torch.softmax(z, 1)[:, 2],
    "margin": lambda z: z.topk(2, 1).values @ torch.tensor([1.0, -1.0], dtype=z.dtype),
    "entropy": lambda z: torch.distributions.Categorical(logits=z).entropy(),
    "superclass": lambda z: torch.logsumexp(z[:, ::2], 1) - torch.logsumexp(z[:, 1::2], 1),
    "squared": lambda z: z[:, 4] ** 2,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_relevance_starts_with_the_functions_gradient(plain, pairs, preset):
    inputs, model = pairs[0], plain.double()

    def relevance(target, initial):
        scorer = LRP(preset, initial=initial)
        heatmap = scorer.heatmap(model, inputs, target).flatten(1)
        return scorer(model, inputs, target, LAYERS) | {"": heatmap}

    # Each rule is linear in what comes from above: what starts at each class, one after another.
    parts = [relevance(constant(c), "one") for c in range(10)]
    for c in range(10):
        assert torch.equal(parts[c]["head"], F.one_hot(constant(c), 10).double())
    logits = model(inputs).detach().requires_grad_()
    for name, function in FUNCTIONS.items():
        (gradient,) = torch.autograd.grad(function(logits).sum(), logits)
        torch.testing.assert_close(weights_of(function, logits), gradient, rtol=1e-12, atol=0)
        for initial, seed in (("logit", gradient * logits.detach()), ("one", gradient)):
            got = relevance(function, initial)
            torch.testing.assert_close(got["head"], seed, rtol=1e-12, atol=1e-14)
            for layer in got:
                expected = sum(seed[:, c, None] * parts[c][layer] for c in range(10))
                error = float((got[layer] - expected).abs().max())
                assert error <= 1e-10 * float(expected.abs().max()), (name, layer)


CAPTUM = {
    "LayerGradientXActivation": {},
    "LayerConductance": {"n_steps": 4},
    "LayerDeepLift": {},
    "LayerFeatureAblation": {},
}


EXPLAINED = [
    (method, name)
    for method in CAPTUM
    for name in ("difference", "log-probability", "superclass", "squared")
    if method != "LayerDeepLift" or name == "difference"  # the others do not add up
]


@pytest.mark.parametrize(("method", "name"), EXPLAINED)
def test_captum_explains_the_function_as_a_models_only_output(plain, pairs, method, name):
    inputs, plain = pairs[0][:4], out_of_place(plain.double())

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = plain

        def forward(self, x):
            return FUNCTIONS[name](self.model(x))

    made = getattr(ca, method)
    got = CaptumLayer(made, **CAPTUM[method])(plain, inputs, FUNCTIONS[name], ["fc1", "head:input"])
    for layer, before in (("fc1", False), ("head:input", True)):
        module = plain.get_submodule(layer.removesuffix(":input"))
        expected = made(Wrapped(), module).attribute(
            inputs, **CAPTUM[method], attribute_to_layer_input=before
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(got[layer], expected.detach(), rtol=1e-9, atol=1e-12)


def test_captums_lrp_of_a_function_is_refused(plain, pairs):
    with pytest.raises(ValueError, match="no rule for a function of the logits"):
        CaptumLayer(ca.LayerLRP)(plain.double(), pairs[0], difference, ["fc1"])


# What is refused

WRONG = {
    "an int": lambda z: 3,
    "None": lambda z: None,
    "an array": lambda z: np.zeros(len(z)),
    "logits": lambda z: z,
    "one number for all": lambda z: z.sum(),
    "a class too many": lambda z: torch.zeros(len(z) + 1, dtype=torch.int64),
    "bool": lambda z: z[:, 0] > 0,
    "int32": lambda z: z.argmax(1).int(),
    "a class that is none": lambda z: torch.full(z.shape[:1], 10),
    "a negative class": lambda z: torch.full(z.shape[:1], -1),
    "not from the logits": lambda z: torch.ones(len(z), dtype=z.dtype),
    "detached": lambda z: z.detach()[:, 0],
    "from a parameter alone": lambda z: PARAMETER * z.detach()[:, 0],
    "a tuple": lambda z: z.max(1),
}
PARAMETER = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["LRP", "Taylor", "LayerActivation", "user's function"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_function_that_gives_something_else_is_one_clear_error(
    plain, pairs, unchanged, wrong, kind
):
    inputs, labels = pairs
    check = unchanged(plain.double())
    with pytest.raises(
        ValueError, match=r"^target: .*(one class|out of range|one number a sample)"
    ):
        score_units(plain, [(inputs, labels)], SCORERS[kind](), layers=["fc1"], target=WRONG[wrong])
    check()


@pytest.mark.parametrize("targets", [[0] * 12, torch.zeros(12), torch.arange(2), torch.arange(12)])
@pytest.mark.parametrize("kind", ["LRP", "LayerActivation"])
def test_classes_given_to_a_scorer_that_do_not_fit_are_one_clear_error(
    plain, pairs, unchanged, targets, kind
):
    check = unchanged(plain.double())
    with pytest.raises(ValueError, match=r"^target: .*(one class a sample|class 10 is out of)"):
        SCORERS[kind]()(plain, pairs[0], targets, ["fc1"])
    check()


@pytest.mark.parametrize("kind", ["Taylor", "user's function"])
def test_scorers_of_classes_refuse_a_number(plain, pairs, kind):
    with pytest.raises(ValueError, match=r"float64.* this scorer needs one class a sample, int64"):
        score_units(
            plain.double(), [pairs], SCORERS[kind](), layers=["fc1"], target=lambda z: z[:, 0]
        )


@pytest.mark.parametrize("kind", ["LRP", "LayerGradientXActivation"])
def test_a_function_without_a_finite_gradient_is_an_error(plain, pairs, kind):
    with pytest.raises(NonFiniteError, match="gradient of its function: NaN or infinite"):
        score_units(
            plain.double(), [pairs], SCORERS[kind](), layers="fc1",
            target=lambda z: (z[:, 0] * 0).sqrt(),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["LRP", "LayerGradientXActivation", "Taylor"])
def test_a_functions_own_error_reaches_the_user(plain, pairs, kind, unchanged):
    def failing(logits):
        raise KeyError("class name")

    check = unchanged(plain.double())
    with pytest.raises(KeyError, match="class name"):
        score_units(plain, [pairs], SCORERS[kind](), layers="fc1", target=failing)
    check()


@pytest.mark.parametrize("scorer", [WeightMagnitude(), Random()])
def test_scorers_of_weights_never_call_the_function(plain, scorer):
    def failing(logits):
        raise AssertionError

    score_units(plain, None, scorer, target=failing)


@pytest.mark.parametrize("target", ["labels", 1.5, None, True, LRP, (1, 2)])
def test_what_is_no_target_is_refused_before_the_pass(plain, target):
    with pytest.raises(
        ValueError, match="it is a class number, 'label', 'predicted' or a function"
    ):
        score_units(plain, iter(()), LRP(), target=target)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (runner_up, "runner_up"),
        (functools.partial(difference), "partial"),
        (2, 2),
        ("label", "label"),
    ],
)
def test_the_origin_names_the_target(plain, pairs, target, name):
    scores = score_units(plain.double(), [pairs], LRP(), layers="fc1", target=target)
    assert scores.origin["target"] == name == describe_target(target)


# The functions behind


def test_weights_do_not_reach_into_the_models_graph():
    x = torch.ones(2, 3, requires_grad=True)
    weights = weights_of(lambda z: z[:, 0] * z[:, 1], x * 2)
    assert weights.tolist() == [[2, 2, 0], [2, 2, 0]]
    assert x.grad is None
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("given", "listed"), [(3, [3]), ([3, 1], [3, 1]), (torch.tensor([0, 2]), [0, 2])]
)
def test_a_list_of_classes(given, listed):
    assert class_list(given, 4) == listed


@pytest.mark.parametrize(
    "given", [[], [1, 1], "label", 1.0, [0.5], None, [None], [4], -1, torch.tensor([True, False])]
)
def test_a_list_of_something_else_is_an_error(given):
    with pytest.raises(ValueError, match=r"^target: "):
        class_list(given, 4)
