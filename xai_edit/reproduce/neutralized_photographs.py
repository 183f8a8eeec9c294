"""Table 1 of Hakemi et al. on EfficientNet-Lite0, with labels of the attribute and without any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.comparisons.leace import LEACE
from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.presence import Presence
from xai_edit.datasets.image_set import ImageSet
from xai_edit.discovery.discover import discover
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.discovery.proposals import relevance_maps
from xai_edit.discovery.strategies import mixture, spectral
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_groups, evaluate_head
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.lrp.lrp import LRP
from xai_edit.reproduce.discovery import OURS, described, without_attribute, without_finding
from xai_edit.reproduce.experiments import Results, refusals
from xai_edit.reproduce.group_training import Training
from xai_edit.reproduce.groups import (
    Neutralizing,
    Plans,
    edited_rows,
    figures_of,
    head_plans,
    sweeps,
)
from xai_edit.reproduce.photographs import LITE0, MEAN, STD, efficientnet_lite0, fine_tuned
from xai_edit.reproduce.training import trained_once

BY_LABELS = "planned on validation images, whose attribute is labelled"
WITHOUT = "planned on training images, whose attribute nobody labels"
TRUE = "true groups, for comparison"
DRO, JTT = "group DRO (on the head)", "JTT (on the head)"
HEAD_EPOCHS = 60
UPWEIGHT = 5  # of 5, 20 and 100 the best on the held-out half of Waterbirds' validation, seed 0
Heads = tuple[HeadFeatures, HeadFeatures]
"""The head's inputs for the images that edits are planned on, and for test images."""


