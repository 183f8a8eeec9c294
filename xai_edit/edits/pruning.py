"""Pruning on masks: the units of lowest relevance are switched off, at once or step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from xai_edit.attribution.coupling import channel_groups
from xai_edit.attribution.layers import CONVOLUTIONS, resolve_layers
from xai_edit.attribution.scorers import LRP, Scorer, describe
from xai_edit.attribution.targets import Target, describe_target
from xai_edit.attribution.trace import following_batch_norms, last_weighted
from xai_edit.attribution.units import UnitScores, score_units, share_of
from xai_edit.checks import readable_again
from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.choosing import choose_spurious
from xai_edit.concepts.features import Features
from xai_edit.concepts.folding import fold_ablation
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import Data, model_device, peek
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.ranking import Prunable, Ranking, prunable
from xai_edit.edits.schedule import FineTune, Schedule, pruned

FeaturesOf = Features | Callable[[nn.Module], Features]
"""Features of the samples with and without a concept, or what collects them from a network."""


class Finder(Protocol):
    """What finds subspaces: `PCA`, `PRCA`, `DRSA`, `CAV`, or a class of a user's own."""

    def fit(self, features: Features) -> Subspaces:
        """Return the subspaces of some features."""


def _pruning_scorer() -> Scorer:
    return LRP("epsilon-plus", initial="one")


@dataclass(frozen=True)
class RelevancePruning:
    """Switch off the units that matter least, by any scorer.

    Yeom et al. 2021, *Pruning by explaining*. A sample's score is summed over positions with its
    sign, then its absolute value is summed over samples; every sample starts from relevance 1.
    Units that stand and fall together, as where a residual network adds layers, go together; their
    scores are summed (`channel_groups`).

    Parameters
    ----------
    share : float in (0, 1]
        Share of all units of the layers to remove. Every layer keeps its best unit.
    scorer : callable
        Any scorer; LRP by ``LRP("epsilon-plus", initial="one")`` by default. `WeightMagnitude`,
        `Taylor`, `Activation`, `Random` and `TorchPruningImportance` are the usual comparisons.
        One with ``behind_norm = True``, such as `Taylor` and `Activation`, is asked for a layer's
        batch norm where it has one: its output is what is switched off. LRP, which merges the
        two, is the same at both.
    layers : sequence of str, optional
        All convolution layers when left out; all hidden linear layers where there are none.
    ranking : {"global", "local"}
        "global" ranks the units of all layers together, each layer's scores divided by their L1
        norm; "local" removes the share in each layer.
    steps : int
        In how many steps the share is reached; each scores anew what is left, after the
        fine-tuning of the step before.
    protect : sequence of str
        Layers that keep all units, and with them those coupled to theirs.
    """

    share: float
    scorer: Scorer = field(default_factory=_pruning_scorer)
    layers: Sequence[str] | None = None
    ranking: Ranking = "global"
    steps: int = 1
    protect: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self.share, self.ranking, self.steps)

    def plan(
        self,
        model: nn.Module,
        data: Data,
        *,
        target: Target = "label",
        fine_tune: FineTune | None = None,
        checkpoint: str | Path | None = None,
    ) -> ModelEdit:
        """Plan the pruning; the model is only read.

        Parameters
        ----------
        model : nn.Module
            A classifier.
        data : iterable or Dataset
            Reference samples; 5 to 10 a class suffice. One pass a step.
        target : int, "label", "predicted" or callable
            The output whose relevance counts.
        fine_tune : callable, optional
            Trains a network in place after each step, such as `FineTuning`. It is given a copy of
            the model in which units that are off stay so.
        checkpoint : str or Path, optional
            A file that each step is written to, and from which the same plan goes on after it was
            cut short, to the same result. It is left behind when the plan is done.

        Returns
        -------
        ModelEdit
            Sets the units' incoming weights and biases to zero, and the scale and shift of batch
            norms that they pass; after fine-tuning also changes all other parameters and the
            statistics of batch norms. Its origin lists the units of each layer, layers that would
            have lost all units and keep their best (``kept``), and those whose units have to stay,
            with the reason (``fixed``).

        Raises
        ------
        ValueError
            If the model cannot be traced (`channel_groups`), or nothing can be pruned.
        """
        data, inputs, found = _prepared(self, model, data, fine_tune)
        scored = _Scored(found, data, self.scorer, target, inputs[:1])

        def score(network: nn.Module, _: int) -> UnitScores:
            return scored.of(network, found.layers)

        schedule = Schedule(self.share, self.ranking, self.steps, fine_tune, checkpoint)
        origin = {"operator": "RelevancePruning", **scored.told()}
        return pruned(model, inputs, found, schedule, score=score, origin=origin)


