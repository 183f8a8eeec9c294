"""Pruned and corrected: pruning, then a last layer that is retrained on completed images."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.finders import ContrastivePCA
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.discovery.discover import discover
from xai_edit.last_layer.counterfactual_tuning import CounterfactualTuning
from xai_edit.lrp.lrp import Scorer
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning
from xai_edit.reproduce.discovery import described, without_attribute
from xai_edit.reproduce.experiments import Results, refusals
from xai_edit.reproduce.pruning import PairPruning
from xai_edit.reproduce.pruning_methods import LRP_PRUNING, POSITIONS, RANK, REFERENCES, Context
from xai_edit.scoring.criteria import Random, Taylor, WeightMagnitude

SHARES = (0.2, 0.6)
CORRECTED = 0.6  # the share after which the last layer is retrained too
TUNED_ON = 800  # training images that the subspace is found in and it is retrained on
CLEAN = "LRP, clean references"
R_DIFF = "LRP, R_diff"
PLAIN: dict[str, Callable[[int], Scorer]] = {
    "LRP": lambda _: LRP_PRUNING,
    "Taylor": lambda _: Taylor(),
    "weight magnitude": lambda _: WeightMagnitude(),
    "random": Random,
    CLEAN: lambda _: LRP_PRUNING,
    R_DIFF: lambda _: LRP_PRUNING,
}
CRITERIA: dict[str, Any] = {
    "CNP": {"criterion": "ablated"},
    "CNP, penalized": {"criterion": "penalized"},
}


def _operators(context: Context, subspaces: Subspaces) -> dict[str, Callable[[float], Any]]:
    """Return what makes the operator of a share, by method."""
    plain = {
        name: partial(RelevancePruning, scorer=scorer(context.seed))
        for name, scorer in PLAIN.items()
    }
    found = context.layer, subspaces, [0]
    aware = {
        name: partial(ConceptAwarePruning, *found, scorer=LRP_PRUNING, **how)
        for name, how in CRITERIA.items()
    }
    return {**plain, **aware}


@dataclass(frozen=True, kw_only=True)
class CorrectedPairPruning(PairPruning):
    """Networks that learned a watermark nobody labels: it is found, then they are pruned.

    Which images have the mark is what the first finding says. By it, in training images, the
    subspace of a layer where the mark forms is found, those that count against a filter in R_diff
    are chosen, and the last layer is retrained. References are as they come, clean ones aside,
    which a person has to sort out.
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
        generator = torch.Generator().manual_seed(context.seed)
        some = torch.randperm(len(context.train), generator=generator)[:TUNED_ON]
        data = without_attribute(context.train[some])
        has = findings[0].has[some].long()
        known: Any = {"attribute": has, "positions": POSITIONS}
        features = collect_features(model, data, layer=context.layer, **known)
        subspaces = ContrastivePCA(RANK).fit(features)
        with ablated(model, context.layer, subspaces, [0]):
            rows.append(context.measured("ablation alone"))
        tuning = CounterfactualTuning(data, context.layer, has, seed=context.seed)
        network = deepcopy(model)
        with refusals(rows, {"method": "unpruned, corrected"}):
            tuning(network)
            rows.append(context.measured("unpruned, corrected", network=network))
        for name, operator in _operators(context, subspaces).items():
            images: dict[str, Any] = {"data": context.references(clean=name == CLEAN)}
            if name == R_DIFF:
                against = some[has.nonzero()[:REFERENCES, 0]]
                images["against"] = without_attribute(context.train[against])
            for share in SHARES:
                ways: dict[str, Any] = {name: None}
                if share == CORRECTED:
                    ways[f"{name}, corrected"] = tuning
                for method, tune in ways.items():
                    with refusals(rows, {"method": method, "share": share}):
                        edit = operator(share).plan(model, **images, fine_tune=tune)
                        with edit.applied(model):
                            rows.append(context.measured(method, share))
        return {"rows": rows, "predictiveness": {}, "found": found}
