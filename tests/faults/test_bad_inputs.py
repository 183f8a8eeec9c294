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
from zennit.composites import EpsilonPlus, LayerMapComposite, NameMapComposite, layer_map_base
from zennit.rules import Epsilon, Flat

import xai_edit as xe
from xai_edit.datasets.image_set import ImageSet

NAN = float("nan")
LRP = xe.LRP()


class Uncopyable(PlainNet):
    def __deepcopy__(self, _):
        raise RuntimeError("only leaves can be copied")


class Spare(PlainNet):
    def __init__(self):
        super().__init__()
        self.extra = nn.Conv2d(1, 4, 1)


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
        alike=[(images[:1].repeat(10, 1, 1, 1), labels[:10])],
        direction=xe.Subspaces(torch.eye(12, 1).double(), (1,), torch.zeros(12).double()),
        wide=xe.Subspaces(torch.eye(7).double(), (7,), torch.zeros(7).double()),
        edit=xe.RelevancePruning(0.5, xe.WeightMagnitude()).plan(model, data),
        grey=ImageSet(torch.zeros(8, 1, 9, 9).byte(), torch.arange(8) % 4, (0.5,), (0.5,), 9),
        colour=ImageSet(torch.zeros(4, 3, 9, 9).byte(), torch.arange(4) % 2, (0.5,), (0.5,), 9),
        one_output=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval(),
        no_bias=nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)).eval(),
        no_head=nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(),
        upwards=nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.Flatten()).eval(),
        no_logits=nn.Sequential(nn.Conv2d(1, 10, 3)).eval(),
        uncopyable=Uncopyable().eval(),
        spare=Spare().eval(),
    )


def score(w, **given):
    usual = {"model": w.model, "data": w.data, "scorer": xe.LRP()}
    return xe.score_units(**{**usual, **given})


def edges(w, scorer=LRP, layers="fc1"):
    return xe.edge_relevance(w.model, w.data, scorer, layers=layers)


def gives(change):
    """A scorer that gives the inputs, changed."""
    return lambda m, x, y, layers: dict.fromkeys(layers, change(x.flatten(1)))


def patterns(w, layers):
    return xe.fit_patterns(w.model, w.data, layers=layers)


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
    return planned(xe.ConceptAwarePruning, w, ("data", "features"), **{**usual, **given})


def path(w, **given):
    asked = ("model", "data", "target")
    return planned(xe.PathPerturbation, w, asked, **{"target": 3, **given})


def single(w, data, target=3, model=None):
    return xe.SingleWeight().plan(model or w.model, data, target=target)


def fictitious(w, data=None, model=None, **given):
    return xe.FictitiousClass().plan(model or w.model, data or w.data, **given)


def removes(w, **given):
    return xe.FictitiousClass(aim="removal").plan(w.model, w.data, **given)


def dampen(w, alpha=2, target=3, data=None):
    operator = xe.comparisons.SelectiveSynapticDampening(alpha)
    return operator.plan(w.model, data or w.data, target=target)


def curve(w, **given):
    scores = xe.UnitScores({"fc1": torch.arange(12.0), "head": torch.arange(10.0)}, 1)
    return xe.deletion_curve(w.model, **{"data": w.data, "scores": scores, **given})


def compare(w, scorers=("epsilon",), **given):
    return xe.compare_scorers(w.model, **{"data": w.data, "scorers": scorers, **given})


def only(w, label):
    return [(x[y == label], y[y == label], has[y == label]) for x, y, has in w.data]


def without(w, label):
    return [(x[y != label], y[y != label], has[y != label]) for x, y, has in w.data]


def removal(w, target=3, data=None, **given):
    return xe.ClassSubspaceRemoval(**given).plan(w.model, data or w.data, target=target)


def counterfactual(w, layer="conv1", subspaces=None, attribute=None, data=None, **given):
    subspaces = w.subspaces if subspaces is None else subspaces
    operator = xe.CounterfactualRetraining(layer, subspaces, **given)
    return operator.plan(w.model, data or w.data, attribute=attribute)


def discover(w, **given):
    return xe.discover(w.model, **{"data": w.data, "layers": ["relu1"], **given})


