"""Every operator and comparison method on every kind of output, and the page that says so."""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass
from functools import partial
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


with torch.no_grad():
    FEATURES = Net().second(Net().first(X).relu()).relu()
    ADDS = int((FEATURES * Net().head.weight[1]).sum(0).argmax())  # most to class 1
    HAS = (FEATURES[:, ADDS] > FEATURES[:, ADDS].median()).long()


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


def negated():
    """The network of one logit −z."""
    model = one_row()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.neg_()
    return model


def two_rows():
    """The network of two logits 0 and z."""
    model, row = Net(2), one_row()
    with torch.no_grad():
        for mine, theirs in zip(model.head.parameters(), row.head.parameters(), strict=True):
            mine.copy_(torch.cat([torch.zeros_like(theirs), theirs]))
    return model


def as_maps(z):
    """Return maps of each class, as of a segmentation."""
    return z[:, :, None, None] * torch.ones(2, 2)


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
    "class 0": Kind(one_row, binary, 0),
    "other": Kind(lambda: Net(end=as_maps), target=function),
}  # fmt: skip
# The kind whose figures a kind has to have.
TWINS = {
    "softmax": "logits", "object": "logits", "sigmoid": "one logit", "multi-label": "one logit",
    "one logit": "two rows", "class 0": "negated",
}  # fmt: skip
REFERENCES = {
    "two rows": Kind(two_rows, read=lambda z: z[:, 1:] - z[:, :1]),
    "negated": Kind(negated, binary, read=torch.neg),
}


def data_of(kind, model):
    """Labels of the model's own answers, one in ten of them wrong."""
    z = model.logits(X).detach()
    labels = (KINDS | REFERENCES)[kind].labels(z)
    wrong = torch.arange(SAMPLES) % 10 == 3
    if labels.ndim > 1:
        labels[wrong] = 1 - labels[wrong]
    else:
        labels[wrong] = (labels[wrong] + 1) % max(2, z.shape[1])
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
    """Forget by the log of two steps of a training, whose network is the model afterwards."""
    network, log = copy.deepcopy(model), comparisons.AmnesiacLog()
    for x, labels, *_ in data:
        with log.recording(network, labels), torch.no_grad():
            network.head.weight += 0.1 * x.mean()
    edit = comparisons.amnesiac(network, log, target=target, repair=data, seed=1)
    return xe.ModelEdit.to_copy(model, edit.apply(network), {})


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
    if model.head.out_features == 1:  # class 0 is explained by −z
        x, y = (torch.cat([batch[at] for batch in data]) for at in (0, 1))
        z = model.logits(x)[:, 0]
        assert found.logit[0] == pytest.approx(float(((2 * y - 1) * z).mean()), rel=1e-4)
    return [*found.accuracy, *found.probability]


def concept_aware(model, data, target):
    features = xe.collect_features(
        model, data, layer="second", scorer=xe.LRP("epsilon"), target=target
    )
    subspaces = xe.PCA(2).fit(features)
    operator = xe.ConceptAwarePruning("second", subspaces, [0], share=0.3)
    return operator.plan(model, data, target=target)


