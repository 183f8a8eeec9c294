"""The common checks: all scorers and operators of ours pass, and each broken promise is named."""

from __future__ import annotations

import functools
import os
import re
import runpy
import sys
from pathlib import Path

import captum.attr
import pytest
import torch
from torch import nn
from torch_pruning import importance
from zennit.composites import EpsilonGammaBox

from xai_edit import (
    LEACE,
    LRP,
    PCA,
    Activation,
    CaptumLayer,
    Change,
    ConceptAwarePruning,
    EditMismatchError,
    FictitiousClass,
    LastLayerRetraining,
    LogitMask,
    ModelEdit,
    PathPerturbation,
    Random,
    RelevancePruning,
    SelectiveSynapticDampening,
    SingleWeight,
    Subspaces,
    Taylor,
    TorchPruningImportance,
    WeightMagnitude,
    collect_features,
    fit_patterns,
    testing,
)
from xai_edit.testing import Example, check_operator, check_scorer, small_example

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Ours.

CAPTUM = {
    "LayerActivation": {},
    "LayerConductance": {"n_steps": 4},
    "LayerDeepLift": {},
    "LayerGradCam": {"attr_dim_summation": False},
    "LayerGradientXActivation": {},
    "LayerIntegratedGradients": {"n_steps": 4},
    "LayerLRP": {},
}
SCORERS = {
    "epsilon": lambda: LRP("epsilon"),
    "epsilon-plus from one": lambda: LRP("epsilon-plus", initial="one"),
    "gamma+epsilon": lambda: LRP("gamma+epsilon", gamma=0.1),
    "alpha2beta1": lambda: LRP("alpha2beta1"),
    "a composite": lambda: LRP(EpsilonGammaBox(low=0.0, high=6.8)),
    "patterns": lambda: LRP(
        "patternattribution", patterns=fit_patterns(small_example().model, data())
    ),
    **{
        name: functools.partial(CaptumLayer, getattr(captum.attr, name), **arguments)
        for name, arguments in CAPTUM.items()
    },
    "weight magnitude": WeightMagnitude,
    "taylor": Taylor,
    "activation": Activation,
    "random": Random,
    "torch-pruning magnitude": lambda: TorchPruningImportance(
        importance.GroupMagnitudeImportance()
    ),
    "torch-pruning taylor": lambda: TorchPruningImportance(importance.GroupTaylorImportance()),
    "torch-pruning lamp": lambda: TorchPruningImportance(importance.LAMPImportance()),
}


def data():
    return small_example().batches(40)


@pytest.mark.parametrize("make", SCORERS.values(), ids=[*SCORERS])
def test_our_scorers_keep_their_promises(make):
    check_scorer(make())


def axes(width):
    return Subspaces(torch.eye(width).double()[:, :2], (1, 1), torch.zeros(width).double())


OPERATORS = {
    "path": PathPerturbation(),
    "path auto": PathPerturbation(share="auto"),
    "path count": PathPerturbation(rank="count", k=2, scope="class_row"),
    "path conv": PathPerturbation(layer="conv1", scorer=Taylor()),
    "path noise": PathPerturbation(noise="gaussian"),
    "sca": SingleWeight(),
    "exact": SingleWeight("exact"),
    "pruning": RelevancePruning(0.3),
    "pruning in steps": RelevancePruning(0.3, steps=2, scorer=Activation()),
    "pruning, torch-pruning": RelevancePruning(
        0.3, scorer=TorchPruningImportance(importance.GroupTaylorImportance())
    ),
    "concept pruning": ConceptAwarePruning("conv1", axes(6), [0], 0.3),
    "fictitious": FictitiousClass(),
    "fictitious exact": FictitiousClass("exact"),
    "mask": LogitMask(),
    "last layer": LastLayerRetraining(repeats=2),
    "last layer tuned": LastLayerRetraining(repeats=1, C="auto"),
    "leace": LEACE(),
    "dampening": SelectiveSynapticDampening(alpha=2),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=[*OPERATORS])
def test_our_operators_keep_their_promises(operator):
    check_operator(operator)


def test_an_operator_that_finds_its_subspaces_is_checked_with_a_plan_of_its_own():
    operator = ConceptAwarePruning("fc1", PCA(2), [0], 0.3)

    def plan(model, batches):
        features = collect_features(model, batches, layer="fc1", scorer=LRP())
        return operator.plan(model, batches, features=features)

    check_operator(operator, plan)


