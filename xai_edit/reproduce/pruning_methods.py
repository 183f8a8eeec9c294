"""The methods that the pruning runs compare: finders of subspaces, scorers and operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from xai_edit.concepts.ablation import with_ablation
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import CAV, PCA, PRCA, ContrastivePCA
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.pruning.fine_tuning import FineTuning
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning
from xai_edit.pruning.torch_pruning_importance import TorchPruningImportance
from xai_edit.scoring.criteria import Activation, Random, Taylor, WeightMagnitude

REFERENCES = 10  # images a class that units are scored on
RANK = 4  # directions of a finder whose subspaces are single directions
POSITIONS = 100  # of an image, at most
STEPS = 4  # of iterative pruning
FINE_TUNED = 0.4  # the share that it reaches
TUNING: dict[str, Any] = {"epochs": 1, "learning_rate": 0.003, "batch_size": 64}
LRP_PRUNING = LRP("epsilon-plus", initial="one")
Found = tuple[Subspaces, list[int]]


@dataclass(frozen=True)
class Context:
    """A network, its images, and what its methods share.

    Attributes
    ----------
    model : nn.Module
    layer : str
        Where the subspaces are.
    seed : int
    train : ImageSet
        With the mark on a share of the second class.
    planning : ImageSet
        Others, of both classes, each without or with the mark by chance: no pairs.
    test : ImageSet
        Others, each once without and once with it.
    """

    model: nn.Module
    layer: str
    seed: int
    train: ImageSet
    planning: ImageSet
    test: ImageSet
    finders: dict[str, Found] = field(default_factory=dict)

    def references(self, *, clean: bool = False) -> ImageSet:
        """Return reference images from training: as they come, or those without the mark."""
        train = self.train
        assert train.attribute is not None
        rows = torch.arange(len(train)) if not clean else (train.attribute == 0).nonzero()[:, 0]
        chosen = torch.cat([rows[train.labels[rows] == label][:REFERENCES] for label in (0, 1)])
        return train[chosen]

    @cached_property
    def features(self) -> Features:
        """The features of the planning images, relevance being that for class 1."""
        return self.features_of(self.model)

    def features_of(self, network: nn.Module) -> Features:
        """Return those of another state of the network."""
        return collect_features(
            network,
            self.planning,
            layer=self.layer,
            scorer=LRP_PRUNING,
            target=1,
            positions=POSITIONS,
            seed=self.seed,
        )

    def found(self, finder: str) -> Found:
        """Return the subspaces of a finder, and which are the mark's."""
        if finder not in self.finders:
            self.finders[finder] = FINDERS[finder](self)
        return self.finders[finder]


def marked(images: ImageSet, value: int) -> ImageSet:
    """Return the images all without the mark (0) or all with it (1)."""
    return replace(images, attribute=torch.full_like(images.labels, value))


def paired_differences(context: Context) -> Found:
    """Return the main directions of what the mark changes in the same images; needs pairs."""
    both = [
        collect_features(
            context.model, marked(context.planning, value), layer=context.layer, positions=None
        )
        for value in (0, 1)
    ]
    change = (both[1].activations - both[0].activations).double()
    directions = torch.linalg.eigh(change.T @ change).eigenvectors.flip(1)[:, :RANK]
    mean = both[0].activations.double().mean(0)
    return Subspaces(directions.contiguous(), (RANK,), mean), [0]


def _by_precision(subspaces: Subspaces, features: Features, count: int) -> Found:
    precision = torch.tensor(predictiveness(subspaces, features, resamples=1).column("spurious"))
    return subspaces, precision.argsort(descending=True, stable=True)[:count].tolist()


def _of_relevance(kind: type[PCA] | type[PRCA], context: Context) -> Found:
    return _by_precision(kind(None).fit(context.features), context.features, RANK)


def _disentangled(context: Context) -> Found:
    found = DRSA(4, seed=context.seed).fit(context.features)
    return _by_precision(found, context.features, 1)


FINDERS: dict[str, Callable[[Context], Found]] = {
    "paired differences": paired_differences,
    "CAV": lambda context: (CAV().fit(context.features), [0]),
    "CAV (logistic)": lambda context: (CAV("logistic").fit(context.features), [0]),
    "contrastive PCA": lambda context: (ContrastivePCA(RANK).fit(context.features), [0]),
    "PCA": partial(_of_relevance, PCA),
    "PRCA": partial(_of_relevance, PRCA),
    "DRSA": _disentangled,
}
Made = tuple[Found | None, Callable[[float], Any], ImageSet]
"""The subspaces that are ablated, the operator of each share, and the reference images."""


