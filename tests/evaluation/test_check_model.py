"""What `check_model` says about each part of the library, against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xai_edit as xe
from xai_edit.core.trace import trace
from xai_edit.evaluation.relevance_shares import stages_of

X = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).double()
pytestmark = pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")


class Net(nn.Module):
    def __init__(self, act=nn.ReLU, scale=1.0, form=lambda z: z, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act = nn.Linear(4, 6, bias=False), act()
        self.second = nn.Linear(6, 6)
        self.head, self.form = nn.Linear(6, classes), form
        with torch.no_grad():
            self.first.weight.abs_().mul_(scale)
            self.second.weight.abs_().mul_(scale)
            self.second.bias.fill_(1 - scale)
            self.head.bias.zero_()
        self.double()

    def forward(self, x):
        return self.form(self.head(self.act(self.second(self.act(self.first(x))))))


def lost(check):
    return [one.message for one in check.warnings if "of the relevance" in one.message]


def test_the_share_of_each_stage_is_in_closed_form_and_a_lost_one_is_a_warning():
    model = Net(scale=0.01)
    check = xe.check_model(model, X[:8], parts=())
    a1 = (X[:8] @ model.first.weight.T).relu()
    z2 = a1 @ model.second.weight.T + model.second.bias
    logits, classes = model(X[:8]).max(1)
    at_second = model.head.weight[classes] * z2
    at_first = at_second / z2 @ model.second.weight * a1
    start = logits.abs().sum()
    assert check.shares["head"] == pytest.approx(1)
    assert check.shares["second"] == pytest.approx(float(at_second.abs().sum() / start), rel=1e-4)
    assert check.shares["first"] == pytest.approx(float(at_first.abs().sum() / start), rel=1e-3)
    at_input = (at_first / a1) @ model.first.weight * X[:8]
    assert check.shares["input"] == pytest.approx(float(at_input.abs().sum() / start), rel=1e-3)
    assert check.shares["input"] < 0.01
    (message,) = lost(check)
    assert f"only {check.shares['first']:.2%}" in message
    assert not lost(xe.check_model(Net(), X[:8], parts=()))


def test_a_stage_with_a_path_around_it_is_none():
    class Around(Net):
        def forward(self, x):
            hidden = self.act(self.first(x))
            return self.head(hidden + self.second(hidden))

    model = Around()
    assert stages_of(model, trace(model, X)) == ["first", "act", "head"]
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))).double()
    assert stages_of(model, trace(model, X)) == ["0", "1.0", "1.1"]


@pytest.mark.parametrize("form", ["tuple", "mapping", "loader"])
def test_accuracy_near_chance_is_a_warning(form):
    model = Net(classes=2)
    said = model(X).argmax(1)
    half = torch.arange(40) % 2
    for labels, right in ((said, 1.0), (said ^ half, 0.5)):
        batch = {
            "tuple": (X, labels),
            "mapping": {"x": X, "labels": labels},
            "loader": DataLoader(TensorDataset(X, labels), batch_size=40),
        }[form]
        check = xe.check_model(model, batch, parts=())
        (found,) = [one for one in check.figures if one.name == "accuracy"]
        assert found.value == right
        least = 0.5 + 2 * math.sqrt(0.25 / 40)
        assert f"above {least:.3f}" in found.accepted
        assert found.fine == (right > least)
        assert any("near chance" in one.message for one in check.findings) == (right < least)
    assert xe.check_model(model, X, parts=()).figures[0].fine is None
    wrong = xe.check_model(model, (X, said + 1), parts=())
    assert any("label 2 is none of the 2 classes" in one.message for one in wrong.findings)


def test_probabilities_without_a_known_last_operation_are_a_warning():
    def normalised(z):
        return (z.exp() / z.exp().sum(1, keepdim=True)) * 1.0

    for form, words in (
        (normalised, "look like probabilities"),
        (lambda z: z.softmax(1), "the output is a softmax"),
    ):
        check = xe.check_model(Net(form=form), X, parts=())
        assert sum(words in one.message for one in check.findings) == 1
    assert not xe.check_model(Net(), X, parts=()).findings


class Functional(Net):
    def forward(self, x):
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)))))


def by_name(check):
    return {one.name: one for one in check.parts}


def test_each_part_works_or_is_refused_with_the_reason():
    check = xe.check_model(Functional(), X[:6])
    parts = by_name(check)
    assert parts["epsilon"].works
    assert parts["epsilon"].figure == pytest.approx(
        xe.check_model(Functional(), X[:2], parts=()).shares["input"]
    )
    deep_lift = parts["LayerDeepLift"]
    assert not deep_lift.works
    assert deep_lift.figure > 0.01
    assert "does not add up" in deep_lift.why
    assert parts["LayerIntegratedGradients"].works
    assert parts["LayerIntegratedGradients"].figure < 0.05
    assert parts["PathPerturbation"].works
    assert parts["to_smaller"].works
    assert {one.part for one in check.parts} == {"LRP", "Captum", "units", "edits", "pruning"}
    assert all(one.why for one in check.refused)
    assert json.loads(json.dumps(check.to_dict())) == check.to_dict()
    for one in check.parts:
        assert f"{one.part}: {one.name}" in str(check)


def test_what_is_refused_leaves_the_rest(unchanged):
    class Odd(Net):
        def forward(self, x):
            return super().forward(x).sinc() + 1

    model = Odd()
    check_unchanged = unchanged(model)
    check = xe.check_model(model, X[:6])
    check_unchanged()
    parts = by_name(check)
    assert not check.ok
    assert not parts["epsilon"].works
    assert "'sinc'" in parts["epsilon"].why
    assert not parts["PathPerturbation"].works  # it has no head
    assert parts["LayerGradientXActivation"].works
    assert parts["RelevancePruning"].works


def test_one_logit_and_other_outputs_are_checked_too():
    one = xe.check_model(Net(classes=1), X[:6], parts=("LRP", "Captum"))
    assert one.ok
    assert one.ratios["head"] == pytest.approx(1)
    assert by_name(one)["LayerIntegratedGradients"].works
    maps = Net(form=lambda z: z[:, :, None, None].expand(-1, -1, 2, 2))
    check = xe.check_model(maps, X[:6], target=lambda out: out[:, 1].sum((1, 2)), parts=("LRP",))
    assert check.ok
    assert by_name(check)["epsilon"].works


def test_units_whose_axis_cannot_be_followed_are_named():
    layers = nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)
    check = xe.check_model(nn.Sequential(*layers).double(), X, parts=("units",))
    assert {one.name: one.works for one in check.parts} == {
        "3 of 5 layers (0, 3, 4)": True,
        "1": False,
        "2": False,
    }
    assert all("give unit_axis=" in one.why for one in check.refused)


@pytest.mark.parametrize("outputs", ["scores", lambda output: output["scores"]])
def test_outputs_is_an_argument_of_every_pass(outputs):
    labels = torch.arange(40) % 3
    named = Net(form=lambda z: {"logits": -z, "scores": z})
    plain, data = Net(), [(X, labels)]
    given = {"outputs": outputs}
    calls = {
        "groups": lambda m, **o: xe.evaluate_groups(m, data, **o).to_dict(),
        "scores": lambda m, **o: xe.score_units(m, data, xe.LRP(), layers="first", **o)["first"],
        "head": lambda m, **o: xe.collect_head_features(m, data, **o).logits(),
        "features": lambda m, **o: (
            xe.collect_features(m, data, layer="second", scorer=xe.LRP(), **o).contexts
        ),
        "check": lambda m, **o: list(xe.check_model(m, data[0], parts=(), **o).shares.values()),
        "unlearning": lambda m, **o: (
            xe.evaluate_unlearning(
                m,
                xe.SingleWeight().plan(plain, data, target=0),
                train=data,
                test=data,
                target=0,
                relearn=(),
                **o,
            ).after.test
        ),
    }
    for name, call in calls.items():
        got, expected = call(named, **given), call(plain)
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, expected)
        else:
            assert got == expected, name


def test_operators_plan_inside_the_context():
    labels, target = torch.arange(40) % 3, int(Net()(X)[0].argmax())
    named, data = Net(form=lambda z: {"logits": -z, "scores": z}), [(X, labels)]
    for operator in (xe.PathPerturbation(share=0.4), xe.SingleWeight()):
        with xe.outputs_as("scores"):
            got = operator.plan(named, data, target=target)
        assert got.summary() == operator.plan(Net(), data, target=target).summary()