@dataclass(frozen=True)
class ConceptAwarePruning:
    """Switch off the units that matter least once a spurious concept has been removed.

    Concept-aware network pruning: the concept's subspaces are ablated while the units are scored,
    so that those which only served it fall to the bottom.

    Parameters
    ----------
    layer : str
        Where the subspaces live; where the concept forms rather than late.
    subspaces : Subspaces or finder
        A finder (`DRSA`, `PCA`, `PRCA`, `CAV`) is fitted to the ``features`` given to `plan`.
    ablate : sequence of int or "auto"
        The subspaces of the spurious concept. "auto" takes those that predict the concept and not
        the class, by `choose_spurious` on the features; where there are none the
        edit is empty and its origin says why.
    share, scorer, layers, ranking, steps, protect
        As for `RelevancePruning`.
    keep_ablation : bool
        Whether the edit also ablates the subspaces for good, folded into the weights of the layer
        that reads them (`fold_ablation`); otherwise they are ablated only for scoring.
    """

    layer: str
    subspaces: Subspaces | Finder
    ablate: Sequence[int] | Literal["auto"]
    share: float
    scorer: Scorer = field(default_factory=_pruning_scorer)
    layers: Sequence[str] | None = None
    ranking: Ranking = "global"
    keep_ablation: bool = False
    steps: int = 1
    protect: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self.share, self.ranking, self.steps)
        if not isinstance(self.subspaces, Subspaces) and not hasattr(self.subspaces, "fit"):
            raise TypeError(
                f"subspaces: {self.subspaces!r} given; give Subspaces, or what finds them, such as "
                "xai_edit.DRSA(4)"
            )
        if isinstance(self.ablate, str):
            if self.ablate != "auto":
                raise ValueError(
                    f"ablate: {self.ablate!r} given; it is 'auto' or the numbers of subspaces"
                )
        elif isinstance(self.subspaces, Subspaces):
            object.__setattr__(self, "ablate", self.subspaces.checked(self.ablate))

    def plan(
        self,
        model: nn.Module,
        data: Data,
        *,
        target: Target = "label",
        features: FeaturesOf | None = None,
        fine_tune: FineTune | None = None,
        checkpoint: str | Path | None = None,
    ) -> ModelEdit:
        """Plan the pruning; see `RelevancePruning.plan`.

        Parameters
        ----------
        model, data, target, fine_tune, checkpoint
            See `RelevancePruning.plan`.
        features : Features or callable, optional
            Of samples with and without the concept, for a finder and for ``ablate="auto"``:
            features of the model, or a function that collects them from a network. With a function
            the subspaces are learned again after each step; where none predicts the concept any
            more, the step scores without ablation.

        Raises
        ------
        ValueError
            Also if features are needed and missing, or the ablation is to be kept and cannot be
            folded; see `fold_ablation`.
        """
        resolve_layers(model, [self.layer])
        search = not isinstance(self.subspaces, Subspaces) or self.ablate == "auto"
        if search != (features is not None):
            raise ValueError(
                "features: "
                + ("none given; a finder and ablate='auto' need" if search else "given without")
                + " the features of samples with and without the concept"
                + ("" if search else ": the subspaces and those to ablate are named already")
            )
        data, inputs, found = _prepared(self, model, data, fine_tune)
        concept = _Concept(self, features)
        concept.learn(model)
        scored = _Scored(found, data, self.scorer, target, inputs[:1])
        origin = {
            "operator": "ConceptAwarePruning",
            **scored.told(),
            "layer": self.layer,
            "keep_ablation": self.keep_ablation,
        }
        if not concept.indices:
            return ModelEdit.between(model, {}, {**origin, **concept.told(), "share": self.share})

        def score(network: nn.Module, step: int) -> UnitScores:
            if step > 0 and callable(features):
                concept.learn(network)
            if not concept.indices:
                return scored.of(network, found.layers)
            with ablated(network, self.layer, concept.subspaces, concept.indices) as inner:
                # The layer, and what is inside of it where it is a block, have other names.
                below = f"{self.layer}."
                seen = [
                    inner + name.removeprefix(self.layer) if f"{name}.".startswith(below) else name
                    for name in found.layers
                ]
                return scored.of(network, seen)

        def fold(network: nn.Module) -> Mapping[str, Tensor]:
            if not self.keep_ablation or not concept.indices:
                return {}
            return fold_ablation(network, self.layer, concept.subspaces, concept.indices, inputs)

        schedule = Schedule(self.share, self.ranking, self.steps, fine_tune, checkpoint)
        return pruned(
            model, inputs, found, schedule, score=score, origin=origin, fold=fold, told=concept.told
        )


