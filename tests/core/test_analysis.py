"""An analysis is kept while the model stays as it is, and not longer."""

from __future__ import annotations

import copy
import gc
import weakref
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from zennit import composites as zc
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.core import Hook

from xai_edit import LRP, FunctionalCanonizer, score_units
from xai_edit.core import analysis
from xai_edit.core.analysis import analysed
from xai_edit.lrp import lrp as scorers

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([2, 0, 1, 1])


def write_in_place(model):
    with torch.no_grad():
        model.fc.weight.mul_(2)


def write_to_data(model):
    model.fc.weight.data.mul_(2)


def write_to_a_buffer(model):
    model.body[1].running_mean.add_(0.1)


def swap_storage(model):
    model.fc.weight.data = model.fc.weight.data.clone()


def replace_parameter(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone())


def replace_module(model):
    model.body[2] = nn.LeakyReLU(0.5)


def replace_by_a_copy(model):
    model.body[0] = copy.deepcopy(model.body[0])


def add_module(model):
    model.body.append(nn.Dropout())


def add_hook(model):
    model.fc.register_forward_hook(lambda *_: None)


def add_pre_hook(model):
    model.fc.register_forward_pre_hook(lambda *_: None)


def parametrize_weight(model):
    parametrize.register_parametrization(model.fc, "weight", nn.Identity())


def change_mode(model):
    model.body[1].train()


def change_attribute(model):
    model.body[0].padding = (2, 2)


def shadow_forward(model):
    model.fc.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), model.fc)


def change_nested_attribute(model):
    model.options["scale"] = 3


CHANGES = [
    write_in_place,
    write_to_data,
    write_to_a_buffer,
    swap_storage,
    replace_parameter,
    replace_module,
    replace_by_a_copy,
    add_module,
    add_hook,
    add_pre_hook,
    parametrize_weight,
    change_mode,
    change_attribute,
    shadow_forward,
    change_nested_attribute,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_analysis_is_dropped_when_the_model_changes(norm, change):
    sparse = torch.eye(2).to_sparse()
    norm.options = {"scale": 2, "of": [sparse, {"deep": {"deeper": {"deepest": ()}}}]}
    first = analysed(norm, X)
    assert analysed(norm, X + 1) is first
    change(norm)
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


@pytest.mark.parametrize(
    "change",
    [write_in_place, write_to_data, write_to_a_buffer, replace_module],
    ids=lambda change: change.__name__,
)
def test_a_changed_model_is_scored_as_one_never_seen(norm, change):
    LRP()(norm, X, TARGETS, ["fc"])
    change(norm)
    fresh = LRP()(copy.deepcopy(norm), X, TARGETS, ["fc"])
    assert torch.equal(LRP()(norm, X, TARGETS, ["fc"])["fc"], fresh["fc"])


class Crosswise(nn.Module):
    """Batch norms that follow other layers than their order as modules says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.second = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.two, self.first = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(self.one(x)).relu()
        return self.fc(self.second(self.two(x)).relu().mean((2, 3)))

    def spoil(self):
        """Let the two norms differ, without a new version of the tensor."""
        self.first.running_var.data.fill_(0.2)
        self.second.running_var.data.fill_(5)


@pytest.fixture
def wrong(monkeypatch):
    """Canonizers that merge the neighbours among the modules, as if chosen by LRP."""
    canonizers = [SequentialMergeBatchNorm(), FunctionalCanonizer()]
    monkeypatch.setattr(scorers, "choose_canonizers", lambda *_: canonizers)


def test_a_wrong_canonizer_is_refused_at_every_call(wrong):
    model = Crosswise().eval()
    model.spoil()
    analysed(model, 1 - X)  # of another sample
    for _ in range(2):
        with pytest.raises(ValueError, match="make another network"):
            score_units(model, [X], LRP(), layers=["fc"], target=0)


def test_a_canonizer_that_was_right_is_compared_again_once_the_weights_changed(wrong):
    model = Crosswise().eval()
    for _ in range(2):
        score_units(model, [X], LRP(), layers=["fc"], target=0)
    model.spoil()
    with pytest.raises(ValueError, match="make another network"):
        score_units(model, [X], LRP(), layers=["fc"], target=0)


def test_a_users_own_canonizers_are_compared_at_every_call():
    model = Crosswise().eval()
    model.spoil()
    scorer = LRP(canonizers=[SequentialMergeBatchNorm(), FunctionalCanonizer()])
    for _ in range(2):
        with pytest.warns(UserWarning, match="make another network"):
            score_units(model, [X], scorer, layers=["fc"], target=0)


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
