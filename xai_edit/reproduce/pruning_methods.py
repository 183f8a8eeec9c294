"""The methods that the pruning runs compare: finders of subspaces, scorers and operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch_pruning import importance

from xai_edit.concepts.ablation import with_ablation
from xai_edit.concepts.choose import choose_spurious
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import CAV, PCA, PRCA, ContrastivePCA
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.lrp.lrp import LRP
from xai_edit.pruning.fine_tuning import FineTuning
from xai_edit.pruning.operators import ConceptAwarePruning, Criterion, RelevancePruning
from xai_edit.pruning.torch_pruning_importance import TorchPruningImportance
from xai_edit.scoring.criteria import Activation, Random, Taylor, WeightMagnitude

REFERENCES = 10  # images a class that units are scored on
RANK = 4  # directions of a finder whose subspaces are single directions
POSITIONS = 100  # of an image, at most
MANY = 8  # subspaces
STEPS = 4  # of iterative pruning
FINE_TUNED = 0.4  # the share that it reaches
TUNING: dict[str, Any] = {"epochs": 1, "learning_rate": 0.003, "batch_size": 64}
LRP_PRUNING = LRP("epsilon-plus", initial="one")
Found = tuple[Subspaces, list[int]]


@dataclass(frozen=True)
class Context:
    """A network, its images, and what its methods share."""

    model: nn.Module
    layer: str  # of the subspaces
    seed: int
    train: ImageSet  # with the mark on a share of the second class
    planning: ImageSet  # others of both classes, each without or with the mark by chance: no pairs
    test: ImageSet  # others, each once without and once with it
    finders: dict[str, Found] = field(default_factory=dict)

    def references(self, *, clean: bool = False) -> ImageSet:
        """Return reference images from training: as they come, or those without the mark."""
        train = self.train
        assert train.attribute is not None
        images = train[train.attribute == 0] if clean else train
        both = [(images.labels == label).nonzero()[:REFERENCES, 0] for label in (0, 1)]
        return images[torch.cat(both)]

    def marked_references(self) -> ImageSet:
        """Return as many images from training that have the mark."""
        assert self.train.attribute is not None
        return self.train[self.train.attribute.nonzero()[:REFERENCES, 0]]

    @cached_property
    def features(self) -> Features:
        """The features of the planning images, relevance being that for class 1."""
        return self.features_of(self.model)

    def features_of(self, network: nn.Module) -> Features:
        """Return those of another state of the network."""
        more: Any = {"layer": self.layer, "positions": POSITIONS, "seed": self.seed}
        return collect_features(network, self.planning, scorer=LRP_PRUNING, target=1, **more)

    def found(self, finder: str) -> Found:
        """Return the subspaces of a finder, and which are the mark's."""
        if finder not in self.finders:
            self.finders[finder] = FINDERS[finder](self)
        return self.finders[finder]

    def chosen(self, finder: str) -> Found:
        """Return the subspaces, and as many of their directions as `choose_spurious` takes.

        ValueError if it takes none.
        """
        subspaces, _ = self.found(finder)
        layer = self.layer
        choice = choose_spurious(self.model, self.planning, subspaces, self.features, layer=layer)
        if not choice.indices:
            raise ValueError(choice.reason)
        return choice.subspaces, [*choice.indices]

    def measured(
        self, method: str, share: float | None = None, network: nn.Module | None = None
    ) -> dict[str, Any]:
        """Return a row: the accuracies of a network as it is now."""
        model = self.model if network is None else network
        accuracy = evaluate_groups(model, self.test, train_samples=self.train.counts())
        return {
            "method": method,
            "share": share,
            "worst": accuracy.worst,
            "balanced": accuracy.balanced,
            "biased": accuracy.train_weighted,
            "groups": [*accuracy.groups.values()],
        }

    def precisions(self, found: Found) -> dict[str, Any]:
        """Return average precisions by subspace: of all, or if they are many, of those taken."""
        subspaces, taken = found
        content = predictiveness(subspaces, self.features, resamples=200).to_dict()
        every = content["subspaces"]
        shown = range(len(every)) if len(every) <= MANY else taken
        by_number = {str(index): every[index] for index in shown}
        return {**content, "taken": [*taken], "subspaces": by_number}


