"""Units along the right axis, by every scorer, in concepts and ablations; layers by name."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from networks import family, value_and_gradient
from torch import nn
from torch.nn import functional as F

from xai_edit import (
    LRP,
    Activation,
    CaptumLayer,
    Subspaces,
    Taylor,
    ablated,
    collect_features,
    edge_relevance,
    fit_patterns,
    score_units,
    with_ablation,
)
from xai_edit.core import axes as axes_of_units
from xai_edit.core.analysis import following_batch_norms, last_weighted
from xai_edit.core.axes import unit_axes
from xai_edit.core.trace import trace
from xai_edit.last_layer.head import find_head
from xai_edit.lrp import check_lrp

LABELS = torch.tensor([0, 2])


class Chain(nn.Module):
    """A layer, an operation that a module named "at" passes on, and a function behind it."""

    def __init__(self, before, operation, behind=lambda x: x):
        super().__init__()
        self.before, self.at = before, nn.Identity()
        self.operation, self.behind = operation, behind

    def forward(self, x):
        return self.behind(self.at(self.operation(self.before(x))))


IMAGES, TOKENS = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 5)
CONVOLVED = {  # operations on six channels, rows and columns, and the axis of the channels
    "elementwise": (lambda x: torch.relu(x).sqrt() * 2 + 1, 1),
    "in place": (lambda x: x.relu_().add_(1), 1),
    "set by index": (lambda x: x.clone().__setitem__((0, 0), 0) or x, 1),
    "permute": (lambda x: x.permute(0, 2, 3, 1), 3),
    "movedim": (lambda x: x.movedim(1, -1), 3),
    "movedim, by name": (lambda x: torch.movedim(input=x, source=1, destination=2), 2),
    "mean over rows": (lambda x: x.mean(2), 1),
    "maximum over columns": (lambda x: x.permute(0, 3, 2, 1).max(1).values, 2),
    "flatten positions": (lambda x: x.flatten(2), 1),
    "reshape positions": (lambda x: x.reshape(2 * len(x) // 2, 6, 4, 9), 1),
    "squeeze": (lambda x: x[..., :1].squeeze(-1), 1),
    "part of them": (lambda x: x[:, [4, 1, 2]], 1),
    "half of them": (lambda x: x.chunk(2, 1)[1], 1),
    "cat of channels": (lambda x: torch.cat([x, x], 1), 1),
    "some set to zero": (lambda x: x.index_fill(1, torch.tensor([2]), 0), 1),
    "pool": (lambda x: F.max_pool2d(x, 2), 1),
    "gate": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), 1),
}
TRANSFORMED = {  # operations on six tokens of six features, and the axis of the features
    "transpose": (lambda x: x.transpose(1, 2), 1),
    "transpose, in place": (lambda x: (x + 0).transpose_(-1, 1), 1),
    "mT": (lambda x: x.mT, 1),
    "larger of two": (lambda x: torch.max(x, x.flip(1)), 2),
    "unflatten positions": (lambda x: x.unflatten(1, (2, 3)), 3),
    "unsqueeze": (lambda x: x.unsqueeze(1), 3),
    "stack": (lambda x: torch.stack([x, x], 1), 3),
    "cat of positions": (lambda x: torch.cat([x[:, :1], x], 1), 2),
    "norm": (lambda x: F.layer_norm(x, (6,)), 2),
    "attention": (lambda x: (x @ x.mT).softmax(-1) @ x, 2),
    "attention, one operation": (lambda x: F.scaled_dot_product_attention(x, x, x), 2),
    "product with weights": (lambda x: x.mT @ torch.ones(6, 4), 2),
    "weights, added to": (lambda x: torch.addmm(torch.ones(4), x[:, 0], torch.ones(6, 4)), 1),
    "bilinear": (lambda x: F.bilinear(x, x, torch.ones(4, 6, 6)), 2),
}


@pytest.mark.parametrize("kind", [*CONVOLVED, *TRANSFORMED])
def test_the_axis_is_followed_from_the_layer_before(kind):
    layer, x = nn.Conv2d(3, 6, 3, padding=1), IMAGES
    if kind in TRANSFORMED:
        layer, x = nn.Linear(5, 6), TOKENS
    operation, axis = (CONVOLVED | TRANSFORMED)[kind]
    found = unit_axes(Chain(layer, operation), x, ["at", "at:input"])
    assert found == {"at": axis, "at:input": axis}


READ = {
    "linear": (nn.Linear(6, 2), 2),
    "convolution": (nn.Conv1d(6, 2, 1), 1),
    "permuted": (lambda x: F.linear(x.transpose(1, 2), torch.ones(2, 6)), 1),
    "recurrent": (nn.LSTM(6, 2, batch_first=True), 2),
    "attention": (nn.MultiheadAttention(6, 2), 2),
}


@pytest.mark.parametrize("reader", READ)
def test_the_axis_is_followed_back_from_the_layer_behind(reader):
    layer, axis = READ[reader]
    behind = (lambda x: layer(x, x, x)) if reader == "attention" else layer
    model = Chain(nn.Identity(), torch.exp, behind)
    assert unit_axes(model, torch.rand(2, 6, 6), ["at"]) == {"at": axis}


def test_words_have_the_features_of_their_embedding():
    model = Chain(nn.Embedding(9, 6), torch.tanh)
    assert unit_axes(model, torch.randint(9, (2, 6)), ["at"]) == {"at": 2}


UNFOLLOWED = {
    "no layer": (nn.Identity(), lambda x: x, None),
    "heads": (nn.Linear(5, 6), lambda x: x.unflatten(2, (2, 3)), None),
    "mixed with positions": (nn.Linear(5, 6), lambda x: x.flatten(1)[:, :, None], None),
    "einsum": (nn.Linear(5, 6), lambda x: torch.einsum("nij,nkj->nik", x, x), None),
    "samples": (nn.Linear(5, 6), lambda x: x.permute(2, 1, 0), "axis of the samples"),
    "read across tokens": (nn.Linear(5, 6), lambda x: x.transpose(1, 2), r"axes \[1, 2\]"),
    "bytes": (nn.Linear(5, 6), lambda x: x.view(torch.int32).float(), None),
}


@pytest.mark.parametrize("kind", UNFOLLOWED)
def test_an_axis_that_cannot_be_followed_is_an_error(kind):
    before, operation, why = UNFOLLOWED[kind]
    model = Chain(before, operation, nn.Linear(6, 2) if kind == "read across tokens" else torch.exp)
    why = why or "no convolution or linear layer gives or reads"
    with pytest.raises(ValueError, match=rf"layer 'at'.*{why}.*give unit_axis="):
        unit_axes(model, TOKENS, ["at"])
    for given in (2, {"at": 2}):
        assert unit_axes(model, TOKENS, ["at"], given) == {"at": 2}


def test_other_names_and_axes_are_refused():
    model = Chain(nn.Linear(5, 6), torch.exp)
    for given, why in ((0, "holds the samples"), ({"fc": 1}, "names some"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=rf"^unit_axis: .*{why}"):
            unit_axes(model, TOKENS, ["at"], given)
    model.behind = lambda x: x.mean(1)
    for axis in (3, -3):
        with pytest.raises(ValueError, match=r"unit_axis: .* shape \(2, 6, 6\)"):
            score_units(model, [TOKENS], Activation(), layers="at", target=0, unit_axis=axis)


def test_layers_of_a_known_kind_cost_no_forward_pass(monkeypatch):
    monkeypatch.setattr(axes_of_units, "trace", None)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    names = ["0", "0:input", "1", "3", "3:input"]
    assert [*unit_axes(model, None, names).values()] == [1, 1, 1, -1, -1]


# Networks of torchvision, whose documentation says which axis is which


BLOCKS = {  # name → the axis of the features of each layer
    "swin": {"features.1.0": 3, "features.1": 3, "features.1.0.norm1": 3, "permute": 1},
    "convnext": {"features.1.0": 1, "features.1.0.block.3": 3, "features.0.1": 1},
    "vit": {"encoder.layers.encoder_layer_0": 2, "encoder.ln": 2},
}
SCORERS = {
    "Activation": Activation(),
    "Taylor": Taylor(),
    "LayerActivation": CaptumLayer(captum.attr.LayerActivation),
}


def likelihood(logits):
    return -F.cross_entropy(logits, LABELS, reduction="sum")


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_scored_by_feature(name):
    model, x, layers = family(name), torch.rand(2, 3, 32, 32), [*BLOCKS[name]]
    got = {
        kind: score_units(model, [(x, LABELS)], scorer, layers=layers)
        for kind, scorer in SCORERS.items()
    }
    relevance = LRP("epsilon").relevance(model, x, LABELS, layers)
    summed = LRP("epsilon")(model, x, LABELS, layers)
    for layer, axis in BLOCKS[name].items():
        values, gradient = value_and_gradient(model, x, layer, likelihood)
        positions = [at for at in range(1, values.ndim) if at != axis]
        for kind, expected in (
            ("Activation", values.clamp(min=0).mean(positions)),
            ("Taylor", (values * gradient).sum(positions)),
            ("LayerActivation", values.sum(positions)),
        ):
            torch.testing.assert_close(
                got[kind][layer], expected.double().sum(0), rtol=1e-4, atol=1e-6
            )
        torch.testing.assert_close(
            summed[layer], relevance[layer].sum(positions), rtol=1e-4, atol=1e-6
        )


class AsManyTokensAsFeatures(nn.Module):
    """Tokens through a block, as many as each has features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 6)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.GELU())
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


