"""Ablation in the forward pass and in the weights: its outputs, relevance, and the model after."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon

from xai_edit import (
    LRP,
    PCA,
    ConceptAwarePruning,
    Presence,
    RelevancePruning,
    Subspaces,
    ablated,
    collect_features,
    fold_ablation,
    score_units,
    to_smaller,
    with_ablation,
)
from xai_edit.concepts import presence
from xai_edit.concepts.collect import values_at as output

LAYERS = ["conv1", "conv2", "fc1"]


def found(model, data, layer, n=3):
    return PCA(n).fit(collect_features(model, data, layer=layer))


def channels_last(values):
    return values.movedim(1, -1) if values.ndim == 4 else values


@pytest.mark.parametrize("indices", [[0], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_layer_passes_its_output_on_without_the_subspaces(plain, batches, layer, indices):
    model, data = plain.double(), [(x.double(), y) for x, y in batches]
    subspaces = found(model, data, layer)
    inputs = data[0][0]
    before = output(model, layer, inputs)
    expected = subspaces.ablate(channels_last(before), indices)
    with ablated(model, layer, subspaces, indices) as inner:
        assert torch.equal(output(model, inner, inputs), before)
        after = output(model, layer, inputs)
    assert torch.allclose(channels_last(after), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("layer", LAYERS)
def test_relevance_passes_through_the_projection_by_the_epsilon_rule(plain, batches, layer):
    model, (x, y) = plain.double(), batches[0]
    x = x.double()
    subspaces = found(model, [(x, y)], layer)
    scorer = LRP("epsilon")
    with ablated(model, layer, subspaces, [0]) as inner:
        outer = layer + ".ablation"
        relevance = scorer.relevance(model, x, y, [inner, outer])
        a, after = (channels_last(output(model, name, x)) for name in (inner, outer))
    U = subspaces.directions([0])
    R, R_after = (channels_last(relevance[name]) for name in (inner, outer))
    ratio = R_after / (after + torch.where(after >= 0, 1e-6, -1e-6))
    expected = a * (ratio - ratio @ U @ U.T)
    assert torch.allclose(R, expected, rtol=1e-8, atol=1e-10)


def test_a_name_map_reaches_the_layer_by_its_inner_name(plain, batches):
    subspaces = found(plain, batches, "conv2")
    x, y = batches[0]
    with ablated(plain, "conv2", subspaces, [0]) as inner:
        names = ["conv1", inner, "fc1", "head"]
        mapped = LRP(NameMapComposite([(names, Epsilon(epsilon=1e-6))]), canonizers=())
        by_name = score_units(plain, [(x, y)], mapped, layers=[inner, "conv1"])
        by_kind = score_units(plain, [(x, y)], LRP("epsilon"), layers=[inner, "conv1"])
    for name in (inner, "conv1"):
        assert torch.allclose(by_name[name], by_kind[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_model_is_exactly_restored(plain, batches, layer, unchanged):
    subspaces = found(plain, batches, layer)
    plain.train()
    check = unchanged(plain)
    children = dict(plain.named_modules())
    with ablated(plain, layer, subspaces, [0]) as inner:
        assert not plain.training
        assert inner == layer + ".layer"
        assert plain.get_submodule(inner) is children[layer]
    check()
    assert dict(plain.named_modules()) == children
    with pytest.raises(KeyboardInterrupt), ablated(plain, layer, subspaces, [0]):
        raise KeyboardInterrupt
    check()
    with ablated(plain, layer, subspaces, [0]) as inner:
        score_units(plain, batches, LRP("epsilon-plus"), layers=[inner, "conv1"])
    check()


def test_two_layers_may_be_ablated_at_once(plain, batches):
    first, second = found(plain, batches, "conv1"), found(plain, batches, "conv2")
    x = batches[0][0]
    with ablated(plain, "conv1", first, [0]):
        only_first = output(plain, "conv2", x)
        with ablated(plain, "conv2", second, [1]):
            both = output(plain, "conv2", x)
        assert torch.equal(output(plain, "conv2", x), only_first)
    expected = second.ablate(only_first.movedim(1, -1), [1]).movedim(-1, 1)
    assert torch.allclose(both, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_with_the_ablation_computes_what_the_ablated_model_does(
    plain, batches, layer, tmp_path, unchanged
):
    subspaces, inputs = found(plain, batches, layer), batches[0][0]
    check = unchanged(plain)
    kept = with_ablation(plain, layer, subspaces, [0, 2])
    check()
    with ablated(plain, layer, subspaces, [0, 2]):
        expected = plain(inputs)
    assert torch.equal(kept(inputs), expected)
    assert not torch.allclose(plain(inputs), expected)

    others = found(plain, batches[1:], layer)
    mean = others.mean.clone()
    again = with_ablation(plain, layer, others, [1, 0])
    save_file(kept.state_dict(), tmp_path / "kept.safetensors")
    again.load_state_dict(load_file(tmp_path / "kept.safetensors"))
    assert torch.equal(again(inputs), expected)
    assert torch.equal(others.mean, mean)

    torch.export.save(torch.export.export(kept, (inputs,)), tmp_path / "kept.pt2")
    exported = torch.export.load(tmp_path / "kept.pt2").module()
    torch.testing.assert_close(exported(inputs), expected)


@pytest.mark.parametrize("when", [None, Presence(0.5)])
def test_a_network_with_its_ablation_is_pruned_and_made_smaller_but_for_what_it_mixes(
    batches, when
):
    torch.manual_seed(0)
    side = 8  # as many channels as pixels a side, so that no size tells the axes apart
    first, second = nn.Conv2d(1, side, 3, padding=1), nn.Conv2d(side, 12, 3, padding=1)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *end).eval()
    inputs = batches[0][0]
    kept = with_ablation(model, "1", found(model, batches, "1"), [0], when=when)
    edit = RelevancePruning(0.5, ranking="local").plan(kept, batches)
    assert set(edit.origin["units"]) == {"2"}
    assert "a value for each" in edit.origin["fixed"]["0"]
    smaller = to_smaller(kept, edit, inputs)
    assert smaller[2].weight.shape == (6, side, 3, 3)
    with edit.applied(kept):
        torch.testing.assert_close(smaller(inputs), kept(inputs))


class Named(nn.Module):
    """Calls its layer by keyword, as blocks that take more than a tensor are called."""

    def __init__(self):
        super().__init__()
        self.block = nn.Bilinear(4, 3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.block(input1=x[:, :4], input2=x[:, 4:]))


def test_a_layer_that_is_called_by_keyword_is_ablated_too():
    torch.manual_seed(0)
    model = Named().eval()
    x = torch.randn(6, 7)
    basis = torch.linalg.qr(torch.randn(5, 5).double()).Q
    subspaces = Subspaces(basis, (2, 3), torch.zeros(5).double())
    a = model.block(x[:, :4], x[:, 4:]).double()
    expected = model.head((a - a @ basis[:, :2] @ basis[:, :2].T).float())
    with ablated(model, "block", subspaces, [0]):
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert torch.allclose(with_ablation(model, "block", subspaces, [0])(x), expected, atol=1e-6)


# Folding.


class Chain(nn.Module):
    """A convolution read by another one, as it is; ``padding`` and ``branch`` break exactness."""

    def __init__(self, padding=0, branch=False, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu = nn.Conv2d(1, 6, 3), nn.ReLU()
        self.conv2 = nn.Conv2d(6, 5, 3, padding=padding, bias=bias)
        self.head = nn.Linear(5, 10)
        self.branch = branch

    def forward(self, x):
        a = self.relu(self.conv1(x))
        z = self.head(self.conv2(a).relu().mean((2, 3)))
        return z + a.mean((1, 2, 3))[:, None] ** 2 if self.branch else z


@pytest.mark.parametrize("indices", [[0], [1, 2]])
@pytest.mark.parametrize(("kind", "layer", "reader"), [("conv", "relu", "conv2"), ("fc", "2", "3")])
def test_folded_weights_compute_what_the_ablation_computes(
    batches, kind, layer, reader, indices, unchanged
):
    torch.manual_seed(0)
    fc = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    model = (Chain() if kind == "conv" else fc).eval()
    subspaces = found(model, batches, layer)
    check = unchanged(model)
    x = batches[0][0]
    values = fold_ablation(model, layer, subspaces, indices, x)
    check()
    assert set(values) == {f"{reader}.weight", f"{reader}.bias"}
    with ablated(model, layer, subspaces, indices):
        expected = model(x)
    folded = torch.func.functional_call(model, values, (x,))
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=1e-4)
    assert (expected - model(x)).abs().max() > 1e-3  # the ablation does something


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        ({"padding": 1}, "relu", "not exact"),
        ({"branch": True}, "relu", "not exact"),
        ({"bias": False}, "relu", "no bias"),
        ({}, "conv1", "directly"),
    ],
)
def test_an_ablation_that_does_not_fold_exactly_is_refused(batches, network, layer, message):
    model = Chain(**network).eval()
    subspaces = found(model, batches, layer)
    with pytest.raises(ValueError, match=message):
        fold_ablation(model, layer, subspaces, [0], batches[0][0])


def test_pruning_that_keeps_the_ablation_equals_pruning_inside_it(batches):
    model = Chain().eval()
    subspaces = found(model, batches, "relu")
    plain, kept = (
        ConceptAwarePruning("relu", subspaces, [0], 0.4, keep_ablation=keep).plan(model, batches)
        for keep in (False, True)
    )
    assert plain.origin["units"] == kept.origin["units"]
    x = batches[0][0]
    with plain.applied(model), ablated(model, "relu", subspaces, [0]):
        expected = model(x)
    with kept.applied(model):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


# Reactive ablation: of samples in which the subspaces are present.


def scores_of(model, layer, subspaces, inputs, indices, pooling):
    """The scores by a loop over samples and positions, and the middle between two of them."""
    a = channels_last(output(model, layer, inputs)).double()
    U = subspaces.directions(indices)
    squares = [
        [float((U.T @ (vector - subspaces.mean)).square().sum()) for vector in sample]
        for sample in a.reshape(len(a), -1, a.shape[-1])
    ]
    pool = max if pooling == "max" else (lambda values: sum(values) / len(values))
    scores = torch.tensor([pool(sample) for sample in squares]).double()
    low, high = scores.sort().values[len(scores) // 2 - 1 : len(scores) // 2 + 1].tolist()
    return scores, (low + high) / 2


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("layer", LAYERS)
def test_only_samples_with_the_subspaces_are_ablated(
    plain, batches, layer, pooling, tmp_path, unchanged
):
    subspaces, inputs = found(plain, batches, layer), batches[0][0]
    expected, threshold = scores_of(plain, layer, subspaces, inputs, [0, 2], pooling)
    a = channels_last(output(plain, layer, inputs))
    scores = presence(a.reshape(len(a), -1, a.shape[-1]), subspaces, [0, 2], pooling)
    torch.testing.assert_close(scores, expected)
    with ablated(plain, layer, subspaces, [0, 2]):
        everywhere = plain(inputs)
    check, here = unchanged(plain), scores > threshold
    when = Presence(threshold, pooling)
    kept = with_ablation(plain, layer, subspaces, [0, 2], when=when)
    with ablated(plain, layer, subspaces, [0, 2], when=when):
        reactive = plain(inputs)
    check()
    assert torch.equal(kept(inputs), reactive)
    assert torch.equal(reactive[~here], plain(inputs)[~here])  # bit by bit
    torch.testing.assert_close(reactive[here], everywhere[here])
    assert not torch.allclose(reactive[here], plain(inputs)[here])

    again = with_ablation(plain, layer, subspaces, [0, 2], when=Presence(0, pooling))
    save_file(kept.state_dict(), tmp_path / "kept.safetensors")
    again.load_state_dict(load_file(tmp_path / "kept.safetensors"))
    assert torch.equal(again(inputs), reactive)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_exported_reactive_ablation_takes_batches_of_any_size_and_mixture(plain, batches, layer):
    subspaces, inputs = found(plain, batches, layer), batches[0][0]
    scores, threshold = scores_of(plain, layer, subspaces, inputs, [0], "max")
    kept = with_ablation(plain, layer, subspaces, [0], when=Presence(threshold))
    kept(inputs)  # finds the axis
    sizes = ({0: torch.export.Dim("samples")},)
    exported = torch.export.export(kept, (inputs,), dynamic_shapes=sizes).module()
    here = scores > threshold
    for rows in (slice(0, 7), here, ~here):  # a mixture, and either kind alone
        own = inputs[rows]
        torch.testing.assert_close(exported(own), kept(inputs)[rows])
        assert torch.equal(exported(own)[~here[rows]], plain(own)[~here[rows]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1000.0])  # of activations; their square is beyond float16
def test_in_half_precision_too_only_samples_with_the_subspaces_are_changed(dtype, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight *= size
        model[0].bias *= size
    subspaces = Subspaces(torch.eye(8).double()[:, :2], (2,), torch.zeros(8).double())
    half, x = copy.deepcopy(model).to(dtype), torch.randn(16, 4).to(dtype)
    scores = half[1](half[0](x))[:, :2].double().square().sum(1)
    low, high = scores.sort().values[7:9].tolist()
    when = Presence((low + high) / 2)
    kept = with_ablation(model, "1", subspaces, [0], when=when)
    kept(x.float())  # finds the axis
    changed = (kept.to(dtype)(x) != half(x)).any(1)
    assert torch.equal(changed, scores > when.threshold)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_outputs_without_the_feature_are_the_same_bits_in_either_memory_layout(memory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(inplace=True)
    )
    model = model.to(memory_format=memory).eval()
    x = torch.randn(5, 3, 20, 20).to(memory_format=memory)
    subspaces = Subspaces(torch.eye(32).double()[:, :4], (4,), torch.zeros(32).double())
    none = with_ablation(model, "1", subspaces, [0], when=Presence(1e9))
    assert torch.equal(none(x), model(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_relevance_passes_samples_that_are_not_ablated_by(plain, batches, layer):
    model, (x, y) = plain.double(), batches[0]
    x = x.double()
    subspaces = found(model, [(x, y)], layer)
    scores, threshold = scores_of(model, layer, subspaces, x, [0], "max")
    scorer, relevance = LRP("epsilon"), {}
    for when in (None, Presence(threshold)):
        with ablated(model, layer, subspaces, [0], when=when) as inner:
            relevance[when is None] = scorer.relevance(model, x, y, [inner])[inner]
    here, plainly = scores > threshold, scorer.relevance(model, x, y, [layer])[layer]
    torch.testing.assert_close(relevance[False][here], relevance[True][here])
    torch.testing.assert_close(relevance[False][~here], plainly[~here], rtol=1e-4, atol=1e-5)
