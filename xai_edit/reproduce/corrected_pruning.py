"""Pruned and corrected: pruning, then a last layer that is retrained on completed images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from xai_edit.concepts.choose import choose_spurious
from xai_edit.concepts.finders import ContrastivePCA
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.discovery.discover import discover
from xai_edit.discovery.findings import Finding
from xai_edit.last_layer.counterfactual_tuning import CounterfactualTuning
from xai_edit.lrp.lrp import Scorer
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning
from xai_edit.reproduce.discovery import described, without_attribute, without_finding
from xai_edit.reproduce.experiments import Results, refusals
from xai_edit.reproduce.pruning import PairPruning
from xai_edit.reproduce.pruning_methods import LRP_PRUNING, Context
from xai_edit.scoring.criteria import Random, Taylor, WeightMagnitude

SHARES = (0.1, 0.2, 0.3, 0.6)
CORRECTED = 0.6  # the share after which the last layer is retrained too
TUNED_ON = 800  # training images that it is retrained on
SIZE = 2  # directions that are exchanged
PLAIN: dict[str, Callable[[int], Scorer]] = {
    "LRP": lambda _: LRP_PRUNING,
    "Taylor": lambda _: Taylor(),
    "weight magnitude": lambda _: WeightMagnitude(),
    "random": Random,
    "LRP, clean references": lambda _: LRP_PRUNING,
}
CRITERIA: dict[str, Any] = {
    "CNP": {},
    "CNP, penalized, λ = 1": {"criterion": "penalized"},
    "CNP, penalized, λ = 0.5": {"criterion": "penalized", "penalty": 0.5},
}
CHOSEN = "by labels and choose_spurious"


def _operators(context: Context, finding: Finding) -> dict[str, Callable[[float], Any]]:
    """Return what makes the operator of a share, by method.

    Concept-aware ones have the finding's subspace, and once more what labels of the planning
    images lead to; they are left out where that is to ablate nothing.
    """
    made: dict[str, Callable[[float], Any]] = {
        name: partial(RelevancePruning, scorer=scorer(context.seed))
        for name, scorer in PLAIN.items()
    }

    def add(name: str, layer: str, subspaces: Subspaces, indices: Sequence[int]) -> None:
        for criterion, how in CRITERIA.items():

            def operator(share: float, how: Any = how) -> ConceptAwarePruning:
                return ConceptAwarePruning(layer, subspaces, indices, share, LRP_PRUNING, **how)

            made[f"{criterion}{name}"] = operator

    add("", finding.layer, finding.subspaces, [0])
    about = context.model, context.planning, ContrastivePCA(None), context.features
    choice = choose_spurious(*about, layer=context.layer)
    if choice.indices:
        add(f"; {CHOSEN}", context.layer, choice.subspaces, choice.indices)
    return made


@dataclass(frozen=True, kw_only=True)
class CorrectedPairPruning(PairPruning):
    """Networks that learned a watermark nobody labels: it is found, then they are pruned.

    The subspaces, and for the retraining which images have the mark, are those of the first
    finding. References are as they come, clean ones aside, which a person has to sort out.
    """

    methods = ()
    shares: ClassVar[tuple[float, ...]] = SHARES

    def setting(self, *images: Any) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        return super().setting(*images) | {"pattern": self.pattern}

    def compared(self, context: Context) -> dict[str, Any]:
        """Measure all methods on one network, without and with the retraining."""
        model = context.model
        rows: list[Results] = [context.measured("unpruned")]
        findings = discover(model, without_attribute(context.train))
        found = described(model, findings, context.test)
        if not len(findings):
            return {"rows": rows, "predictiveness": {}, "found": found}
        first = findings[0]
        with without_finding(model, first):
            rows.append(context.measured("ablation alone"))
        generator = torch.Generator().manual_seed(context.seed)
        some = torch.randperm(len(context.train), generator=generator)[:TUNED_ON]
        data, has = without_attribute(context.train[some]), first.has[some].long()
        tuning = CounterfactualTuning(data, first.layer, has, size=SIZE, seed=context.seed)
        network = deepcopy(model)
        with refusals(rows, {"method": "unpruned, corrected"}):
            tuning(network)
            rows.append(context.measured("unpruned, corrected", network=network))
        for name, operator in _operators(context, first).items():
            references = context.references(clean=name == "LRP, clean references")
            for share in SHARES:
                ways: dict[str, Any] = {name: None}
                if share == CORRECTED and CHOSEN not in name:
                    ways[f"{name}, corrected"] = tuning
                for method, tune in ways.items():
                    with refusals(rows, {"method": method, "share": share}):
                        edit = operator(share).plan(model, references, fine_tune=tune)
                        with edit.applied(model):
                            rows.append(context.measured(method, share))
        return {"rows": rows, "predictiveness": {}, "found": found}
