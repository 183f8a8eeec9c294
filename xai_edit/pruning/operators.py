"""Pruning on masks: the units of lowest relevance are switched off, at once or step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from xai_edit.concepts.ablation import ablated, fold_ablation
from xai_edit.concepts.choose import choose_spurious
from xai_edit.concepts.features import Features
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.analysis import following_batch_norms, last_weighted
from xai_edit.core.checks import fraction, one_of, readable_again, require, whole_number
from xai_edit.core.data import Data, model_device, peek
from xai_edit.core.layers import CONVOLUTIONS, resolve_layers
from xai_edit.core.targets import Target, describe_target
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.lrp.lrp import LRP, Scorer, describe
from xai_edit.pruning.coupled_channels import channel_groups
from xai_edit.pruning.ranking import Ranking, prunable
from xai_edit.pruning.schedule import FineTune, Schedule, Score, pruned
from xai_edit.scoring.unit_scores import UnitScores, score_units

DEFAULT_SCORER = partial(LRP, "epsilon-plus", initial="one")
FeaturesOf = Features | Callable[[nn.Module], Features]
"""Features of samples with and without a concept, or a function that collects them."""


class Finder(Protocol):
    """Finds subspaces: `PCA`, `PRCA`, `DRSA`, `CAV`, or a class of a user's own."""

    def fit(self, features: Features) -> Subspaces:
        """Return the subspaces of some features."""


@dataclass(frozen=True)
class RelevancePruning:
    """Switch off the units that matter least, by any scorer.

    Yeom et al. 2021, *Pruning by explaining*. A sample's score is summed over positions with its
    sign, then its absolute value is summed over samples; so the sign of a criterion does not
    matter. Coupled units, as where a residual network adds layers, go together; their scores are
    summed (`channel_groups`).

    Parameters
    ----------
    share : float in (0, 1]
        Share of all units of the layers to remove. Every layer keeps its best unit.
    scorer : callable
        Any scorer; LRP by ``LRP("epsilon-plus", initial="one")`` by default. `WeightMagnitude`,
        `Taylor`, `Activation`, `Random` and `TorchPruningImportance` are the usual comparisons.
        One with ``behind_norm = True``, such as `Taylor` and `Activation`, scores a layer's batch
        norm where there is one, whose output is what is switched off. LRP, which merges the two, is
        the same at both.
    layers : sequence of str, optional
        All convolution layers when left out; all hidden linear layers where there are none.
    ranking : {"global", "local"}
        "global" ranks the units of all layers together, each layer's scores divided by their L1
        norm; "local" removes the share in each layer.
    steps : int
        In how many steps the share is reached; each scores the remaining network anew, after the
        fine-tuning of the step before.
    protect : sequence of str
        Layers that keep all units, and with them those coupled to theirs.
    """

    share: float
    scorer: Scorer = field(default_factory=DEFAULT_SCORER)
    layers: Sequence[str] | None = None
    ranking: Ranking = "global"
    steps: int = 1
    protect: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self)

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
            Trains a network in place after each step, such as `FineTuning`: a copy of the model in
            which units that are off stay so.
        checkpoint : str or Path, optional
            A file that each step is written to, from which an interrupted plan goes on to the same
            result. It stays when the plan is done.

        Returns
        -------
        ModelEdit
            Sets the units' incoming weights and biases to zero, and the scale and shift of their
            batch norms; after fine-tuning also changes all other parameters and the statistics of
            batch norms. Its origin lists the units of each layer, layers that would have lost all
            units and keep their best (``kept``), and those whose units have to stay, with the
            reason (``fixed``).

        Raises
        ------
        ValueError
            If the model cannot be traced (`channel_groups`), or nothing can be pruned.
        """
        plan = _Plan(self, model, data, target, fine_tune, checkpoint)
        return plan.edit(model, lambda network, step: plan.scores(network))


@dataclass(frozen=True)
class ConceptAwarePruning:
    """Switch off the units that matter least once a spurious concept has been removed.

    Concept-aware network pruning: the concept's subspaces are ablated while the units are scored,
    so that those which only served it fall to the bottom.

    Parameters
    ----------
    layer : str
        The layer of the subspaces; where the concept forms rather than late.
    subspaces : Subspaces or finder
        A finder (`DRSA`, `PCA`, `PRCA`, `CAV`) is fitted to the ``features`` given to `plan`.
    ablate : sequence of int or "auto"
        The subspaces of the spurious concept. "auto" takes those that predict the concept and not
        the class, by `choose_spurious` on the features; where there are none the edit is empty and
        its origin says why.
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
    scorer: Scorer = field(default_factory=DEFAULT_SCORER)
    layers: Sequence[str] | None = None
    ranking: Ranking = "global"
    keep_ablation: bool = False
    steps: int = 1
    protect: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self)
        given = isinstance(self.subspaces, Subspaces)
        if not given and not hasattr(self.subspaces, "fit"):
            raise TypeError(
                f"subspaces: {self.subspaces!r} given; give Subspaces, or a finder such as "
                "xai_edit.DRSA(4)"
            )
        if isinstance(self.ablate, str):
            works = "it is 'auto' or the numbers of subspaces"
            require(self.ablate == "auto", "ablate", self.ablate, works)
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
        if search and features is None:
            raise ValueError(
                "features: none given; a finder and ablate='auto' need those of samples with and "
                "without the concept"
            )
        if features is not None and not search:
            raise ValueError("features: given, but the subspaces to ablate are named already")
        plan = _Plan(self, model, data, target, fine_tune, checkpoint)
        plan.origin |= {"layer": self.layer, "keep_ablation": self.keep_ablation}
        concept = _Concept(self, features)
        concept.learn(model)
        if not concept.indices:
            about = {**plan.origin, **concept.origin(), "share": self.share}
            return ModelEdit.between(model, {}, about)

        def score(network: nn.Module, step: int) -> UnitScores:
            if step > 0 and callable(features):
                concept.learn(network)
            if not concept.indices:
                return plan.scores(network)
            with ablated(network, self.layer, concept.subspaces, concept.indices) as inner:
                return plan.scores(network, self.layer, inner)

        def fold(network: nn.Module) -> Mapping[str, Tensor]:
            if not self.keep_ablation or not concept.indices:
                return {}
            U, removed = concept.subspaces, concept.indices
            return fold_ablation(network, self.layer, U, removed, plan.inputs)

        return plan.edit(model, score, fold=fold, step_origin=concept.origin)