def drawn(w, edit=None, **given):
    given = {"images": w.images[:4], **given}
    return xe.before_after_maps(w.model, edit or w.edit, **given)


def shrink(w, **given):
    return xe.comparisons.boundary_shrink(w.model, w.data, target=1, **given)


def retrain(w, data, model=None, **given):
    return xe.LastLayerRetraining(repeats=1).plan(model or w.model, data, **given)


def rows(a, c=None, **given):
    return xe.concepts.Features(torch.tensor(a), None if c is None else torch.tensor(c), **given)


def collect(w, **given):
    return xe.collect_features(w.model, w.data, **{"layer": "relu1", **given})


def predict(w, subspaces=None, **given):
    return xe.predictiveness(subspaces or w.subspaces, w.features, **given)


def enter(context):
    with context:
        pass


def maps(w, model=None, **given):
    usual = {"inputs": w.images[:2], "subspaces": w.subspaces, "layer": "relu1"}
    return xe.concepts.subspace_maps(model or w.model, **{**usual, "scorer": xe.LRP(), **given})


def present(w, channels, *pooling):
    return xe.concepts.presence(torch.zeros(2, 3, channels), w.subspaces, [0], *pooling)


def groups(w, **given):
    return xe.evaluate_groups(w.model, **{"data": w.data, **given})


def unlearning(w, edit=None, **given):
    usual = {"train": w.data, "test": w.data, "target": 3, "relearn": ()}
    return xe.evaluate_unlearning(w.model, edit or w.edit, **{**usual, **given})


def planted(w, what):
    return xe.datasets.Shortcut(what, 0.9).train(w.grey, seed=0)