def subspaces():
    basis = torch.linalg.qr(torch.rand(6, 6, generator=torch.Generator().manual_seed(1)).double()).Q
    return Subspaces(basis, (2, 4), torch.arange(6).double())


@pytest.mark.parametrize("scored", [False, True])
def test_ablation_removes_features_where_there_are_as_many_tokens(scored):
    model, found = AsManyTokensAsFeatures().double().eval(), subspaces()
    x = TOKENS.double()
    expected = model.head(found.ablate(model.block(model.embed(x)), [0]).mean(1))
    with ablated(model, "block", found, [0]):
        if scored:  # the axis is found in a pass with the scorer's hooks
            score_units(model, [x], SCORERS["LayerActivation"], layers=["embed"], target=0)
        torch.testing.assert_close(model(x), expected)
    kept = with_ablation(model, "block", found, [0])
    for _ in range(2):  # the axis is kept from the first call
        torch.testing.assert_close(kept(x), expected)
    tokens_lost = model.head(found.ablate(model.block(model.embed(x)).mT, [0]).mT.mean(1))
    with ablated(model, "block", found, [0], unit_axis=1):
        torch.testing.assert_close(model(x), tokens_lost)


def test_ablation_along_an_axis_that_cannot_be_followed_is_an_error():
    model = Chain(nn.Identity(), torch.exp)
    with ablated(model, "at", subspaces(), [0]), pytest.raises(ValueError, match="give unit_axis="):
        model(torch.rand(2, 6, 6))


