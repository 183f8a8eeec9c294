"""What ``xai-edit prune`` plans, from which images: the pruning itself and what it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from torch import nn

from xai_edit.attribution.criteria import Random, WeightMagnitude
from xai_edit.attribution.layers import resolve_layers
from xai_edit.attribution.scorers import LRP, Scorer
from xai_edit.baselines.recovery import FineTuning
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import CAV, PCA, PRCA, ContrastivePCA
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import Data
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.pruning import ConceptAwarePruning, Finder, RelevancePruning
from xai_edit.guard import copied
from xai_edit.loading import Images
from xai_edit.neutralize import Marked, places_by_group

Operator: TypeAlias = RelevancePruning | ConceptAwarePruning

BY_RELEVANCE, AWARE = "pruning by relevance (LRP)", "concept-aware pruning"
PLAIN, CLEAN = "plain LRP", "plain LRP, images without the feature"
MAGNITUDE, RANDOM = "weight magnitude", "random"
TUNED = "fine-tuning alone"
SEED = 0  # of the parts, the positions, the order of fine-tuning and the random baseline
FEWEST = 2  # images of a group: one to plan from and one for the figures
REFERENCES = 10  # images of a class that units are scored on
OF_A_KIND = 250  # images, of the class or the rest, with or without, that subspaces are found from
POSITIONS = 100  # of an image, at most

FINDERS: dict[str, Callable[[], Finder]] = {
    "contrastive-pca": ContrastivePCA,
    "cav": CAV,
    "prca": partial(PRCA, None),
    "pca": partial(PCA, None),
    "drsa": DRSA,
}


def finder_named(name: str) -> Finder:
    """Return what finds subspaces, by its name on the command line.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    if name not in FINDERS:
        raise ValueError(f"finder: {name!r} given; it is one of {', '.join(FINDERS)}")
    return FINDERS[name]()


class Reader(Protocol):
    """Makes batches of images; the text says what for, beside a progress bar."""

    def __call__(self, images: Any, doing: str, /, *, shuffled: bool = False) -> Data:
        """Return batches that can be read again; shuffled, each time in another order."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Images cut into two halves that share none, each with images of every group.

    Attributes
    ----------
    planning, held_out : Marked
        A half of each (class, feature) group, for all that is planned, and the other half, for the
        figures.
    told : bool
        Whether the feature is told of; if not, no image has it.
    labels : list of int
        Of ``planning``.
    """

    planning: Marked
    held_out: Marked
    told: bool
    labels: list[int]

    def references(self, *, clean: bool = False) -> Marked:
        """Return ten planning images of each class, or fewer; all or those without the feature."""
        places = [at for at, has in enumerate(self.planning.spurious) if not (clean and has)]
        few = spread([self.labels[at] for at in places], REFERENCES)
        return self.planning.only([places[at] for at in few])

    def of_concept(self, target: int) -> Marked:
        """Return planning images with and without the feature, of a class and of the rest."""
        kinds = [
            (label == target, has)
            for label, has in zip(self.labels, self.planning.spurious, strict=True)
        ]
        return self.planning.only(spread(kinds, OF_A_KIND))

    def tuning(self) -> tuple[Marked, str]:
        """Return the images to fine-tune with, and which they are; the feature tells no class.

        All planning images where the feature is not told of. Else every (class, feature) group is
        repeated up to the size of the largest; or, where some class has no images with the feature,
        those without it are taken.

        Raises
        ------
        ValueError
            If that leaves a class without images.
        """
        if not self.told:
            return self.planning, "all planning images"
        groups: dict[tuple[int, int], list[int]] = {}
        for at, group in enumerate(zip(self.labels, self.planning.spurious, strict=True)):
            groups.setdefault(group, []).append(at)
        classes = sorted({*self.labels})
        if len(groups) == 2 * len(classes):
            largest = max(map(len, groups.values()))
            places = [own[at % len(own)] for own in groups.values() for at in range(largest)]
            return self.planning.only(places), "planning images, as many of each group"
        if missing := [label for label in classes if (label, 0) not in groups]:
            raise ValueError(
                f"fine-tune: class {missing[0]} has no images without the feature and another none "
                "with it, so that training would bring the shortcut back; give some, or no "
                "--fine-tune"
            )
        places = [at for at, has in enumerate(self.planning.spurious) if not has]
        return self.planning.only(places), "planning images without the feature"