def marked(images: ImageSet, value: int) -> ImageSet:
    """Return the images all without the mark (0) or all with it (1)."""
    return replace(images, attribute=torch.full_like(images.labels, value))


def paired_differences(context: Context) -> Found:
    """Return the main directions of what the mark changes in the same images; needs pairs."""
    model, layer = context.model, context.layer
    pair = (marked(context.planning, value) for value in (0, 1))
    both = (collect_features(model, images, layer=layer, positions=None) for images in pair)
    without, with_mark = (features.activations for features in both)
    change = (with_mark - without).double()
    directions = torch.linalg.eigh(change.T @ change).eigenvectors.flip(1)[:, :RANK]
    mean = without.double().mean(0)
    return Subspaces(directions.contiguous(), (RANK,), mean), [0]


def _by_precision(finder: PCA | PRCA | DRSA, context: Context, count: int) -> Found:
    features = context.features
    subspaces = finder.fit(features)
    precision = torch.tensor(predictiveness(subspaces, features, resamples=1).column("spurious"))
    return subspaces, precision.argsort(descending=True, stable=True)[:count].tolist()


def _of_one(finder: CAV | ContrastivePCA, context: Context) -> Found:
    return finder.fit(context.features), [0]


FINDERS: dict[str, Callable[[Context], Found]] = {
    "paired differences": paired_differences,
    "CAV": partial(_of_one, CAV()),
    "CAV (logistic)": partial(_of_one, CAV("logistic")),
    "contrastive PCA": partial(_of_one, ContrastivePCA(RANK)),
    "PCA": partial(_by_precision, PCA(None), count=RANK),
    "PRCA": partial(_by_precision, PRCA(None), count=RANK),
    "DRSA": lambda context: _by_precision(DRSA(4, seed=context.seed), context, 1),
}
Made = tuple[Found | None, Callable[[float], Any], dict[str, ImageSet]]
"""The subspaces that are ablated, the operator of each share, and the images that it plans on."""


def _plain(
    scorer: Callable[[int], Any], context: Context, *, clean: bool = False, against: bool = False
) -> Made:
    def operator(share: float) -> RelevancePruning:
        return RelevancePruning(share, scorer(context.seed))

    images = {"data": context.references(clean=clean)}
    if against:
        images["against"] = context.marked_references()
    return None, operator, images


def _aware(
    finder: str,
    context: Context,
    *,
    clean: bool = False,
    chosen: bool = False,
    criterion: Criterion = "ablated",
) -> Made:
    found = context.chosen(finder) if chosen else context.found(finder)

    def operator(share: float) -> ConceptAwarePruning:
        return ConceptAwarePruning(context.layer, *found, share, LRP_PRUNING, criterion=criterion)

    return found, operator, {"data": context.references(clean=clean)}


SCORERS: dict[str, Callable[[int], Any]] = {
    "LRP": lambda _: LRP_PRUNING,
    "weight magnitude": lambda _: WeightMagnitude(),
    "Taylor": lambda _: Taylor(),
    "activation": lambda _: Activation(),
    "Torch-Pruning magnitude": lambda _: TorchPruningImportance(
        importance.GroupMagnitudeImportance()
    ),
    "Torch-Pruning Taylor": lambda _: TorchPruningImportance(importance.GroupTaylorImportance()),
    "random": Random,
}
"""The scorer of a seed."""

METHODS: dict[str, Callable[[Context], Made]] = {
    "LRP": partial(_plain, SCORERS["LRP"]),
    "LRP, clean references": partial(_plain, SCORERS["LRP"], clean=True),
    "LRP, R_diff": partial(_plain, SCORERS["LRP"], against=True),
    **{name: partial(_plain, scorer) for name, scorer in SCORERS.items() if name != "LRP"},
    **{f"CNP: {finder}": partial(_aware, finder) for finder in FINDERS},
    "CNP, clean references: paired differences": partial(_aware, "paired differences", clean=True),
    "CNP, penalized: contrastive PCA": partial(_aware, "contrastive PCA", criterion="penalized"),
    "CNP, penalized, chosen directions: contrastive PCA": partial(
        _aware, "contrastive PCA", chosen=True, criterion="penalized"
    ),
}