class Mixer(nn.Module):
    """Linear layers across tokens and across features."""

    def __init__(self):
        super().__init__()
        self.embed, self.across, self.head = nn.Linear(5, 4), nn.Linear(6, 6), nn.Linear(4, 3)
        self.stream = nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.stream(x + self.across(x.mT).mT).mean(1))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_every_scorer_sums_along_the_axis_given(axis):
    model = Mixer().double()
    x = TOKENS.double()
    with pytest.raises(ValueError, match=r"'stream' .* axes \[1, 2\].*give unit_axis="):
        score_units(model, [(x, LABELS)], LRP(), layers="stream")
    with pytest.raises(ValueError, match="give unit_axis="):
        collect_features(model, [x], layer="stream")

    def wrapped(model, inputs, targets, layers):
        return Taylor()(model, inputs, targets, layers)

    values, gradient = value_and_gradient(model, x, "stream", likelihood)
    positions = 2 if axis == 1 else 1
    for scorer, expected in (
        (Taylor(), values * gradient),
        (wrapped, values * gradient),
        (Activation(), values.clamp(min=0) / values.shape[positions]),
        (SCORERS["LayerActivation"], values),
        (LRP(), LRP().relevance(model, x, LABELS, ["stream"])["stream"]),
    ):
        for given, layers in ((axis, "stream"), ({"stream": axis}, ["stream", "embed"])):
            got = score_units(model, [(x, LABELS)], scorer, layers=layers, unit_axis=given)
            torch.testing.assert_close(got["stream"], expected.sum(positions).sum(0))
    features = collect_features(model, [x], layer="stream", positions=None, unit_axis=axis)
    rows = values.mT if axis == 1 else values
    torch.testing.assert_close(features.activations, rows.flatten(0, 1))


# Calls by keyword, unused branches, the fast path of transformers


