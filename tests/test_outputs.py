"""Every operator and comparison method on every kind of output, and the page that says so."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn

import xai_edit as xe
from xai_edit import comparisons

PAGE = Path(__file__).parents[1] / "docs" / "outputs.md"
SAMPLES, CLASSES, LABEL = 60, 3, 1
X = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
HAS = (X[:, 0] > 0).long()


class Net(nn.Module):
    """Two hidden layers and a head; ``end`` makes of its output what the model returns."""

    def __init__(self, outputs=CLASSES, end=lambda z: z):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.head, self.end = nn.Linear(6, outputs), end
        with torch.no_grad():
            self.head.bias -= self.logits(X).quantile(0.5, 0)
        self.eval()

    def logits(self, x):
        return self.head(self.second(self.first(x).relu()).relu())

    def forward(self, x):
        return self.end(self.logits(x))


def one_row(end=lambda z: z, row=LABEL):
    """The network of one logit whose row is that of a label."""
    model, wide = Net(1, end), Net()
    with torch.no_grad():
        for mine, theirs in zip(model.head.parameters(), wide.head.parameters(), strict=True):
            mine.copy_(theirs[row : row + 1])
    return model


@dataclass(frozen=True)
class Kind:
    """A kind of output: the model, its labels, and the logits that its edits are read from."""

    make: object
    labels: object = staticmethod(lambda z: z.argmax(1))
    target: object = 1
    read: object = staticmethod(lambda z: z)
    around: object = contextlib.nullcontext


def binary(z):
    return (z[:, 0] > 0).long()


def function(outputs):
    return outputs[:, 1].sum((1, 2))


KINDS = {
    "logits": Kind(Net),
    "softmax": Kind(lambda: Net(end=lambda z: z.softmax(1))),
    "object": Kind(lambda: Net(end=lambda z: SimpleNamespace(logits=z, hidden=z * 2))),
    "one logit": Kind(one_row, binary),
    "sigmoid": Kind(lambda: one_row(torch.sigmoid), binary),
    "multi-label": Kind(
        Net, lambda z: (z > 0).long(), 1, lambda z: z[:, LABEL : LABEL + 1],
        lambda: xe.one_label(LABEL),
    ),
    "other": Kind(lambda: Net(end=lambda z: z[:, :, None, None] * torch.ones(2, 2)), target=function),
}  # fmt: skip
# The kind whose figures a kind has to have.
TWINS = {
    "softmax": "logits", "object": "logits", "sigmoid": "one logit", "multi-label": "one logit",
}  # fmt: skip


def data_of(kind, model):
    """Labels of the model's own answers, one in ten of them wrong."""
    labels = KINDS[kind].labels(model.logits(X).detach())
    wrong = torch.arange(SAMPLES) % 10 == 3
    if labels.ndim > 1:
        labels[wrong] = 1 - labels[wrong]
    else:
        labels[wrong] = (labels[wrong] + 1) % (2 if kind in ("one logit", "sigmoid") else CLASSES)
    return [(X[:40], labels[:40], HAS[:40]), (X[40:], labels[40:], HAS[40:])]


def edited(plan):
    """Return a method that gives the logits with an edit applied."""

    def run(model, data, target, read):
        edit = plan(model, data, target)
        assert edit.size > 0, edit.origin
        with edit.applied(model), torch.no_grad():
            return read(model.logits(X))

    return run


def figures(measure):
    return lambda model, data, target, read: measure(model, data, target)


def training(method, **options):
    options = {"epochs": 2, "learning_rate": 0.05, "batch_size": 20, "seed": 1} | options
    return edited(lambda m, d, t: getattr(comparisons, method)(m, d, target=t, **options))


def retrained(model, data, target):
    def train(network, batches):
        with torch.no_grad():
            for x, *_ in batches:
                network.head.bias += x.mean()

    again = lambda: type(model)(model.head.out_features, model.end)  # noqa: E731
    return comparisons.retrain(model, data, target=target, build=again, train=train)


def amnesiac(model, data, target):
    log = comparisons.AmnesiacLog()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for x, labels, *_ in data:
        with log.recording(model, labels), torch.no_grad():
            model.head.weight += 0.1 * x.mean()
    edit = comparisons.amnesiac(model, log, target=target, repair=data, seed=1)
    changed = edit.apply(model)
    with torch.no_grad():
        new = [parameter.clone() for parameter in changed.parameters()]
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
    names = [name for name, _ in model.named_parameters()]
    values = {
        name: (torch.arange(one.numel()), one.flatten())
        for name, one in zip(names, new, strict=True)
    }
    return xe.ModelEdit.between(model, values, {})


