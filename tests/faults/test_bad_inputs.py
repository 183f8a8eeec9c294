"""Bad input to all that is public: one clear error, the model untouched."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from captum.attr import LayerConductance, Saliency
from conftest import PlainNet, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import xai_edit as xe
from xai_edit.datasets.image_set import ImageSet

NAN = float("nan")


class Uncopyable(PlainNet):
    def __deepcopy__(self, _):
        raise RuntimeError("only leaves can be copied")


@functools.cache
def world():
    """What the calls are made with; each leaves it as it was."""
    torch.manual_seed(0)
    model = PlainNet().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    labels = torch.arange(60) % 10
    has = (torch.arange(60) // 10) % 2
    images[has == 1, :, :2, :2] = 2.0
    data = [(images[:30], labels[:30], has[:30]), (images[30:], labels[30:], has[30:])]
    unmarked = [(x, y) for x, y, _ in data]
    features = xe.collect_features(model, data, layer="relu1", positions=4, scorer=xe.LRP())
    return SimpleNamespace(
        model=model,
        images=images,
        labels=labels,
        data=data,
        unmarked=unmarked,
        bare=[x for x, _, _ in data],
        features=features,
        plain_features=xe.collect_features(model, data, layer="relu1", positions=4),
        unlabelled=xe.concepts.Features(features.activations, features.contexts, features.sample),
        subspaces=xe.PCA(2).fit(features),
        wide=xe.Subspaces(torch.eye(7).double(), (7,), torch.zeros(7).double()),
        edit=xe.RelevancePruning(0.5, xe.WeightMagnitude()).plan(model, data),
        grey=ImageSet(torch.zeros(8, 1, 9, 9).byte(), torch.arange(8) % 4, (0.5,), (0.5,), 9),
        one_output=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval(),
        no_bias=nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)).eval(),
        no_head=nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(),
        no_logits=nn.Sequential(nn.Conv2d(1, 10, 3)).eval(),
        uncopyable=Uncopyable().eval(),
    )


def tensors(*shape):
    return torch.zeros(*shape).double()


def score(w, **given):
    usual = {"model": w.model, "data": w.data, "scorer": xe.LRP()}
    return xe.score_units(**{**usual, **given})


def between(w, **values):
    made = {name: tuple(map(torch.tensor, each)) for name, each in values.items()}
    return xe.ModelEdit.between(w.model, made, {})


def planned(operator, w, asked, **given):
    """Plan by an operator made of some arguments, ``asked`` being those of ``plan``."""
    plan = {"model": w.model, "data": w.data, **{k: given.pop(k) for k in asked if k in given}}
    return operator(**given).plan(**plan)


def prune(w, share=0.5, **given):
    asked = ("model", "data", "fine_tune", "checkpoint")
    return planned(xe.RelevancePruning, w, asked, share=share, **given)


def aware(w, **given):
    usual = {"layer": "relu1", "subspaces": w.subspaces, "ablate": [0], "share": 0.3}
    return planned(xe.ConceptAwarePruning, w, ("features",), **{**usual, **given})


def path(w, **given):
    asked = ("model", "data", "target")
    return planned(xe.PathPerturbation, w, asked, **{"target": 3, **given})


def single(w, data, target=3, model=None):
    return xe.SingleWeight().plan(model or w.model, data, target=target)


def fictitious(w, data=None, model=None, **given):
    return xe.FictitiousClass().plan(model or w.model, data or w.data, **given)


def dampen(w, alpha):
    return xe.comparisons.SelectiveSynapticDampening(alpha).plan(w.model, w.data, target=3)


def rows(a, c=None, **given):
    return xe.concepts.Features(torch.tensor(a), None if c is None else torch.tensor(c), **given)


def collect(w, **given):
    return xe.collect_features(w.model, w.data, **{"layer": "relu1", **given})


def predict(w, subspaces=None, **given):
    return xe.predictiveness(subspaces or w.subspaces, w.features, **given)


def enter(context):
    with context:
        pass


def maps(w, **given):
    usual = {"inputs": w.images[:2], "subspaces": w.subspaces, "layer": "relu1"}
    return xe.concepts.subspace_maps(w.model, **{**usual, "scorer": xe.LRP(), **given})


def groups(w, **given):
    return xe.evaluate_groups(w.model, **{"data": w.data, **given})


def unlearning(w, edit=None, **given):
    usual = {"train": w.data, "test": w.data, "target": 3, "relearn": ()}
    return xe.evaluate_unlearning(w.model, edit or w.edit, **{**usual, **given})


def planted(w, what):
    return xe.datasets.Shortcut(what, 0.9).train(w.grey, seed=0)


EYE = torch.eye(3).double()
E, N_E = [[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]
PICTURE = torch.full((4, 3, 3), 255).byte()
RED = xe.datasets.Colours([(255, 0, 0), (0, 255, 0)])
T, V, N, L = TypeError, ValueError, xe.core.NonFiniteError, xe.core.UnknownLayerError
# The call, the type of the error, the beginning of its message.
# fmt: off
SCORERS = [
    (lambda w: score(w, target=lambda z: z), V, "target: the function of the logits gave"),
    (lambda w: score(w, scorer=xe.LRP), T, "scorer: <class"),
    (lambda w: score(w, scorer="epsilon"), T, "scorer: 'epsilon' given; wrap"),
    (lambda w: score(w, model=w.no_logits), V, "model: its output is (30, 10, 6, 6); a"),
    (lambda w: xe.LRP(3), T, "composite: 3 is neither a preset"),
    (lambda w: xe.LRP("epsilon", gamma=1), T, "composite: preset 'epsilon'"),
    (lambda w: xe.CaptumLayer(Saliency), T, "method: <class"),
    (lambda w: xe.CaptumLayer(LayerConductance, steps=1), T, "no argument ['steps'] here"),
    (lambda w: xe.CaptumLayer(LayerConductance, target=1), T, "no argument ['target'] here"),
    (lambda w: xe.fit_patterns(w.model, w.data, layers=["relu1"]), V, "layer 'relu1' is"),
    (lambda w: xe.check_model(w.model, w.images * NAN), N, "batch 0 has inputs that are NaN"),
    (lambda w: score(w, target=10**20), V, "target: 100000000000000000000 given; it is a"),
    (lambda w: score(w, data=[(w.images[:2], [0, 1e20])]), V, "has labels that are not whole num"),
    (lambda w: score(w, data=[(w.images[:2], [0, 1e999])]), V, "has labels that are not whole num"),
    (lambda w: score(w, data=[(w.images[:2], [0, 10**30])]), T, "has labels that are not numbers"),
    (lambda w: groups(w, groups=torch.full((60,), 1e20)), V, "values that are not whole numbers"),
]
EDITS = [
    (lambda w: between(w, **{"conv9.weight": ([0], [1.0])}), V, "'conv9.weight' is not a"),
    (lambda w: between(w, **{"fc1.bias": ([0], [NAN])}), N, "entries of 'fc1.bias' to values"),
    (lambda w: between(w, **{"fc1.bias": ([12], [1.0])}), V, "'fc1.bias' has no entry 12; it has"),
    (lambda w: between(w, **{"fc1.bias": ([-1], [1.0])}), V, "'fc1.bias' has no entry -1; it has"),
    (lambda w: between(w, **{"fc1.bias": ([1, 1], [1.0, 2.0])}), V, "has entry 1 more than"),
    (lambda w: between(w, **{"fc1.bias": ([1, 2], [1.0])}), V, "'fc1.bias' has indices of"),
    (lambda w: between(w, **{"fc1.bias": ([True], [1.0])}), V, "'fc1.bias' has indices of"),
    (lambda w: xe.ModelEdit.between(w.model, {}, {"at": {1}}), T, "origin: Object of type"),
    (lambda w: w.edit.apply(w.no_bias), V, "'conv2.weight', which the model does not have"),
    (lambda w: w.edit.undo(w.model), V, "the model does not hold this edit"),
    (lambda w: w.edit.save("none/edit"), OSError, "the folder 'none' does not exist"),
    (lambda w: xe.ModelEdit.load("none"), OSError, "none: no such file"),
    (lambda w: xe.ModelEdit.load("."), xe.core.EditFileError, ".: cannot be read"),
]
OPERATORS = [
    (lambda w: prune(w, 30), V, "share: 30 given; it is a fraction in (0, 1]; is it in percent"),
    (lambda w: prune(w, ranking="both"), V, "ranking: 'both' given; it is one of"),
    (lambda w: prune(w, steps=0), V, "steps: 0 given; it is a whole number from 1"),
    (lambda w: prune(w, layers=["head"]), V, "layers: 'head' gives the output"),
    (lambda w: prune(w, layers=["relu1"]), V, "layers: the channels of 'relu1' have"),
    (lambda w: prune(w, protect=["conv9"]), L, "layer 'conv9' not found; did you mean 'conv2'"),
    (lambda w: prune(w, data=iter(w.data), steps=2), T, "a list_iterator can be read only"),
    (lambda w: prune(w, fine_tune=3), T, "fine_tune: 3 given"),
    (lambda w: prune(w, checkpoint="none/a"), OSError, "the folder 'none' does not"),
    (lambda w: prune(w, model=w.uncopyable), V, "model: it cannot be copied (only leaves"),
    (lambda w: prune(w, model=w.one_output), V, "layers: the model has no convolution"),
    (lambda w: aware(w, subspaces="CAV"), T, "subspaces: 'CAV' given; give Subspaces"),
    (lambda w: aware(w, ablate=[9]), V, "subspaces: [9] given; there are 2"),
    (lambda w: aware(w, ablate="all"), V, "ablate: 'all' given; it is 'auto' or"),
    (lambda w: aware(w, layer="relu9"), L, "layer 'relu9' not found"),
    (lambda w: aware(w, subspaces=xe.CAV()), V, "features: none given; a finder and"),
    (lambda w: aware(w, subspaces=w.wide), V, "subspaces: of 7 channels, but the layer"),
    (lambda w: aware(w, keep_ablation=True), V, "layer 'relu1': its output goes to"),
    (lambda w: path(w, share=2), V, "share: 2 given; it is a fraction in (0, 1]"),
    (lambda w: path(w, rank="max"), V, "rank: 'max' given; it is one of 'sum'"),
    (lambda w: path(w, k=3), V, "k: 3 given with rank='sum'; k goes with 'count'"),
    (lambda w: path(w, scope="row"), V, "scope: 'row' given; it is one of 'class_row'"),
    (lambda w: path(w, bound=1), V, "bound: 1 given; it is a fraction in [0, 1)"),
    (lambda w: path(w, noise="pink"), V, "noise: 'pink' given; it is one of None, "),
    (lambda w: path(w, scale=0), V, "scale: 0 given; it is a finite number above"),
    (lambda w: path(w, target=10), V, "target: class 10 is out of range; the model"),
    (lambda w: path(w, target="3"), V, "target: '3' given; it is a whole number"),
    (lambda w: path(w, data=[(w.images[:3], [0, 1, 2])]), V, "class 3"),
    (lambda w: path(w, model=w.no_head), V, "model: a final linear layer is needed"),
    (lambda w: xe.SingleWeight("best"), V, "select: 'best' given; it is one of 'sca'"),
    (lambda w: xe.SingleWeight(rate=50), V, "rate: 50 given; it is a fraction in [0, 1]; is"),
    (lambda w: xe.SingleWeight(n_weights=0), V, "n_weights: 0 given; it is a whole number from 1"),
    (lambda w: xe.SingleWeight(n_weights=True), V, "n_weights: True given; it is a whole number"),
    (lambda w: xe.SingleWeight(rate=NAN), V, "rate: nan given; it is a fraction in [0, 1]"),
    (lambda w: xe.SingleWeight(tolerance=2), V, "tolerance: 2 given; it is a fraction"),
    (lambda w: xe.SingleWeight(anchor="yes"), V, "anchor: 'yes' given"),
    (lambda w: xe.SingleWeight(seed=1.5), V, "seed: 1.5 given; it is a whole number"),
    (lambda w: single(w, w.bare), V, "data: has no labels; give (input, label) batches"),
    (lambda w: single(w, w.data, [3, 3]), V, "target: [3, 3] given; give one class or several"),
    (lambda w: xe.FictitiousClass(rate="best"), V, "rate: 'best' given; it is 'auto', 'least"),
    (lambda w: xe.FictitiousClass(rate={0: 50}), V, "rate: 50 given; it is a fraction in [0, 1]"),
    (lambda w: xe.FictitiousClass(aim="mean"), V, "aim: 'mean' given; it is one of 'worst"),
    (lambda w: fictitious(w, attribute=torch.ones(60)), V, "attribute: samples with"),
    (lambda w: fictitious(w, attribute=torch.ones(3)), V, "attribute: "),
    (lambda w: fictitious(w, target=10), V, "target: class 10 is out of range; the model"),
    (lambda w: fictitious(w, model=w.one_output), V, "labels: class "),
    (lambda w: xe.comparisons.LEACE().plan(w.model, w.unmarked), V, "attribute: not given, and"),
    (lambda w: xe.comparisons.LEACE().plan(w.model, w.data, attribute=torch.ones(60)),
     V, "all 60 samples"),
    (lambda w: xe.LogitMask().plan(w.model, w.data, target=10), V, "target: class 10 is out"),
    (lambda w: xe.LogitMask().plan(w.no_bias, w.data, target=1), V, "'1' has no bias to"),
    (lambda w: xe.comparisons.SelectiveSynapticDampening(alpha=-1), V, "alpha: -1 given"),
    (lambda w: xe.comparisons.SelectiveSynapticDampening(lambda_=-1), V, "lambda_: -1 given"),
    (lambda w: xe.comparisons.SelectiveSynapticDampening(chunk_size=0), V, "chunk_size: 0 given"),
    (lambda w: dampen(w, alpha=99), V, "alpha: 99 given; with 6 of 60 samples in the"),
    (lambda w: xe.LastLayerRetraining(C=0), V, "C: 0 given; it is a finite number above 0"),
    (lambda w: xe.LastLayerRetraining(C="tuned"), V, "C: 'tuned' given"),
    (lambda w: xe.LastLayerRetraining(0), V, "repeats: 0 given; it is a whole number from 1"),
    (lambda w: xe.to_smaller(w.model, None, w.images), V, "edit: no unit that can be removed"),
    (lambda w: xe.to_smaller(w.model, w.edit, torch.rand(1, 3, 8, 8)), V, "(1, 3, 8,"),
    (lambda w: xe.to_smaller(w.no_bias, w.edit, w.images), V, "'conv2.weight', which"),
]
CONCEPTS = [
    (lambda w: xe.Subspaces(tensors(3), (1,), tensors(3)), V, "basis: shape (3,), torch"),
    (lambda w: xe.Subspaces(tensors(3, 2), (1, 1), tensors(3)), V, "basis: columns are not"),
    (lambda w: xe.Subspaces(EYE, (2,), tensors(3)), V, "sizes: (2,) given; they cut 3 directions"),
    (lambda w: xe.Subspaces(EYE, (3,), tensors(2)), V, "mean: shape (2,), torch.float64 given;"),
    (lambda w: xe.Subspaces(EYE, (3,), tensors(3) * NAN), N, "mean: NaN or infinite"),
    (lambda w: w.subspaces.block(5), V, "subspaces: [5] given; there are 2"),
    (lambda w: w.subspaces.directions([]), V, "subspaces: [] given; there are 2"),
    (lambda w: w.subspaces.directions(1.5), V, "subspaces: 1.5 given; give a list"),
    (lambda w: w.subspaces.project(torch.rand(2, 7)), V, "activations: (2, 7) given; the"),
    (lambda w: w.subspaces.ablate(torch.rand(2, 7), [0]), V, "activations: (2, 7) given;"),
    (lambda w: w.subspaces.split(*torch.rand(2, 2, 7)), V, "activations: (2, 7) given"),
    (lambda w: w.subspaces.split(torch.rand(4), torch.rand(7)), V, "contexts: (7,) given"),
    (lambda w: rows([1.0]), V, "activations: (1,) given; their shape is (vectors"),
    (lambda w: rows([[1.0]], [[1.0, 2.0]]), V, "contexts: (1, 2) given; activations have"),
    (lambda w: rows([[1.0]], sample=torch.ones(2).long()), V, "sample: ((2,), torch.int64)"),
    (lambda w: rows([[1.0]], labels=torch.ones(2)), V, "labels: (2,) given; one number for each"),
    (lambda w: rows([[NAN]]), N, "activations: NaN or infinite values"),
    (lambda w: collect(w, positions=0), V, "positions: 0 given; it is a whole number from 1"),
    (lambda w: collect(w, seed=-1), V, "seed: -1 given; it is a whole number from 0"),
    (lambda w: collect(w, scorer="epsilon"), T, "scorer: str given; contexts need a"),
    (lambda w: collect(w, scorer=xe.Taylor()), T, "scorer: Taylor given; contexts need"),
    (lambda w: collect(w, layer="relu9"), L, "layer 'relu9' not found"),
    (lambda w: collect(w, on_disk="none/a"), OSError, "the folder 'none' does not exist"),
    (lambda w: collect(w, attribute=torch.ones(9)), V, "attribute: (9,) values for 30 samples"),
    (lambda w: collect(w, target="label 3"), V, "target: 'label 3' given"),
    (lambda w: xe.PCA(0), V, "n_subspaces: 0 given; it is a whole number from 1"),
    (lambda w: xe.PCA(9).fit(w.features), V, "n_subspaces: 9 given; the activations vary in"),
    (lambda w: xe.PRCA().fit(w.plain_features), V, "features: they have no contexts; collect"),
    (lambda w: xe.PRCA(9).fit(w.features), V, "n_subspaces: 9 given; relevance is positive"),
    (lambda w: xe.PRCA(1).fit(rows(E, N_E)), V, "relevance is positive along 0 directions"),
    (lambda w: xe.DRSA(0), V, "n_subspaces: 0 given; it is a whole number"),
    (lambda w: xe.DRSA(tol=2), V, "tol: 2 given; it is a fraction in [0, 1)"),
    (lambda w: xe.DRSA(2, size=3).fit(w.features), V, "2 of 3 directions asked for; the features"),
    (lambda w: xe.DRSA(2).fit(rows(E[:1], E[:1])), V, "features: 1 given; 2 directions need"),
    (lambda w: xe.DRSA(1).fit(rows(E, N_E)), V, "features: no positive relevance in any"),
    (lambda w: xe.CAV("mean"), V, "kind: 'mean' given; it is one of 'pattern', 'logistic'"),
    (lambda w: xe.CAV(C=-1), V, "C: -1 given; it is a finite number above 0"),
    (lambda w: xe.CAV().fit(w.unlabelled), V, "attribute: one yes (1) or no (0) for each"),
    (lambda w: xe.CAV().fit(w.features, torch.ones(60)), V, "and some of each"),
    (lambda w: xe.ContrastivePCA(0), V, "size: 0 given; it is a whole number from 1"),
    (lambda w: xe.ContrastivePCA(4).fit(w.features), V, "size: 4 given; the activations vary"),
    (lambda w: xe.ContrastivePCA(1).fit(w.features, w.labels % 2), V, "features: no class has"),
    (lambda w: predict(w, w.wide), V, "4) given; the subspaces have 7 channels"),
    (lambda w: predict(w, resamples=0), V, "resamples: 0 given; it is a whole number from"),
    (lambda w: predict(w, target=99), V, "target: 99 given; the samples' classes are [0, 1"),
    (lambda w: predict(w, labels=torch.ones(3)), V, "labels: (3,) given; one class"),
    (lambda w: xe.predictiveness(w.subspaces, w.unlabelled), V, "attribute: one yes (1) or"),
    (lambda w: predict(w, resamples=2).column("mean"), V, "column: 'mean' given; there are"),
    (lambda w: enter(xe.ablated(w.model, "fc1:input", w.wide, [0])), V, "'fc1:input' given"),
    (lambda w: enter(xe.ablated(w.model, "fc9", w.wide, [0])), L, "layer 'fc9' not found"),
    (lambda w: xe.with_ablation(w.model, "relu1", w.subspaces, [5]), V, "[5] given"),
    (lambda w: xe.with_ablation(w.uncopyable, "relu1", w.subspaces, [0]), V, "be copied"),
    (lambda w: xe.fold_ablation(w.model, "relu1", w.subspaces, [0], w.images), V, "'relu1': its"),
    (lambda w: xe.with_ablation(w.model, "relu1", w.wide, [0])(w.images), V, "of 7 channels,"),
    (lambda w: xe.concepts.strongest_samples(w.subspaces, w.features, count=0),
     V, "count: 0 given"),
    (lambda w: xe.concepts.strongest_samples(w.subspaces, w.features, count=99),
     V, "count: 99 given; it is a whole number from 1 to 60"),
    (lambda w: maps(w, scorer=xe.Taylor()), T, "scorer: Taylor given; maps need a rule"),
    (lambda w: maps(w, inputs=[1]), T, "inputs: list given; give a batch as one tensor"),
    (lambda w: maps(w, inputs=w.images.long()), V, "inputs: torch.int64 given; token ids"),
    (lambda w: maps(w, subspaces=w.wide), V, "given; the subspaces have 7 channels"),
]
EVALUATION = [
    (lambda w: xe.evaluate_groups(w.model, w.bare), V, "data: has no labels; give (input"),
    (lambda w: groups(w, data=[(w.images, w.labels + 1)]), V, "labels: class 10 is out of"),
    (lambda w: groups(w, groups=torch.ones(9)), V, "groups: (9,) values for 30 samples"),
    (lambda w: groups(w, groups=lambda x: -torch.ones(len(x))), V, "groups: -1 given; they"),
    (lambda w: groups(w, train_samples="many"), V, "train_samples: 'many' given; give"),
    (lambda w: groups(w).gap("median"), V, "average: 'median' given; it is one of 'average'"),
    (lambda w: groups(w).of(99), V, "classes: no samples"),
    (lambda w: unlearning(w, 3), T, "edit: int given; give a ModelEdit or a network"),
    (lambda w: unlearning(w, w.model), V, "edit: the model itself was given"),
    (lambda w: unlearning(w, target=10), V, "target: class 10 is out of range"),
    (lambda w: unlearning(w, target=range(10)), V, "train: no samples of any class but"),
    (lambda w: unlearning(w, train=iter(w.data)), T, "train: a list_iterator can be read"),
    (lambda w: unlearning(w, test=[(w.images[:2], [0, 1])]), V, "test: no samples of class 3"),
    (lambda w: unlearning(w, analysis=w.data), V, "analysis: of 60 different samples"),
    (lambda w: unlearning(w, relearn=(5, 1)), V, "relearn: (5, 1) given; give steps from"),
    (lambda w: unlearning(w, retrained="net"), T, "retrained: str given; give a ModelEdit"),
    (lambda w: xe.compare_sizes(w.model, w.model, torch.rand(1, 3, 8, 8)), V, "(1, 3, 8, 8"),
    (lambda w: xe.before_after_maps(w.model, 3, w.images), T, "edit: int given; give a ModelEdit"),
]
TRAINING = [
    (lambda w: xe.FineTuning(iter(w.data)), T, "data: a list_iterator can be read only once"),
    (lambda w: xe.comparisons.random_labels(w.model, w.data, target=10), V, "target: class 10 is"),
    (lambda w: xe.comparisons.negative_gradient(w.model, w.data, target=1, learning_rate=0),
     V, "learning_rate: 0 given"),
    (lambda w: xe.comparisons.random_labels(w.model, w.data, target=range(10)),
     V, "target: all 10 classes"),
    (lambda w: xe.comparisons.boundary_shrink(w.model, w.data, target=1, epsilon=0),
     V, "epsilon: 0 given"),
    (lambda w: enter(xe.comparisons.AmnesiacLog().recording(w.model, [0.5])),
     V, "labels: torch.float32"),
    (lambda w: xe.comparisons.retrain(w.model, w.data, target=1, build=3, train=print),
     T, "build: int given"),
    (lambda w: xe.comparisons.retrain(w.model, w.data, target=1, build=PlainNet, train=3),
     T, "train: int given"),
]
SHORTCUTS = [
    (lambda w: xe.datasets.Mark(PICTURE, place=(-1, 0)), V, "place: -1 given; it is a whole"),
    (lambda w: xe.datasets.Mark(PICTURE, size=(0, 3)), V, "size: 0 given; it is a whole number"),
    (lambda w: xe.datasets.Mark("none.png"), OSError, "picture: none.png: no such file"),
    (lambda w: xe.datasets.Colours([(1, 2, 3)]), V, "colours: [(1, 2, 3)] given; give two or more"),
    (lambda w: xe.datasets.Colours([(0, 0, 256)] * 2), V, "colours: [(0, 0, 256), (0, 0, 256)]"),
    (lambda w: xe.datasets.Shortcut("mark", 0.9), V, "planted: 'mark' given; give Mark(…),"),
    (lambda w: xe.datasets.Shortcut(RED, 90), V, "strength: 90 given; it is a fraction in [0, 1]"),
    (lambda w: planted(w, RED), V, "goes_with: attribute 3 for a label, and what is planted"),
]
# fmt: on
CASES = [*SCORERS, *EDITS, *OPERATORS, *CONCEPTS, *EVALUATION, *TRAINING, *SHORTCUTS]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2] for case in CASES])
def test_bad_input_is_one_clear_error_and_every_model_stays_as_it_was(
    call, error, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    w = world()
    models = [each for each in vars(w).values() if isinstance(each, nn.Module)]
    checks = [snapshot(model) for model in models]
    with pytest.raises(error, match=re.escape(message)) as raised:
        call(w)
    for check in checks:
        check()
    assert [*tmp_path.iterdir()] == []
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


class Failing(nn.Module):
    """Two layers, of which one may be checkpointed, or an error of the model's own."""

    def __init__(self, problem=None, *, reentrant=None):
        super().__init__()
        self.problem, self.reentrant = problem, reentrant
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        if self.problem is not None:
            raise self.problem
        if self.reentrant is None:
            return self.last(self.first(x))
        return self.last(checkpoint(self.first, x, use_reentrant=self.reentrant))