def _plain(scorer: Callable[[int], Any], context: Context, *, clean: bool = False) -> Made:
    def operator(share: float) -> RelevancePruning:
        return RelevancePruning(share, scorer(context.seed))

    return None, operator, context.references(clean=clean)


def _torch_pruning(name: str, _: int) -> TorchPruningImportance:
    import torch_pruning  # only here: slow to import

    return TorchPruningImportance(getattr(torch_pruning.importance, name)())


def _aware(finder: str, context: Context, *, clean: bool = False) -> Made:
    found = context.found(finder)

    def operator(share: float) -> ConceptAwarePruning:
        return ConceptAwarePruning(context.layer, *found, share, LRP_PRUNING)

    return found, operator, context.references(clean=clean)


METHODS: dict[str, Callable[[Context], Made]] = {
    "LRP": partial(_plain, lambda _: LRP_PRUNING),
    "LRP, clean references": partial(_plain, lambda _: LRP_PRUNING, clean=True),
    "weight magnitude": partial(_plain, lambda _: WeightMagnitude()),
    "Taylor": partial(_plain, lambda _: Taylor()),
    "activation": partial(_plain, lambda _: Activation()),
    "Torch-Pruning magnitude": partial(_plain, partial(_torch_pruning, "GroupMagnitudeImportance")),
    "Torch-Pruning Taylor": partial(_plain, partial(_torch_pruning, "GroupTaylorImportance")),
    "random": partial(_plain, Random),
    **{f"CNP: {finder}": partial(_aware, finder) for finder in FINDERS},
    "CNP, clean references: paired differences": partial(_aware, "paired differences", clean=True),
}


FINE_TUNED_METHODS = (
    "fine-tuning alone",
    "LRP",
    "LRP, clean references",
    "weight magnitude",
    "random",
    "CNP: contrastive PCA",
    "CNP, subspaces learned again: contrastive PCA",
    "CNP, clean references: contrastive PCA",
    "CNP, ablation kept: contrastive PCA",
    "fine-tuning alone, ablation kept: contrastive PCA",
    "random, ablation kept: contrastive PCA",
)

Tuned = tuple[str, float | None, nn.Module, Callable[[], ModelEdit]]
"""The name, the share, the network to edit, and what plans the edit."""


def fine_tuned(context: Context) -> Iterator[Tuned]:
    """Yield methods that prune step by step and fine-tune after each: see `Tuned`."""
    layer, seed = context.layer, context.seed
    again = ContrastivePCA(RANK)

    def plain(scorer: Scorer) -> RelevancePruning:
        return RelevancePruning(FINE_TUNED, scorer, steps=STEPS)

    def aware(subspaces: Any) -> ConceptAwarePruning:
        return ConceptAwarePruning(layer, subspaces, [0], FINE_TUNED, LRP_PRUNING, steps=STEPS)

    for kind, images in (("clean", marked(context.train, 0)), ("biased", context.train)):

        def tuning(images: ImageSet = images) -> FineTuning:
            """Return one whose order of images starts anew, the same for every method."""
            return FineTuning(Epochs(images, seed, TUNING["batch_size"]), **TUNING, seed=seed)

        def planned(
            operator: Any,
            *,
            clean: bool = False,
            tuning: Callable[[], FineTuning] = tuning,
            network: nn.Module = context.model,
            **more: Any,
        ) -> Callable[[], ModelEdit]:
            data = context.references(clean=clean)
            return partial(operator.plan, network, data, fine_tune=tuning(), **more)

        def alone(model: nn.Module, tuning: Callable[[], FineTuning] = tuning) -> ModelEdit:
            network, tune = deepcopy(model), tuning()
            for _ in range(STEPS):
                tune(network)
            return ModelEdit.to_copy(model, network, {})

        found, indices = context.found("contrastive PCA")
        kept = with_ablation(context.model, layer, found, indices)
        plans: tuple[Callable[[], ModelEdit], ...] = (
            partial(alone, context.model),
            planned(plain(LRP_PRUNING)),
            planned(plain(LRP_PRUNING), clean=True),
            planned(plain(WeightMagnitude())),
            planned(plain(Random(seed))),
            planned(aware(found)),
            planned(aware(again), features=context.features_of),
            planned(aware(found), clean=True),
            # Scored by plain LRP, through the ablation that is a part of the network.
            planned(plain(LRP_PRUNING), network=kept),
            partial(alone, kept),
            planned(plain(Random(seed)), network=kept),
        )
        for method, plan in zip(FINE_TUNED_METHODS, plans, strict=True):
            yield (
                f"{method}; tuned on {kind} images",
                None if method.startswith("fine-tuning alone") else FINE_TUNED,
                kept if "ablation kept" in method else context.model,
                plan,
            )
