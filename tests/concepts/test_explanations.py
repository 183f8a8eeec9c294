"""What a subspace shows: its strongest samples, and maps that add up to the ordinary one."""

import importlib

import pytest
import torch
from torch import nn
from zennit import rules as zr
from zennit.attribution import Gradient
from zennit.composites import (
    EpsilonAlpha2Beta1,
    EpsilonGammaBox,
    EpsilonPlusFlat,
    NameLayerMapComposite,
    layer_map_base,
)
from zennit.torchvision import ResNetCanonizer

from xai_edit import LRP, Subspaces, collect_features
from xai_edit.concepts import Features
from xai_edit.concepts.explanations import strongest_samples, subspace_maps
from xai_edit.concepts.predictiveness import sample_scores

# The function of the same name hides the module.
scores_module = importlib.import_module("xai_edit.concepts.predictiveness")


def subspaces_of(channels, sizes):
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator).double()).Q
    return Subspaces(basis[:, : sum(sizes)].clone(), sizes, torch.zeros(channels).double())


def vgg_like():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4, 10),
        nn.ReLU(inplace=True),
        nn.Linear(10, 4),
    ).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def largest(tensor):
    return float(tensor.abs().max())


def zennit_map(model, composite, inputs, target, initial="logit"):
    """The relevance of the inputs by Zennit's own attributor."""
    weights = torch.eye(model(inputs).shape[1], dtype=inputs.dtype)[target]
    with Gradient(model, composite) as attributor:
        seed = (
            (lambda out: weights * out) if initial == "logit" else (lambda out: weights + 0 * out)
        )
        return attributor(inputs, seed)[1].detach()


COMPOSITES = {
    "epsilon-plus-flat": EpsilonPlusFlat,
    "alpha2beta1": EpsilonAlpha2Beta1,
    "gamma-box": lambda canonizers=(): EpsilonGammaBox(-4.0, 4.0, canonizers=canonizers),
}


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("initial", ["logit", "one"])
@pytest.mark.parametrize("layer", ["4", "9"])
def test_maps_and_residue_add_up_to_zennits_map_on_a_vgg(images, composite, initial, layer):
    model, sizes = vgg_like(), (1, 3, 2)
    scorer = LRP(COMPOSITES[composite](), initial=initial)
    channels = 10 if layer == "9" else 8
    maps, residue = subspace_maps(
        model, images, subspaces_of(channels, sizes), layer=layer, scorer=scorer, target=2
    )
    expected = zennit_map(model, COMPOSITES[composite](), images, torch.full((5,), 2), initial)
    assert maps.shape == (5, 3, 3, 8, 8)
    assert largest(maps.sum(1) + residue - expected) < 2e-6 * largest(expected)
    assert all(largest(maps[:, k]) > 1e-3 * largest(expected) for k in range(3))
    assert largest(residue) > 1e-2 * largest(expected)


@pytest.mark.parametrize(("layer", "channels"), [("layer2.0", 128), ("layer3.0.conv2:input", 256)])
def test_maps_and_residue_add_up_to_zennits_map_on_a_residual_network(layer, channels):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=6).double().eval()
    inputs = torch.randn(2, 3, 32, 32).double()
    composite = EpsilonPlusFlat(canonizers=[ResNetCanonizer()])
    target, subspaces = torch.tensor([1, 4]), subspaces_of(channels, (20, 20))
    maps, residue = subspace_maps(
        model, inputs, subspaces, layer=layer, scorer=LRP(composite), target=target
    )
    expected = zennit_map(model, composite, inputs, target)
    assert largest(maps.sum(1) + residue - expected) < 1e-9 * largest(expected)
    assert all(largest(maps[:, k]) > 1e-4 * largest(expected) for k in range(2))


