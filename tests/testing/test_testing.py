"""The common checks: all scorers and operators of ours pass, and each broken promise is named."""

from __future__ import annotations

import captum.attr as ca
import pytest
import torch
from torch import nn
from torch_pruning import importance as tp
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat, LayerMapComposite
from zennit.rules import Epsilon, Flat, Pass

import xai_edit as xe
from xai_edit import testing
from xai_edit.pruning import TorchPruningImportance
from xai_edit.testing import Example, check_operator, check_scorer, small_example


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Ours.


def patterns():
    return xe.fit_patterns(small_example().model, small_example().batches(40))


class OwnFlat(Flat):
    """A rule with ways of its own, which runs by Zennit's hooks."""

    def register(self, module):
        return super().register(module)


SCORERS = {
    "epsilon": lambda: xe.LRP("epsilon"),
    "epsilon-plus from one": lambda: xe.LRP("epsilon-plus", initial="one"),
    "gamma+epsilon": lambda: xe.LRP("gamma+epsilon", gamma=0.1),
    "alpha2beta1": lambda: xe.LRP("alpha2beta1"),
    "a composite": lambda: xe.LRP(EpsilonGammaBox(low=0.0, high=6.8)),
    "a composite with a canonizer": lambda: xe.LRP(
        EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()])
    ),
    "a user's rule": lambda: xe.LRP(
        LayerMapComposite([(nn.ReLU, Pass()), (nn.Conv2d, OwnFlat()), (nn.Linear, Epsilon())])
    ),
    "patterns": lambda: xe.LRP("patternattribution", patterns=patterns()),
    "layer activation": lambda: xe.CaptumLayer(ca.LayerActivation),
    "conductance": lambda: xe.CaptumLayer(ca.LayerConductance, n_steps=4),
    "integrated gradients": lambda: xe.CaptumLayer(ca.LayerIntegratedGradients, n_steps=4),
    "grad cam": lambda: xe.CaptumLayer(ca.LayerGradCam, attr_dim_summation=False),
    "gradient x activation": lambda: xe.CaptumLayer(ca.LayerGradientXActivation),
    "captum's lrp": lambda: xe.CaptumLayer(ca.LayerLRP),
    "weight magnitude": xe.WeightMagnitude,
    "taylor": xe.Taylor,
    "activation": xe.Activation,
    "random": xe.Random,
    "torch-pruning magnitude": lambda: TorchPruningImportance(tp.GroupMagnitudeImportance()),
    "torch-pruning taylor": lambda: TorchPruningImportance(tp.GroupTaylorImportance()),
}


@pytest.mark.parametrize("make", SCORERS.values(), ids=[*SCORERS])
def test_our_scorers_keep_their_promises(make):
    check_scorer(make())


def axes(width, size=1):
    basis = torch.eye(width).double()[:, : 2 * size]
    return xe.Subspaces(basis, (size, size), torch.zeros(width).double())


OPERATORS = {
    "path": xe.PathPerturbation(),
    "path auto": xe.PathPerturbation(share="auto", scope="neuron"),
    "path count": xe.PathPerturbation(rank="count", k=2, scope="neuron"),
    "path noise": xe.PathPerturbation(noise="gaussian"),
    "sca": xe.SingleWeight(),
    "exact": xe.SingleWeight("exact"),
    "pruning in steps": xe.RelevancePruning(0.3, steps=2, scorer=xe.Activation()),
    "pruning": xe.RelevancePruning(0.3, scorer=TorchPruningImportance(tp.GroupTaylorImportance())),
    "concept pruning": xe.ConceptAwarePruning("conv1", axes(6), [0], 0.3),
    "fictitious": xe.FictitiousClass(),
    "fictitious exact": xe.FictitiousClass("exact"),
    "counterfactual": xe.CounterfactualRetraining("conv1", axes(6, 3)),
    "mask": xe.LogitMask(),
    "last layer": xe.LastLayerRetraining(repeats=1, C="auto"),
    "class subspace": xe.ClassSubspaceRemoval(directions=1),
    "class subspace auto": xe.ClassSubspaceRemoval("fc1", bound=0.7),
    "leace": xe.comparisons.LEACE(),
    "dampening": xe.comparisons.SelectiveSynapticDampening(alpha=2),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=[*OPERATORS])
def test_our_operators_keep_their_promises(operator):
    check_operator(operator)


def test_an_operator_that_finds_its_subspaces_is_checked_with_a_plan_of_its_own():
    operator = xe.ConceptAwarePruning("fc1", xe.PCA(2), [0], 0.3)

    def plan(model, batches):
        features = xe.collect_features(model, batches, layer="fc1", scorer=xe.LRP())
        return operator.plan(model, batches, features=features)

    check_operator(operator, plan)


