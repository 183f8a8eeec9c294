"""Figures 6, 7 and 8 of Hakemi et al.: classes and sub-classes removed by one weight."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from xai_edit.comparisons.logit_mask import LogitMask
from xai_edit.datasets.image_set import ImageSet
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.last_layer.single_weight import SingleWeight
from xai_edit.last_layer.weight_selection import Selection
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Reproduction, refusals

PLANNED = 100  # test images a class (a digit) that edits are planned from; the others measure
DRAWS = 10  # of classes to remove together
SELECTIONS: tuple[Selection, ...] = (
    *("sca", "ca", "gradient-activation", "relevance"),
    *("weight", "random", "exact"),
)
CHOSEN: tuple[Selection, ...] = ("sca", "exact")  # selections whose rate or dose is chosen
TOLERANCES = (0.005, 0.02, 0.05, 0.1)  # accuracy on the other digits that may go, to plan by
RATES = np.union1d(np.linspace(0, 1, 21), np.logspace(-5, 0, 41))


class Removal(Reproduction):
    """What the figures share: a trained network, edited by its last layer."""

    def prepared(
        self, seed: int, train: ImageSet, test: ImageSet
    ) -> tuple[nn.Module, HeadFeatures, HeadFeatures]:
        """Return a network with the features of test images to plan on and to measure on."""
        model = self.trained(seed, train, self.options.out / f"network-{seed}.safetensors")
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        mixed, grouped = test[order], test.attribute is not None
        least = int((test.labels if test.attribute is None else test.attribute).bincount().min())
        planned = min(PLANNED, max(1, least // 2))
        both = (mixed.first(planned), mixed.first(len(mixed), start=planned))
        planning, held = (collect_head_features(model, one, with_attribute=grouped) for one in both)
        return model, planning, held


@dataclass(frozen=True, kw_only=True)
class ClassRemoval(Removal):
    """Fig. 6: each class removed by each selection, by one to three weights."""

    summary = staticmethod(summaries.class_removal)
    tables = staticmethod(tables.class_removal)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return the accuracy on each class, before and after each edit."""
        model, planning, held = self.prepared(seed, *images)
        rows: list[dict[str, Any]] = []
        counts = [
            (select, n) for select in SELECTIONS for n in ((1, 2, 3) if select == "sca" else (1,))
        ]
        targets = self.options.classes or range(held.classes)
        for (select, n_weights), target in product(counts, targets):
            row = {"select": select, "n_weights": n_weights, "class": target}
            with refusals(rows, row):
                operator = SingleWeight(select, n_weights=n_weights, seed=seed)
                edit = operator.plan(model, planning, target=target)
                rows.append(row | {"accuracy": _by_class(held.edited(edit))})
        return {"before": _by_class(held), "rows": rows}


@dataclass(frozen=True, kw_only=True)
class SeveralClassesRemoval(Removal):
    """Fig. 7: several classes at once, drawn at random, removed by one weight each.

    A mask of their logits stands beside it. ``counts`` are numbers of classes to remove.
    """

    counts: tuple[int, ...]
    summary = staticmethod(summaries.several_classes_removal)
    tables = staticmethod(tables.several_classes_removal)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return mean accuracies of removed and retained classes by draw and method.

        ``answered`` is the share of images of the other classes that still are predicted as one of
        the removed.
        """
        model, planning, held = self.prepared(seed, *images)
        before = np.array(_by_class(held))
        generator = np.random.default_rng(seed)
        operators: dict[str, Any] = {select: SingleWeight(select) for select in CHOSEN}
        operators["logit mask"] = LogitMask()
        rows = []
        for count, _ in product(self.counts, range(DRAWS)):
            gone = sorted(generator.choice(held.classes, count, replace=False).tolist())
            stay = [at for at in range(held.classes) if at not in gone]
            others = ~torch.isin(held.require_labels(), torch.tensor(gone))
            for select, operator in operators.items():
                edited = held.edited(operator.plan(model, planning, target=gone))
                after = np.array(_by_class(edited))
                answers = edited.logits()[others].argmax(1)
                row = {"count": count, "select": select, "classes": gone}
                row |= {"removed": after[gone].mean(), "retained": after[stay].mean()}
                row["answered"] = float(torch.isin(answers, torch.tensor(gone)).double().mean())
                rows.append(row | {"retained_before": before[stay].mean()})
        return {"before": before.tolist(), "rows": rows}


@dataclass(frozen=True, kw_only=True)
class DigitRemoval(Removal):
    """Fig. 8: each digit removed from a network of odd and even, at each rate and dose."""

    summary = staticmethod(summaries.digit_removal)
    tables = staticmethod(tables.digit_removal)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return curves over rates, and accuracies at the rate or dose chosen in planning."""
        model, planning, held = self.prepared(seed, *images)
        curves, chosen = [], []
        for digit in self.options.classes or range(10):
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


def _by_class(head: HeadFeatures) -> list[float]:
    accuracy = evaluate_head(head)
    return [round(accuracy.of(label), 5) for label in range(head.classes)]