LRP = xe.LRP()
FULL = [torch.cuda.OutOfMemoryError("Tried"), RuntimeError("can't allocate memory"), MemoryError()]
PAIR = [(torch.ones(2, 2), torch.tensor([0, 1]))]


@pytest.mark.parametrize("problem", FULL, ids=lambda one: type(one).__name__)
def test_a_full_memory_comes_out_as_it_is(problem):
    model = Failing(problem).eval()
    conductance = xe.CaptumLayer(LayerConductance)
    for scorer in (xe.LRP(), xe.Taylor(), conductance):
        with pytest.raises(type(problem)) as raised:
            xe.score_units(model, PAIR, scorer, layers=["first"])
        assert raised.value is problem


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, TypeError])
def test_an_error_of_the_model_is_named_as_its_own(kind):
    model = Failing(kind("my own")).eval()
    message = rf"model: it fails on inputs of shape \(1, 2\).* \({kind.__name__}: my own\)"
    with pytest.raises(ValueError, match=message):
        xe.score_units(model, PAIR, xe.LRP())


@pytest.mark.parametrize("scorer", [LRP, xe.Taylor()], ids=["lrp", "taylor"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_is_scored_alike_or_refused_for_that(scorer, reentrant):
    model = Failing(reentrant=reentrant).eval()
    try:
        found = xe.score_units(model, PAIR, scorer)
    except ValueError as problem:
        assert "checkpointing" in str(problem)  # noqa: PT017
        assert reentrant or scorer is not LRP
    else:
        model.reentrant = None
        expected = xe.score_units(model, PAIR, scorer)
        assert all(torch.equal(found[name], expected[name]) for name in ("first", "last"))


def test_a_network_without_a_unit_that_can_go_is_refused_with_the_reason():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 2),
    ).eval()
    images = torch.rand(2, 3, 8, 8)
    check = snapshot(model)
    message = r"channels of '0' have to stay: native_group_norm in '1' \(GroupNorm\) mixes"
    with pytest.raises(ValueError, match=message):
        xe.RelevancePruning(0.5).plan(model, [images], target=1)
    with pytest.raises(ValueError, match="no unit that can be removed is switched off"):
        xe.to_smaller(model, None, images)
    check()