@dataclass(frozen=True, kw_only=True)
class NeutralizingPhotographs(Neutralizing):
    """EfficientNet-Lite0 fine-tuned on photographs, and edited with labels and without.

    By labels of the attribute edits are planned on validation images, as in the paper. Without
    labels they are planned on training images: a validation set that is balanced within each class
    would tell the attribute by itself. Another ``network`` is trained and edited as in the paper.
    """

    methods: ClassVar[tuple[str, ...]] = ("threshold shift", *Neutralizing.methods, DRO, JTT)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured on the network of one seed."""
        if self.network != LITE0:
            return super().one_seed(seed, *images)
        train, validation, test = (replace(one, mean=MEAN, std=STD) for one in images)
        file = self.options.out / f"network-{seed}.safetensors"
        torch.manual_seed(seed)
        network = efficientnet_lite0(int(train.labels.max()) + 1)
        tuned = partial(
            fine_tuned, train=train, validation=validation, epochs=self.epochs, seed=seed
        )
        model = trained_once(file, network, tuned)
        source, planning, held = (
            collect_head_features(model, one, with_attribute=True)
            for one in (train, validation, test)
        )
        counts = train.counts()
        before = {"method": "unedited (ERM)"}
        before |= figures_of(evaluate_head(held, train_samples=counts))
        rows = [before]
        plans: Plans = {
            "threshold shift": partial(threshold_shift, model, planning),
            **head_plans(model, planning, planning),
            **trained_heads(model, planning, seed),
        }
        rows += edited_rows(self.options, plans, held, counts)
        findings = discover(model, without_attribute(train))
        found, chosen = described(model, findings, test, within=True), None
        if (marked := _marked(findings, train)) is not None:
            found |= {"marked": marked, "marked_auroc": found["findings"][marked]["auroc"]}
            chosen = findings[marked]
        own = [before, *_without_labels(model, train, test, (source, held), chosen)]
        return {
            BY_LABELS: {"rows": rows, "sweeps": sweeps(model, planning, planning)},
            WITHOUT: {"rows": own, "sweeps": []},
            "found": {OURS: found},
        }


def _marked(findings: Findings, train: ImageSet) -> int | None:
    """Return the number of the finding that a person would mark, None where there is none.

    The one that goes most with the attribute of training images, within each class.
    """
    from sklearn.metrics import roc_auc_score

    assert train.attribute is not None
    has = train.attribute > 0
    parts = [train.labels == label for label in train.labels.unique()]

    def least(finding: Finding) -> float:
        aurocs = [float(roc_auc_score(has[part], finding.scores[part])) for part in parts]
        return max(min(aurocs), 1 - max(aurocs))

    return max(range(len(findings)), key=lambda at: least(findings[at]), default=None)


def _without_labels(
    model: nn.Module, train: ImageSet, test: ImageSet, heads: Heads, chosen: Finding | None
) -> list[Results]:
    """Return the accuracies after edits by groups that need no labels, and by true groups."""
    counts = train.counts()
    rows: list[Results] = []

    def add(method: str, operator: Any, pair: Heads, attribute: Tensor) -> None:
        source, held = pair
        with refusals(rows, {"method": method}):
            edit = operator.plan(model, replace(source, attribute=attribute))
            figures = figures_of(evaluate_head(held.edited(edit), train_samples=counts))
            rows.append({"method": method, **figures, "weights_changed": edit.size})

    retraining = LastLayerRetraining(C="auto")
    groups = dict(_groups(model, train, heads[0]))
    if chosen is not None:
        groups["discovered groups"] = chosen.has.long()
    for name, attribute in groups.items():
        add(f"last-layer retraining: {name}", retraining, heads, attribute)
    if chosen is None:
        return rows
    add("LEACE: discovered groups", LEACE(), heads, chosen.has.long())
    present = Presence(chosen.threshold, chosen.pooling)
    where: Any = {"when": present, "unit_axis": chosen.axis}
    row = {"method": "reactive ablation"}
    with refusals(rows, row), ablated(model, chosen.layer, chosen.subspaces, [0], **where):
        accuracy = evaluate_groups(model, test, train_samples=counts)
        rows.append({**row, **figures_of(accuracy)})
    with without_finding(model, chosen):
        both = [collect_head_features(model, one, with_attribute=True) for one in (train, test)]
        heads = both[0], both[1]
        accuracy = evaluate_head(heads[1], train_samples=counts)
        rows.append({"method": "ablation", **figures_of(accuracy)})
        for name in (TRUE, "discovered groups"):
            method = f"ablation and last-layer retraining: {name}"
            add(method, retraining, heads, groups[name])
    return rows


def _groups(
    model: nn.Module, train: ImageSet, source: HeadFeatures
) -> Iterator[tuple[str, Tensor]]:
    """Yield values of an attribute by which last-layer retraining balances."""
    assert source.attribute is not None
    yield TRUE, source.attribute
    yield "classes", torch.zeros_like(train.labels)
    predicted = source.logits().argmax(1)
    yield "class and prediction (JTT's errors)", predicted
    relevance = LRP("epsilon-plus", initial="one")
    clusters: dict[str, Tensor] = {}
    for label in train.labels.unique().tolist():
        own = train.labels == label
        fit = torch.ones(int(own.sum()), dtype=torch.bool)
        maps = relevance_maps(model, (x for x, *_ in train[own]), label, relevance)
        divided = {
            "clusters of the head's inputs (GEORGE)": mixture(source.features[own], fit),
            "clusters of relevance maps (ExMap)": spectral(maps, fit),
        }
        for name, strategies in divided.items():
            clusters.setdefault(name, torch.zeros_like(train.labels))[own] = strategies.cluster
    yield from clusters.items()


def trained_heads(model: nn.Module, planning: HeadFeatures, seed: int) -> Plans:
    """Return what trains the last layer for the worst group, and on its own errors.

    Half of the images of each group train it, and the others say which epoch is kept. JTT takes
    the errors of the network as it is.
    """
    labels, attribute = planning.require_labels(), planning.attribute
    assert attribute is not None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[(2 * labels + attribute)[order].argsort(stable=True)]
    training = Training(epochs=HEAD_EPOCHS, seed=seed, validation=planning[order[1::2]])
    half = planning[order[::2]]
    return {
        DRO: partial(training.group_dro, model, half),
        JTT: partial(training.jtt, model, half, first_epochs=0, upweight=UPWEIGHT),
    }


def threshold_shift(model: nn.Module, planning: HeadFeatures) -> ModelEdit:
    """Plan the change of class 1's bias after which the worst group is the best."""
    labels, attribute = planning.require_labels(), planning.attribute
    assert attribute is not None
    margin = planning.logits() @ torch.tensor([-1.0, 1.0], dtype=torch.double)  # for class 1
    order = margin.sort().values
    thresholds = (order[1:] + order[:-1]) / 2
    shares = []
    for label, value in torch.stack([labels, attribute], 1).unique(dim=0).tolist():
        own = margin[(labels == label) & (attribute == value)].sort().values
        below = torch.searchsorted(own, thresholds, right=True) / len(own)
        shares.append(1 - below if label else below)
    threshold = thresholds[torch.stack(shares).amin(0).argmax()]
    assert planning.bias is not None
    bias = planning.bias.double() - torch.stack([torch.zeros_like(threshold), threshold])
    return planning.edit(model, {"operator": "threshold shift"}, bias=bias.to(planning.bias))
