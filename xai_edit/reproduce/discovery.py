"""Discovery of a planted mark without labels of it, and what edits by the discovered groups do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.core.layers import replaced
from xai_edit.datasets.image_set import ImageSet
from xai_edit.discovery.discover import discover
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.discovery.proposals import METHODS
from xai_edit.last_layer.counterfactual import CounterfactualRetraining
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Results, refusals
from xai_edit.reproduce.pruning import PairPruning
from xai_edit.reproduce.pruning_methods import Context, marked

HOLDS = 0.95  # AUROC from which a finding holds the mark
OTHER = 0.8  # AUROC below which it holds something else
TRUTH = "last-layer retraining on each image without and with the mark"


@dataclass(frozen=True, kw_only=True)
class PairDiscovery(PairPruning):
    """Networks that learned a watermark with one of two classes, searched by every method.

    The search reads the training images without their attribute; presence and accuracies are on
    other images.
    """

    methods = METHODS
    summary = staticmethod(summaries.pair_discovery)
    tables = staticmethod(tables.pair_discovery)

    def compared(self, context: Context) -> dict[str, Any]:
        """Measure all methods on one network."""
        rows: list[Results] = [context.measured("unedited")]
        train = context.train
        assert train.attribute is not None
        found = {}
        for method in filter(self.options.wants, METHODS):
            findings = discover(context.model, _without_attribute(train), method=method)
            found[method] = self._described(context, findings)
            if len(findings) and train.attribute.any():
                rows += self._edited(context, method, findings[0])
        if train.attribute.any():
            both = [*marked(train, 0), *marked(train, 1)]
            with LastLayerRetraining().plan(context.model, both).applied(context.model):
                rows.append(context.measured(TRUTH))
        return {"rows": rows, "found": found}

    def _described(self, context: Context, findings: Findings) -> dict[str, Any]:
        """Return the scores of the findings, and how well each ranks images by the mark."""
        from sklearn.metrics import roc_auc_score

        truth = context.test.attribute
        assert truth is not None
        described = []
        for one in findings:
            seen = torch.cat([one.presence(context.model, batch[0]) for batch in context.test])
            entry: Results = {"target": one.target, "layer": one.layer}
            entry["score"] = one.evidence.score
            auroc = float(roc_auc_score(truth.numpy(), seen.numpy()))
            described.append({**entry, "auroc": auroc, "stands_out": one.evidence.stands_out})
        return {
            "findings": described,
            "rank": next((i for i, one in enumerate(described) if one["auroc"] >= HOLDS), None),
            "auroc": described[0]["auroc"] if described else None,
            "score": described[0]["score"] if described else None,
            "other": max((one["score"] for one in described if one["auroc"] < OTHER), default=0.0),
            "standing_out": sum(one["stands_out"] for one in described),
        }

    def _edited(self, context: Context, method: str, first: Finding) -> list[Results]:
        """Return the accuracies after edits by the first finding."""
        model, train = context.model, context.train
        rows: list[Results] = []

        def ablate(values: Tensor) -> Tensor:
            a = values.movedim(first.axis, -1)
            return first.subspaces.ablate(a, [0]).movedim(-1, first.axis)

        with replaced(model, first.layer, ablate):
            rows.append(context.measured(f"ablation: {method}"))
        operators: dict[str, Any] = {
            "counterfactual retraining": CounterfactualRetraining(first.layer, first.subspaces),
            "last-layer retraining": LastLayerRetraining(),
        }
        for name, operator in operators.items():
            row = {"method": f"{name}: {method}"}
            with refusals(rows, row):
                data = _without_attribute(train)
                edit = operator.plan(model, data, attribute=first.has.long())
                with edit.applied(model):
                    rows.append(context.measured(row["method"]))
        return rows


def _without_attribute(images: ImageSet) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of images, without the attribute."""
    return [(inputs, labels) for inputs, labels, *_ in images]