class ResponseNorm(nn.Module):
    """Global response normalisation, as in ConvNeXt V2."""

    def forward(self, x):
        energy = x.norm(dim=(2, 3), keepdim=True)
        return x + x * energy / (energy.mean(1, keepdim=True) + 1e-6)


def test_channels_that_a_mean_over_channels_mixes_are_named_once_with_the_reason():
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), ResponseNorm()) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    message = (
        r"channels of '0.0' and 3 more have to stay: mean in '0.1' \(ResponseNorm\) mixes the "
        "channels by their mean, which differs without some of them$"
    )
    with pytest.raises(ValueError, match=message):
        xe.RelevancePruning(0.5).plan(model, [torch.rand(2, 3, 8, 8)], target=1)


# What is no error, and what then happens


@pytest.mark.parametrize("kind", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_training_counts_may_be_lists_or_arrays(kind):
    w = world()
    counts = groups(w).samples
    expected = groups(w, train_samples=counts)
    found = groups(w, train_samples=kind(counts))
    assert torch.equal(found.train_samples, counts)
    assert found.train_weighted == expected.train_weighted


def test_a_layer_without_positions_gives_one_vector_a_sample():
    w = world()
    for positions in (None, 1, 20):
        features = xe.collect_features(w.model, w.data, layer="fc1", positions=positions)
        assert features.activations.shape == (60, 12)
        assert features.sample.tolist() == [*range(60)]


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_share_that_would_empty_layers_leaves_each_its_best_unit_and_says_so(ranking, steps):
    w = world()
    operator = xe.RelevancePruning(1.0, ranking=ranking, steps=steps)
    edit = operator.plan(w.model, w.data)
    assert edit.origin["kept"] == {"one unit each, though the share takes all": ["conv1", "conv2"]}
    assert edit.origin["removed"] == "8 of 10 units"
    removed = {name: len(units) for name, units in edit.origin["units"].items()}
    assert removed == {"conv1": 3, "conv2": 5}
    smaller = xe.to_smaller(w.model, edit, w.images)
    assert (smaller.conv1.out_channels, smaller.conv2.out_channels) == (1, 1)