class _Concept:
    """The subspaces to ablate, as they were given or last learned."""

    subspaces: Subspaces
    indices: tuple[int, ...]

    def __init__(self, operator: ConceptAwarePruning, features: FeaturesOf | None) -> None:
        self.operator, self.features = operator, features
        self.found: dict[str, Any] = {}

    def learn(self, network: nn.Module) -> None:
        """Find the subspaces of a network, and which of them are the concept's."""
        finder, ablate = self.operator.subspaces, self.operator.ablate
        features: Any = self.features(network) if callable(self.features) else self.features
        self.subspaces = finder if isinstance(finder, Subspaces) else finder.fit(features)
        if ablate == "auto":
            table = predictiveness(self.subspaces, features)
            choice = choose_spurious(table)
            self.indices = choice.indices
            self.found = {"predictiveness": table.to_dict(), "reason": choice.reason}
        else:
            self.indices = self.subspaces.checked(ablate)

    def origin(self) -> dict[str, Any]:
        """Return what an edit's origin says of the concept."""
        return {"ablated": [*self.indices], "subspaces": self.subspaces.origin, **self.found}


class _Plan:
    """What both operators plan with: the units that may go, and their scores."""

    def __init__(
        self,
        operator: RelevancePruning | ConceptAwarePruning,
        model: nn.Module,
        data: Data,
        target: Target,
        fine_tune: FineTune | None,
        checkpoint: str | Path | None,
    ) -> None:
        if fine_tune is not None and not callable(fine_tune):
            raise TypeError(
                f"fine_tune: {fine_tune!r} given; give a function that trains a network in place, "
                "such as xai_edit.FineTuning(data)"
            )
        if operator.steps > 1:
            readable_again(data, f"pruning in {operator.steps} steps")
        first, whole = peek(data, model_device(model))
        self.data = whole if isinstance(data, Iterator) else data
        self.inputs, sample = first.inputs, first.inputs[:1]
        layers = _layers(model, operator.layers, sample)
        named = operator.layers is not None
        groups = channel_groups(model, sample)
        self.found = prunable(groups, layers, protect=operator.protect, named=named)
        self.scorer, self.target = operator.scorer, target
        steps = operator.share, operator.ranking, operator.steps
        self.schedule = Schedule(*steps, fine_tune, checkpoint)
        self.origin: dict[str, Any] = {
            "operator": type(operator).__name__,
            "scorer": describe(operator.scorer),
            "target": describe_target(target),
        }

    def edit(self, model: nn.Module, score: Score, **more: Any) -> ModelEdit:
        """Return the edit; see `xai_edit.pruning.schedule.pruned`."""
        given: dict[str, Any] = {"score": score, "origin": self.origin, **more}
        return pruned(model, self.inputs, self.found, self.schedule, **given)

    def scores(self, network: nn.Module, layer: str = "", inner: str = "") -> UnitScores:
        """Score the layers to prune: |sum over positions| of each sample, summed over samples.

        In the network, ``layer`` and the modules inside it are found under the name ``inner``.
        """
        names = [
            inner + name.removeprefix(layer) if f"{name}.".startswith(f"{layer}.") else name
            for name in self.found.layers
        ]
        if getattr(self.scorer, "behind_norm", False):
            norms = following_batch_norms(network, self.inputs[:1], names)
            names = [norms.get(name, name) for name in names]
        scores = score_units(
            network, self.data, self.scorer, layers=names, target=self.target, aggregate="abs"
        )
        sums = {own: scores.sums[name] for own, name in zip(self.found.layers, names, strict=True)}
        return UnitScores(sums, scores.samples, scores.aggregate)


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


def _check(operator: RelevancePruning | ConceptAwarePruning) -> None:
    fraction(operator.share, "share")
    one_of(operator.ranking, ("global", "local"), "ranking")
    whole_number(operator.steps, "steps", least=1)