E, N_E = [[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]
PICTURE = torch.full((4, 3, 3), 255).byte()
RED = xe.datasets.Colours([(255, 0, 0), (0, 255, 0)])
FOUR = xe.datasets.Colours([(0, 0, value) for value in range(4)])
T, V, N, L = TypeError, ValueError, xe.core.NonFiniteError, xe.core.UnknownLayerError
# The call, the type of the error, the beginning of its message.
# fmt: off
SCORERS = [
    (lambda w: score(w, target=lambda z: z), V, "target: the function of the logits gave"),
    (lambda w: score(w, scorer=xe.LRP), T, "scorer: <class"),
    (lambda w: score(w, scorer="epsilon"), T, "scorer: 'epsilon' given; wrap"),
    (lambda w: score(w, model=w.no_logits), V, "model: its output is (30, 10, 6, 6); a"),
    (lambda w: xe.LRP(EpsilonPlus), T, "nor an instance of a Zennit"),
    (lambda w: xe.LRP(Epsilon()), T, "nor an instance of a Zennit"),
    (lambda w: xe.LRP(None), T, "nor an instance of a Zennit"),
    (lambda w: xe.LRP(EpsilonPlus(), gamma=0.1), T, "['gamma'] go with a preset name"),
    (lambda w: xe.LRP(initial="two"), V, "initial: 'two' given; it is one of 'logit', 'one'"),
    (lambda w: xe.LRP(3), T, "composite: 3 is neither a preset"),
    (lambda w: xe.LRP("epsilom"), V, "composite: 'epsilom' is not a preset"),
    (lambda w: xe.LRP("epsilon", gamma=1), T, "'epsilon': got an unexpected keyword argument 'gam"),
    (lambda w: xe.LRP("epsilon-gamma-box"), T, "box': missing a required argument: 'low'"),
    (lambda w: patterns(w, ["conv9"]), L, "did you mean 'conv"),
    (lambda w: patterns(w, ["relu1"]), V, "'relu1' is a ReLU; linear layers and convolutions"),
    (lambda w: patterns(w, ["fc1:input"]), V, "'fc1:input' is an input"),
    (lambda w: patterns(w, []), V, "an empty list"),
    (lambda w: xe.fit_patterns(w.upwards, w.data, layers=["0"]), V, "'0' is a ConvTranspose2d; "),
    (lambda w: score(w, scorer=lambda *_: {"other": 1}), V, "no scores for layer 'conv1', but"),
    (lambda w: score(w, scorer=gives(lambda x: x.sum(0))), V, "shape (64,) for 30 samples"),
    (lambda w: score(w, scorer=gives(lambda x: x[..., None])), V, "shape (30, 64, 1) for"),
    (lambda w: score(w, scorer=gives(lambda x: x * NAN)), V, "'conv1': NaN or infinite"),
    (lambda w: xe.CaptumLayer(Saliency), T, "method: <class"),
    (lambda w: xe.CaptumLayer(LayerConductance, steps=1), T, "no argument ['steps'] here"),
    (lambda w: xe.CaptumLayer(LayerConductance, target=1), T, "no argument ['target'] here"),
    (lambda w: xe.check_model(w.model, w.images * NAN), N, "batch 0 has inputs that are NaN"),
    (lambda w: score(w, target=-1), V, "target: class -1 is out of range"),
    (lambda w: score(w, data=[(w.images[:2], [0, 10])]), V, "class 10 is out of range; the"),
    (lambda w: score(w, data=w.bare), V, "'label' given, but the data has no labels"),
    (lambda w: score(w, data=[*w.data, w.images * NAN]), N, "batch 2 has inputs that are NaN"),
    (lambda w: score(w, aggregate="max"), V, "'max' given; it is one of 'sum'"),
    (lambda w: score(w, k=0), V, "k: 0 given; it is a whole number from 1 to 4"),
    (lambda w: score(w, k=5), V, "k: 5 given; it is a whole number from 1 to 4"),
    (lambda w: edges(w, xe.Taylor()), T, "needs a rule, so an xai_edit.LRP"),
    (lambda w: edges(w, layers="fc9"), L, "layer 'fc9' not found"),
    (lambda w: edges(w, layers="fc1:input"), V, "'fc1:input' has no weights"),
    (lambda w: edges(w, xe.LRP(NameMapComposite([(["head"], Epsilon())]))), V, "'fc1' has no rule"),
    (lambda w: edges(w).top("fc1", 0), V, "count: 0 given; it is a whole number from 1 to 288"),
    (lambda w: score(w, target=10**20), V, "target: 100000000000000000000 given; it is a"),
    (lambda w: score(w, data=[(w.images[:2], [0, 1e20])]), V, "has labels that are not whole num"),
    (lambda w: score(w, data=[(w.images[:2], [0, 1e999])]), V, "has labels that are not whole num"),
    (lambda w: score(w, data=[(w.images[:2], [0, 10**30])]), T, "has labels that are not numbers"),
    (lambda w: groups(w, groups=torch.full((60,), 1e20)), V, "values that are not whole numbers"),
]
FLAT = xe.LRP(LayerMapComposite([*layer_map_base(), (nn.Conv2d, Flat()), (nn.Linear, Flat())]))
EDITS = [
    (lambda w: between(w, **{"conv9.weight": ([0], [1.0])}), V, "'conv9.weight' is not a"),
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
    (lambda w: aware(w, ablate="all"), V, "ablate: 'all' given; it is 'auto' or"),
    (lambda w: aware(w, data=iter(w.data)), T, 'can be read only once, and criterion="pen'),
    (lambda w: aware(w, layer="relu9"), L, "layer 'relu9' not found"),
    (lambda w: aware(w, subspaces=xe.CAV()), V, "features: none given; a finder and"),
    (lambda w: aware(w, subspaces=w.wide), V, "subspaces: of 7 channels, but the layer"),
    (lambda w: aware(w, keep_ablation=True), V, "layer 'relu1': its output goes to"),
    (lambda w: path(w, share=2), V, "share: 2 given; it is a fraction in (0, 1]"),
    (lambda w: path(w, rank="max"), V, "rank: 'max' given; it is one of 'sum'"),
    (lambda w: path(w, rank="count"), V, "k: None"),
    (lambda w: path(w, rank="count", k=0), V, "k: 0 given"),
    (lambda w: path(w, rank="count", k=13), V, "whole number from 1 to 12"),
    (lambda w: path(w, layer="fcl"), L, "did you mean 'fc1'"),
    (lambda w: path(w, layer="relu3"), V, "'relu3'"),
    (lambda w: path(w, layer="head"), V, "layer: 'head' is the output; name 'head:input'"),
    (lambda w: path(w, layer="fc1:input"), V, "'fc1:input' give scope='neuron'"),
    (lambda w: path(w, noise="gaussian", share="auto"), V, "share: 'auto'"),
    (lambda w: path(w, k=3), V, "k: 3 given with rank='sum'; k goes with 'count'"),
    (lambda w: path(w, scope="row"), V, "scope: 'row' given; it is one of 'class_row'"),
    (lambda w: path(w, bound=1), V, "bound: 1 given; it is a fraction in [0, 1)"),
    (lambda w: path(w, noise="pink"), V, "noise: 'pink' given; it is one of None, "),
    (lambda w: path(w, scale=0), V, "scale: 0 given; it is a finite number above"),
    (lambda w: path(w, target=10), V, "target: class 10 is out of range; the model"),
    (lambda w: path(w, target="3"), V, "target: '3' given; it is a whole number"),
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
    (lambda w: fictitious(w, attribute=torch.ones(3)), V, "attribute: "),
    (lambda w: fictitious(w, w.unmarked), V, "attribute: not given"),
    (lambda w: fictitious(w, attribute=torch.zeros(60), target=3), V, "with and without"),
    (lambda w: fictitious(w, attribute=torch.ones(60), target=3), V, "with and without"),
    (lambda w: fictitious(w, attribute=1 + w.labels % 2, target=3), V, "yes or no"),
    (lambda w: fictitious(w, attribute=255 * (w.labels % 2), target=3), V, "yes or no"),
    (lambda w: fictitious(w, attribute=2 * (w.labels % 2) - 1, target=3), V, "yes or no"),
    (lambda w: fictitious(w, attribute=w.labels % 3), V, "name the value to act on by fictitious="),
    (lambda w: fictitious(w, fictitious=9), V, "fictitious: 9 given"),
    (lambda w: fictitious(w, fictitious=[0, 1], target=3), V, "give one for each target"),
    (lambda w: removes(w, fictitious=[0, 1], target=[0, 1]), V, "are all values of the feature"),
    (lambda w: xe.FictitiousClass("exact", aim="indifference"), V, "goes with the other sel"),
    (lambda w: xe.FictitiousClass("exact").sweep(w.model, w.data, target=1),
     V, "'exact' finds its own dose"),
    (lambda w: fictitious(w, attribute=w.subspaces), V, "attribute: 2 subspaces given; give one"),
    (lambda w: fictitious(w, attribute=w.wide), V, "a subspace of 7 channels"),
    (lambda w: fictitious(w, w.alike, attribute=w.direction), V, "equally strong in all samples"),
    *(
        (lambda w, op=operator, given=given: op("exact", **given), V, f"{message} the other sel")
        for operator in (xe.SingleWeight, xe.FictitiousClass)
        for given, message in (
            ({"rate": 0.5}, "rate: goes with"),
            ({"anchor": True}, "anchor: True goes with"),
        )
    ),
    (lambda w: fictitious(w, target=10), V, "target: class 10 is out of range; the model"),
    (lambda w: fictitious(w, model=w.one_output), V, "labels: class "),
    (lambda w: xe.comparisons.LEACE().plan(w.model, w.unmarked), V, "attribute: not given, and"),
    (lambda w: xe.comparisons.LEACE().plan(w.model, w.data, attribute=torch.ones(60)),
     V, "all 60 samples"),
    (lambda w: xe.comparisons.LEACE().plan(w.no_bias, w.data), V, "no bias"),
    (lambda w: xe.LogitMask().plan(w.model, w.data, target=10), V, "target: class 10 is out"),
    (lambda w: xe.LogitMask().plan(w.no_bias, w.data, target=1), V, "'1' has no bias to"),
    (lambda w: xe.comparisons.SelectiveSynapticDampening(alpha=-1), V, "alpha: -1 given"),
    (lambda w: xe.comparisons.SelectiveSynapticDampening(lambda_=-1), V, "lambda_: -1 given"),
    (lambda w: xe.comparisons.SelectiveSynapticDampening(chunk_size=0), V, "chunk_size: 0 given"),
    (lambda w: dampen(w, target=10), V, "out of range"),
    (lambda w: dampen(w, target=[]), V, "target"),
    (lambda w: dampen(w, target=range(10)), V, "has to stay"),
    (lambda w: dampen(w, data=without(w, 3)), V, "no sample of class 3"),
    (lambda w: dampen(w, data=w.bare), V, "no labels"),
    (lambda w: dampen(w, alpha=99), V, "alpha: 99 given; with 6 of 60 samples in the"),
    (lambda w: removal(w, layer="pool1"), V, "'pool1' cannot be folded into 'head'"),
    (lambda w: removal(w, layer="head"), V, "'head' is the output; name a hidden layer"),
    (lambda w: removal(w, layer="head:input"), V, "name the layer whose outputs lose the subspace"),
    (lambda w: removal(w, layer="nowhere"), L, "nowhere"),
    (lambda w: removal(w, 10, layer="fc1"), V, "class 10 is out of range"),
    (lambda w: removal(w, layer="fc1", directions=12, method="esc"), V, "12 given; it is a whole"),
    (lambda w: removal(w, layer="fc1", directions=2), V, "2 given; 'leace' has 1"),
    (lambda w: removal(w, range(10), directions=1), V, "all 10 classes of the model given"),
    (lambda w: removal(w, method="pca"), V, "method"),
    (lambda w: removal(w, vectors="all"), V, "vectors"),
    (lambda w: removal(w, directions=0), V, "directions"),
    (lambda w: removal(w, bound=1.0), V, "bound"),
    (lambda w: counterfactual(w, attribute=torch.zeros(60)), V, "attribute: no sample with the"),
    (lambda w: counterfactual(w, attribute=torch.ones(60)), V, "attribute: no sample without the"),
    (lambda w: counterfactual(w, attribute=2 * w.labels), V, "given; it is yes or no"),
    (lambda w: counterfactual(w, attribute=torch.ones(2)), V, "attribute"),
    (lambda w: counterfactual(w, layer="conv9"), L, "'conv9'"),
    (lambda w: counterfactual(w, layer="head"), V, "'head' given, the last layer"),
    (lambda w: counterfactual(w, subspaces=w.wide), V, "subspaces have 7 channels"),
    (lambda w: counterfactual(w, subspaces=[0]), T, "subspaces: list given"),
    (lambda w: counterfactual(w, layer=3, subspaces={}), T, "layer: int given; name a layer"),
    (lambda w: counterfactual(w, layer=[], subspaces={}), V, "layer: () given; name a layer"),
    (lambda w: counterfactual(w, layer=["conv1", "fc1"]), V, "name the one layer that the"),
    (lambda w: counterfactual(w, subspaces={"conv2": w.subspaces}), V, "name 'conv2' among"),
    (lambda w: counterfactual(w, ["head", "head:input"], {}), V, "('head': the last layer; 'he"),
    (lambda w: counterfactual(w, size=3), V, "size: 3 given; it is a whole number from 1 to 2"),
    (lambda w: counterfactual(w, size=0), V, "size: 0 given"),
    (lambda w: counterfactual(w, donors=0), V, "donors: 0 given"),
    (lambda w: counterfactual(w, C=0), V, "C: 0 given"),
    (lambda w: counterfactual(w, data=iter(w.data)), T, "can be read only once"),
    (lambda w: counterfactual(w, data=w.bare, attribute=w.labels % 2), V, "data: has no labels"),
    (lambda w: counterfactual(w, data=without(w, 0)), V, "samples of 9 classes"),
    (lambda w: removal(w, data=only(w, 3)), V, "samples of the target alone"),
    (lambda w: removal(w, data=without(w, 3)), V, "class 3 is absent from the data"),
    (lambda w: removal(w, layer="fc1", data=w.bare), V, "data: has no labels"),
    (lambda w: xe.ClassSubspaceRemoval().plan(w.model, w.data, target=3, validation=only(w, 3)),
     V, "have no samples"),
    (lambda w: xe.LastLayerRetraining(C=0), V, "C: 0 given; it is a finite number above 0"),
    (lambda w: xe.LastLayerRetraining(C="tuned"), V, "C: 'tuned' given"),
    (lambda w: retrain(w, w.unmarked), V, "attribute: not given"),
    (lambda w: retrain(w, without(w, 3)), V, "9 classes"),
    (lambda w: retrain(w, w.bare, attribute=w.labels % 2), V, "labels"),
    (lambda w: retrain(w, w.data, w.no_bias), V, "no bias"),
    (lambda w: xe.LastLayerRetraining(0), V, "repeats: 0 given; it is a whole number from 1"),
    (lambda w: xe.to_smaller(w.model, None, w.images), V, "edit: no unit that can be removed"),
    (lambda w: xe.to_smaller(w.model, w.edit, torch.rand(1, 3, 8, 8)), V, "(1, 3, 8,"),
    (lambda w: xe.to_smaller(w.no_bias, w.edit, w.images), V, "'conv2.weight', which"),
]
CONCEPTS = [
    (lambda w: w.subspaces.directions(1.5), V, "subspaces: 1.5 given; give a list"),
    (lambda w: w.subspaces.project(torch.rand(2, 7)), V, "activations: (2, 7) given; the"),
    (lambda w: w.subspaces.ablate(torch.rand(2, 7), [0]), V, "activations: (2, 7) given;"),
    (lambda w: w.subspaces.split(*torch.rand(2, 2, 7)), V, "activations: (2, 7) given"),
    (lambda w: w.subspaces.split(torch.rand(4), torch.rand(7)), V, "contexts: (7,) given"),
    (lambda w: rows([[1.0]], [[1.0, 2.0]]), V, "contexts: (1, 2) given; activations have"),
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
    (lambda w: predict(w, seed=-1), V, "seed"),
    (lambda w: xe.predictiveness(w.subspaces, w.unlabelled, attribute=w.labels % 2, target=2),
     V, "target: 2 given; the samples have no labels"),
    (lambda w: predict(w, resamples=0), V, "resamples: 0 given; it is a whole number from"),
    (lambda w: predict(w, target=99), V, "target: 99 given; the samples' classes are [0, 1"),
    (lambda w: predict(w, labels=torch.ones(3)), V, "labels: (3,) given; one class"),
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
    (lambda w: maps(w, inputs=w.images[:0]), V, "no samples"),
    (lambda w: maps(w, inputs=w.images * NAN), N, "NaN"),
    (lambda w: maps(w, layer="conv3"), L, "conv3"),
    (lambda w: maps(w, w.spare, layer="extra"), V, "'extra' takes no part in the model's forward"),
    (lambda w: maps(w, target=10), V, "target: class 10"),
    (lambda w: maps(w, target="label"), V, "no labels"),
    (lambda w: maps(w, target=torch.zeros(3).long()), V, "target"),
    (lambda w: maps(w, scorer=FLAT), V, "activations of zero have relevance"),
    (lambda w: xe.Presence(-1), V, "threshold: -1 given; it is a finite number"),
    (lambda w: xe.Presence(1.0, "sum"), V, "pooling: 'sum' given; it is one of 'max', 'mean'"),
    (lambda w: present(w, 4, "sum"), V, "pooling: 'sum' given"),
    (lambda w: present(w, 5), V, "subspaces have 4 channels"),
    (lambda w: xe.with_ablation(w.model, "relu1", w.subspaces, [0], when=0.5),
     T, "when: float given; give xai_edit.Presence(threshold)"),
    (lambda w: xe.concepts.strongest_samples(w.wide, w.features, count=1),
     V, "the subspaces have 7 channels"),
    (lambda w: maps(w, scorer=xe.Taylor()), T, "scorer: Taylor given; maps need a rule"),
    (lambda w: maps(w, inputs=[1]), T, "inputs: list given; give a batch as one tensor"),
    (lambda w: maps(w, inputs=w.images.long()), V, "inputs: torch.int64 given; token ids"),
    (lambda w: maps(w, subspaces=w.wide), V, "given; the subspaces have 7 channels"),
]
EVALUATION = [
    (lambda w: groups(w, groups=torch.ones(9)), V, "groups: (9,) values for 30 samples"),
    (lambda w: groups(w, train_samples="many"), V, "train_samples: 'many' given; give"),
    (lambda w: groups(w).intervals(confidence=1.0), V, "confidence: 1.0 given"),
    (lambda w: groups(w).intervals(confidence=95), V, "confidence: 95 given"),
    (lambda w: groups(w).intervals(resamples=0), V, "resamples: 0 given"),
    (lambda w: groups(w).intervals(resamples=10.5), V, "resamples: 10.5 given"),
    (lambda w: groups(w).intervals(seed=-1), V, "seed: -1 given"),
    (lambda w: groups(w).gap("median"), V, "average: 'median' given; it is one of 'average'"),
    (lambda w: groups(w).of(99), V, "classes: no samples"),
    (lambda w: unlearning(w, 3), T, "edit: int given; give a ModelEdit or a network"),
    (lambda w: unlearning(w, target=10), V, "target: class 10 is out of range"),
    (lambda w: unlearning(w, train=iter(w.data)), T, "train: a list_iterator can be read"),
    (lambda w: unlearning(w, relearn=(5, 1)), V, "relearn: (5, 1) given; give steps from"),
    (lambda w: unlearning(w, retrained="net"), T, "retrained: str given; give a ModelEdit"),
    (lambda w: unlearning(w, retrained=w.one_output), V, "differ"),
    (lambda w: unlearning(w, target=()), V, "target: "),
    (lambda w: unlearning(w, test=iter(w.data)), T, "test: a list_iterator can be read"),
    (lambda w: unlearning(w, test=[]), V, "test: data: no samples"),
    (lambda w: unlearning(w, analysis=[]), V, "analysis: data: no samples"),
    (lambda w: unlearning(w, relearn=(0, 1.5)), V, "relearn: 1.5 given; it is a whole number"),
    (lambda w: unlearning(w, seed=0.5), T, "integer"),
    (lambda w: unlearning(w, layers=["fc9"]), L, "layer 'fc9' not found"),
    (lambda w: xe.compare_sizes(w.model, w.model, torch.rand(1, 3, 8, 8)), V, "(1, 3, 8, 8"),
    (lambda w: drawn(w, 3), T, "edit: int given; give a ModelEdit"),
    (lambda w: drawn(w, targets=10), V, "class 10 is out of range"),
    (lambda w: drawn(w, targets=[1, 2]), V, "one class a sample"),
    (lambda w: drawn(w, scorers=["eps"]), V, "'eps' is not a preset"),
    (lambda w: drawn(w, images=[1, 2]), T, "list given; give a tensor"),
    (lambda w: drawn(w, images=w.images * NAN), N, "NaN"),
    (lambda w: drawn(w, images=w.images[:0]), V, "no samples"),
    (lambda w: drawn(w).png(w.images[:2]), V, "for 4 inputs"),
    (lambda w: drawn(w).png(titles=["a", "b"]), V, "titles: 2 values for 4 samples"),
    (lambda w: curve(w, layers="fc9"), L, "layer 'fc9' not found"),
    (lambda w: curve(w, layers="conv1"), KeyError, "layer 'conv1' not found"),
    (lambda w: curve(w, layers=[]), V, "empty"),
    (lambda w: curve(w, layers="head"), V, "output"),
    (lambda w: curve(w, shares=(0, 10)), V, "is it in percent"),
    (lambda w: curve(w, shares=(-0.1, 0.5)), V, "fraction"),
    (lambda w: curve(w, shares=(0.5, 0.1)), V, "ascending"),
    (lambda w: curve(w, shares=(0.1, 0.1)), V, "ascending"),
    (lambda w: curve(w, shares=(0.1,)), V, "two or more"),
    (lambda w: curve(w, shares=0.1), T, "shares"),
    (lambda w: curve(w, order="best"), V, "order: 'best' given; it is one of 'most', 'least'"),
    (lambda w: curve(w, target=10), V, "class 10 is out of range"),
    (lambda w: curve(w, target="label"), V, "target"),
    (lambda w: compare(w, []), V, "one or more"),
    (lambda w: compare(w, ["epsilon", "epsilon"]), V, "its own name"),
    (lambda w: compare(w, xe.Taylor()), T, "list"),
    (lambda w: compare(w, ["epsilom"]), V, "'epsilom' is not a preset"),
    (lambda w: compare(w, {"a": 5}), T, "scorer: 5"),
    (lambda w: compare(w, layers="fc9"), L, "layer 'fc9' not found"),
    (lambda w: compare(w, share=10), V, "is it in percent"),
    (lambda w: compare(w, target=12), V, "class 12"),
    (lambda w: compare(w, aggregate="max"), V, "aggregate"),
    (lambda w: compare(w, deletion=(0, 0.5)), V, "held_out"),
    (lambda w: compare(w, held_out=w.data), V, "deletion"),
    (lambda w: compare(w, deletion_layers="fc1"), V, "held_out"),
    (lambda w: compare(w, deletion=(0, 0.5), held_out=w.data, deletion_layers="fc9"),
     L, "layer 'fc9' not found"),
    (lambda w: compare(w, deletion=(0, 1), held_out=w.data, layers="fc1", deletion_layers="conv1"),
     V, "compared layers"),
    (lambda w: compare(w, deletion=(0, 1), held_out=iter(())), V, "no samples"),
    (lambda w: compare(w, data=None), V, "None given"),
    (lambda w: compare(w, data=iter(())), V, "used up"),
]
TRAINING = [
    (lambda w: xe.FineTuning(iter(w.data)), T, "data: a list_iterator can be read only once"),
    (lambda w: xe.comparisons.random_labels(w.model, w.data, target=10), V, "target: class 10 is"),
    (lambda w: xe.comparisons.negative_gradient(w.model, w.data, target=1, learning_rate=0),
     V, "learning_rate: 0 given"),
    (lambda w: xe.comparisons.random_labels(w.model, w.data, target=range(10)),
     V, "target: all 10 classes"),
    (lambda w: shrink(w, epsilon=0), V, "epsilon: 0 given"),
    (lambda w: shrink(w, epochs=0), V, "epochs: 0 given"),
    (lambda w: shrink(w, batch_size=0), V, "batch_size: 0 given"),
    (lambda w: shrink(w, clip=(1.0, 0.0)), V, "the lower end comes first"),
    (lambda w: enter(xe.comparisons.AmnesiacLog().recording(w.model, [0.5])),
     V, "labels: torch.float32"),
    (lambda w: xe.comparisons.retrain(w.model, w.data, target=1, build=3, train=print),
     T, "build: int given"),
    (lambda w: xe.comparisons.retrain(w.model, w.data, target=1, build=PlainNet, train=3),
     T, "train: int given"),
]
DISCOVERY = [
    (lambda w: discover(w, target=10), V, "target: class 10 is out of range"),
    (lambda w: discover(w, images="some"), V, "images: 'some' given"),
    (lambda w: discover(w, method="lrp"), V, "method: 'lrp' given"),
    (lambda w: discover(w, method="errors", data=w.bare), V, "labels"),
    (lambda w: discover(w, limit=3), V, "limit: 3 given"),
    (lambda w: discover(w, images="all"), V, "name the target classes"),
    (lambda w: discover(w, scorer="epsilon-plus"), T, "scorer: str given; give xai_edit.LRP"),
    (lambda w: discover(w, marks="marks.json"), T, "marks: str given; give xai_edit.Marks.load"),
    (lambda w: discover(w, layers=[3]), T, "layers: int given; they are names"),
    (lambda w: discover(w, layers=["nowhere"]), L, "nowhere"),
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
    (lambda w: xe.datasets.Shortcut(RED, NAN), V, "strength: nan given"),
    (lambda w: xe.datasets.Shortcut(RED, 0.9).train(w.colour, 0), V, "images: 3 channels; only"),
    (lambda w: xe.datasets.Shortcut(RED, 0.9).balanced(w.grey[w.grey.labels > 5], 0),
     V, "images: none given"),
    (lambda w: xe.datasets.Shortcut(FOUR, 0.9).train(planted(w, FOUR), 0),
     V, "images: have a shortcut already"),
    (lambda w: planted(w, FOUR).regrouped(lambda label: label), V, "the images have a shortcut"),
    (lambda w: xe.datasets.Shortcut(FOUR, 0.9, goes_with=lambda y: y / 2).train(w.grey, 0),
     V, "goes_with: torch.float32 of shape (8,) given"),
    (lambda w: xe.datasets.Mark(PICTURE, opacity=40), V, "opacity: 40 given; it is a fraction"),
    (lambda w: xe.datasets.Mark(PICTURE.float()), V, "picture: torch.float32 of shape"),
]
# fmt: on
CASES = [*SCORERS, *EDITS, *OPERATORS, *CONCEPTS, *EVALUATION, *TRAINING, *SHORTCUTS, *DISCOVERY]


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