def split(images: Images, spurious: Sequence[int] | None, *, seed: int = SEED) -> Parts:
    """Cut labelled images at random into two halves, each group by itself.

    Parameters
    ----------
    images : Images
    spurious : sequence of int or None
        Whether each has the feature, 1 or 0; None where that is not told.
    seed : int

    Raises
    ------
    ValueError
        If labels are missing, or a group has too few images.
    """
    has = [0] * len(images) if spurious is None else [*spurious]
    groups = places_by_group(images, has)
    labels = {place: label for (label, _), places in groups.items() for place in places}
    random = np.random.default_rng(seed)
    planning: list[int] = []
    held_out: list[int] = []
    for (label, feature), places in sorted(groups.items()):
        if len(places) < FEWEST:
            which = "" if spurious is None else f" {'with' if feature else 'without'} the feature"
            raise ValueError(
                f"data: class {label} has {len(places)} images{which}; give {FEWEST} or more, for "
                "planning and figures, or none"
            )
        drawn = random.permutation(places).tolist()
        held_out += drawn[: len(drawn) // 2]
        planning += drawn[len(drawn) // 2 :]
    planning.sort()
    whole = Marked(images, has)
    return Parts(
        whole.only(planning),
        whole.only(sorted(held_out)),
        spurious is not None,
        [labels[place] for place in planning],
    )


def spread(kinds: Sequence[Hashable], most: int) -> list[int]:
    """Return places of at most so many of each kind, spread evenly, in rising order."""
    places: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    taken = []
    for own in places.values():
        size = min(len(own), most)
        taken += [own[number * len(own) // size] for number in range(size)]
    return sorted(taken)


class Plans:
    """The pruning and what it has to beat, all of them in as many steps with the same tuning.

    Parameters
    ----------
    model : nn.Module
        Only read.
    operator : RelevancePruning or ConceptAwarePruning
    parts : Parts
    epochs : int or None
        Of fine-tuning after each step.
    read : callable
        See `Reader`.
    target : int
        The class whose output contexts explain; the feature is to speak for it.

    Attributes
    ----------
    images : Marked or None
        What subspaces were found from, once the pruning is planned.
    subspaces : Subspaces or None
        Those of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        operator: Operator,
        parts: Parts,
        *,
        epochs: int | None,
        read: Reader,
        target: int,
    ) -> None:
        self.model, self.operator, self.parts = model, operator, parts
        self.epochs, self.read, self.target = epochs, read, target
        self.images: Marked | None = None
        self.subspaces: Subspaces | None = None

    def methods(self) -> dict[str, Callable[[], ModelEdit]]:
        """Return what plans each edit, by its name; the pruning itself comes first."""
        lrp = self.operator.scorer
        made: dict[str, Callable[[], ModelEdit]] = {}
        if isinstance(self.operator, RelevancePruning):
            made[BY_RELEVANCE] = partial(self._pruned, BY_RELEVANCE, lrp)
        else:
            made[AWARE] = partial(self._aware, self.operator)
            made[PLAIN] = partial(self._pruned, PLAIN, lrp)
            made[CLEAN] = partial(self._pruned, CLEAN, lrp, clean=True)
        made[MAGNITUDE] = partial(self._pruned, MAGNITUDE, WeightMagnitude())
        made[RANDOM] = partial(self._pruned, RANDOM, Random(SEED))
        if self.epochs is not None:
            made[TUNED] = self._tuned
        return made

    def _pruned(self, name: str, scorer: Scorer, *, clean: bool = False) -> ModelEdit:
        own = self.operator
        plain = RelevancePruning(own.share, scorer, steps=own.steps, protect=own.protect)
        data = self.read(self.parts.references(clean=clean), name)
        return plain.plan(self.model, data, fine_tune=self._tuning(name))

    def _aware(self, operator: ConceptAwarePruning) -> ModelEdit:
        self.images = images = self.parts.of_concept(self.target)

        def features(network: nn.Module) -> Features:
            return collect_features(
                network,
                self.read(images, "collecting features"),
                layer=operator.layer,
                scorer=LRP("epsilon-plus", initial="one"),
                target=self.target,
                positions=POSITIONS,
                seed=SEED,
            )

        own = replace(operator, subspaces=_Kept(self, operator))
        data = self.read(self.parts.references(), AWARE)
        return own.plan(self.model, data, features=features, fine_tune=self._tuning(AWARE))

    def _tuned(self) -> ModelEdit:
        tune, network = self._tuning(TUNED), copied(self.model)
        assert tune is not None  # there are epochs
        for _ in range(self.operator.steps):
            tune(network)
        return ModelEdit.to_copy(self.model, network, {"operator": repr(tune)})

    def _tuning(self, name: str) -> FineTuning | None:
        if self.epochs is None:
            return None
        data = self.read(self.parts.tuning()[0], f"{name}: fine-tuning", shuffled=True)
        return FineTuning(data, self.epochs, seed=SEED)


class _Kept:
    """A finder that keeps the subspaces it finds first, those of the model itself."""

    def __init__(self, plans: Plans, operator: ConceptAwarePruning) -> None:
        self.plans, self.operator = plans, operator

    def fit(self, features: Features) -> Subspaces:
        finder = self.operator.subspaces
        assert not isinstance(finder, Subspaces)
        try:
            found = finder.fit(features)
        except ValueError as problem:
            raise ValueError(
                f"finder: nothing found at layer {self.operator.layer!r} ({problem}); name another "
                "layer or another finder"
            ) from problem
        if self.plans.subspaces is None:
            self.plans.subspaces = found
        return found


def check_layers(model: nn.Module, operator: Operator) -> None:
    """Raise `UnknownLayerError`, before the long part, for a layer that the model does not have."""
    aware = [operator.layer] if isinstance(operator, ConceptAwarePruning) else []
    for layer in (*operator.protect, *aware):
        resolve_layers(model, [layer])