@pytest.mark.parametrize("name", ["path", "pruning", "leace", "dampening", "exact"])
def test_operators_keep_their_promises_in_double_precision(name):
    check_operator(OPERATORS[name], example=lambda _: small_example(torch.float64))


def test_the_example_is_a_network_that_reads_a_spurious_mark():
    example = small_example()
    with torch.no_grad():
        right = example.model(example.inputs).argmax(1) == example.labels
    marked = example.groups == 1
    others = example.labels > 0
    assert right[~marked].float().mean() > 0.9
    assert right[marked & others].float().mean() < 0.7


def test_checks_leave_the_process_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()
    testing.example._trained.cache_clear()
    check_scorer(Taylor())
    check_operator(LogitMask())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.is_grad_enabled(), torch.get_num_threads())


# A network of a user's own.


def sequences(dtype):
    """Sequences of six tokens, three features each, read by a network without pooling layers."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.mix = nn.Conv1d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = torch.relu(self.embed(x)).transpose(1, 2)
            return self.head(torch.relu(self.mix(x)).mean(2))

    generator = torch.Generator().manual_seed(1)
    model = Reader()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(30, 6, 3, generator=generator)
    labels = model(inputs).argmax(1)
    return Example(model.to(dtype).eval(), inputs.to(dtype), labels, ["embed", "mix:input"])


@pytest.mark.parametrize("scorer", [LRP("epsilon"), Taylor(), Activation(), WeightMagnitude()])
def test_a_network_of_ones_own_can_be_given(scorer):
    check_scorer(scorer, example=sequences)


def test_an_operator_is_checked_on_a_network_of_ones_own():
    operator = RelevancePruning(0.3, layers=["mix"])
    check_operator(operator, example=sequences)


# Scorers that break a promise.


def good(model, inputs, targets, layers, change=None, clean=True):
    """Positive outputs; ``change`` is what a broken scorer does on the way."""
    kept = {}
    handles = []
    for name in layers:

        def keep(module, args, output, name=name):
            positive = output.detach().clamp(min=0)
            kept[name] = positive.reshape(*positive.shape[:2], -1).sum(2)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        if clean:
            for handle in handles:
                handle.remove()
    if change is not None:
        change(model, kept)
    return kept


def scorer_of(change):
    def scorer(model, inputs, targets, layers):
        return good(model, inputs, targets, layers, change)

    return scorer


def leaves_hooks(model, inputs, targets, layers):
    return good(model, inputs, targets, layers, clean=False)


def leaves_hooks_after_an_error(model, inputs, targets, layers):
    handle = model.fc1.register_full_backward_hook(lambda *_: None)
    scores = good(model, inputs, targets, layers)
    handle.remove()
    return scores


def leaves_hooks_after_a_wrong_target(model, inputs, targets, layers):
    handle = model.pool2.register_forward_pre_hook(lambda *_: None)
    rows = torch.arange(len(inputs))
    with torch.no_grad():
        try:
            logits = model(inputs)
        except RuntimeError:
            handle.remove()
            raise
        logits[rows, targets].sum()
    handle.remove()
    return good(model, inputs, targets, layers)


def backward(model, inputs, targets, layers):
    with torch.enable_grad():
        nn.functional.cross_entropy(model(inputs), targets).backward()
    return good(model, inputs, targets, layers)


def batch_norms_in_training(model, inputs, targets, layers):
    model.norm.train()
    try:
        return good(model, inputs, targets, layers)
    finally:
        model.norm.eval()


def batch_mean(model, inputs, targets, layers):
    scores = good(model, inputs, targets, layers)
    return {name: values - values.mean(0) for name, values in scores.items()}


def first_sample_first(model, inputs, targets, layers):
    """The sums are right, but the rows are not those of the samples."""
    scores = good(model, inputs, targets, layers)
    return {name: values.sort(0).values for name, values in scores.items()}


def hides_errors(model, inputs, targets, layers):
    try:
        return good(model, inputs, targets, layers)
    except RuntimeError:
        return {name: torch.zeros(1, 1) for name in layers}


def of_a_frozen_parameter(model, inputs, targets, layers):
    with torch.enable_grad():
        torch.autograd.grad(model(inputs).sum(), [model.conv1.weight])
    return good(model, inputs, targets, layers)


def of_what_has_a_gradient(model, inputs, targets, layers):
    scores = good(model, inputs, targets, layers)
    return {n: v if model.conv1.weight.requires_grad else 2 * v for n, v in scores.items()}


def writes_into_inputs(model, inputs, targets, layers):
    inputs.clamp_(max=1)
    return good(model, inputs, targets, layers)


def seeds(model, inputs, targets, layers):
    torch.manual_seed(0)
    scores = good(model, inputs, targets, layers)
    return {name: values + torch.rand(values.shape[1]) for name, values in scores.items()}


def noisy(model, inputs, targets, layers):
    scores = good(model, inputs, targets, layers)
    return {name: values + torch.rand(values.shape[1]) for name, values in scores.items()}


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, model, inputs, targets, layers):
        self.calls += 1
        scores = good(model, inputs, targets, layers)
        return {name: values + self.calls for name, values in scores.items()}


class AnotherInScoreUnits:
    """Scores of a batch that are not the sum of its samples', which it does not say."""

    def __call__(self, model, inputs, targets, layers):
        scores = good(model, inputs, targets, layers)
        return {name: values.mean(0).expand(len(values), -1) for name, values in scores.items()}