@dataclass(frozen=True)
class Tuner:
    """A network that is fine-tuned on images, alone or after each step of pruning."""

    context: Context
    images: ImageSet
    network: nn.Module

    def tuning(self) -> FineTuning:
        """Return fine-tuning whose order of images starts anew, the same for every method."""
        seed = self.context.seed
        return FineTuning(Epochs(self.images, seed, TUNING["batch_size"]), **TUNING, seed=seed)

    def alone(self) -> ModelEdit:
        """Fine-tune a copy as often as in pruning."""
        network, tune = deepcopy(self.network), self.tuning()
        for _ in range(STEPS):
            tune(network)
        return ModelEdit.to_copy(self.network, network, {})

    def plain(self, method: str, *, clean: bool = False) -> ModelEdit:
        """Plan pruning by a scorer."""
        scorer = SCORERS[method](self.context.seed)
        return self._planned(RelevancePruning(FINE_TUNED, scorer, steps=STEPS), clean)

    def aware(self, *, again: bool = False, clean: bool = False) -> ModelEdit:
        """Plan concept-aware pruning, with subspaces of the first network or those of each step."""
        found = ContrastivePCA(RANK) if again else self.context.found("contrastive PCA")[0]
        layer, scorer = self.context.layer, LRP_PRUNING
        how: Any = {"steps": STEPS, "criterion": "ablated"}
        operator = ConceptAwarePruning(layer, found, [0], FINE_TUNED, scorer, **how)
        more = {"features": self.context.features_of} if again else {}
        return self._planned(operator, clean, **more)

    def _planned(self, operator: Any, clean: bool, **more: Any) -> ModelEdit:
        data = self.context.references(clean=clean)
        edit: ModelEdit = operator.plan(self.network, data, fine_tune=self.tuning(), **more)
        return edit


FINE_TUNED_METHODS: dict[str, Callable[[Tuner], ModelEdit]] = {
    "fine-tuning alone": Tuner.alone,
    "LRP": lambda tuner: tuner.plain("LRP"),
    "LRP, clean references": lambda tuner: tuner.plain("LRP", clean=True),
    "weight magnitude": lambda tuner: tuner.plain("weight magnitude"),
    "random": lambda tuner: tuner.plain("random"),
    "CNP: contrastive PCA": Tuner.aware,
    "CNP, subspaces learned again: contrastive PCA": lambda tuner: tuner.aware(again=True),
    "CNP, clean references: contrastive PCA": lambda tuner: tuner.aware(clean=True),
    # Scored by plain LRP, through the ablation that is a part of the network.
    "CNP, ablation kept: contrastive PCA": lambda tuner: tuner.plain("LRP"),
    "fine-tuning alone, ablation kept: contrastive PCA": Tuner.alone,
    "random, ablation kept: contrastive PCA": lambda tuner: tuner.plain("random"),
}

Tuned = tuple[str, float | None, nn.Module, Callable[[], ModelEdit]]
"""The name, the share, the network to edit, and what plans the edit."""


def fine_tuned(context: Context) -> Iterator[Tuned]:
    """Yield methods that prune step by step and fine-tune after each: see `Tuned`."""
    kept = with_ablation(context.model, context.layer, *context.found("contrastive PCA"))
    for kind, images in (("clean", marked(context.train, 0)), ("biased", context.train)):
        for method, plan in FINE_TUNED_METHODS.items():
            network = kept if "ablation kept" in method else context.model
            share = None if method.startswith("fine-tuning alone") else FINE_TUNED
            planned = partial(plan, Tuner(context, images, network))
            yield f"{method}; tuned on {kind} images", share, network, planned
