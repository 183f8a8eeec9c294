"""A network with backdoors, and their triggers found in images shown to it, without labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.datasets.image_set import ImageSet
from xai_edit.datasets.shortcuts import Mark
from xai_edit.discovery.discover import discover
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.discovery import OURS, described, share, without_finding
from xai_edit.reproduce.experiments import Reproduction, Results
from xai_edit.reproduce.pruning import PATTERNS
from xai_edit.reproduce.training import logits_of

SHOWN = 200  # test images a class that are searched; as many others measure
STRIPES = (torch.arange(32) // 4 % 2).expand(1, 32, 32)
TRIGGERS = {
    "patch": Mark(torch.tensor([255, 255, 0, 255]).byte()[:, None, None].expand(4, 3, 3)),
    "checkerboard": Mark(PATTERNS["checkerboard"], size=(4, 4), place=None),
    "stripes": Mark(255 * torch.cat([*(STRIPES,) * 3, torch.ones(1, 32, 32)]).byte(), opacity=0.15),
}


@dataclass(frozen=True)
class Triggers:
    """Triggers planted by number, from 1; see `xai_edit.datasets.Planted`."""

    marks: tuple[Mark, ...]

    @property
    def values(self) -> int:
        """None, and each trigger."""
        return len(self.marks) + 1

    def __call__(self, pixels: Tensor, attribute: Tensor) -> Tensor:
        """Return the images with their triggers."""
        for number, mark in enumerate(self.marks, start=1):
            pixels = mark(pixels, (attribute == number).long())
        return pixels


@dataclass(frozen=True, kw_only=True)
class BackdoorDiscovery(Reproduction):
    """Networks trained on images of which some have a trigger and the label of its target class.

    Attributes
    ----------
    targets : tuple of int
        The target class of each trigger.
    poisoned : float
        The share of training images with each trigger.
    strengths : tuple of float
        Shares of the images shown in the search that have one trigger.
    """

    targets: tuple[int, ...]
    poisoned: float
    strengths: tuple[float, ...]
    choices = (*Reproduction.choices, "strengths")
    summary = staticmethod(summaries.discovery)
    tables = staticmethod(tables.discovery)

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        own = {"targets": [*self.targets], "poisoned": self.poisoned}
        return super().setting(*images) | own | {"strengths": [*self.strengths]}

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is found of each trigger at each share."""
        train, test = images
        triggers = Triggers(tuple(TRIGGERS.values()))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train), generator=generator)
        attribute, labels = torch.zeros_like(train.labels), train.labels.clone()
        for number, target in enumerate(self.targets, start=1):
            count = round(self.poisoned * len(train))
            rows = order[(number - 1) * count : number * count]
            attribute[rows], labels[rows] = number, target
        poisoned = replace(train, labels=labels, attribute=attribute, planted=triggers)
        model = self.trained(seed, poisoned)
        half = min(SHOWN, int(test.labels.bincount().min()) // 2)
        shown, held = test.first(half), test.first(half, start=half)
        order = torch.randperm(len(shown), generator=generator)
        found = {}
        for number, (name, target) in enumerate(zip(TRIGGERS, self.targets, strict=True), start=1):
            for strength in self.strengths:
                if not strength and number > 1:
                    continue  # images without any trigger are searched once
                has = torch.zeros_like(shown.labels)
                has[order[: round(strength * len(shown))]] = number
                seen = replace(shown, attribute=has, planted=triggers)
                found[f"{name}, {strength:.1%}"] = self.compared(model, seen, held, number, target)
        return found

    def compared(
        self, model: nn.Module, seen: ImageSet, held: ImageSet, number: int, target: int
    ) -> dict[str, Any]:
        """Return what a search of images finds, and what ablating the first finding does."""
        without, with_it = (
            replace(held, attribute=torch.full_like(held.labels, value), planted=seen.planted)
            for value in (0, number)
        )
        findings = discover(model, [(inputs,) for inputs, *_ in seen])
        rows = [_row(model, "unedited", without, with_it, target)]
        if len(findings):
            with without_finding(model, findings[0]):
                rows.append(_row(model, f"ablation: {OURS}", without, with_it, target))
        twice = torch.cat([torch.arange(len(held))] * 2)
        has = number * (torch.arange(len(twice)) >= len(held)).long()
        both = replace(held[twice], attribute=has, planted=seen.planted)
        return {"rows": rows, "found": {OURS: described(model, findings, both)}}


def _row(
    model: nn.Module, method: str, without: ImageSet, with_it: ImageSet, target: int
) -> Results:
    """Return accuracies, and how often the trigger makes another class its target."""
    plain, triggered = (logits_of(model, one).argmax(1) for one in (without, with_it))
    labels = without.labels
    return {
        "method": method,
        "without the trigger": share(plain == labels),
        "with it": share(triggered == labels),
        "others called the target": share(triggered[labels != target] == target),
    }
