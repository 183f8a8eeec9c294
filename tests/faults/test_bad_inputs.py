"""Bad input to all that is public: one clear error, the model untouched."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torchvision
from captum.attr import LayerConductance, Saliency
from conftest import PlainNet, snapshot
from torch import nn
from zennit.composites import EpsilonPlus

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
    head = xe.collect_head_features(model, data, with_attribute=True)
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
        head=head,
        edit=xe.RelevancePruning(0.5, xe.WeightMagnitude()).plan(model, data),
        pair=ImageSet(torch.zeros(8, 1, 9, 9).byte(), torch.arange(8) % 2, (0.5,), (0.5,), 9),
        grey=ImageSet(torch.zeros(8, 1, 9, 9).byte(), torch.arange(8) % 4, (0.5,), (0.5,), 9),
        colour=ImageSet(torch.zeros(8, 3, 9, 9).byte(), torch.arange(8) % 2, (0,) * 3, (1,) * 3, 9),
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


def planted(w, what, images=None):
    return xe.datasets.Shortcut(what, 0.9).train(w.grey if images is None else images, seed=0)


EYE = torch.eye(3).double()
E, N_E = [[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]
PICTURE = torch.full((4, 3, 3), 255).byte()
RED = xe.datasets.Colours([(255, 0, 0), (0, 255, 0)])
T, V, N, L = TypeError, ValueError, xe.core.NonFiniteError, xe.core.UnknownLayerError
# What is wrong, the call, what is raised, a piece of what it says.
# fmt: off
SCORERS = [
    ("logits", lambda w: score(w, target=lambda z: z),
     V, "target: the function of the logits gave"),
    ("ones", lambda w: score(w, target=lambda z: torch.ones(len(z))),
     V, "target: the function of the"),
    ("a class", lambda w: score(w, scorer=xe.LRP), T, "scorer: <class"),
    ("a name", lambda w: score(w, scorer="epsilon"), T, "scorer: 'epsilon' given; wrap"),
    ("maps", lambda w: score(w, model=w.no_logits), V, "model: its output is (30, 10, 6, 6) for"),
    ("preset", lambda w: xe.LRP("epsilonn"), V, "composite: 'epsilonn' is not a preset"),
    ("composite", lambda w: xe.LRP(3), T, "composite: 3 is neither a preset"),
    ("initial", lambda w: xe.LRP(initial="two"),
     V, "initial: 'two' given; it is one of 'logit', 'one'"),
    ("gamma", lambda w: xe.LRP("epsilon", gamma=1), T, "composite: preset 'epsilon'"),
    ("composite's", lambda w: xe.LRP(EpsilonPlus(), gamma=1), T, "['gamma'] go with a preset name"),
    ("Captum's", lambda w: xe.CaptumLayer(Saliency), T, "method: <class"),
    ("steps", lambda w: xe.CaptumLayer(LayerConductance, steps=1), T, "no argument ['steps'] here"),
    ("seed", lambda w: score(w, scorer=xe.Random(seed="a")), V, "seed: 'a' given"),
    ("patterns", lambda w: xe.fit_patterns(w.model, w.data, layers=["relu1"]),
     V, "layer 'relu1' is"),
    ("check", lambda w: xe.check_model(w.model, w.images * NAN), N, "inputs: NaN or infinite"),
]
EDITS = [
    ("name", lambda w: between(w, **{"conv9.weight": ([0], [1.0])}), V, "'conv9.weight' is not a"),
    ("NaN", lambda w: between(w, **{"fc1.bias": ([0], [NAN])}),
     N, "entries of 'fc1.bias' to values"),
    ("place", lambda w: between(w, **{"fc1.bias": ([12], [1.0])}),
     V, "'fc1.bias' has no entry 12; it has"),
    ("below 0", lambda w: between(w, **{"fc1.bias": ([-1], [1.0])}),
     V, "'fc1.bias' has no entry -1; it has"),
    ("twice", lambda w: between(w, **{"fc1.bias": ([1, 1], [1.0, 2.0])}),
     V, "has entry 1 more than"),
    ("lengths", lambda w: between(w, **{"fc1.bias": ([1, 2], [1.0])}),
     V, "'fc1.bias' has indices of"),
    ("a mask", lambda w: between(w, **{"fc1.bias": ([True], [1.0])}),
     V, "'fc1.bias' has indices of"),
    ("origin", lambda w: xe.ModelEdit.between(w.model, {}, {"at": {1}}),
     T, "origin: Object of type"),
    ("copy", lambda w: xe.ModelEdit.to_copy(w.model, w.no_bias, {}),
     V, "copy: has no 'conv1.weight'"),
    ("model", lambda w: w.edit.apply(w.no_bias),
     V, "'conv2.weight', which the model does not have"),
    ("undo", lambda w: w.edit.undo(w.model), V, "the model does not hold this edit"),
    ("folder", lambda w: w.edit.save("none/edit"), OSError, "the folder 'none' does not exist"),
    ("no file", lambda w: xe.ModelEdit.load("none"), OSError, "none: no such file"),
    ("a folder", lambda w: xe.ModelEdit.load("."), xe.core.EditFileError, ".: cannot be read"),
]
OPERATORS = [
    ("share 0", lambda w: prune(w, 0), V, "share: 0 given; it is a fraction in (0, 1]"),
    ("share 30", lambda w: prune(w, 30),
     V, "share: 30 given; it is a fraction in (0, 1]; is it in percent"),
    ("share True", lambda w: prune(w, True), V, "share: True given"),
    ("a half", lambda w: prune(w, "half"), V, "share: 'half' given"),
    ("ranking", lambda w: prune(w, ranking="both"), V, "ranking: 'both' given; it is one of"),
    ("steps 0", lambda w: prune(w, steps=0), V, "steps: 0 given; it is a whole number from 1"),
    ("steps 1.5", lambda w: prune(w, steps=1.5), V, "steps: 1.5 given"),
    ("output", lambda w: prune(w, layers=["head"]), V, "layers: 'head' gives the output"),
    ("an activation", lambda w: prune(w, layers=["relu1"]),
     V, "layers: the channels of 'relu1' have"),
    ("protect", lambda w: prune(w, protect=["conv9"]),
     L, "layer 'conv9' not found; did you mean 'conv2'"),
    ("one pass", lambda w: prune(w, data=iter(w.data), steps=2),
     T, "a list_iterator can be read only"),
    ("fine_tune", lambda w: prune(w, fine_tune=3), T, "fine_tune: 3 given"),
    ("checkpoint", lambda w: prune(w, checkpoint="none/a"), OSError, "the folder 'none' does not"),
    ("no copy", lambda w: prune(w, model=w.uncopyable),
     V, "model: it cannot be copied (only leaves"),
    ("no layers", lambda w: prune(w, model=w.one_output),
     V, "layers: the model has no convolution"),
    ("subspaces", lambda w: aware(w, subspaces="CAV"), T, "subspaces: 'CAV' given; give Subspaces"),
    ("ablate 9", lambda w: aware(w, ablate=[9]), V, "subspaces: [9] given; there are 2"),
    ("ablate all", lambda w: aware(w, ablate="all"), V, "ablate: 'all' given; it is 'auto' or"),
    ("layer", lambda w: aware(w, layer="relu9"), L, "layer 'relu9' not found"),
    ("features", lambda w: aware(w, subspaces=xe.CAV()), V, "features: none given; a finder and"),
    ("too many", lambda w: aware(w, features=w.features), V, "features: given, but"),
    ("channels", lambda w: aware(w, subspaces=w.wide),
     V, "subspaces: of 7 channels, but the layer"),
    ("keep", lambda w: aware(w, keep_ablation=True), V, "layer 'relu1': its output goes to"),
    ("path: share", lambda w: path(w, share=2), V, "share: 2 given; it is a fraction in (0, 1]"),
    ("path: rank", lambda w: path(w, rank="max"), V, "rank: 'max' given; it is one of 'sum'"),
    ("path: k", lambda w: path(w, k=3), V, "k: 3 given with rank='sum'; k goes with 'count'"),
    ("path: scope", lambda w: path(w, scope="row"), V, "scope: 'row' given; it is one of 'neuron'"),
    ("path: bound", lambda w: path(w, bound=1), V, "bound: 1 given; it is a fraction in [0, 1)"),
    ("path: noise", lambda w: path(w, noise="pink"), V, "noise: 'pink' given; it is one of None, "),
    ("path: scale", lambda w: path(w, scale=0), V, "scale: 0 given; it is a finite number above"),
    ("path: class", lambda w: path(w, target=10), V, "target: class 10 is out of range; the model"),
    ("path: word", lambda w: path(w, target="3"), V, "target: '3' given; it is a whole number"),
    ("path: absent", lambda w: path(w, data=[(w.images[:3], [0, 1, 2])]), V, "class 3"),
    ("path: output", lambda w: path(w, layer="head"), V, "'head' is the output; name 'head:input'"),
    ("path: no head", lambda w: path(w, model=w.no_head),
     V, "model: a final linear layer is needed"),
    ("select", lambda w: xe.SingleWeight("best"), V, "select: 'best' given; it is one of 'sca'"),
    ("rate", lambda w: xe.SingleWeight(rate=50),
     V, "rate: 50 given; it is a fraction in [0, 1]; is"),
    ("n_weights", lambda w: xe.SingleWeight(n_weights=0),
     V, "n_weights: 0 given; it is a whole number from 1"),
    ("tolerance", lambda w: xe.SingleWeight(tolerance=2),
     V, "tolerance: 2 given; it is a fraction"),
    ("anchor", lambda w: xe.SingleWeight(anchor="yes"), V, "anchor: 'yes' given"),
    ("seed", lambda w: xe.SingleWeight(seed=1.5), V, "seed: 1.5 given; it is a whole number"),
    ("unlabelled", lambda w: single(w, w.bare),
     V, "data: has no labels; give (input, label) batches"),
    ("absent", lambda w: single(w, [(w.images[:2], [0, 1])]),
     V, "target: class 3 is absent from the"),
    ("twice", lambda w: single(w, w.data, [3, 3]),
     V, "target: [3, 3] given; give one class or several"),
    ("others", lambda w: single(w, w.head, 3, w.no_bias),
     V, "data: its features were collected for"),
    ("rate", lambda w: xe.FictitiousClass(rate="best"),
     V, "rate: 'best' given; it is 'auto', 'least"),
    ("aim", lambda w: xe.FictitiousClass(aim="mean"), V, "aim: 'mean' given; it is one of 'worst"),
    ("no feature", lambda w: fictitious(w, w.unmarked),
     V, "attribute: not given, and the data has no"),
    ("all have it", lambda w: fictitious(w, attribute=torch.ones(60)),
     V, "attribute: samples with"),
    ("short", lambda w: fictitious(w, attribute=torch.ones(3)), V, "attribute: "),
    ("target 10", lambda w: fictitious(w, target=10),
     V, "target: class 10 is out of range; the model"),
    ("one output", lambda w: fictitious(w, model=w.one_output), V, "labels: class "),
    ("LEACE", lambda w: xe.comparisons.LEACE().plan(w.model, w.unmarked),
     V, "attribute: not given, and the data"),
    ("LEACE, all", lambda w: xe.comparisons.LEACE().plan(w.model, w.data, attribute=torch.ones(60)),
     V, "all 60 samples"),
    ("mask", lambda w: xe.LogitMask().plan(w.model, w.data, target=10),
     V, "target: class 10 is out"),
    ("no bias", lambda w: xe.LogitMask().plan(w.no_bias, w.data, target=1),
     V, "'1' has no bias to"),
    ("alpha", lambda w: xe.comparisons.SelectiveSynapticDampening(alpha=-1), V, "alpha: -1 given"),
    ("alpha 99", lambda w: dampen(w, alpha=99), V, "alpha: 99 given; with 6 of 60 samples in the"),
    ("C", lambda w: xe.LastLayerRetraining(C=0),
     V, "C: 0 given; it is a finite number above 0"),
    ("repeats", lambda w: xe.LastLayerRetraining(0),
     V, "repeats: 0 given; it is a whole number from 1"),
    ("smaller", lambda w: xe.to_smaller(w.model, None, w.images),
     V, "edit: no unit that can be removed"),
    ("wrong input", lambda w: xe.to_smaller(w.model, w.edit, torch.rand(1, 3, 8, 8)),
     V, "(1, 3, 8,"),
    ("wrong edit", lambda w: xe.to_smaller(w.no_bias, w.edit, w.images),
     V, "'conv2.weight', which"),
]
CONCEPTS = [
    ("one axis", lambda w: xe.Subspaces(tensors(3), (1,), tensors(3)),
     V, "basis: shape (3,), torch"),
    ("zeros", lambda w: xe.Subspaces(tensors(3, 2), (1, 1), tensors(3)),
     V, "basis: columns are not"),
    ("sizes", lambda w: xe.Subspaces(EYE, (2,), tensors(3)),
     V, "sizes: (2,) given; they cut 3 directions"),
    ("mean", lambda w: xe.Subspaces(EYE, (3,), tensors(2)),
     V, "mean: shape (2,), torch.float64 given; expected"),
    ("mean NaN", lambda w: xe.Subspaces(EYE, (3,), tensors(3) * NAN), N, "mean: NaN or infinite"),
    ("block 5", lambda w: w.subspaces.block(5), V, "subspaces: [5] given; there are 2"),
    ("no block", lambda w: w.subspaces.directions([]), V, "subspaces: [] given; there are 2"),
    ("no list", lambda w: w.subspaces.directions(1.5), V, "subspaces: 1.5 given; give a list"),
    ("project", lambda w: w.subspaces.project(torch.rand(2, 7)),
     V, "activations: (2, 7) given; the subspaces"),
    ("ablate", lambda w: w.subspaces.ablate(torch.rand(2, 7), [0]),
     V, "activations: (2, 7) given;"),
    ("split", lambda w: w.subspaces.split(*torch.rand(2, 2, 7)),
     V, "activations: (2, 7) given"),
    ("split", lambda w: w.subspaces.split(torch.rand(4), torch.rand(7)),
     V, "contexts: (7,) given"),
    ("axes", lambda w: rows([1.0]), V, "activations: (1,) given; their shape is (vectors"),
    ("contexts", lambda w: rows([[1.0]], [[1.0, 2.0]]),
     V, "contexts: (1, 2) given; activations have"),
    ("sample", lambda w: rows([[1.0]], sample=torch.ones(2).long()),
     V, "sample: ((2,), torch.int64) given; it is 1"),
    ("labels", lambda w: rows([[1.0]], labels=torch.ones(2)),
     V, "labels: (2,) given; one number for each of 1"),
    ("a NaN", lambda w: rows([[NAN]]), N, "activations: NaN or infinite values"),
    ("positions", lambda w: collect(w, positions=0),
     V, "positions: 0 given; it is a whole number from 1"),
    ("seed", lambda w: collect(w, seed=-1), V, "seed: -1 given; it is a whole number from 0"),
    ("a rule", lambda w: collect(w, scorer="epsilon"),
     T, "scorer: str given; contexts need a"),
    ("Taylor", lambda w: collect(w, scorer=xe.Taylor()),
     T, "scorer: Taylor given; contexts need"),
    ("layer", lambda w: collect(w, layer="relu9"), L, "layer 'relu9' not found"),
    ("on_disk", lambda w: collect(w, on_disk="none/a"),
     OSError, "the folder 'none' does not exist"),
    ("spurious", lambda w: collect(w, attribute=torch.ones(9)),
     V, "attribute: (9,) values for 30 samples"),
    ("words", lambda w: collect(w, target="label 3"), V, "target: 'label 3' given"),
    ("PCA 0", lambda w: xe.PCA(0), V, "n_subspaces: 0 given; it is a whole number from 1"),
    ("PCA 9", lambda w: xe.PCA(9).fit(w.features),
     V, "n_subspaces: 9 given; the activations vary in"),
    ("PCA of 1", lambda w: xe.PCA(1).fit(rows([[1.0]])),
     V, "features: 1 given; at least 2 vectors"),
    ("PRCA", lambda w: xe.PRCA().fit(w.plain_features),
     V, "features: they have no contexts; collect"),
    ("PRCA 9", lambda w: xe.PRCA(9).fit(w.features),
     V, "n_subspaces: 9 given; relevance is positive"),
    ("PRCA, < 0", lambda w: xe.PRCA(1).fit(rows(E, N_E)),
     V, "relevance is positive along 0 directions"),
    ("DRSA 0", lambda w: xe.DRSA(0), V, "n_subspaces: 0 given; it is a whole number"),
    ("tol", lambda w: xe.DRSA(tol=2), V, "tol: 2 given; it is a fraction in [0, 1)"),
    ("DRSA 9", lambda w: xe.DRSA(9).fit(w.features), V, "n_subspaces: 9 of 1 directions asked for"),
    ("size 3", lambda w: xe.DRSA(2, size=3).fit(w.features),
     V, "2 of 3 directions asked for; the features"),
    ("few", lambda w: xe.DRSA(2).fit(rows(E[:1], E[:1])),
     V, "features: 1 given; 2 directions need"),
    ("DRSA, < 0", lambda w: xe.DRSA(1).fit(rows(E, N_E)),
     V, "features: no positive relevance in any"),
    ("contexts", lambda w: xe.DRSA(2).fit(w.plain_features),
     V, "features: they have no contexts; collect"),
    ("kind", lambda w: xe.CAV("mean"),
     V, "kind: 'mean' given; it is one of 'pattern', 'logistic'"),
    ("C", lambda w: xe.CAV(C=-1), V, "C: -1 given; it is a finite number above 0"),
    ("unmarked", lambda w: xe.CAV().fit(w.unlabelled),
     V, "attribute: one yes (1) or no (0) for each"),
    ("all marked", lambda w: xe.CAV().fit(w.features, torch.ones(60)), V, "and some of each"),
    ("equal", lambda w: xe.CAV().fit(rows([[1.0], [1.0]]), torch.tensor([0, 1])),
     V, "do not differ"),
    ("size", lambda w: xe.ContrastivePCA(0), V, "size: 0 given; it is a whole number from 1"),
    ("size 4", lambda w: xe.ContrastivePCA(4).fit(w.features),
     V, "size: 4 given; the activations vary"),
    ("apart", lambda w: xe.ContrastivePCA(1).fit(w.features, w.labels % 2),
     V, "features: no class has"),
    ("channels", lambda w: predict(w, w.wide),
     V, "subspaces: of 7 channels, but the features have 4"),
    ("resamples", lambda w: predict(w, resamples=0),
     V, "resamples: 0 given; it is a whole number from"),
    ("target", lambda w: predict(w, target=99),
     V, "target: 99 given; the samples' classes are [0, 1"),
    ("few labels", lambda w: predict(w, labels=torch.ones(3)),
     V, "labels: (3,) given; one class"),
    ("no labels", lambda w: xe.predictiveness(w.subspaces, w.unlabelled),
     V, "attribute: one yes (1) or"),
    ("column", lambda w: predict(w, resamples=2).column("mean"),
     V, "column: 'mean' given; there are"),
    ("inputs", lambda w: enter(xe.ablated(w.model, "fc1:input", w.wide, [0])),
     V, "'fc1:input' given"),
    ("no layer", lambda w: enter(xe.ablated(w.model, "fc9", w.wide, [0])),
     L, "layer 'fc9' not found"),
    ("number 5", lambda w: xe.with_ablation(w.model, "relu1", w.subspaces, [5]),
     V, "[5] given"),
    ("uncopied", lambda w: xe.with_ablation(w.uncopyable, "relu1", w.subspaces, [0]),
     V, "be copied"),
    ("fold", lambda w: xe.fold_ablation(w.model, "relu1", w.subspaces, [0], w.images),
     V, "'relu1': its"),
    ("wide", lambda w: xe.with_ablation(w.model, "relu1", w.wide, [0])(w.images),
     V, "of 7 channels,"),
    ("count 0", lambda w: xe.concepts.strongest_samples(w.subspaces, w.features, count=0),
     V, "count: 0 given"),
    ("count 99", lambda w: xe.concepts.strongest_samples(w.subspaces, w.features, count=99),
     V, "count: 99 given; it is a whole number from 1 to 60"),
    ("maps", lambda w: maps(w, scorer=xe.Taylor()), T, "scorer: Taylor given; maps need a rule"),
    ("a list", lambda w: maps(w, inputs=[1]), T, "inputs: list given; give a batch as one tensor"),
    ("tokens", lambda w: maps(w, inputs=w.images.long()),
     V, "inputs: torch.int64 given; token ids"),
    ("map wide", lambda w: maps(w, subspaces=w.wide),
     V, "subspaces: of 7 channels, but the values of"),
]
EVALUATION = [
    ("no labels", lambda w: xe.evaluate_groups(w.model, w.bare),
     V, "data: has no labels; give (input"),
    ("label 10", lambda w: groups(w, data=[(w.images, w.labels + 1)]),
     V, "labels: class 10 is out of"),
    ("few", lambda w: groups(w, groups=torch.ones(9)), V, "groups: (9,) values for 30 samples"),
    ("below 0", lambda w: groups(w, groups=lambda x: -torch.ones(len(x))),
     V, "groups: -1 given; they"),
    ("some", lambda w: groups(w, data=[*w.data, *w.unmarked]),
     V, "some batches have groups and some"),
    ("training", lambda w: groups(w, train_samples=torch.ones(2, 2)), V, "train_samples: "),
    ("a list", lambda w: groups(w, train_samples=[6, 6]), V, "train_samples: shape (2,) given"),
    ("words", lambda w: groups(w, train_samples="many"), V, "train_samples: 'many' given; give"),
    ("gap", lambda w: groups(w).gap("median"), V, "average: 'median' given; it is one of average"),
    ("class", lambda w: groups(w).of(99), V, "classes: no samples"),
    ("head", lambda w: xe.evaluate_head(w.head, train_samples=torch.ones(2)), V, "train_samples: "),
    ("edit", lambda w: unlearning(w, 3),
     T, "edit: int given; give a ModelEdit or a network"),
    ("itself", lambda w: unlearning(w, w.model), V, "edit: the model itself was given"),
    ("forget 10", lambda w: unlearning(w, target=10),
     V, "target: target: class 10 is out of range"),
    ("forget all", lambda w: unlearning(w, target=range(10)),
     V, "train: no samples of any class but"),
    ("read once", lambda w: unlearning(w, train=iter(w.data)),
     T, "train: a list_iterator can be read"),
    ("absent", lambda w: unlearning(w, test=[(w.images[:2], [0, 1])]),
     V, "test: no samples of class 3"),
    ("planned on", lambda w: unlearning(w, analysis=w.data),
     V, "analysis: of 60 different samples"),
    ("falling", lambda w: unlearning(w, relearn=(5, 1)),
     V, "relearn: (5, 1) given; give steps from"),
    ("retrained", lambda w: unlearning(w, retrained="net"),
     T, "retrained: str given; give a ModelEdit"),
    ("rounds", lambda w: xe.compare_sizes(w.model, w.model, w.images, rounds=0),
     V, "rounds: 0 given"),
    ("size of", lambda w: xe.compare_sizes(w.model, w.model, torch.rand(1, 3, 8, 8)),
     V, "(1, 3, 8, 8"),
    ("maps of", lambda w: xe.before_after_maps(w.model, 3, w.images),
     T, "edit: int given; give a ModelEdit"),
]
TRAINING = [
    ("once", lambda w: xe.FineTuning(iter(w.data)),
     T, "data: a list_iterator can be read only once"),
    ("epochs", lambda w: xe.FineTuning(w.data, epochs=0)(w.model),
     V, "epochs: 0 given"),
    ("forget", lambda w: xe.comparisons.random_labels(w.model, w.data, target=10),
     V, "target: class 10 is out of"),
    ("rate", lambda w: xe.comparisons.negative_gradient(w.model, w.data, target=1, learning_rate=0),
     V, "learning_rate: 0 given"),
    ("all", lambda w: xe.comparisons.random_labels(w.model, w.data, target=range(10)),
     V, "target: all 10 classes"),
    ("epsilon", lambda w: xe.comparisons.boundary_shrink(w.model, w.data, target=1, epsilon=0),
     V, "epsilon: 0 given"),
    ("no log", lambda w: xe.comparisons.amnesiac(w.model, xe.comparisons.AmnesiacLog(), target=1),
     V, "log: is empty"),
    ("log", lambda w: enter(xe.comparisons.AmnesiacLog().recording(w.model, [0.5])),
     V, "labels: torch.float32"),
    ("no net", lambda w: xe.comparisons.retrain(w.model, w.data, target=1, build=3, train=print),
     T, "build: int given"),
    ("train", lambda w: xe.comparisons.retrain(w.model, w.data, target=1, build=PlainNet, train=3),
     T, "train: int given"),
]
SHORTCUTS = [
    ("opacity", lambda w: xe.datasets.Mark(PICTURE, opacity=0),
     V, "opacity: 0 given; it is above 0 and at most"),
    ("place", lambda w: xe.datasets.Mark(PICTURE, place=(-1, 0)),
     V, "place: (-1, 0) given; row and column"),
    ("size", lambda w: xe.datasets.Mark(PICTURE, size=(0, 3)),
     V, "size: (0, 3) given; height and width are"),
    ("picture", lambda w: xe.datasets.Mark(PICTURE[:3]),
     V, "picture: torch.uint8 of shape (3, 3, 3) given"),
    ("no file", lambda w: xe.datasets.Mark("none.png"), OSError, "picture: none.png: no such file"),
    ("outside", lambda w: planted(w, xe.datasets.Mark(PICTURE, place=(7, 7)), w.pair),
     V, "place: a mark of 3×3"),
    ("colours", lambda w: xe.datasets.Colours([(1, 2, 3)]),
     V, "colours: [(1, 2, 3)] given; give two or more"),
    ("bright", lambda w: xe.datasets.Colours([(0, 0, 256)] * 2),
     V, "colours: [(0, 0, 256), (0, 0, 256)] given"),
    ("coloured", lambda w: planted(w, RED, w.colour),
     V, "images: 3 channels; only grey ones get a"),
    ("what", lambda w: xe.datasets.Shortcut("mark", 0.9),
     V, "planted: 'mark' given; give Mark(…), Colours(…)"),
    ("strength", lambda w: xe.datasets.Shortcut(RED, 90),
     V, "strength: 90 given; it is a share of the images"),
    ("labels", lambda w: planted(w, RED),
     V, "goes_with: attribute 3 for a label, and what is planted"),
    ("none", lambda w: planted(w, RED, w.grey[torch.zeros(0).long()]), V, "images: none given"),
]
# fmt: on
CASES = [
    pytest.param(*case, id=f"{group}: {name}")
    for group, listed in {
        "scorers": SCORERS,
        "edits": EDITS,
        "operators": OPERATORS,
        "concepts": CONCEPTS,
        "evaluation": EVALUATION,
        "training": TRAINING,
        "shortcuts": SHORTCUTS,
    }.items()
    for name, *case in listed
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
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
    told = str(raised.value)
    assert "\n" not in told
    assert len(told) < 600


@pytest.mark.parametrize(
    "call",
    [
        lambda model, images: xe.RelevancePruning(0.5).plan(model, [images], target=1),
        lambda model, images: xe.to_smaller(model, None, images),
    ],
    ids=["pruned", "made smaller"],
)
def test_a_network_that_torch_pruning_cannot_trace_is_told(call):
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    images = torch.rand(2, 3, 64, 64)
    check = snapshot(model)
    with pytest.raises(ValueError, match=r"Torch-Pruning cannot trace ShuffleNetV2 .*such as VGG"):
        call(model, images)
    check()


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
    assert {name: len(units) for name, units in edit.origin["units"].items()} == {
        "conv1": 3,
        "conv2": 5,
    }
    smaller = xe.to_smaller(w.model, edit, w.images)
    assert (smaller.conv1.out_channels, smaller.conv2.out_channels) == (1, 1)