def replace_parameter(model, scores):
    model.conv2.weight = nn.Parameter(model.conv2.weight.detach().clone())


def write(model, scores):
    with torch.no_grad():
        model.conv2.bias[3] += 1


def swap_storage(model, scores):
    model.fc1.weight.data = model.fc1.weight.data.clone()


def set_key(key, value):
    def change(model, scores):
        scores[key] = value(scores[key])

    return change


def drop(model, scores):
    del scores["conv2"]


BROKEN = {
    "a hook left behind": (leaves_hooks, "changes the forward hooks of layer 'conv1'"),
    "a hook left after an error": (
        leaves_hooks_after_an_error,
        "changes the backward hooks of layer 'fc1' when the model raises in its forward pass "
        "number 1",
    ),
    "a hook left after a wrong target": (
        leaves_hooks_after_a_wrong_target,
        "changes the forward pre hooks of layer 'pool2' when there are fewer targets than samples",
    ),
    "a hook of all modules": (
        scorer_of(lambda model, _: nn.modules.module.register_module_forward_hook(lambda *_: None)),
        "changes the global forward hooks of all modules",
    ),
    "a hook of a parameter": (
        scorer_of(lambda model, _: model.conv2.weight.register_hook(lambda grad: grad)),
        "changes the hooks of parameter 'conv2.weight'",
    ),
    "a user's hook taken away": (
        scorer_of(lambda model, _: model.head._forward_hooks.clear()),
        "changes the forward hooks of layer 'head'",
    ),
    "a parameter written in place": (
        scorer_of(write),
        "changes the values of parameter 'conv2.bias'",
    ),
    "a parameter replaced": (scorer_of(replace_parameter), "changes parameter 'conv2.weight'"),
    "a parameter moved": (scorer_of(swap_storage), "changes parameter 'fc1.weight'"),
    "a mode flipped": (
        scorer_of(lambda model, _: model.dropout.train()),
        "changes the training mode of layer 'dropout'",
    ),
    "a buffer written": (
        batch_norms_in_training,
        "changes the values of buffer 'norm.running_mean'",
    ),
    "a gradient added": (backward, "changes the gradient of parameter 'conv1.weight'"),
    "a flag flipped": (
        scorer_of(lambda model, _: model.fc1.requires_grad_(False)),
        "changes requires_grad of parameter 'fc1.weight'",
    ),
    "an attribute left": (
        scorer_of(lambda model, _: setattr(model.fc1, "seen", True)),
        "leaves behind the attribute 'seen' of layer 'fc1'",
    ),
    "an attribute changed": (
        scorer_of(lambda model, _: setattr(model.relu1, "inplace", False)),
        "changes the attribute 'inplace' of layer 'relu1'",
    ),
    "a module replaced": (
        scorer_of(lambda model, _: setattr(model, "relu3", nn.Softplus())),
        "changes the module 'relu3'",
    ),
    "a module taken away": (
        scorer_of(lambda model, _: delattr(model, "relu3")),
        "takes away the module 'relu3'",
    ),
    "the state_dict changed": (
        scorer_of(lambda model, _: model.register_buffer("extra", torch.zeros(1))),
        "leaves behind buffer 'extra'",
    ),
    "gradients switched off": (
        scorer_of(lambda model, _: torch.set_grad_enabled(False)),
        "changes whether gradients are computed",
    ),
    "the data written": (writes_into_inputs, "changes the data it was given (tensor 0)"),
    "the generator seeded": (seeds, "changes PyTorch's global random generator"),
    "another bit each time": (noisy, "gives other scores of layer 'conv1' when it is called again"),
    "a memory": (Counting(), "gives other scores of layer 'conv1' when it is called again"),
    "a batch's mean": (batch_mean, "gives other scores of a sample: layer 'conv1' in batches of 1"),
    "another sample's row": (first_sample_first, "gives other scores of a sample: layer 'conv1'"),
    "a batch's scores": (AnotherInScoreUnits(), "gives other scores of a sample: layer 'conv1'"),
    "an error hidden": (
        hides_errors,
        "gives scores when the model raises in its forward pass number 1, and hides the error",
    ),
    "no frozen parameters": (
        of_a_frozen_parameter,
        "fails on a model that has hooks, gradients and a frozen parameter (RuntimeError: One of",
    ),
    "another score of a frozen model": (
        of_what_has_a_gradient,
        "gives other scores of layer 'conv1' where the model has hooks, gradients of an earlier",
    ),
    "nan": (
        scorer_of(set_key("fc1", lambda values: values / 0)),
        "scores of layer 'fc1' are NaN or infinite",
    ),
    "a wrong shape": (
        scorer_of(set_key("conv2", lambda values: values[:, :-1])),
        "scores of layer 'conv2' have shape (7, 7), expected (7, 8), (samples, units)",
    ),
    "summed over samples": (
        scorer_of(set_key("conv2", lambda values: values.sum(0))),
        "scores of layer 'conv2' have shape (8,), expected (7, 8), (samples, units)",
    ),
    "whole numbers": (
        scorer_of(set_key("fc1", lambda values: values.long())),
        "scores of layer 'fc1' are torch.int64, the model is torch.float32",
    ),
    "another precision": (
        scorer_of(set_key("fc1", lambda values: values.float())),
        "scores of layer 'fc1' are torch.float32, the model is torch.float64",
    ),
    "another device": (
        scorer_of(set_key("fc1", lambda values: values.to("meta"))),
        "scores of layer 'fc1' are on meta, the model is on cpu",
    ),
    "a list": (
        scorer_of(set_key("head", lambda values: values.tolist())),
        "gives a list for layer 'head', not a tensor",
    ),
    "a layer left out": (scorer_of(drop), "gives nothing for layer 'conv2', not a tensor"),
    "no mapping": (
        lambda model, inputs, targets, layers: torch.zeros(7, 4),
        "gives a Tensor, not a mapping from layer names to tensors",
    ),
    "a captum method that draws": (
        CaptumLayer(captum.attr.LayerGradientShap, baselines=torch.zeros(3, 1, 8, 8)),
        "gives other scores of layer 'conv1' when it is called again with the same batch",
    ),
}


