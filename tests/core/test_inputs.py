"""Models of several inputs, batches of several forms, and outputs that hold the logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import nn

import xai_edit as xe
from xai_edit.core.data import batches
from xai_edit.core.outputs import outputs_as

X, S = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.rand(6, 1) + 1
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Scaled(nn.Module):
    """A network of values and of a weight a sample, with its logits in some form."""

    def __init__(self, form=lambda z: z):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.form = form

    def forward(self, values, attention_mask=None):
        hidden = torch.relu(self.first(values))
        if attention_mask is not None:
            hidden = hidden * attention_mask
        return self.form(self.head(hidden))


class OfOneInput(Scaled):
    def forward(self, x):
        return super().forward(x[:, :4], x[:, 4:])


BATCHES = {
    "a mapping": lambda x, s, y: {"values": x, "attention_mask": s, "labels": y},
    "inputs by name": lambda x, s, y: ({"values": x, "attention_mask": s}, y),
    "inputs by position": lambda x, s, y: ((x, s), y),
    "a list": lambda x, s, y: [[x, s], y],
}
SCORERS = {
    "LRP": xe.LRP,
    "Taylor": xe.Taylor,
    "gradient": lambda: xe.CaptumLayer(LayerGradientXActivation),
    "integrated gradients": lambda: xe.CaptumLayer(LayerIntegratedGradients, n_steps=4),
}


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("kind", SCORERS)
def test_several_inputs_score_like_one_that_holds_them_all(form, kind):
    data = [BATCHES[form](X[i : i + 3], S[i : i + 3], Y[i : i + 3]) for i in (0, 3)]
    got = xe.score_units(Scaled(), data, SCORERS[kind](), layers=["first", "head"])
    if kind == "integrated gradients":  # the whole has the mask on its path too
        assert got["head"].any()
        return
    whole = [(torch.cat([X, S], 1), Y)]
    expected = xe.score_units(OfOneInput(), whole, SCORERS[kind](), layers=["first", "head"])
    for name in ("first", "head"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", BATCHES)
def test_edits_and_figures_are_those_of_one_input(form):
    said = Scaled()(X, S).argmax(1)
    data, whole = [BATCHES[form](X, S, said)], [(torch.cat([X, S], 1), said)]
    target = int(said[0])
    for operator in (
        xe.SingleWeight(select="exact"),
        xe.PathPerturbation(layer="first", share=0.4, scope="neuron"),
    ):
        got = operator.plan(Scaled(), data, target=target)
        expected = operator.plan(OfOneInput(), whole, target=target)
        assert got.summary() == expected.summary()
    groups = torch.arange(6) % 2
    got = xe.evaluate_groups(Scaled(), data, groups=groups)
    assert got.to_dict() == xe.evaluate_groups(OfOneInput(), whole, groups=groups).to_dict()


OUTPUTS = {
    "an attribute": lambda z: SimpleNamespace(loss=None, logits=z),
    "a key": lambda z: {"hidden": z + 1, "logits": z},
    "a tuple": lambda z: (None, z, z + 1),
}


@pytest.mark.parametrize("form", OUTPUTS)
@pytest.mark.parametrize("kind", SCORERS)
def test_logits_are_found_in_what_a_model_returns(form, kind):
    expected = xe.score_units(Scaled(), [(X, Y)], SCORERS[kind](), layers="first")
    got = xe.score_units(Scaled(OUTPUTS[form]), [(X, Y)], SCORERS[kind](), layers="first")
    torch.testing.assert_close(got["first"], expected["first"])


@pytest.mark.parametrize("outputs", ["scores", lambda output: output["scores"]])
def test_outputs_say_where_the_logits_are(outputs):
    model = Scaled(lambda z: {"logits": z + 1, "scores": z})
    expected = xe.score_units(Scaled(), [(X, Y)], xe.LRP(), layers="first")
    with outputs_as(outputs):
        got = xe.score_units(model, [(X, Y)], xe.LRP(), layers="first")
    torch.testing.assert_close(got["first"], expected["first"])
    with pytest.raises(TypeError, match="outputs: 3 given"), outputs_as(3):
        pass


@pytest.mark.parametrize("kind", ["LRP", "gradient"])
def test_a_function_of_any_outputs_can_be_explained(kind):
    maps = Scaled(lambda z: z[:, :, None, None] * torch.arange(4.0).view(2, 2))  # a segmentation
    got = xe.score_units(
        maps, [X], SCORERS[kind](), layers="first", target=lambda out: out[:, 1].sum((1, 2))
    )
    expected = xe.score_units(
        Scaled(), [X], SCORERS[kind](), layers="first", target=lambda z: 6 * z[:, 1]
    )
    torch.testing.assert_close(got["first"], expected["first"], rtol=1e-4, atol=1e-5)


def test_inputs_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"inputs of different lengths: \{'0': 6, '1': 5\}"):
        next(batches([((X, S[:5]), Y)]))


def test_functions_of_one_batch_take_a_mapping():
    model, batch = Scaled(), {"values": X, "attention_mask": S}
    whole = torch.cat([X, S], 1)
    layers = ["first", "head"]
    got = xe.LRP().relevance(model, batch, Y, layers)
    expected = xe.LRP().relevance(OfOneInput(), whole, Y, layers)
    torch.testing.assert_close(got, expected)
    heat = xe.LRP().heatmap(model, batch, Y)
    torch.testing.assert_close(heat, xe.LRP().heatmap(OfOneInput(), whole, Y)[:, :4])
    edit = xe.RelevancePruning(share=0.4).plan(model, [{**batch, "labels": Y}])
    small = xe.to_smaller(model, edit, batch)
    with edit.applied(model):
        torch.testing.assert_close(small(**batch), model(**batch))
    with pytest.raises(TypeError, match="example_input: str given"):
        xe.to_smaller(model, edit, "values")
