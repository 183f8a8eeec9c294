"""Contexts: exact, at inactive neurons too, under any composite."""

import pytest
import torch
from networks import value_and_gradient
from torch import nn
from zennit import rules as zr
from zennit.composites import LayerMapComposite, NameMapComposite, layer_map_base
from zennit.core import BasicHook

from xai_edit import LRP, collect_features

RULES = {
    "epsilon": (zr.Epsilon(0.1), lambda g: g[0]),
    "zplus": (zr.ZPlus(), lambda g: g[0]),
    "alphabeta": (zr.AlphaBeta(2.0, 1.0), lambda g: 2 * g[0] - g[2]),
    "gamma": (zr.Gamma(0.3), lambda g: g[0] + g[2]),
}


class Residual(nn.Module):
    """A layer that is read by a branch and, past it, by a sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = x + self.conv2(torch.relu(self.conv1(x)))
        return self.fc(x.relu().mean([2, 3]))


def seeded(make):
    torch.manual_seed(1)
    return make().double().eval()


def rows(values):
    return values.movedim(1, -1).flatten(0, -2)


def contexts_and_gradient(model, batches, layer):
    """Contexts, and by a network without rules the target logit's gradient and the activations."""
    data = [(x[:20].double(), y[:20]) for x, y in batches]
    scorer = LRP("epsilon", epsilon=1e-14)
    features = collect_features(model, data, layer=layer, scorer=scorer, positions=None)
    found = [
        value_and_gradient(model, x, layer, lambda z, y=y: z[range(len(y)), y].sum())
        for x, y in data
    ]
    activations, gradient = (torch.cat([rows(one[i]) for one in found]) for i in (0, 1))
    assert torch.equal(features.activations, activations)
    return features.contexts, gradient, activations


@pytest.mark.parametrize("layer", ["conv1", "relu1", "pool1", "fc1:input", "head"])
def test_contexts_are_the_gradient_where_lrp_is_gradient_times_input(plain, batches, layer):
    contexts, gradient, activations = contexts_and_gradient(plain.double(), batches, layer)
    torch.testing.assert_close(contexts, gradient, rtol=1e-8, atol=1e-10)
    if layer.startswith(("relu", "pool")):
        inactive = activations == 0
        assert gradient[inactive].abs().max() > 1e-2  # else the test would not see the loss


@pytest.mark.parametrize("layer", ["stem", "relu", "conv1", "conv2"])
def test_contexts_take_all_paths_from_a_layer(batches, layer):
    model = seeded(Residual)
    if layer == "relu":  # called once in this network
        model.relu = nn.ReLU(inplace=True)
    contexts, gradient, _ = contexts_and_gradient(model, batches, layer)
    torch.testing.assert_close(contexts, gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_contexts_are_the_gradient_that_zennits_rule_multiplies(rule, kind):
    torch.manual_seed(0)
    if kind == "linear":
        modules = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
        x = torch.randn(10, 6).double()
    else:
        flat = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 3))
        modules = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), flat
        x = torch.randn(10, 2, 8, 8).double()
    model = nn.Sequential(*modules).double()
    hook, reduced = RULES[rule]
    own = (nn.Linear if kind == "linear" else nn.Conv2d, hook)
    composite = LayerMapComposite([*layer_map_base(), own, (nn.Linear, zr.Epsilon())])
    features = collect_features(
        model, [x], layer="1", scorer=LRP(composite), target=1, positions=None
    )
    unmultiplied = BasicHook(
        hook.input_modifiers,
        hook.param_modifiers,
        hook.output_modifiers,
        hook.gradient_mapper,
        lambda inputs, gradients: reduced(gradients),
    )
    base = [
        (["3"], zr.Pass()),
        (["4" if kind == "linear" else "4.1"], hook if kind == "linear" else zr.Epsilon()),
    ]
    activations = model[:2](x).detach().requires_grad_()
    with NameMapComposite([(["2"], unmultiplied), *base]).context(model):
        logits = model[2:](activations)
        seed = torch.zeros_like(logits)
        seed[:, 1] = logits[:, 1].detach()
        (expected,) = torch.autograd.grad(logits, activations, seed)
    assert torch.allclose(features.contexts, rows(expected), rtol=1e-10, atol=1e-12)
    assert (activations == 0).float().mean() > 0.2


@pytest.mark.parametrize(
    ("composite", "initial"), [("epsilon-plus", "logit"), ("gamma+epsilon", "one")]
)
def test_activation_times_context_is_the_relevance(norm, batches, composite, initial):
    batches = batches[2:]
    scorer = LRP(composite, initial=initial)
    for model, layer in ((norm, "body.2"), (seeded(Residual).float(), "relu")):
        features = collect_features(model, batches, layer=layer, scorer=scorer, positions=None)
        relevance = [scorer.relevance(model, x, y, [layer])[layer] for x, y in batches]
        expected = torch.cat([rows(one) for one in relevance])
        found = features.activations * features.contexts
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("rule", [zr.Flat(), zr.WSquare(), zr.ZBox(-1.0, 2.0)])
def test_rules_without_contexts_are_refused(plain, batches, rule):
    composite = LayerMapComposite([*layer_map_base(), (nn.Conv2d, rule), (nn.Linear, rule)])
    with pytest.raises(ValueError, match="activations of zero have relevance"):
        collect_features(plain, batches, layer="relu1", scorer=LRP(composite))


def test_errors_name_what_is_wrong(plain, norm, batches):
    with pytest.raises(ValueError, match=r"'body\.0'"):
        collect_features(norm, batches, layer="body.0", scorer=LRP("epsilon"))
    with pytest.raises(ValueError, match="'label' given, but the data has no labels"):
        collect_features(plain, [batches[0][0]], layer="relu1", scorer=LRP())
    plain.extra = nn.Linear(64, 2)
    plain.forward = lambda x: (plain.extra(x.flatten(1)), type(plain).forward(plain, x))[1]
    with pytest.raises(ValueError, match="no relevance reaches 'extra'"):
        collect_features(plain, batches, layer="extra", scorer=LRP())