@pytest.fixture
def _restored():
    """What some broken scorers leave to the process."""
    hooks = nn.modules.module._global_forward_hooks
    yield
    hooks.clear()
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("scorer", "sentence"), BROKEN.values(), ids=[*BROKEN])
def test_a_broken_scorer_is_told_which_promise_it_broke(scorer, sentence):
    with pytest.raises(AssertionError) as caught:
        check_scorer(scorer)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_scorer_that_others_are_made_of_is_whole():
    check_scorer(good)


def test_scores_of_a_batch_are_right_where_a_scorer_says_so():
    scorer = AnotherInScoreUnits()
    scorer.per_sample = False
    check_scorer(scorer)


def test_an_error_of_the_scorer_itself_comes_through():
    with pytest.raises(ZeroDivisionError):
        check_scorer(lambda *_: 1 / 0)


# Two processes.


def of_the_process(model, inputs, targets, layers):
    scores = good(model, inputs, targets, layers)
    return {name: values * os.getpid() for name, values in scores.items()}


def make_of_the_process():
    return of_the_process


def test_two_processes_agree_with_one():
    check_scorer(LRP("epsilon-plus"), processes=functools.partial(LRP, "epsilon-plus"))


def test_a_scorer_that_depends_on_its_process_is_told_so():
    with pytest.raises(AssertionError, match="of_the_process: gives other scores in two processes"):
        check_scorer(of_the_process, processes=make_of_the_process)


def test_what_cannot_be_sent_to_a_process_is_an_error():
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        check_scorer(WeightMagnitude(), processes=lambda: WeightMagnitude())