class OneBlock(nn.Module):
    """Relevance passes through some channels alone."""

    def __init__(self):
        super().__init__()
        self.keep = torch.tensor(1.0)

    def forward(self, h):
        h = h.clone()
        if h.requires_grad:
            h.register_hook(lambda relevance: relevance * self.keep)
        return h


@pytest.mark.parametrize("below", [zr.ZPlus(), zr.Flat(), zr.Epsilon(), zr.Gamma(0.25)])
@pytest.mark.parametrize("sizes", [(3, 1, 4), (2, 2)])
def test_each_map_is_zennits_through_a_virtual_layer(images, below, sizes):
    # h = Uᵀa and back as convolutions of size 1, with relevance kept in one block of h.
    model, inputs = vgg_like().double(), images.double()
    whole = subspaces_of(8, (8,)).basis
    there, block, back = nn.Conv2d(8, 8, 1, bias=False), OneBlock(), nn.Conv2d(8, 8, 1)
    there.weight.data, back.weight.data = whole.T[:, :, None, None], whole[:, :, None, None]
    virtual = nn.Sequential(*model[:5], there, block, back, *model[5:]).requires_grad_(False)
    # What is zero comes back from h as a rounding error; made positive, it has its context.
    back.bias = nn.Parameter(torch.full((8,), 1e-12).double())
    kinds = [*layer_map_base(), (nn.Conv2d, zr.ZPlus()), (nn.Linear, zr.Epsilon())]
    scorer = LRP(NameLayerMapComposite([(["0", "3"], below)], kinds))
    exact = zr.Epsilon(1e-40)
    through = NameLayerMapComposite([(["0", "3"], below), (["5", "7"], exact)], kinds)
    maps, residue = subspace_maps(
        model, inputs, subspaces_of(8, sizes), layer="4", scorer=scorer, target=1
    )
    start = 0
    for k, size in enumerate([*sizes, 8 - sum(sizes)]):
        block.keep = torch.zeros(8, 1, 1).double()
        block.keep[start : start + size] = 1
        start += size
        expected = zennit_map(virtual, through, inputs, torch.ones(5).long())
        found = maps[:, k] if k < len(sizes) else residue
        assert largest(found - expected) < 1e-8 * largest(maps)
        assert not size or largest(expected) > 1e-2 * largest(maps)


def test_a_map_sums_to_the_relevance_that_split_gives(images):
    torch.manual_seed(0)
    model = vgg_like().double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bias.data.zero_()  # biases would keep relevance below the layer
    inputs, scorer = images.double(), LRP("epsilon", epsilon=1e-13)
    subspaces = subspaces_of(8, (3, 2))
    maps, residue = subspace_maps(model, inputs, subspaces, layer="6", scorer=scorer, target=3)
    features = collect_features(model, [inputs], layer="6", scorer=scorer, target=3, positions=None)
    parts, rest = subspaces.split(features.activations, features.contexts)
    assert torch.allclose(maps.flatten(2).sum(2), features.per_sample(parts), rtol=1e-8)
    assert torch.allclose(residue.flatten(1).sum(1), features.per_sample(rest), rtol=1e-8)


def test_channels_of_tokens_are_the_last():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)
    ).double()
    inputs, scorer = torch.randn(4, 5, 3).double(), LRP("epsilon", epsilon=1e-14)
    for layer, cut, channels in (("2", 3, 4), ("5:input", 5, 20)):
        subspaces = subspaces_of(channels, (1, 2))
        maps, _ = subspace_maps(model, inputs, subspaces, layer=layer, scorer=scorer, target=0)
        x = inputs.clone().requires_grad_()
        a = model[:cut](x)
        (context,) = torch.autograd.grad(model[cut:](a)[:, 0].sum(), a, retain_graph=True)
        for k in range(2):
            U = subspaces.block(k)
            (gradient,) = torch.autograd.grad(a, x, context @ U @ U.T, retain_graph=True)
            assert torch.allclose(maps[:, k], inputs * gradient, rtol=1e-6, atol=1e-9)


