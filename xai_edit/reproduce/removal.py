"""Figures 6, 7 and 8 of Hakemi et al.: classes and sub-classes removed by one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from xai_edit.datasets.image_set import ImageSet
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.last_layer.single_weight import SingleWeight
from xai_edit.last_layer.weight_selection import Selection
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Options, Reproduction, Results, Table

PLANNED = 100  # test images a class (a digit) that edits are planned from; the others measure
DRAWS = 10  # of classes to remove together
SELECTIONS: tuple[Selection, ...] = (
    "sca",
    "ca",
    "gradient-activation",
    "relevance",
    "weight",
    "random",
    "exact",
)
CHOSEN: tuple[Selection, ...] = ("sca", "exact")  # selections whose rate or dose is chosen
TOLERANCES = (0.005, 0.02, 0.05, 0.1)  # accuracy on the other digits that may go, to plan by
RATES = np.union1d(np.linspace(0, 1, 21), np.logspace(-5, 0, 41))


@dataclass(frozen=True, kw_only=True)
class ClassRemoval(Reproduction):
    """Fig. 6: each class removed by each selection, by one to three weights."""

    def one_seed(self, options: Options, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return the accuracy on each class, before and after each edit."""
        train, test = images
        model = self.trained(options, seed, train)
        planning, held = parts(model, test, seed)
        rows = []
        counts = ((select, n) for select in SELECTIONS for n in (1, 2, 3))
        for select, n_weights in counts:
            if n_weights > 1 and select != "sca":
                continue
            operator = SingleWeight(select, n_weights=n_weights, seed=seed)
            for target in options.classes or range(held.classes):
                row: dict[str, Any] = {"select": select, "n_weights": n_weights, "class": target}
                try:
                    edit = operator.plan(model, planning, target=target)
                except ValueError as problem:
                    rows.append(row | {"refused": str(problem)})
                    continue
                rows.append(row | {"accuracy": _by_class(held.edited(edit))})
        return {"before": _by_class(held), "rows": rows}

    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return figures by selection and by class, over classes and seeds."""
        return summaries.class_removal(results)

    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return Fig. 6 as tables: by selection, and by class for SCA."""
        return tables.class_removal(summary)


@dataclass(frozen=True, kw_only=True)
class SeveralClassesRemoval(Reproduction):
    """Fig. 7: several classes at once, drawn at random, removed by one weight each."""

    def one_seed(self, options: Options, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return mean accuracies of removed and retained classes by draw and selection."""
        train, test = images
        model = self.trained(options, seed, train)
        planning, held = parts(model, test, seed)
        before = np.array(_by_class(held))
        generator = np.random.default_rng(seed)
        counts = {round(held.classes * share) for share in (0.2, 0.4, 0.6, 0.8, 0.98)}
        rows = []
        for count in [each for each in sorted(counts - {held.classes}) for _ in range(DRAWS)]:
            gone = sorted(generator.choice(held.classes, count, replace=False).tolist())
            stay = [at for at in range(held.classes) if at not in gone]
            for select in ("sca", "exact"):
                edit = SingleWeight(select).plan(model, planning, target=gone)
                after = np.array(_by_class(held.edited(edit)))
                row = {"count": count, "select": select, "classes": gone}
                row |= {"removed": after[gone].mean(), "retained": after[stay].mean()}
                rows.append(row | {"retained_before": before[stay].mean()})
        return {"before": before.tolist(), "rows": rows}

    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return figures by number of classes and selection, over draws and seeds."""
        return summaries.several_classes_removal(results)

    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return Fig. 7 as a table."""
        return tables.several_classes_removal(summary)


@dataclass(frozen=True, kw_only=True)
class DigitRemoval(Reproduction):
    """Fig. 8: each digit removed from a network of odd and even, at each rate and dose."""

    def one_seed(self, options: Options, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return curves over rates, and accuracies at the rate or dose chosen in planning."""
        train, test = images
        model = self.trained(options, seed, train, classes=2)
        planning, held = parts(model, test, seed)
        curves, chosen = [], []
        for digit in options.classes or range(10):
            where: dict[str, Any] = {"fictitious": digit, "target": digit % 2}
            for operator in (FictitiousClass("sca"), FictitiousClass("gradient-activation")):
                (sweep,) = operator.sweep(
                    model, planning, validation=held, rates=RATES.tolist(), **where
                )
                assert sweep.removed is not None
                assert sweep.retained is not None
                row: dict[str, Any] = {"digit": digit, "select": operator.select}
                row |= {"column": sweep.column, "removed": sweep.removed.tolist()}
                curves.append(row | {"retained": sweep.retained.tolist()})
            for select, tolerance in product(CHOSEN, TOLERANCES):
                operator = FictitiousClass(select, aim="removal", tolerance=tolerance)
                edit = operator.plan(model, planning, **where)  # the rate or dose chosen here
                after = evaluate_head(held.edited(edit))
                digits = Accuracy(after.right.T, after.samples.T)  # by digit instead of by parity
                row = {"digit": digit, "select": select, "tolerance": tolerance}
                chosen.append(row | {"removed": digits.of(digit), "retained": digits.rest(digit)})
        accuracy = evaluate_head(held).average
        return {"before": accuracy, "rates": RATES.tolist(), "curves": curves, "chosen": chosen}

    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return mean curves over digits and seeds, and figures by selection and tolerance."""
        return summaries.digit_removal(results)

    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return Fig. 8 as tables."""
        return tables.digit_removal(summary)


def parts(model: nn.Module, test: ImageSet, seed: int) -> tuple[HeadFeatures, HeadFeatures]:
    """Return features to plan on and to measure on: test images in an order by the seed."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    mixed = test[order]
    least = int((test.labels if test.attribute is None else test.attribute).bincount().min())
    planned = min(PLANNED, max(1, least // 2))
    both = (mixed.first(planned), mixed.first(len(mixed), start=planned))
    grouped = test.attribute is not None
    planning, held = (collect_head_features(model, one, with_attribute=grouped) for one in both)
    return planning, held


def _by_class(head: HeadFeatures) -> list[float]:
    """Return the accuracy on each class."""
    accuracy = evaluate_head(head)
    return [round(accuracy.of(label), 5) for label in range(head.classes)]