# Operators that break a promise.


class Broken:
    """Halves some weights of the last hidden layer; the functions given break a promise."""

    def __init__(self, before=None, after=None, origin=None, change=None):
        self.before, self.after, self.change = before, after, change
        self.origin = {"operator": "Broken"} if origin is None else origin

    def plan(self, model, data, *, target):
        if self.before is not None:
            self.before(model)
        for inputs, *_ in data:
            with torch.no_grad():
                model(inputs)
        if self.after is not None:
            self.after(model)
        old = model.fc1.weight.detach()[target, :5].clone()
        at = torch.arange(5) + target * model.fc1.in_features
        change = Change(tuple(model.fc1.weight.shape), at, old, old / 2)
        if self.change is not None:
            change = self.change(change)
        return ModelEdit({"fc1.weight": change}, self.origin)


class Reads(Broken):
    """As Broken, in evaluation mode, as it should be."""

    def plan(self, model, data, *, target):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            return super().plan(model, data, target=target)
        finally:
            for module, training in modes:
                module.training = training


class Lax(ModelEdit):
    """An edit that looks at nothing."""

    def apply(self, model):
        for name, change in self.changes.items():
            with torch.no_grad():
                model.get_parameter(name).view(-1)[change.index] = change.new
        return model

    undo = apply


class WritesElsewhere(ModelEdit):
    def apply(self, model):
        write(super().apply(model), {})
        return model


class StaysApplied(ModelEdit):
    def undo(self, model):
        return model


class Near(ModelEdit):
    """An edit that takes a model for its own whose values are close."""

    def check(self, model, *, undo=False):
        for name, change in self.changes.items():
            found = model.get_parameter(name).detach().view(-1)[change.index]
            if not torch.allclose(found, change.new if undo else change.old):
                raise EditMismatchError(name)


class Stumbles(ModelEdit):
    def apply(self, model):
        return super().apply(model if isinstance(model.fc1, nn.Linear) else None)


