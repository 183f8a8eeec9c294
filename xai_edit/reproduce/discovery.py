"""Discovery of a planted mark without labels of it, and what edits by the discovered groups do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.core.data import model_device
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import as_inputs
from xai_edit.core.layers import replaced
from xai_edit.datasets.image_set import ImageSet
from xai_edit.discovery.candidates import POOLINGS, presence_of
from xai_edit.discovery.channel_relevance import layer_vectors
from xai_edit.discovery.discover import discover
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.discovery.proposals import METHODS
from xai_edit.last_layer.counterfactual import CounterfactualRetraining
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Results, refusals
from xai_edit.reproduce.pruning import PairPruning
from xai_edit.reproduce.pruning_methods import Context, marked
from xai_edit.reproduce.training import logits_of

OURS = METHODS[0]
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
    summary = staticmethod(summaries.discovery)
    tables = staticmethod(tables.discovery)

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        own = {key: value for key, value in super().setting(*images).items() if key != "shares"}
        return own | {"pattern": self.pattern}

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured at each strength."""
        return {f"ρ = {key}": one for key, one in super().one_seed(seed, *images).items()}

    def compared(self, context: Context) -> dict[str, Any]:
        """Measure all methods on one network."""
        model, train = context.model, context.train
        rows = [self.row(context, "unedited")]
        assert train.attribute is not None
        found = {}
        for method in filter(self.options.wants, METHODS):
            findings = discover(model, without_attribute(train), method=method)
            found[method] = described(model, findings, context.test)
            if len(findings) and train.attribute.any():
                rows += self._edited(context, method, findings)
        if train.attribute.any():
            both = [*marked(train, 0), *marked(train, 1)]
            with LastLayerRetraining().plan(model, both).applied(model):
                rows.append(self.row(context, TRUTH))
        return {"rows": rows, "found": found}

    def row(self, context: Context, method: str) -> Results:
        """Return the accuracies of the network as it is now."""
        return {"method": method, "worst": context.measured(method)["worst"]}

    def _edited(self, context: Context, method: str, findings: Findings) -> list[Results]:
        """Return the accuracies after edits by the first finding."""
        model, train, first = context.model, context.train, findings[0]
        rows: list[Results] = []
        with without_finding(model, first):
            rows.append(self.row(context, f"ablation: {method}"))
        operators: dict[str, Any] = {"last-layer retraining": LastLayerRetraining()}
        if method == OURS:  # the others are published for groups alone
            completed = CounterfactualRetraining(
                findings.origin["layers"], {first.layer: first.subspaces}
            )
            operators["counterfactual retraining"] = completed
        for name, operator in operators.items():
            row = {"method": f"{name}: {method}"}
            with refusals(rows, row):
                data = without_attribute(train)
                edit = operator.plan(model, data, attribute=first.has.long())
                with edit.applied(model):
                    rows.append(self.row(context, row["method"]))
        return rows


@dataclass(frozen=True, kw_only=True)
class ClassDiscovery(PairDiscovery):
    """Networks of all classes, each of which learned a watermark with one of ``classes``."""

    marked_class: int = 0

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured with the watermark on each class."""
        return {
            f"class {label}, {name}": found
            for label in self.classes
            for name, found in PairDiscovery.one_seed(
                replace(self, marked_class=label), seed, *images
            ).items()
        }

    def chosen(self, images: list[ImageSet]) -> list[ImageSet]:
        """Return the images of all classes."""
        return images

    def row(self, context: Context, method: str) -> Results:
        """Return accuracies, and how often the mark makes another class the marked one."""
        test = context.test
        assert test.attribute is not None
        predicted = logits_of(context.model, test).argmax(1)
        right, has = predicted == test.labels, test.attribute == 1
        own = test.labels == self.marked_class
        by_class = [right[(test.labels == label) & has] for label in test.labels.unique()]
        by_class += [right[(test.labels == label) & ~has] for label in test.labels.unique()]
        return {
            "method": method,
            "without the mark": share(right[~has]),
            "with it": share(right[has]),
            "the marked class without it": share(right[own & ~has]),
            "others called it": share(predicted[~own & has] == self.marked_class),
            "worst class": min(map(share, by_class)),
        }


def described(
    model: nn.Module,
    findings: Findings,
    test: ImageSet,
    *,
    either: bool = False,
    within: bool = False,
) -> Results:
    """Return the scores of the findings, and how well each ranks images by their attribute.

    With ``either``, a finding may be of either value of the attribute, as of one of two colours.
    With ``within``, the AUROC is the least of those within the classes, of either value.
    """
    from sklearn.metrics import roc_auc_score

    assert test.attribute is not None
    truth = (test.attribute > 0).numpy()
    listed = []
    for one, seen in zip(findings, _presences(model, findings, test), strict=True):
        entry: Results = {"target": one.target, "layer": one.layer, "score": one.evidence.score}
        entry["directions"] = one.subspaces.basis.shape[1]
        labels = test.labels.numpy() if within else 0 * test.labels.numpy()
        parts = [labels == label for label in set(labels.tolist())]
        aurocs = [float(roc_auc_score(truth[part], seen[part])) for part in parts]
        either_way = [1 - auroc for auroc in aurocs] if either or within else aurocs
        entry["auroc"] = max(min(aurocs), min(either_way))
        listed.append({**entry, "stands_out": one.evidence.stands_out})
    return {
        "findings": listed,
        "rank": next((i for i, one in enumerate(listed) if one["auroc"] >= HOLDS), None),
        "auroc": listed[0]["auroc"] if listed else None,
        "score": listed[0]["score"] if listed else None,
        "other": max((one["score"] for one in listed if one["auroc"] < OTHER), default=0.0),
        "standing_out": sum(one["stands_out"] for one in listed),
    }


def _presences(model: nn.Module, findings: Findings, test: ImageSet) -> np.ndarray:
    """Return the presence of each finding, (findings, images), from one pass over the images."""
    axes = {one.layer: one.axis for one in findings}
    found = [torch.zeros(len(findings), 0, dtype=torch.float64)]
    with preserved(model):
        for inputs, *_ in test if axes else ():
            own = as_inputs(inputs, "inputs").to(model_device(model))
            vectors = layer_vectors(model, own, axes)
            rows = []
            for one in findings:
                a, real = vectors[one.layer]
                both = presence_of(a.double(), real, [one.subspaces])
                rows.append(both[POOLINGS.index(one.pooling), 0].cpu())
            found.append(torch.stack(rows))
    return torch.cat(found, 1).numpy()


def without_finding(model: nn.Module, finding: Finding) -> AbstractContextManager[None]:
    """Return a context in which the finding's subspace is ablated."""

    def ablate(values: Tensor) -> Tensor:
        a = values.movedim(finding.axis, -1)
        return finding.subspaces.ablate(a, [0]).movedim(-1, finding.axis)

    return replaced(model, finding.layer, ablate)


def without_attribute(images: ImageSet) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of images, without the attribute."""
    return [(inputs, labels) for inputs, labels, *_ in images]


def share(which: Tensor) -> float:
    """Return the mean of yes-or-no answers."""
    return float(which.double().mean())
