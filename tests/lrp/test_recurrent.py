"""Recurrent layers have no relevance rule; what needs none works on their networks."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn

from xai_edit import LRP, CaptumLayer, SingleWeight, score_units
from xai_edit.last_layer import collect_head_features

X = torch.randn(12, 7, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
KINDS = {
    "LSTM": "lstm",
    "GRU": "gru",
    "RNN": "rnn_tanh",
    "LSTMCell": "lstm_cell",
    "GRUCell": "gru_cell",
    "RNNCell": "rnn_tanh_cell",
}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        options = {} if kind.endswith("Cell") else {"batch_first": True}
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(6, 3)
        self.cell = getattr(nn, kind)(5, 6, **options)

    def forward(self, x):
        x = self.embed(x)
        if not hasattr(self.cell, "batch_first") or isinstance(self.cell, nn.RNNCellBase):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_relevance_through_a_recurrent_layer_is_refused_by_name_with_what_works(kind, unchanged):
    model = Recurrent(kind).eval()
    check = unchanged(model)
    for call in (
        lambda: LRP().heatmap(model, X, LABELS),
        lambda: score_units(model, [(X, LABELS)], LRP(), layers=["embed"]),
    ):
        with pytest.raises(ValueError, match=rf"'cell': {kind} runs '{KINDS[kind]}'.*CaptumLayer"):
            call()
    check()
    scores = score_units(model, [(X, LABELS)], LRP(), layers=["head"], target=1)
    torch.testing.assert_close(scores["head"][1], model(X)[:, 1].double().sum(), rtol=1e-4, atol=0)
    scorer = CaptumLayer(LayerGradientXActivation)
    assert score_units(model, [(X, LABELS)], scorer, layers=["embed"])["embed"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_a_recurrent_network_is_edited(kind):
    model = Recurrent(kind).eval()
    with torch.no_grad():
        model.head.bias[1] += 0.5  # all are predicted as class 1
        features = collect_head_features(model, [(X, LABELS)])
        edit = SingleWeight(select="exact").plan(model, features, target=1)
        with edit.applied(model):
            edited = model(X)
    torch.testing.assert_close(features.edited(edit).logits().float(), edited, rtol=1e-4, atol=1e-5)
