"""The plans of ``xai-edit prune`` and the images for each: pruning and comparison methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from xai_edit.command.load import Images, spread
from xai_edit.command.run import Run
from xai_edit.command.run_parts import SEED, indices_by
from xai_edit.concepts.candidates import numbered
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import CAV, PCA, PRCA, ContrastivePCA, Finder
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import one_of
from xai_edit.core.guard import copied
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.counterfactual_tuning import CounterfactualTuning
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.pruning.fine_tuning import FineTuning
from xai_edit.pruning.operators import DEFAULT_SCORER, ConceptAwarePruning, RelevancePruning
from xai_edit.pruning.schedule import FineTune
from xai_edit.report.table import counted
from xai_edit.scoring.criteria import Random, Taylor, WeightMagnitude

Operator: TypeAlias = RelevancePruning | ConceptAwarePruning

BY_RELEVANCE, AWARE = "pruning by relevance (LRP)", "concept-aware pruning"
PLAIN, CLEAN = "plain LRP", "plain LRP, images without the feature"
TAYLOR, MAGNITUDE, RANDOM = "Taylor", "weight magnitude", "random"
TUNED, CORRECTED = "fine-tuning alone", "counterfactual retraining alone"
ABLATION = "ablation alone"
ADVICE = {
    CLEAN: "use it if you have images without the feature",
    RANDOM: "so nothing speaks for choosing units by relevance here",
    **dict.fromkeys((TUNED, CORRECTED), "use it if the network need not be smaller"),
    ABLATION: "use it if the network need not be smaller: it prunes nothing",
}
SCORERS: dict[str, tuple[str, Scorer]] = {
    TAYLOR: ("taylor", Taylor()),
    MAGNITUDE: ("weight-magnitude", WeightMagnitude()),
    RANDOM: ("random", Random(SEED)),
}
"""By comparison method, the name for ``--composite`` and the scorer."""
REFERENCES = 10  # images of a class that units are scored on
OF_A_KIND = 250  # images, of the class or the rest, with or without, that subspaces are found from
POSITIONS = 100  # of an image, at most

FINDERS: dict[str, Callable[[], Finder]] = {
    "contrastive-pca": partial(ContrastivePCA, None),
    "cav": CAV,
    "prca": partial(PRCA, None),
    "pca": partial(PCA, None),
    "drsa": DRSA,
}


def advice(*, marked: bool, tuned: bool) -> dict[str, str]:
    """Return when to use each comparison method, with the options that make its edit.

    With a feature that is known (``marked``) pruning needs to be told not to be concept-aware. What
    is ``tuned`` needs the images and labels that it is trained on.
    """
    also = " --ablate none" if marked else ""
    ways = {PLAIN: also.strip(), TAYLOR: f"--composite taylor{also}"}
    needless = ": it needs no labels of the feature" if marked and not tuned else ""
    found = {name: f"use it ({how}){needless}" for name, how in ways.items() if how}
    magnitude = "" if tuned else ": it needs no images"
    found[MAGNITUDE] = f"use it (--composite weight-magnitude{also}){magnitude}"
    return ADVICE | found


def references(planning: Images, *, clean: bool = False) -> Images:
    """Return ten images of each class, or fewer; with ``clean``, of those without the feature."""
    if clean:
        planning = without_feature(planning)
    return planning.only(some_of_each(planning.labels, REFERENCES))


def of_concept(planning: Images, target: int) -> Images:
    """Return images with and without the feature, of a class and of the rest."""
    kinds = [(label == target, has) for label, has in planning.groups]
    return planning.only(some_of_each(kinds, OF_A_KIND))


@dataclass(frozen=True)
class Tuning:
    """What trains the network after each step.

    Attributes
    ----------
    alone : str
        The method of training without pruning.
    doing : str
        For the page: the training, and the images.
    of : callable
        The training of a method, by its name.
    """

    alone: str
    doing: str
    of: Callable[[str], FineTune]


def tuning(
    run: Run, planning: Images, epochs: int | None, *, corrected: str | None
) -> Tuning | None:
    """Return the fine-tuning for so many epochs, the retraining of the last layer, or None.

    ``corrected`` is the layer where the feature is exchanged for the retraining.
    """
    if corrected is not None:

        def retraining(name: str) -> FineTune:
            data = run.read(planning, f"{name}: counterfactual retraining")
            return CounterfactualTuning(data, corrected, seed=SEED)

        doing = (
            f"retraining the last layer on {counted(len(planning), 'planning image')}, each with "
            "and without the feature (completed at that layer)"
        )
        return Tuning(CORRECTED, doing, retraining)
    if epochs is None:
        return None
    images, which = tuned_on(planning, marked=run.attribute is not None)

    def fine_tuning(name: str) -> FineTune:
        data = run.read(images, f"{name}: fine-tuning", shuffled=True)
        return FineTuning(data, epochs, seed=SEED)

    return Tuning(TUNED, f"{counted(epochs, 'epoch')} of fine-tuning on {which}", fine_tuning)


def tuned_on(planning: Images, *, marked: bool) -> tuple[Images, str]:
    """Return images to fine-tune with, in which the feature predicts no class, and their name.

    All planning images, each (class, feature) group repeated up to the size of the largest where
    the feature is known (``marked``); or those without the feature where a class has none with it.
    Raises ValueError if a class then has no images.
    """
    if not marked:
        return planning, "all planning images"
    groups = indices_by(planning.groups)
    classes = sorted({label for label, _ in groups})
    if len(groups) == 2 * len(classes):
        largest = max(map(len, groups.values()))
        repeated = [own[at % len(own)] for own in groups.values() for at in range(largest)]
        return planning.only(repeated), "planning images, as many of each group"
    if missing := [label for label in classes if (label, 0) not in groups]:
        raise ValueError(
            f"fine-tune: class {missing[0]} has no images without the feature and another none "
            "with it, so that training would bring the shortcut back; give some, or no --fine-tune"
        )
    return without_feature(planning), "planning images without the feature"


def without_feature(images: Images) -> Images:
    """Return the images that do not have the feature."""
    return images.only([index for index, (_, has) in enumerate(images.groups) if not has])


def some_of_each(kinds: Sequence[Hashable], most: int) -> list[int]:
    """Return indices of at most so many of each kind, spread over them, in rising order."""
    taken = []
    for own in indices_by(kinds).values():
        size = min(len(own), most)
        taken += [own[at] for at in spread(len(own), size)]
    return sorted(taken)


@dataclass(eq=False)
class FirstKept:
    """A finder that keeps the first subspaces it finds, which are those of the model itself.

    They are kept as `choose_spurious` numbers them, and with ``as_numbered`` also returned so.
    """

    finder: Finder
    layer: str
    as_numbered: bool
    first: Subspaces | None = None

    def fit(self, features: Features) -> Subspaces:
        """Fit the finder; raise ValueError with the layer where it finds nothing."""
        try:
            subspaces = self.finder.fit(features)
        except ValueError as problem:
            raise ValueError(
                f"finder: nothing found at layer {self.layer!r} ({problem}); name another layer or "
                "another finder"
            ) from problem
        if self.first is None:
            self.first = numbered(subspaces)
        return numbered(subspaces) if self.as_numbered else subspaces


def aware(
    layer: str, finder: str | None, file: Path | None, ablate: Sequence[int] | None, **how: Any
) -> ConceptAwarePruning:
    """Return the concept-aware operator, by a finder's subspaces or those of a file.

    ``ablate`` are numbers as in `numbered`; without them `choose_spurious` chooses.
    """
    if file is not None and finder is not None:
        raise ValueError(f"finder: {finder!r} given beside --subspaces; give one of them")
    subspaces: Subspaces | FirstKept
    if file is not None:
        subspaces = Subspaces.load(file) if ablate is None else numbered(Subspaces.load(file))
    else:
        found = FINDERS[one_of(finder or "contrastive-pca", FINDERS, "finder")]()
        subspaces = FirstKept(found, layer, as_numbered=ablate is not None)
    return ConceptAwarePruning(layer, subspaces, "auto" if ablate is None else ablate, **how)


def first_subspaces(operator: ConceptAwarePruning) -> Subspaces:
    """Return the subspaces in the model before pruning, as they are numbered on the page."""
    own: Any = operator.subspaces
    return numbered(own) if isinstance(own, Subspaces) else own.first


def methods(
    run: Run, own: Operator, planning: Images, target: int, tune: Tuning | None
) -> dict[str, Callable[[], ModelEdit]]:
    """Return the function that plans each edit, by method; that of the operator itself is first.

    All take as many steps, with the same training after each. ``target`` is the class whose output
    contexts explain, which the feature is to speak for.
    """

    def pruned(name: str, operator: Operator) -> ModelEdit:
        how: dict[str, Any] = {"fine_tune": None if tune is None else tune.of(name)}
        if isinstance(operator, ConceptAwarePruning):
            shown, auto = of_concept(planning, target), operator.ablate == "auto"
            finder = getattr(operator.subspaces, "finder", None)
            if finder is not None or auto:
                contexts = isinstance(finder, (PRCA, DRSA))  # the others need no backward pass
                how["features"] = partial(
                    collect_features,
                    data=run.read(shown, "collecting features"),
                    layer=operator.layer,
                    scorer=LRP("epsilon-plus", initial="one") if contexts else None,
                    target=target,
                    positions=POSITIONS,
                    seed=SEED,
                )
            if auto:
                how["planning"] = run.read(shown, "trying ablations")
        data = run.read(references(planning, clean=name == CLEAN), name)
        return operator.plan(run.model, data, **how)

    def tuned(tune: Tuning) -> ModelEdit:
        train, network = tune.of(tune.alone), copied(run.model)
        for _ in range(own.steps):
            train(network)
        return ModelEdit.to_copy(run.model, network, {"operator": repr(train)})

    by_lrp = isinstance(own.scorer, LRP)
    lrp = own.scorer if by_lrp else DEFAULT_SCORER()
    plain = RelevancePruning(own.share, lrp, steps=own.steps, protect=own.protect)
    operators: dict[str, Operator]
    if isinstance(own, ConceptAwarePruning):
        operators = {AWARE: own, PLAIN: plain, CLEAN: plain}
    else:
        name = BY_RELEVANCE if by_lrp else f"pruning by {run.options.composite}"
        operators = {name: own} if by_lrp else {name: own, PLAIN: plain}
    for name, (short, scorer) in SCORERS.items():
        if isinstance(own, ConceptAwarePruning) or short != run.options.composite:
            operators[name] = replace(plain, scorer=scorer)
    made: dict[str, Callable[[], ModelEdit]]
    made = {name: partial(pruned, name, operator) for name, operator in operators.items()}
    return made if tune is None else {**made, tune.alone: partial(tuned, tune)}
