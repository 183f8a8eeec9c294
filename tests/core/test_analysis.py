"""An analysis is kept while the model stays as it is, and not longer."""

from __future__ import annotations

import copy
import gc
import weakref
from types import MethodType

import pytest
import torch
from networks import Crosswise
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from zennit import composites as zc
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.core import Hook

from xai_edit import LRP, FunctionalCanonizer, score_units
from xai_edit.core import analysis
from xai_edit.core.analysis import analysed
from xai_edit.lrp import lrp as scorers

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([2, 0, 1, 1])


def forward(self, x):
    return 2 * nn.Linear.forward(self, x)


CHANGES = {
    "written in place": lambda model: nn.init.zeros_(model.fc.weight),
    "written to data": lambda model: model.fc.weight.data.mul_(2),
    "a buffer written to": lambda model: model.body[1].running_mean.add_(0.1),
    "storage": lambda model: setattr(model.fc.weight, "data", model.fc.weight.data.clone()),
    "parameter": lambda model: setattr(model.fc, "weight", nn.Parameter(torch.ones(10, 8))),
    "module": lambda model: setattr(model.body, "2", nn.LeakyReLU(0.5)),
    "copy of a module": lambda model: setattr(model.body, "0", copy.deepcopy(model.body[0])),
    "added module": lambda model: model.body.append(nn.Dropout()),
    "hook": lambda model: model.fc.register_forward_hook(print),
    "pre-hook": lambda model: model.fc.register_forward_pre_hook(print),
    "parametrization": lambda model: register_parametrization(model.fc, "weight", nn.Identity()),
    "mode": lambda model: model.body[1].train(),
    "attribute": lambda model: setattr(model.body[0], "padding", (2, 2)),
    "shadowed forward": lambda model: setattr(model.fc, "forward", MethodType(forward, model.fc)),
    "nested attribute": lambda model: model.options.update(scale=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_analysis_is_dropped_when_the_model_changes(norm, change):
    sparse = torch.eye(2).to_sparse()
    norm.options = {"scale": 2, "of": [sparse, {"deep": {"deeper": {"deepest": ()}}}]}
    first = analysed(norm, X)
    assert analysed(norm, X + 1) is first
    CHANGES[change](norm)
    assert analysed(norm, X) is not first


def test_inputs_of_another_shape_have_their_own_analysis(norm):
    small, large = analysed(norm, X), analysed(norm, torch.rand(2, 1, 12, 12))
    assert large is not small
    assert analysed(norm, X) is small


def test_an_analysis_does_not_outlive_its_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    score_units(model, [torch.rand(2, 3)], LRP(), target=0)
    kept, gone = len(analysis._KEPT), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(analysis._KEPT) < kept


@pytest.fixture
def traces(monkeypatch):
    """The forward passes that are traced."""
    made, trace = [], analysis.trace
    monkeypatch.setattr(analysis, "trace", lambda *given: made.append(given) or trace(*given))
    return made


@pytest.mark.parametrize("layers", [None, ["fc"]])
def test_a_model_is_looked_at_once_for_several_calls(norm, traces, unchanged, layers):
    expected = score_units(copy.deepcopy(norm), [(X, TARGETS)], LRP(), layers=layers)
    check = unchanged(norm)
    traces.clear()
    for scorer in (LRP(), LRP("epsilon-plus"), LRP(zc.GuidedBackprop()), LRP()):
        again = score_units(norm, [(X, TARGETS)], scorer, layers=layers)
    check()
    assert len(traces) == 1
    for name in expected:
        assert torch.equal(again[name], expected[name])


def test_canonizers_are_compared_again_once_the_weights_changed_and_refused_at_every_call(
    monkeypatch,
):
    # As if LRP chose those that merge the neighbours among the modules.
    canonizers = [SequentialMergeBatchNorm(), FunctionalCanonizer()]
    monkeypatch.setattr(scorers, "choose_canonizers", lambda *_: canonizers)
    model = Crosswise(1).eval()
    for _ in range(2):
        score_units(model, [X], LRP(), layers=["fc"], target=0)
    model.spoil()
    analysed(model, 1 - X)  # of another sample
    for _ in range(2):
        with pytest.raises(ValueError, match="make another network"):
            score_units(model, [X], LRP(), layers=["fc"], target=0)


class Doubling(Hook):
    """A rule of a user's own that changes the forward pass."""

    factor = 1

    def forward(self, module, inputs, *given):  # keyword arguments too since Zennit 1.0
        return given[-1] * self.factor

    def copy(self):
        return self


def test_a_rule_that_may_change_the_logits_is_compared_at_every_call(norm):
    rule = Doubling()
    scorer = LRP(zc.NameMapComposite([(["fc"], rule)]))
    score_units(norm, [X], scorer, layers=["fc"], target=0)
    rule.factor = 2
    with pytest.raises(ValueError, match="make another network"):
        score_units(norm, [X], scorer, layers=["fc"], target=0)