@pytest.mark.parametrize("name", ["path", "leace", "exact"])
def test_operators_keep_their_promises_in_double_precision(name):
    check_operator(OPERATORS[name], example=lambda _: small_example(torch.float64))


def test_the_example_has_every_class_with_and_without_the_mark():
    example = small_example()
    groups = torch.stack([example.labels, example.groups], dim=1).unique(dim=0, return_counts=True)
    assert groups[1].tolist() == [12] * 8
    corner = example.inputs[:, 0, 7, 7]
    assert torch.equal(corner > 1, example.groups == 1)


def test_checks_leave_the_process_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()
    testing.example._trained.cache_clear()
    check_scorer(xe.Taylor())
    check_operator(xe.LogitMask())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.is_grad_enabled(), torch.get_num_threads())


# A network of a user's own.


def sequences(dtype):
    """Sequences of six tokens, three features each, read by a network without pooling layers."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
            self.mix = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            x = torch.relu(self.embed(x)).transpose(1, 2)
            return self.head(torch.relu(self.mix(x)).mean(2))

    torch.manual_seed(1)
    model, inputs = Reader().to(dtype).eval(), torch.randn(30, 6, 3, dtype=dtype)
    return Example(model, inputs, torch.arange(30) % 5, ["embed", "mix:input"])


def test_a_network_of_ones_own_can_be_given():
    check_scorer(xe.LRP("epsilon"), example=sequences)
    check_scorer(xe.WeightMagnitude(), example=sequences)
    check_operator(xe.RelevancePruning(0.3, layers=["mix"]), example=sequences)


# Scorers that break a promise.


def good(model, inputs, targets, layers, change=None):
    """A scorer that keeps all promises, but for what ``change`` does when it is done."""
    scores = dict(xe.Activation()(model, inputs, targets, layers))
    if change is not None:
        change(model, scores)
    return scores


def does(change):
    """A scorer that changes the model, or the scores by name, when it is done."""
    return lambda model, inputs, targets, layers: good(model, inputs, targets, layers, change)


def gives(layer, change):
    """A scorer that changes the scores of one layer."""
    return does(lambda model, scores: scores.update({layer: change(scores[layer])}))


def of_all(change):
    """A scorer that changes the scores of all layers."""
    return does(lambda model, scores: scores.update({n: change(v) for n, v in scores.items()}))


def write(model, scores=None):
    with torch.no_grad():
        model.conv2.bias[3] += 1


def leaves_hooks_after_an_error(model, inputs, targets, layers):
    handle = model.fc1.register_full_backward_hook(lambda *_: None)
    scores = good(model, inputs, targets, layers)
    handle.remove()
    return scores


def leaves_hooks_after_a_wrong_target(model, inputs, targets, layers):
    handle = model.pool2.register_forward_pre_hook(lambda *_: None)
    torch.zeros(len(inputs), 4)[torch.arange(len(inputs)), targets].sum()
    handle.remove()
    return good(model, inputs, targets, layers)


def backward(model, inputs, targets, layers):
    with torch.enable_grad():
        nn.functional.cross_entropy(model(inputs), targets).backward()
    return good(model, inputs, targets, layers)


def hides_errors(model, inputs, targets, layers):
    try:
        return good(model, inputs, targets, layers)
    except ValueError:
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


class Counting:
    calls = 0

    def __call__(self, model, inputs, targets, layers):
        self.calls += 1
        scores = good(model, inputs, targets, layers)
        return {name: values + self.calls for name, values in scores.items()}


class BatchMean:
    """Scores of a batch that are not the sum of its samples', which it does not say."""

    def __call__(self, model, inputs, targets, layers):
        scores = good(model, inputs, targets, layers)
        return {name: values.mean(0).expand(len(values), -1) for name, values in scores.items()}


def replace_parameter(model, scores):
    model.conv2.weight = nn.Parameter(model.conv2.weight.detach().clone())