def checked(model, data, target):
    found = xe.check_model(model, data[0], target=target)
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
    '`PathPerturbation(scope="neuron")`': edited(
        lambda m, d, t: xe.PathPerturbation(scope="neuron").plan(m, d, target=t)
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


OF_FUNCTIONS = (
    "`score_units` by LRP",
    "`score_units` by Captum",
    "`score_units` by `Taylor`",
    "`edge_relevance`",
    "`RelevancePruning`",
    "`ConceptAwarePruning`, `collect_features`",
    "`check_model`",
)


def outcome(row, kind):
    """Return what a method gives on a kind of output, or the sentence that refuses it."""
    chosen = (KINDS | REFERENCES)[kind]
    model = chosen.make()
    target = 1 if kind == "other" and row not in OF_FUNCTIONS else chosen.target
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with chosen.around(), torch.random.fork_rng():
        try:
            return ROWS[row](model, data_of(kind, model), target, chosen.read)
        except ValueError as problem:
            return re.sub(r"is \([\d, ]*\)", "is (samples, …)", str(problem))
        finally:
            for name, one in model.state_dict().items():
                assert torch.equal(one, before[name]), name


LABELS = (
    "one_label: label 1 chosen, and methods that train or weigh all weights by the loss of one "
    "label spoil the others; use LogitMask, SingleWeight or PathPerturbation"
)
NO_CLASSES = (
    "model: its output is (samples, …); a classifier gives one row of logits a sample, shape "
    "(samples, classes); others can be scored and pruned, with target= a function of the outputs"
)
SHADOW = (
    "model: has one output, and a shadow class needs a row beside those of the classes; use "
    "boundary_shrink"
)
TRAINED = (
    "retrain", "random_labels", "negative_gradient", "boundary_shrink", "boundary_expanding",
    "SelectiveSynapticDampening",
)  # fmt: skip
REFUSED = {(row, "other"): NO_CLASSES for row in ROWS if row not in OF_FUNCTIONS}
REFUSED |= {(f"`{name}`", "multi-label"): LABELS for name in TRAINED}
REFUSED |= {("`boundary_expanding`", kind): SHADOW for kind in ("one logit", "sigmoid", "class 0")}
REFUSED["`amnesiac`", "multi-label"] = (
    "labels: torch.int64 of shape (40, 3) given; give one class number a sample"
)
REFUSED["`score_units` by `Taylor`", "other"] = (
    "target: a tensor of shape (40,), torch.float32, for 40 samples; this scorer needs one class "
    "a sample, int64"
)
# A second row is trained too; and what is listed or drawn by class has no mirror image.
NO_TWIN = {(f"`{name}`", "one logit") for name in (*TRAINED, "amnesiac")}
NO_TWIN |= {
    (f"`{name}`", "class 0")
    for name in ("evaluate_groups", "retrain", "amnesiac", "LastLayerRetraining")
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_a_method_gives_the_figures_of_the_same_logits_or_one_sentence(row, kind):
    found = outcome(row, kind)
    if (row, kind) in REFUSED:
        assert found == REFUSED[row, kind]
        return
    assert not isinstance(found, str), found
    twin = TWINS.get(kind)
    if twin is None or (row, kind) in NO_TWIN:
        return
    torch.testing.assert_close(found, outcome(row, twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["SingleWeight", "LogitMask", "LEACE", "LastLayerRetraining"])
def test_an_edit_of_one_label_leaves_the_others_bit_for_bit(row):
    model = Net()
    operator = {"LEACE": comparisons.LEACE}.get(row) or getattr(xe, row)
    target = {"target": 0} if row in ("SingleWeight", "LogitMask") else {}
    with xe.one_label(LABEL):
        edit = operator().plan(model, data_of("multi-label", model), **target)
    assert edit.origin["label"] == LABEL
    before = model(X)
    with edit.applied(model):
        after = model(X)
    others = [one for one in range(CLASSES) if one != LABEL]
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.allclose(after[:, LABEL], before[:, LABEL])
    if target:
        assert float((after[:, LABEL] > before[:, LABEL]).double().mean()) > 0.5


@pytest.mark.parametrize(("make", "row"), [(one_row, 1), (negated, 0)])
def test_of_one_logit_the_feature_is_neutralised_in_the_class_that_it_speaks_for(make, row):
    model = make()
    with torch.no_grad():
        model.head.weight[:, ADDS] *= 20
        model.head.bias -= model(X).quantile(0.5)
    data = [(X, binary(model(X)) ^ (torch.arange(SAMPLES) % 5 == 0), HAS)]
    operator = xe.FictitiousClass(rate=0.05)
    edit = operator.plan(model, data)
    (weight,) = edit.origin["rows"]
    assert weight["class"] == row
    other = f"its row is that of class {row} with the other sign"
    assert edit.origin["left_alone"] == {str(1 - row): other}
    named = operator.plan(model, data, target=row)
    changes = [one.changes["head.weight"] for one in (edit, named)]
    assert torch.equal(changes[0].new, changes[1].new)
    assert torch.equal(changes[0].index, changes[1].index)
    with edit.applied(model):
        lowered = model(X) if row else -model(X)
    before = model(X) if row else -model(X)
    assert (lowered <= before).all()
    with pytest.raises(ValueError, match="of one logit have one row; name one"):
        operator.plan(model, data, target=[0, 1], fictitious=[0, 1])


@pytest.mark.parametrize("kind", ["one logit", "sigmoid"])
@pytest.mark.parametrize("weighted", [False, True])
def test_training_of_one_logit_is_that_of_the_binary_cross_entropy(kind, weighted):
    model = KINDS[kind].make()
    data = data_of(kind, model)
    method = comparisons.negative_gradient if weighted else comparisons.random_labels
    edit = method(model, data, target=1, epochs=3, learning_rate=0.1, batch_size=99)
    twin = one_row()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, maximize=weighted)
    batches = [(x, y.float()) for x, y, _ in data]
    if weighted:
        x, y = (torch.cat([batch[at] for batch in batches]) for at in (0, 1))
        batches = [(x[y > 0], y[y > 0])]
    for _ in range(3):
        for x, y in batches:
            wanted = y if weighted else torch.zeros_like(y)  # the other class is 0
            loss = nn.functional.binary_cross_entropy_with_logits(twin(x)[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with edit.applied(model):
        torch.testing.assert_close(model.logits(X), twin(X), rtol=1e-4, atol=1e-5)


def test_fine_tuning_of_several_labels_is_that_of_the_binary_cross_entropy():
    model, twin = Net(), Net()
    data = [(x, y) for x, y, _ in data_of("multi-label", model)]
    xe.FineTuning(data, epochs=2, learning_rate=0.1)(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for x, y in 2 * data:
        loss = nn.functional.binary_cross_entropy_with_logits(twin(x), y.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("label", range(CLASSES))
def test_each_label_is_scored_and_counted_on_its_own(label):
    model = Net(end=torch.sigmoid)
    data = data_of("multi-label", model)
    z, y = model.logits(X).detach(), torch.cat([batch[1] for batch in data])
    outside = xe.score_units(model, data, xe.LRP("epsilon"), layers="second", target=label)
    with xe.one_label(label):
        found = xe.evaluate_groups(model, data)
        inside = xe.score_units(model, data, xe.LRP("epsilon"), layers="second", target=1)
    assert inside.origin["label"] == label
    torch.testing.assert_close(outside["second"], inside["second"])
    for has, mark in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        members = (y[:, label] == has) & (mark == HAS)
        right = (z[members, label] > 0).long() == has
        assert found.groups[has, mark] == pytest.approx(float(right.double().mean()))


def test_what_is_not_one_label_is_one_clear_error():
    model = Net()
    data = data_of("multi-label", model)
    several = "labels: 3 labels a sample given; take one label at a time, inside xai_edit.one_label"
    for call in (
        lambda: xe.score_units(model, data, xe.LRP()),
        lambda: xe.SingleWeight().plan(model, data, target=1),
        lambda: xe.FictitiousClass().plan(model, data),
        lambda: xe.PathPerturbation().plan(model, data, target=1),
        lambda: xe.evaluate_groups(model, data),
        lambda: comparisons.random_labels(model, data, target=1),
    ):
        with pytest.raises(ValueError, match=several):
            call()
    with pytest.raises(ValueError, match="model: it ends in a softmax"), xe.one_label(1):
        xe.evaluate_groups(Net(end=lambda z: z.softmax(1)), data)
    with pytest.raises(ValueError, match="one_label: class 3 is out of range"), xe.one_label(3):
        xe.evaluate_groups(model, data)
    with pytest.raises(ValueError, match="label: -1 given"), xe.one_label(-1):
        pass
    with xe.one_label(1):
        features = xe.collect_head_features(model, data)
    with pytest.raises(ValueError, match="were collected for label 1"), xe.one_label(2):
        xe.SingleWeight().plan(model, features, target=1)


@pytest.mark.parametrize("wrapped", [partial(torch.compile, backend="eager"), torch.jit.script])
def test_a_final_sigmoid_is_not_hidden_by_compilation(wrapped):
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid()).eval()
    data = [(X, (plain(X)[:, 0] > 0.5).long(), HAS)]
    if wrapped is torch.jit.script:
        with pytest.raises(ValueError, match="computed from a softmax or sigmoid"):
            xe.evaluate_groups(wrapped(plain), data)
        return
    assert xe.evaluate_groups(wrapped(plain), data).groups == xe.evaluate_groups(plain, data).groups
    for scorer in (xe.Taylor(), xe.LRP("epsilon")):
        got, expected = (
            xe.score_units(model, data, scorer, layers=["0"]) for model in (wrapped(plain), plain)
        )
        torch.testing.assert_close(got["0"], expected["0"])
        assert got.origin["output"] == expected.origin["output"]
    options = {"target": 1, "epochs": 2, "learning_rate": 0.1}
    edits = [comparisons.negative_gradient(one, data, **options) for one in (plain, wrapped(plain))]
    values = [[change.new for change in edit.changes.values()] for edit in edits]
    torch.testing.assert_close(*values)


COLUMNS = {
    "one logit": "one logit",
    "one label of several": "multi-label",
    "final softmax": "softmax",
    "final sigmoid": "sigmoid",
    "`.logits`": "object",
    "others, by a function": "other",
}


def test_the_page_shows_what_was_tried():
    sentences = list(dict.fromkeys(REFUSED.values()))
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for row in ROWS:
        refused = [REFUSED.get((row, kind)) for kind in COLUMNS.values()]
        cells = ["yes" if one is None else f"({sentences.index(one) + 1})" for one in refused]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", *(f"{at}. `{sentence}`" for at, sentence in enumerate(sentences, start=1))]
    assert "\n".join(lines) in PAGE.read_text(encoding="utf-8"), "\n".join(lines)