class _Scored:
    """Scores of the layers to prune in any state of the network."""

    def __init__(
        self, found: Prunable, data: Data, scorer: Scorer, target: Target, sample: Tensor
    ) -> None:
        self.found, self.data, self.scorer, self.target = found, data, scorer, target
        self.sample = sample

    def told(self) -> dict[str, Any]:
        """Return what an origin says of the scores."""
        return {"scorer": describe(self.scorer), "target": describe_target(self.target)}

    def of(self, network: nn.Module, names: Sequence[str]) -> UnitScores:
        """Return the scores of a network that has the layers under other names, perhaps."""
        if getattr(self.scorer, "behind_norm", False):
            norms = following_batch_norms(network, self.sample, names)
            names = [norms.get(name, name) for name in names]
        scores = score_units(
            network, self.data, self.scorer, layers=names, target=self.target, aggregate="abs"
        )
        sums = {own: scores.sums[name] for own, name in zip(self.found.layers, names, strict=True)}
        return UnitScores(sums, scores.samples, scores.aggregate)


class _Concept:
    """The subspaces to ablate, as they were given or as they were last learned."""

    def __init__(self, operator: ConceptAwarePruning, features: FeaturesOf | None) -> None:
        self.operator, self.features = operator, features
        self.subspaces: Subspaces = Subspaces(torch.eye(1).double(), (1,), torch.zeros(1).double())
        self.indices: tuple[int, ...] = ()
        self.found: dict[str, Any] = {}

    def learn(self, network: nn.Module) -> None:
        """Find the subspaces of a network, and which of them are the concept's."""
        finder, ablate = self.operator.subspaces, self.operator.ablate
        features = self.features(network) if callable(self.features) else self.features
        if isinstance(finder, Subspaces):
            self.subspaces = finder
        else:
            assert features is not None  # checked in `plan`
            self.subspaces = finder.fit(features)
        if ablate == "auto":
            assert features is not None
            table = predictiveness(self.subspaces, features)
            choice = choose_spurious(table)
            self.indices = choice.indices
            self.found = {"predictiveness": table.to_dict(), "reason": choice.reason}
        else:
            self.indices = self.subspaces.checked(ablate)

    def told(self) -> dict[str, Any]:
        """Return what an origin says of the concept."""
        found = {"ablated": list(self.indices), "subspaces": self.subspaces.origin}
        return {**found, **self.found}


def _prepared(
    operator: RelevancePruning | ConceptAwarePruning,
    model: nn.Module,
    data: Data,
    fine_tune: FineTune | None,
) -> tuple[Data, Tensor, Prunable]:
    """Return the data, whole, its first inputs, and what can be pruned."""
    if fine_tune is not None and not callable(fine_tune):
        raise TypeError(
            f"fine_tune: {fine_tune!r} given; give a function that trains a network in place, such "
            "as xai_edit.FineTuning(data)"
        )
    if operator.steps > 1:
        readable_again(data, f"pruning in {operator.steps} steps")
    first, whole = peek(data, model_device(model))
    layers = _layers(model, operator.layers, first.inputs[:1])
    groups = channel_groups(model, first.inputs[:1])
    named = operator.layers is not None
    data = whole if isinstance(data, Iterator) else data
    return data, first.inputs, prunable(groups, layers, protect=operator.protect, named=named)


def _layers(model: nn.Module, layers: Sequence[str] | None, inputs: Tensor) -> list[str]:
    """Return the layers to prune: those named, all convolutions or all linear; not the last."""
    last = last_weighted(model, inputs)
    if layers is not None:
        if last in (named := resolve_layers(model, layers)):
            raise ValueError(f"layers: {last!r} gives the output; its units are the classes")
        return named
    modules = {name: module for name, module in model.named_modules() if name != last}
    convolutions = [name for name, module in modules.items() if isinstance(module, CONVOLUTIONS)]
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not convolutions and not linear:
        raise ValueError("layers: the model has no convolution and no hidden linear layer to prune")
    return convolutions or linear


def _check(share: float, ranking: str, steps: int) -> None:
    share_of(1, share)
    if ranking not in ("global", "local"):
        raise ValueError(f"ranking: {ranking!r} given; it is 'global' or 'local'")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps: {steps!r} given; it is a whole number from 1")