def unlearning(model, data, target):
    edit = xe.LogitMask().plan(model, data, target=target)
    given = {"train": data, "test": data, "target": target, "relearn": (0, 2)}
    found = xe.evaluate_unlearning(model, edit, **given)
    after = found.after
    return [
        after.test.forgotten, after.test.rest, found.before.test.forgotten, after.probe_test,
        *after.relearning_test.forgotten, *after.relearning_test.rest,
    ]  # fmt: skip


def curve(model, data, target):
    scores = xe.score_units(model, data, xe.Activation(), layers="second", target=target)
    found = xe.deletion_curve(model, data, scores, layers="second", shares=(0, 0.5))
    return [*found.accuracy, *found.probability, *found.logit]


def concept_aware(model, data, target):
    features = xe.collect_features(
        model, data, layer="second", scorer=xe.LRP("epsilon"), target=target
    )
    subspaces = xe.PCA(2).fit(features)
    operator = xe.ConceptAwarePruning("second", subspaces, [0], share=0.3)
    return operator.plan(model, data, target=target)


def checked(model, data, target):
    found = xe.check_model(model, data[0])
    return [one.value for one in found.figures if one.name == "accuracy"]


LAYERS = ["first", "second"]
ROWS = {
    "`score_units` by LRP": figures(
        lambda m, d, t: xe.score_units(m, d, xe.LRP("epsilon"), layers=LAYERS, target=t).sums
    ),
    "`score_units` by Captum": figures(
        lambda m, d, t: (
            xe.score_units(
                m, d, xe.CaptumLayer(LayerGradientXActivation), layers=LAYERS, target=t
            ).sums
        )
    ),
    "`score_units` by `Taylor`": figures(
        lambda m, d, t: xe.score_units(m, d, xe.Taylor(), layers=LAYERS, target=t).sums
    ),
    "`edge_relevance`": figures(
        lambda m, d, t: xe.edge_relevance(m, d, xe.LRP("epsilon"), layers=LAYERS, target=t).sums
    ),
    "`RelevancePruning`": edited(
        lambda m, d, t: xe.RelevancePruning(share=0.3).plan(m, d, target=t)
    ),
    "`ConceptAwarePruning`, `collect_features`": edited(concept_aware),
    "`SingleWeight`": edited(lambda m, d, t: xe.SingleWeight().plan(m, d, target=t)),
    '`SingleWeight("exact")`': edited(
        lambda m, d, t: xe.SingleWeight("exact").plan(m, d, target=t)
    ),
    "`FictitiousClass`": edited(lambda m, d, t: xe.FictitiousClass(rate=0.05).plan(m, d, target=t)),
    '`FictitiousClass("exact")`': edited(
        lambda m, d, t: xe.FictitiousClass("exact", aim="removal").plan(m, d, target=t)
    ),
    "`PathPerturbation`": edited(lambda m, d, t: xe.PathPerturbation().plan(m, d, target=t)),
    '`PathPerturbation(scope="class_row")`': edited(
        lambda m, d, t: xe.PathPerturbation(scope="class_row").plan(m, d, target=t)
    ),
    "`LogitMask`": edited(lambda m, d, t: xe.LogitMask().plan(m, d, target=t)),
    "`LEACE`": edited(lambda m, d, t: comparisons.LEACE().plan(m, d)),
    "`LastLayerRetraining`": edited(lambda m, d, t: xe.LastLayerRetraining(2).plan(m, d)),
    "`retrain`": edited(retrained),
    "`random_labels`": training("random_labels"),
    "`negative_gradient`": training("negative_gradient"),
    "`boundary_shrink`": training("boundary_shrink"),
    "`boundary_expanding`": training("boundary_expanding"),
    "`amnesiac`": edited(amnesiac),
    "`SelectiveSynapticDampening`": edited(
        lambda m, d, t: comparisons.SelectiveSynapticDampening(1.2).plan(m, d, target=t)
    ),
    "`evaluate_groups`": figures(lambda m, d, t: xe.evaluate_groups(m, d).groups),
    "`evaluate_unlearning`": figures(unlearning),
    "`deletion_curve`": figures(curve),
    "`check_model`": figures(checked),
}


def outcome(row, kind):
    """Return what a method gives on a kind of output, or the sentence that refuses it."""
    chosen = KINDS[kind]
    model = chosen.make()
    target = chosen.target
    head = not (row.startswith("`score") or row in OF_FUNCTIONS)
    if kind == "other" and head:
        target = 1
    with chosen.around(), torch.random.fork_rng():
        try:
            return ROWS[row](model, data_of(kind, model), target, chosen.read)
        except ValueError as problem:
            return str(problem)


OF_FUNCTIONS = (
    "`edge_relevance`",
    "`RelevancePruning`",
    "`ConceptAwarePruning`, `collect_features`",
)
