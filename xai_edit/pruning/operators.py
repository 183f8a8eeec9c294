"""Pruning operators, which plan to switch off the units of lowest score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xai_edit.concepts.ablation import ablated, fold_ablation
from xai_edit.concepts.choose import choose_spurious
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import Finder
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.analysis import following_batch_norms, last_weighted
from xai_edit.core.checks import (
    fraction,
    one_of,
    positive,
    readable_again,
    require,
    whole_number,
)
from xai_edit.core.data import Data, model_device, peek
from xai_edit.core.guard import copied, preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import CONVOLUTIONS, resolve_layers
from xai_edit.core.targets import Target, describe_target
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.lrp.lrp import LRP, Scorer, describe
from xai_edit.pruning.coupled_channels import Coupling, coupling
from xai_edit.pruning.ranking import Ranking, prunable
from xai_edit.pruning.schedule import FineTune, Schedule, Score, pruned
from xai_edit.scoring.unit_scores import UnitScores, score_units

DEFAULT_SCORER = partial(LRP, "epsilon-plus", initial="one")
FeaturesOf = Features | Callable[[nn.Module], Features]
"""Features of samples with and without a concept, or a function that collects them."""
Criterion = Literal["ablated", "penalized"]


@dataclass(frozen=True)
class RelevancePruning:
    """Switch off the units with the lowest scores (Yeom et al. 2021, *Pruning by explaining*).

    Scores are summed over positions, and their absolute values over samples. Coupled units
    (`channel_groups`) are removed together by the sum of their scores.

    Parameters
    ----------
    share : float in (0, 1]
        Share of all units of the layers to remove. Every layer keeps its best unit.
    scorer : callable
        ``LRP("epsilon-plus", initial="one")`` by default. One with ``behind_norm = True``, such as
        `Taylor`, scores the output of the batch norm that follows a layer.
    layers : sequence of str, optional
        When left out, all convolution layers and linear layers that are applied at each position,
        or all hidden linear layers where none of those can be pruned.
    ranking : {"global", "local"}
        "global" ranks the units of all layers together, each layer's scores divided by their L1
        norm; "local" removes the share in each layer.
    steps : int
        Steps up to the share; each scores the network that the last one pruned and fine-tuned.
    protect : sequence of str
        Layers that keep all units, as do layers coupled to them.

    Examples
    --------
    >>> xe.RelevancePruning(share=0.875).plan(model, data).origin["removed"]
    '28 of 32 units'
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
        against: Data | None = None,
        fine_tune: FineTune | None = None,
        checkpoint: str | Path | None = None,
    ) -> ModelEdit:
        """Plan the pruning; ValueError if the model cannot be traced or nothing can be pruned.

        Parameters
        ----------
        model : nn.Module
            A classifier. Not changed.
        data : iterable or Dataset
            Reference samples, 5 to 10 a class; one pass a step.
        target : int, "label", "predicted" or callable
            See `xai_edit.core.targets.Target`.
        against : iterable or Dataset, optional
            Samples in which an undesired feature acts, such as those where a `Finding` ``has`` it.
            Units are ranked by R_diff = R − R_against (Hatefi et al. 2025, *Attribution-guided
            pruning*, general minus undesired relevance), each layer's R divided by its L1 norm,
            so that units which only the feature needs go first. One more pass a step.
        fine_tune : callable, optional
            Trains a pruned copy of the model in place after each step, such as `FineTuning`.
        checkpoint : str or Path, optional
            A file that is written after each step, and from which an interrupted plan resumes.

        Returns
        -------
        ModelEdit
            Sets the units' incoming weights and biases to zero, and the scale and shift of their
            batch norms. Its origin has the pruned ``units``, layers that keep only their best unit
            (``kept``), those whose units have to stay, with the reason (``fixed``), and those
            that only make a gate (``gates``): without relevance they are not ranked, and lose units
            only with the layer that they gate; with ``against`` the number of its samples.
        """
        plan = _Plan(self, unwrapped(model), data, target, fine_tune, checkpoint)
        if against is None:
            return plan.edit(lambda network, step: plan.scores(network))
        if self.steps > 1:
            readable_again(against, f"pruning in {self.steps} steps", "against")
        first, whole = peek(against, model_device(model), "against")
        undesired = whole if isinstance(against, Iterator) else against
        about: dict[str, int] = {}

        def score(network: nn.Module, step: int) -> UnitScores:
            R, R_against = plan.scores(network), plan.scores(network, undesired)
            about["against"] = R_against.samples
            return _normalized(R, R_against, torch.sub)

        return plan.edit(score, against=first.inputs, step_origin=lambda: about)


