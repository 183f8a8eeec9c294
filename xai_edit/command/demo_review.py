"""The first half of the demo: its watermark found without labels of it, and reviewed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xai_edit.core.files import write_safetensors
from xai_edit.datasets.small_network import MARKED, TRAINED_SEED
from xai_edit.datasets.watermarked_digits import Samples
from xai_edit.discovery.discover import discover
from xai_edit.discovery.findings import Finding
from xai_edit.discovery.marks import SPURIOUS
from xai_edit.discovery.shown import pictures, shown_rows
from xai_edit.pages.demo import EXCEPTIONS
from xai_edit.pages.discover import FINDINGS, PICTURES

MARKS = "marks.json"


@dataclass(frozen=True)
class Reviewed:
    """What was found and marked; ``finding`` is None where no finding is the watermark.

    ``layers`` are those that were searched. ``known`` are the samples, their watermark as marked;
    without a finding it is the true one.
    """

    finding: Finding | None
    layers: list[str]
    known: Samples
    results: dict[str, Any]


def review(out: Path, model: nn.Module, samples: Samples, seed: int) -> Reviewed:
    """Search the class that most wrong answers name, and mark the finding that is the watermark."""
    with torch.no_grad():
        predicted = model(samples.images).argmax(1)
    wrong = predicted[predicted != samples.labels].bincount()
    target = int(wrong.argmax()) if len(wrong) else 0
    unmarked = [batch[:2] for batch in samples.batches]
    found = discover(model, unmarked, target, seed=seed)
    found.save(out / FINDINGS)
    layers = [*found.origin["layers"]]
    drawn = pictures(model, unmarked, found, pixels=lambda images: images)
    write_safetensors(out / PICTURES, drawn, "xai_edit.pictures", "")
    has = samples.watermark.bool()
    shown = [[has[rows].tolist() for rows in shown_rows(one, found)] for one in found]
    verdicts, by_person = said(seed, shown)
    number = next((at for at, verdict in verdicts.items() if verdict == SPURIOUS), None)
    results: dict[str, Any] = {
        "class": target,
        "wrong": int(wrong.sum()),
        "wrong_as_class": int(wrong[target]) if len(wrong) else 0,
        "samples": len(samples),
        "answer": found.answer,
        "with_watermark": [[*map(sum, rows)] for rows in shown],
        "finding": number,
        "by_person": by_person,
        "agreement": None,
    }
    if number is None:
        (out / MARKS).unlink(missing_ok=True)  # of an earlier run
        return Reviewed(None, layers, samples, results)
    marks = found.mark(verdicts)
    marks.save(out / MARKS)
    results["agreement"] = float((marks.attribute == has).double().mean())
    known = Samples(samples.images, samples.labels, marks.attribute.long())
    return Reviewed(found[number], layers, known, results)


def said(seed: int, shown: Sequence[Sequence[Sequence[bool]]]) -> tuple[dict[int, str], bool]:
    """Return a verdict by the number of its finding, and whether it was set by the pictures.

    It was for the network that comes with the package. Another seed gives other weights, so there
    the verdict comes from the true watermark; see `most_alike`.
    """
    person = json.loads(MARKED.read_text(encoding="utf-8"))
    if seed == TRAINED_SEED and len(person) == len(shown):
        return {int(number): verdict for number, verdict in person.items()}, True
    number = most_alike(shown)
    return ({} if number is None else {number: SPURIOUS}), False


def most_alike(shown: Sequence[Sequence[Sequence[bool]]]) -> int | None:
    """Return the number of the finding that looks most like the watermark, None without one.

    ``shown`` says which samples have the watermark: of each finding the strongest in the class, in
    other classes, and the least like it in the class. A person takes the finding with the fewest
    exceptions: strongest in the class that lack it, or least alike that have it, at most two of
    either. The first of equals has the highest score.
    """
    exceptions = {
        number: len(most) - sum(most) + sum(least)
        for number, (most, _, least) in enumerate(shown)
        if max(len(most) - sum(most), sum(least)) <= EXCEPTIONS
    }
    return min(exceptions, key=lambda number: exceptions[number], default=None)


def as_marked(finding: Finding, model: nn.Module, samples: Samples) -> Samples:
    """Return other samples with the watermark where the finding is present."""
    has = finding.attribute(model)(samples.images)
    return Samples(samples.images, samples.labels, has.long())