GLOBAL_HOOK = nn.modules.module.register_module_forward_hook
AGAIN = "gives other scores of layer 'conv1' when it is called again with the same batch"
MIXED = "gives other scores of a sample: layer 'conv1' in batches of 1"
NOT_EQUAL = "gives other scores of layer 'conv1' where the model has hooks, gradients of an earlier"
SHAPE = "scores of layer 'conv2' are ((7, 7), torch.float32, 'cpu'), expected ((7, 8), torch.float"
DTYPE = (
    "scores of layer 'fc1' are ((7, 12), torch.float32, 'cpu'), expected ((7, 12), torch.float64"
)
BROKEN = [
    (leaves_hooks_after_an_error, "changes the backward hooks of layer 'fc1' when the model raises "
     "in its forward pass number 1"),
    (leaves_hooks_after_a_wrong_target, "changes the forward pre hooks of layer 'pool2' when there "
     "are fewer targets than samples"),
    (does(lambda model, _: GLOBAL_HOOK(lambda *_: None)),
     "changes the global forward hooks of all modules"),
    (does(lambda model, _: model.conv2.weight.register_hook(lambda grad: grad)),
     "changes the hooks of parameter 'conv2.weight'"),
    (does(write), "changes the values of parameter 'conv2.bias'"),
    (does(replace_parameter), "changes parameter 'conv2.weight'"),
    (does(lambda model, _: model.dropout.train()), "changes the training mode of layer 'dropout'"),
    (does(lambda model, _: model.norm.running_mean.add_(1)),
     "changes the values of buffer 'norm.running_mean'"),
    (backward, "changes the gradient of parameter 'conv1.weight'"),
    (does(lambda model, _: model.fc1.requires_grad_(False)),
     "changes requires_grad of parameter 'fc1.weight'"),
    (does(lambda model, _: setattr(model.fc1, "seen", True)),
     "leaves behind the attribute 'seen' of layer 'fc1'"),
    (does(lambda model, _: setattr(model, "relu3", nn.Softplus())), "changes the module 'relu3'"),
    (does(lambda model, _: delattr(model, "relu3")), "takes away the module 'relu3'"),
    (does(lambda model, _: torch.set_grad_enabled(False)),
     "changes whether gradients are computed"),
    (writes_into_inputs, "changes the data it was given (tensor 0)"),
    (does(lambda model, _: torch.rand(1)), "changes PyTorch's global random generator"),
    (Counting(), AGAIN),
    (of_all(lambda values: values.sort(0).values), MIXED),  # the sums are right, not the rows
    (BatchMean(), MIXED),
    (hides_errors, "gives scores when the model raises in its forward pass number 1, and hides"),
    (of_a_frozen_parameter,
     "fails on a model that has hooks, gradients and a frozen parameter (RuntimeError: One of"),
    (of_what_has_a_gradient, NOT_EQUAL),
    (gives("fc1", lambda values: values / 0), "scores of layer 'fc1' are NaN or infinite"),
    (gives("conv2", lambda values: values[:, :-1]), SHAPE),
    (gives("fc1", lambda values: values.float()), DTYPE),
    (gives("head", lambda values: values.tolist()), "gives a list for layer 'head', not a tensor"),
    (does(lambda model, scores: scores.pop("conv2")),
     "gives nothing for layer 'conv2', not a tensor"),
    (lambda *_: torch.zeros(7, 4), "gives a Tensor, not a mapping from layer names to tensors"),
]  # fmt: skip


@pytest.fixture
def _restored():
    """What some broken scorers leave to the process."""
    hooks = nn.modules.module._global_forward_hooks
    yield
    hooks.clear()
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("scorer", "sentence"), BROKEN, ids=[one for _, one in BROKEN])
def test_the_message_names_the_promise_that_a_scorer_breaks(scorer, sentence):
    with pytest.raises(AssertionError) as caught:
        check_scorer(scorer)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scorer_or_an_operator_that_keeps_its_promises_passes():
    scorer = BatchMean()
    scorer.per_sample = False
    check_scorer(scorer)
    check_operator(Halves())


def test_an_error_of_the_scorer_itself_comes_through():
    with pytest.raises(ZeroDivisionError):
        check_scorer(lambda *_: 1 / 0)


# Operators that break a promise.


class Halves:
    """Halves some weights of the last hidden layer; the functions given break a promise."""

    def __init__(self, after=None, origin=None, change=None, edit=xe.ModelEdit):
        self.after, self.change, self.edit = after, change, edit
        self.origin = {"operator": "Halves"} if origin is None else origin

    def plan(self, model, data, *, target):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            return self.planned(model, data, target)
        finally:
            for module, training in modes:
                module.training = training

    def planned(self, model, data, target):
        for inputs, *_ in data:
            with torch.no_grad():
                model(inputs)
        if self.after is not None:
            self.after(model)
        old = model.fc1.weight.detach()[target, :5].clone()
        at = torch.arange(5) + target * model.fc1.in_features
        change = xe.edits.Change(tuple(model.fc1.weight.shape), at, old, old / 2)
        if self.change is not None:
            change = self.change(change)
        return self.edit({"fc1.weight": change}, self.origin)


class InTraining(Halves):
    def plan(self, model, data, *, target):
        return self.planned(model, data, target)