def test_targets_are_a_class_the_prediction_a_function_or_one_for_each(plain, digits):
    x, scorer, subspaces = digits[0][:6], LRP("epsilon"), subspaces_of(6, (2,))

    def maps(target):
        return subspace_maps(plain, x, subspaces, layer="relu2", scorer=scorer, target=target)[0]

    predicted = plain(x).argmax(1)
    assert torch.equal(maps("predicted"), maps(predicted))
    assert torch.equal(maps(3), maps(torch.full((6,), 3)))
    assert torch.equal(maps(3), maps(torch.tensor(3)))
    difference = maps(lambda logits: logits[:, 3])
    assert torch.allclose(difference, maps(3), rtol=1e-4, atol=1e-6 * largest(difference))
    assert largest(maps(3) - maps(4)) > 1e-3 * largest(maps(3))


def test_one_forward_pass_serves_all_subspaces(plain, digits):
    calls, counts = [], []
    plain.conv1.register_forward_hook(lambda *_: calls.append(1))
    for sizes in ((1, 1), (1, 1, 1, 1, 1, 1)):
        subspaces = subspaces_of(6, sizes)
        subspace_maps(plain, digits[0][:3], subspaces, layer="conv2", scorer=LRP("epsilon"))
        counts.append(len(calls))
    assert counts[1] - counts[0] <= counts[0]


def test_the_model_is_as_before(norm, digits, unchanged):
    norm.train()
    check = unchanged(norm)
    subspaces, x = subspaces_of(8, (2,)), digits[0][:3]
    subspace_maps(norm, x, subspaces, layer="body.5", scorer=LRP("epsilon-plus"))
    check()
    with pytest.raises(ValueError, match=r"layer: 'body\.3'.*merged"):
        subspace_maps(norm, x, subspaces, layer="body.3", scorer=LRP("epsilon-plus"))
    check()
    # What is scored next is not kept in memory for further passes.
    scorer = LRP("epsilon")
    first = scorer.heatmap(norm, x, torch.zeros(3).long())
    assert torch.equal(first, scorer.heatmap(norm, x, torch.zeros(3).long()))


# The strongest samples.


def random_features(contexts):
    generator = torch.Generator().manual_seed(0)
    a, c = torch.randn(2, 40, 5, generator=generator).double()
    sample = torch.randint(12, (40,), generator=generator)
    sample[:12] = torch.arange(12)
    return Features(a, c if contexts else None, sample=sample)


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("chunk", [7, 2**16])
def test_scores_and_strongest_samples_match_brute_force(monkeypatch, contexts, chunk):
    monkeypatch.setattr(scores_module, "VECTORS", chunk)
    features = random_features(contexts)
    basis = subspaces_of(5, (2, 1)).basis
    subspaces = Subspaces(basis, (2, 1), torch.arange(5).double())
    brute = torch.zeros(12, 2).double()
    for at in range(40):
        for k in range(2):
            U = subspaces.block(k)
            a = features.activations[at]
            if contexts:
                value = (U.T @ a) @ (U.T @ features.contexts[at])
            else:
                value = (U.T @ (a - subspaces.mean)).square().sum()
            brute[features.sample[at], k] += value
    assert torch.allclose(sample_scores(subspaces, features), brute, rtol=1e-10)
    for count in (1, 4, 12):
        found = strongest_samples(subspaces, features, count=count)
        assert found.shape == (2, count)
        for k in range(2):
            expected = sorted(range(12), key=lambda sample, k=k: -float(brute[sample, k]))
            assert found[k].tolist() == expected[:count]


def test_equal_samples_keep_their_order():
    subspaces = Subspaces(torch.eye(2).double(), (1, 1), torch.zeros(2).double())
    features = Features(torch.ones(6, 2))
    assert strongest_samples(subspaces, features, count=3).tolist() == [[0, 1, 2]] * 2