@dataclass(frozen=True)
class ConceptAwarePruning:
    """Concept-aware network pruning: score units while a spurious concept is ablated.

    Parameters
    ----------
    layer : str
        The layer of the subspaces; where the concept forms rather than late.
    subspaces : Subspaces or finder
        A finder such as `DRSA` is fitted to the ``features`` of `plan`.
    ablate : sequence of int or "auto"
        Those of the spurious concept. "auto" applies `choose_spurious`, which numbers directions of
        a single one; if it chooses none, the edit is empty, or a later step ablates nothing.
    share, scorer, layers, ranking, steps, protect
        See `RelevancePruning`.
    keep_ablation : bool
        Whether the edit also ablates the subspaces, folded into weights (`fold_ablation`).
    criterion : {"ablated", "penalized"}
        "penalized" ranks units by R − λ · max(0, R_full − R), with their scores R in the ablated
        network and R_full in that without, each layer's divided by their L1 norm, so that units
        which only the concept needs go first. It reads the reference samples twice. "ablated", as
        the method was published, ranks by R alone and reads them once.
    penalty : float
        λ, 0 or more.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> operator = xe.ConceptAwarePruning("relu1", xe.ContrastivePCA(1), [0], share=29 / 32)
    >>> 3 in operator.plan(model, data, features=features).origin["units"]["conv"]
    True
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
    criterion: Criterion = "penalized"
    penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        one_of(self.criterion, get_args(Criterion), "criterion")
        positive(self.penalty, "penalty", zero=True)
        if not isinstance(self.subspaces, Subspaces) and not hasattr(self.subspaces, "fit"):
            raise TypeError(
                f"subspaces: {self.subspaces!r} given; give Subspaces, or a finder such as "
                "xai_edit.DRSA(4)"
            )
        if isinstance(self.ablate, str):
            works = "it is 'auto' or the indices of subspaces"
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
        planning: Data | None = None,
        fine_tune: FineTune | None = None,
        checkpoint: str | Path | None = None,
    ) -> ModelEdit:
        """Plan the pruning; other arguments and errors as of `RelevancePruning.plan`.

        Parameters
        ----------
        features : Features or callable, optional
            Of samples with and without the concept, for a finder or ``ablate="auto"``. A function
            that collects them from a network is called in each step.
        planning : iterable or Dataset, optional
            The labelled samples of the features, in the same order, on whose groups
            ``ablate="auto"`` tries each ablation.
        """
        model = unwrapped(model)
        resolve_layers(model, [self.layer])
        search = not isinstance(self.subspaces, Subspaces) or self.ablate == "auto"
        if search and features is None:
            raise ValueError(
                "features: none given; a finder and ablate='auto' need those of samples with and "
                "without the concept"
            )
        if features is not None and not search:
            raise ValueError("features: given, but the subspaces and their indices need none")
        if (planning is None) == (self.ablate == "auto"):
            raise ValueError(
                f"planning: {'given' if planning is not None else 'none given'}, and ablate is "
                f"{self.ablate!r}; 'auto', and nothing else, needs the samples of the features"
            )
        if self.steps > 1:
            readable_again(planning, f"pruning in {self.steps} steps", "planning")
        if self.criterion == "penalized":
            readable_again(data, 'criterion="penalized"')
        plan = _Plan(self, model, data, target, fine_tune, checkpoint)
        plan.origin |= {"layer": self.layer, "keep_ablation": self.keep_ablation}
        plan.origin |= {"criterion": self.criterion}
        if self.criterion == "penalized":
            plan.origin |= {"penalty": self.penalty}
        subspaces, indices, about = self._concept(model, features, planning)
        if not indices:
            return ModelEdit.between(model, {}, {**plan.origin, **about, "share": self.share})

        def score(network: nn.Module, step: int) -> UnitScores:
            nonlocal subspaces, indices, about
            if step > 0 and callable(features):
                subspaces, indices, about = self._concept(network, features, planning)
            if not indices:
                return plan.scores(network)
            with ablated(network, self.layer, subspaces, indices) as inner:
                scores = plan.scores(network, layer=self.layer, inner=inner)
            if self.criterion == "ablated":
                return scores

            def penalized(R: Tensor, R_full: Tensor) -> Tensor:
                return R - self.penalty * (R_full - R).clamp(min=0)

            return _normalized(scores, plan.scores(network), penalized)

        def fold(network: nn.Module) -> Mapping[str, Tensor]:
            if not self.keep_ablation or not indices:
                return {}
            return fold_ablation(network, self.layer, subspaces, indices, plan.inputs)

        return plan.edit(score, fold=fold, step_origin=lambda: about)

    def _concept(
        self, network: nn.Module, source: FeaturesOf | None, planning: Data | None
    ) -> tuple[Subspaces, tuple[int, ...], dict[str, Any]]:
        """Return subspaces, the indices of those to ablate, and both as entries of an origin."""
        features: Any = source(network) if callable(source) else source
        finder = self.subspaces
        if self.ablate == "auto":
            assert planning is not None  # `plan` has checked it
            choice = choose_spurious(network, planning, finder, features, layer=self.layer)
            subspaces, indices, tried = choice.subspaces, choice.indices, choice.to_dict()
        else:
            subspaces = finder if isinstance(finder, Subspaces) else finder.fit(features)
            indices, tried = subspaces.checked(self.ablate), {}
        return subspaces, indices, {"ablated": [*indices], "subspaces": subspaces.origin, **tried}


class _Normalized(UnitScores):
    """Scores that are divided by norms already."""

    def normalized(self, layer: str) -> Tensor:
        return self[layer]


def _normalized(
    one: UnitScores, other: UnitScores, criterion: Callable[[Tensor, Tensor], Tensor]
) -> UnitScores:
    """Return a criterion of the normalized scores R of each layer in two settings."""
    sums = {layer: criterion(one.normalized(layer), other.normalized(layer)) for layer in one}
    return _Normalized(sums, one.samples, one.aggregate)


class _Plan:
    """The units that an operator may remove, their scores, and the origin of the edit."""

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
        self.inputs = first.inputs
        self.network = copied(model).eval()  # the one to prune
        with preserved(self.network):
            coupled = coupling(self.network, first.inputs)
        layers = _layers(self.network, operator.layers, first.inputs[:1], coupled)
        named, gates = operator.layers is not None, coupled.gates
        self.found = prunable(
            coupled.groups, layers, protect=operator.protect, named=named, gates=gates
        )
        self.model, self.scorer, self.target = model, operator.scorer, target
        steps = operator.share, operator.ranking, operator.steps
        self.schedule = Schedule(*steps, fine_tune, checkpoint)
        described = {"scorer": describe(operator.scorer), "target": describe_target(target)}
        self.origin: dict[str, Any] = {"operator": type(operator).__name__, **described}

    def edit(self, score: Score, **more: Any) -> ModelEdit:
        """Return the edit; see `xai_edit.pruning.schedule.pruned`."""
        more |= {"score": score, "origin": self.origin}
        return pruned(self.model, self.network, self.inputs, self.found, self.schedule, **more)

    def scores(
        self, network: nn.Module, data: Data | None = None, layer: str = "", inner: str = ""
    ) -> UnitScores:
        """Score the layers to prune in a network that has ``layer`` under the name ``inner``.

        On the reference samples, or on other ``data``.
        """
        names = [
            inner + name.removeprefix(layer) if f"{name}.".startswith(f"{layer}.") else name
            for name in self.found.layers
        ]
        if getattr(self.scorer, "behind_norm", False):
            norms = following_batch_norms(network, self.inputs[:1], names)
            names = [norms.get(name, name) for name in names]
        data, target = self.data if data is None else data, self.target
        scores = score_units(
            network, data, self.scorer, layers=names, target=target, aggregate="abs"
        )
        sums = {own: scores.sums[name] for own, name in zip(self.found.layers, names, strict=True)}
        return UnitScores(sums, scores.samples, scores.aggregate)


def _layers(
    model: nn.Module, layers: Sequence[str] | None, inputs: Inputs, coupled: Coupling
) -> list[str]:
    """Return the layers to prune; see `RelevancePruning`."""
    last = last_weighted(model, inputs)
    if layers is not None:
        if last in (named := resolve_layers(model, layers)):
            raise ValueError(f"layers: {last!r} gives the output; its units are the classes")
        return named
    hidden = {name: module for name, module in model.named_modules() if name != last}
    maps = [
        name
        for name, module in hidden.items()
        if isinstance(module, CONVOLUTIONS) or name in coupled.positions
    ]
    linear = [name for name, module in hidden.items() if isinstance(module, nn.Linear)]
    if not maps and not linear:
        raise ValueError("layers: the model has no convolution and no hidden linear layer to prune")
    free = {name for group in coupled.groups if group.fixed is None for name in group.layers}
    for names in (maps, linear):
        if not free.isdisjoint(names):
            return names
    return [name for name in hidden if name in {*maps, *linear}]


def _check(operator: RelevancePruning | ConceptAwarePruning) -> None:
    fraction(operator.share, "share")
    one_of(operator.ranking, ("global", "local"), "ranking")
    whole_number(operator.steps, "steps", least=1)