class EditsOf(Reads):
    """Plans edits of a kind of their own."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def plan(self, model, data, *, target):
        edit = super().plan(model, data, target=target)
        return self.kind(edit.changes, edit.origin)


class WritesData(Reads):
    def plan(self, model, data, *, target):
        for inputs, *_ in data:
            inputs.clamp_(max=1)
        return super().plan(model, data, target=target)


class ReadsFirst(Reads):
    """Hooks stay where the model raises, not where the data do."""

    def plan(self, model, data, *, target):
        data = list(data)
        handle = model.conv2.register_forward_hook(lambda *_: None)
        edit = super().plan(model, data, target=target)
        handle.remove()
        return edit


class HidesErrors(Reads):
    def plan(self, model, data, *, target):
        try:
            return super().plan(model, data, target=target)
        except RuntimeError:
            return super().plan(model, [], target=target)


class OfFlags(Reads):
    def plan(self, model, data, *, target):
        times = 1 if model.training else 2
        edit = super().plan(model, data, target=target)
        change = edit.changes["fc1.weight"]
        new = Change(change.shape, change.index, change.old, change.new * times)
        return ModelEdit({"fc1.weight": new}, edit.origin)


class NoEdit:
    def plan(self, model, data):
        return {"fc1.weight": 0}


class Nothing(Reads):
    def plan(self, model, data, *, target):
        return ModelEdit({}, super().plan(model, data, target=target).origin)


def hooked_until_the_end():
    handles = []
    return Reads(
        before=lambda model: handles.append(model.fc1.register_forward_hook(lambda *_: None)),
        after=lambda model: handles.pop().remove(),
    )


def drawn(change):
    return Change(change.shape, change.index, change.old, change.new + torch.rand(5) / 10)


BROKEN_OPERATORS = {
    "the model written": (
        Reads(after=lambda model: write(model, {})),
        "planning changes the values of parameter 'conv2.bias'",
    ),
    "buffers written": (Broken(), "planning changes the values of buffer 'norm.running_mean'"),
    "a mode flipped": (
        Reads(after=lambda model: model.eval() and setattr(model, "x", 1)),
        "planning leaves behind the attribute 'x' of the model",
    ),
    "a hook left after an error": (
        hooked_until_the_end(),
        "planning changes the forward hooks of layer 'fc1' when reading batch number 1 of the data "
        "raises",
    ),
    "an error hidden": (
        HidesErrors(),
        "plans an edit when reading batch number 1 of the data raises, and hides the error",
    ),
    "another edit each time": (
        Reads(change=drawn),
        "planning again with the same model and data gives other values: new of 'fc1.weight'",
    ),
    "another edit of a used model": (
        OfFlags(),
        "a model in training mode, with hooks, gradients and a frozen parameter, gives other "
        "values: new of 'fc1.weight'",
    ),
    "no edit": (NoEdit(), "plans a dict, not a ModelEdit"),
    "nothing to do": (Nothing(), "plans an edit without changes, of which nothing can be checked"),
    "wrong old values": (
        Reads(change=lambda c: Change(c.shape, c.index, c.old + 1, c.new)),
        "the edit does not fit the model it was planned on: 'fc1.weight' differs from the model",
    ),
    "an entry twice": (
        Reads(
            change=lambda c: Change(c.shape, c.index[[0, 0, 1]], c.old[[0, 0, 1]], c.new[[0, 0, 1]])
        ),
        "the edit names entries of 'fc1.weight' twice or not in their order",
    ),
    "an edit that fits all": (
        EditsOf(Lax),
        "the edit does not refuse a model that holds it already",
    ),
    "an edit of more than it says": (
        EditsOf(WritesElsewhere),
        "applying the edit gives 'conv2.bias' other values than it says",
    ),
    "an edit that stays": (
        EditsOf(StaysApplied),
        "applying and undoing the edit changes the values of parameter 'fc1.weight'",
    ),
    "an edit of models that are near": (
        EditsOf(Near),
        "the edit does not refuse a model whose 'fc1.weight' differs in one bit",
    ),
    "an edit that stumbles": (
        EditsOf(Stumbles),
        "the edit does not refuse a model without the parameters that it changes with "
        "EditMismatchError, but raises AttributeError",
    ),
    "the data written": (
        WritesData(),
        "planning changes the data it was given (tensor 0)",
    ),
    "a hook left after an error of the model": (
        ReadsFirst(),
        "planning changes the forward hooks of layer 'conv2' when the model raises in its forward "
        "pass number 1",
    ),
    "an origin of tuples": (
        Reads(origin={"operator": "x", "units": (1, 2)}),
        "the edit's origin is not JSON: 'units' comes back as [1, 2], it was (1, 2)",
    ),
    "an origin of numbered keys": (
        Reads(origin={"operator": "x", "rate": {3: 0.5}}),
        "the edit's origin is not JSON: 'rate' comes back as {'3': 0.5}, it was {3: 0.5}",
    ),
    "an origin that is NaN": (
        Reads(origin={"operator": "x", "rate": float("nan")}),
        "the edit's origin is not JSON: Out of range float values",
    ),
    "an origin of tensors": (
        Reads(origin={"operator": "x", "score": torch.nn.ReLU()}),
        "the edit's origin is not JSON: Object of type ReLU is not JSON serializable",
    ),
    "an origin without a name": (
        Reads(origin={"rate": 1}),
        "the edit's origin does not name its operator",
    ),
}


@pytest.mark.parametrize(
    ("operator", "sentence"), BROKEN_OPERATORS.values(), ids=[*BROKEN_OPERATORS]
)
def test_a_broken_operator_is_told_which_promise_it_broke(operator, sentence):
    with pytest.raises(AssertionError) as caught:
        check_operator(operator)
    assert f"{type(operator).__name__}: {sentence}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_operator_that_others_are_made_of_is_whole():
    check_operator(Reads())


def test_an_operator_without_a_plan_is_an_error():
    with pytest.raises(TypeError, match="operator: 3 has no method plan; give plan="):
        check_operator(3)


# The pages.


@pytest.mark.parametrize("kind", ["scorer", "operator"])
def test_the_code_of_a_page_is_that_of_its_example_which_runs(kind, monkeypatch, capsys):
    example = ROOT / "examples" / f"own_{kind}.py"
    page = (ROOT / "docs" / "how-to" / f"own-{kind}.md").read_text(encoding="utf-8")
    code = example.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 2
    assert all(block in code for block in blocks)
    monkeypatch.setattr(sys, "argv", [str(example), "--quick"])
    runpy.run_path(str(example), run_name="__main__")
    told = capsys.readouterr().out
    sentences = re.findall(r"^    (\w+: .*)$", page, re.M)
    assert any(sentence in told for sentence in sentences)