class ReadsFirst(Halves):
    """Hooks stay where the model raises, not where the data do."""

    def plan(self, model, data, *, target):
        data = list(data)
        handle = model.conv2.register_forward_hook(lambda *_: None)
        edit = super().plan(model, data, target=target)
        handle.remove()
        return edit


class HidesErrors(Halves):
    def plan(self, model, data, *, target):
        try:
            return super().plan(model, data, target=target)
        except RuntimeError:
            return super().plan(model, [], target=target)


class OfModes(Halves):
    def plan(self, model, data, *, target):
        times = 1 if model.training else 2
        self.change = lambda c: xe.edits.Change(c.shape, c.index, c.old, c.new * times)
        return super().plan(model, data, target=target)


class Lax(xe.ModelEdit):
    """An edit that looks at nothing."""

    def apply(self, model):
        for name, change in self.changes.items():
            with torch.no_grad():
                model.get_parameter(name).view(-1)[change.index] = change.new
        return model

    undo = apply


class WritesElsewhere(xe.ModelEdit):
    def apply(self, model):
        write(super().apply(model))
        return model


class Near(xe.ModelEdit):
    """An edit that takes a model for its own whose values are close."""

    def check(self, model, *, undo=False):
        for name, change in self.changes.items():
            found = model.get_parameter(name).detach().view(-1)[change.index]
            if not torch.allclose(found, change.new if undo else change.old):
                raise xe.core.EditMismatchError(name)


class Stumbles(xe.ModelEdit):
    def apply(self, model):
        return super().apply(model if isinstance(model.fc1, nn.Linear) else None)


def origin(**entries):
    return Halves(origin={"operator": "x", **entries})


TWICE = [0, 0, 1]
NOT_JSON = "the edit's origin is not JSON: "
BROKEN_OPERATORS = [
    (Halves(after=write), "planning changes the values of parameter 'conv2.bias'"),
    (InTraining(), "planning changes the values of buffer 'norm.running_mean'"),
    (Halves(after=lambda model: setattr(model, "x", 1)),
     "planning leaves behind the attribute 'x' of the model"),
    (ReadsFirst(), "planning changes the forward hooks of layer 'conv2' when the model raises in "
     "its forward pass number 1"),
    (HidesErrors(), "plans an edit when reading batch number 1 of the data raises, and hides"),
    (Halves(change=lambda c: xe.edits.Change(c.shape, c.index, c.old, c.new + torch.rand(5) / 10)),
     "planning again with the same model and data gives other values: new of 'fc1.weight'"),
    (OfModes(), "a model in training mode, with hooks, gradients and a frozen parameter, gives "
     "other values: new of 'fc1.weight'"),
    (Halves(edit=lambda changes, origin: changes), "plans a dict, not a ModelEdit"),
    (Halves(edit=lambda changes, origin: xe.ModelEdit({}, origin)),
     "plans an edit without changes, of which nothing can be checked"),
    (Halves(change=lambda c: xe.edits.Change(c.shape, c.index, c.old + 1, c.new)),
     "the edit does not fit the model it was planned on: 'fc1.weight' differs from the model"),
    (Halves(change=lambda c: xe.edits.Change(c.shape, c.index[TWICE], c.old[TWICE], c.new[TWICE])),
     "the edit names entries of 'fc1.weight' twice or not in their order"),
    (Halves(edit=Lax), "the edit does not refuse a model that holds it already"),
    (Halves(edit=WritesElsewhere), "applying the edit gives 'conv2.bias' other values than it"),
    (Halves(edit=type("StaysApplied", (xe.ModelEdit,), {"undo": lambda self, model: model})),
     "applying and undoing the edit changes the values of parameter 'fc1.weight'"),
    (Halves(edit=Near), "the edit does not refuse a model whose 'fc1.weight' differs in one bit"),
    (Halves(edit=Stumbles), "the edit does not refuse a model without the parameters that it "
     "changes with EditMismatchError, but raises AttributeError"),
    (origin(units=(1, 2)), f"{NOT_JSON}'units' comes back as [1, 2], it was (1, 2)"),
    (origin(rate=float("nan")), f"{NOT_JSON}Out of range float values"),
    (Halves(origin={"rate": 1}), "the edit's origin does not name its operator"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "sentence"), BROKEN_OPERATORS, ids=[one for _, one in BROKEN_OPERATORS]
)
def test_the_message_names_the_promise_that_an_operator_breaks(operator, sentence):
    with pytest.raises(AssertionError) as caught:
        check_operator(operator)
    assert f"{type(operator).__name__}: {sentence}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_operator_without_a_plan_is_an_error():
    with pytest.raises(TypeError, match="operator: 3 has no method plan; give plan="):
        check_operator(3)