class ByKeyword(nn.Module):
    def __init__(self, *, keyword=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(5, 3)
        self.keyword = keyword

    def call(self, layer, x):
        return layer(input=x) if self.keyword else layer(x)

    def forward(self, x):
        x = self.call(self.conv, x).relu().mean((2, 3))
        return self.call(self.head, self.call(self.fc, x).relu())


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize("scorer", [LRP(), Taylor(), Activation()], ids=repr)
def test_layers_called_by_keyword_are_scored_alike(scorer):
    data = [(torch.rand(2, 3, 6, 6), LABELS)]
    layers = ["conv:input", "conv", "fc:input", "head:input", "head"]
    got, expected = (
        score_units(ByKeyword(keyword=keyword), data, scorer, layers=layers)
        for keyword in (True, False)
    )
    for name in layers:
        torch.testing.assert_close(got[name], expected[name])


def test_heads_patterns_edges_and_features_see_calls_by_keyword():
    x = torch.rand(2, 3, 6, 6)
    model, twin = ByKeyword(), ByKeyword(keyword=False)
    assert find_head(model, x).layer == last_weighted(model, x) == "head"
    got, expected = (fit_patterns(one, [x], layers=["fc"]).linear["fc"] for one in (model, twin))
    torch.testing.assert_close(got, expected)
    got, expected = (
        edge_relevance(one, [(x, LABELS)], LRP(), layers=["fc"])["fc"] for one in (model, twin)
    )
    torch.testing.assert_close(got, expected)
    features = collect_features(model, [x], layer="fc:input")
    torch.testing.assert_close(features.activations, model.conv(x).relu().mean((2, 3)).detach())


class Branches(nn.Module):
    """Branches that are not called, see constants only (a table of positions), or lead nowhere."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.idle, self.constant, self.lost = nn.Linear(5, 3), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.body(x).relu() + self.constant(torch.ones(7, 2)).mean(0)
        self.lost(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.parametrize("scorer", [LRP(), *SCORERS.values()], ids=repr)
def test_branches_without_part_in_the_output_are_skipped_unless_named(scorer):
    model, data = Branches(), [(TOKENS[:, 0], LABELS)]
    assert score_units(model, data, scorer).layers == ["body", "head"]
    with pytest.raises(ValueError, match="'idle' takes no part in the model's forward pass"):
        score_units(model, data, scorer, layers=["head", "idle"])
    assert trace(model, data[0][0]).unused == {"lost"}


def test_a_branch_that_no_sample_reaches_is_not_checked_and_has_no_relevance():
    model = Branches()
    assert "constant" not in check_lrp(model, TOKENS[:, 0]).ratios
    with pytest.raises(ValueError, match="constant"):
        score_units(model, [(TOKENS[:, 0], LABELS)], LRP(), layers="constant")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.embed, self.encoder = nn.Linear(5, 6), nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


def by_hand(model, x, **changes):
    """The encoder's layer, post-norm, with what ``changes`` make of the values of its layers."""
    (layer,) = model.encoder.layers
    changed = dict.fromkeys(("linear1", "linear2", "layer"), lambda x: x) | changes
    x = model.embed(x)
    x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
    hidden = changed["linear1"](layer.linear1(x)).relu()
    x = layer.norm2(x + changed["linear2"](layer.linear2(hidden)))
    return model.head(changed["layer"](x).mean(1)), hidden


def test_layers_inside_a_transformer_are_seen_and_its_fast_path_comes_back():
    model = Encoder().eval().requires_grad_(False)
    name = "encoder.layers.0.linear1"
    assert torch.backends.mha.get_fastpath_enabled()
    for scorer in SCORERS.values():
        got = score_units(model, [(TOKENS, LABELS)], scorer, layers=name)[name]
        assert got.shape == (8,)
        assert torch.backends.mha.get_fastpath_enabled()
    _, hidden = by_hand(model, TOKENS)
    got = score_units(model, [(TOKENS, LABELS)], Activation(), layers=name)[name]
    torch.testing.assert_close(got, hidden.mean(1).sum(0).double(), rtol=1e-5, atol=1e-6)

    def failing(*_):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        score_units(model, [(TOKENS, LABELS)], failing, layers=name)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("layer", ["linear1", "linear2", "layer"])
def test_ablation_works_inside_a_transformer_and_behind_it(layer):
    model = Encoder().eval().requires_grad_(False)
    width = 8 if layer == "linear1" else 6
    basis = torch.linalg.qr(torch.rand(width, width).double()).Q
    found = Subspaces(basis, (2, width - 2), torch.ones(width).double())
    name = "encoder.layers.0" + ("" if layer == "layer" else f".{layer}")
    expected, _ = by_hand(model, TOKENS, **{layer: lambda x: found.ablate(x, [0]).to(x)})
    with ablated(model, name, found, [0]), torch.no_grad():
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)
    kept = with_ablation(model, name, found, [0])
    with torch.no_grad():
        torch.testing.assert_close(kept(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_ablation_of_what_is_no_layer_of_its_own_is_one_clear_error():
    model = Encoder().eval()
    name = "encoder.layers.0.self_attn"
    with (
        ablated(model, name, subspaces(), [0]),
        pytest.raises(ValueError, match="passes on a tuple, not one tensor"),
    ):
        model(TOKENS)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 6)

        def forward(self, x):
            return F.linear(x, self.fc.weight)

    reads = Reads()
    with (
        ablated(reads, "fc", subspaces(), [0]),
        pytest.raises(AttributeError, match="reads the layer's weights instead of calling it"),
    ):
        reads(TOKENS)


def test_a_batch_norm_follows_only_what_it_reads_unchanged():
    for activation, found in ((nn.ReLU(inplace=True), {}), (nn.Identity(), {"0": "2"})):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), activation, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
        )
        assert following_batch_norms(model, IMAGES, ["0", "4"]) == found
    assert last_weighted(nn.Sequential(nn.Flatten()), TOKENS) is None
