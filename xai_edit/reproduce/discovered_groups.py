"""Edits of the last layer by groups that were discovered, beside the same by true labels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.comparisons.leace import LEACE
from xai_edit.core.counting import count_by_group
from xai_edit.datasets.image_set import ImageSet
from xai_edit.discovery.discover import discover
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.discovery import OURS, described, without_attribute
from xai_edit.reproduce.experiments import Results, refusals
from xai_edit.reproduce.group_training import Training
from xai_edit.reproduce.groups import NeutralizingColours

SEARCHED = 10_000  # training images


@dataclass(frozen=True, kw_only=True)
class ColourDiscovery(NeutralizingColours):
    """Coloured digits whose colour nobody labels: found in training images, then neutralised.

    The edits are planned on the same images by true and by discovered values of the colour.
    """

    methods: ClassVar[Collection[str]] = ()
    summary = staticmethod(summaries.discovery)
    tables = staticmethod(tables.discovery)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured at each strength."""
        return {f"ρ = {key}": one for key, one in super().one_seed(seed, *images).items()}

    def compared(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is found in the network of one seed and strength, and edits by it."""
        train, planning, held = images
        model = self.built(seed, train)
        training = Training(epochs=self.epochs, batch_size=self.batch_size, seed=seed, **self.erm)
        model = training.erm(model, train).apply(model).eval()
        source, test = (
            collect_head_features(model, one, with_attribute=True) for one in (planning, held)
        )
        counts = train.counts()
        rows: list[Results] = [
            {"method": "unedited", "worst": evaluate_head(test, train_samples=counts).worst}
        ]
        rows += _edits(model, source, test, counts, "true values")
        findings = discover(model, without_attribute(train[torch.arange(len(train))[:SEARCHED]]))
        found = described(model, findings, held, either=True)
        if len(findings):
            first = findings[0]
            seen = torch.cat([first.presence(model, batch[0]) for batch in planning])
            has = (seen > first.threshold).long()
            rows.append(
                {"method": "images whose value is right", "worst": least_right(source, has)}
            )
            rows += _edits(model, replace(source, attribute=has), test, counts, "discovered values")
        return {"rows": rows, "found": {OURS: found}}


def _edits(
    model: nn.Module, source: HeadFeatures, test: HeadFeatures, counts: Tensor, values: str
) -> list[Results]:
    """Return the worst group of edits that are planned on the source."""
    exact = partial(FictitiousClass("exact").plan, fictitious=[0, 1], validation=source)
    plans: dict[str, Callable[..., ModelEdit]]
    plans = {"DFR": LastLayerRetraining(C="auto").plan, "LEACE": LEACE().plan, "FCR: exact": exact}
    rows: list[Results] = []
    for name, plan in plans.items():
        row = {"method": f"{name}, {values}"}
        with refusals(rows, row):
            accuracy = evaluate_head(test.edited(plan(model, source)), train_samples=counts)
            rows.append({**row, "worst": accuracy.worst})
    return rows


def least_right(source: HeadFeatures, has: Tensor) -> float:
    """Return the least share, over groups, of samples whose discovered value is the true one.

    A finding may be of either value: the better of both numberings counts.
    """
    assert source.labels is not None
    assert source.attribute is not None
    shares = []
    for one in (has, 1 - has):
        right = count_by_group(one, source.attribute, 2, source.labels)
        shares.append(float((right[0] / right[1]).min()))
    return max(shares)
