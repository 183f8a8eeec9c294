"""The review page of ``xai-edit discover``: findings, their evidence, and a person's marks."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from itertools import repeat as repeated
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.files import write_atomically
from xai_edit.core.text import escape
from xai_edit.discovery.conclude import GROUP
from xai_edit.discovery.evidence import GROUPS
from xai_edit.discovery.findings import UNSURE, Finding, Findings, sentence
from xai_edit.discovery.marks import VERDICTS
from xai_edit.discovery.shown import in_class, shown_rows
from xai_edit.evaluation.accuracy import CONFIDENCE
from xai_edit.evaluation.intervals import wilson_intervals
from xai_edit.pages.verdict import warnings_html
from xai_edit.report.html import Report, repeat
from xai_edit.report.review_controls import fields, saving, verdicts
from xai_edit.report.review_pictures import (
    WIDTH,
    histogram,
    overlaid,
    passage,
    picture,
    scatter,
    waveform,
)
from xai_edit.report.table import Notes, counted

FINDINGS, PICTURES = "findings.safetensors", "pictures.safetensors"  # of a run
MORE = ("review.css", "review.js")
HEADING = "What this network's classes depend on"
FEW = 10  # samples of a group below which its accuracy has an interval
EMPTY = "0 (empty)"
BAR = '<p class="bar over"><span>−m, against the class</span><i></i><span>m, for it</span></p>'
NOT_SHOWN = (
    "<p>The samples are no images, signals or texts, so they are not shown here: they stand by "
    "their names.</p>"
)
LOOK = {
    "images": "Look at the pictures: is it part of the class, or a shortcut? Point at a picture, "
    "or go to it with Tab and the arrow keys, to see the relevance that passes through the "
    "feature: red speaks for the class, blue against it.",
    "signals": "Look at the signals: is it part of the class, or a shortcut? Shading is the "
    "relevance that passes through the feature: red speaks for the class, blue against it.",
    "tokens": "Look at the texts: is it part of the class, or a shortcut? The colour of a word is "
    "the relevance that passes through the feature there: red speaks for the class, blue against "
    "it.",
}
LIMITS = (
    "A feature that belongs to a class transfers as well as a spurious one. Only a person can tell "
    "them apart; the figures say where to look.",
    "A group of fewer than eight samples says little, and a division that leaves fewer is not "
    "looked at.",
    "A feature that is spread over many directions of a layer, such as a background, may be found "
    "in parts or not at all.",
    "A mark on every image that is predicted as a class has no contrast inside the class. It can "
    "only show up among the most relevant directions, as what separates the whole class. The "
    "controls have it too, so that its score may be 0: look at the pictures.",
    "Where the core of a class and a shortcut share directions, a finding holds both, and taking "
    "it away harms the class.",
    "That nothing stands out is no proof that there is no shortcut.",
)


def review_page(
    findings: Findings,
    pictures: Mapping[str, Tensor],
    *,
    names: Mapping[int, str] | None = None,
    words: Callable[[int], str] | None = None,
) -> Report:
    """Return the page on which a person reviews findings and saves marks.

    Parameters
    ----------
    findings : Findings
    pictures : dict of Tensor
        Of `xai_edit.discovery.shown.pictures`; may be empty.
    names : dict of int to str, optional
        Names of classes by number.
    words : callable, optional
        Returns the word of a token's number, such as ``tokenizer.decode``; by default the number is
        shown.
    """
    return Report(HEADING, _Review(findings, pictures, names or {}, words).parts(), more=MORE)


def write_review(
    findings: Findings,
    pictures: Mapping[str, Tensor],
    path: str | Path,
    *,
    names: Mapping[int, str] | None = None,
    words: Callable[[int], str] | None = None,
) -> None:
    """Write `review_page` to an HTML file, atomically.

    Examples
    --------
    >>> from xai_edit.discovery.shown import pictures
    >>> from xai_edit.pages.discover import write_review
    >>> findings = xe.discover(model, data, target=0, layers=["relu1"])
    >>> write_review(findings, pictures(model, data, findings), "review.html")
    """
    page = review_page(findings, pictures, names=names, words=words)
    write_atomically(path, page.html().encode())


def discovery_page(
    results: Mapping[str, Any], findings: Findings, pictures: Mapping[str, Tensor]
) -> Report:
    """Return the page of a run, with how to repeat it."""
    names = {int(label): name for label, name in results["names"].items()}
    files = [FINDINGS, PICTURES, "timing.json"]
    parts = _Review(findings, pictures, names).parts()
    warned = warnings_html(results.get("warnings", ()))  # the first versions wrote none
    return Report(HEADING, [warned, *parts, repeat(results, files)], more=MORE)


def class_called(label: int, names: Mapping[int, str]) -> str:
    """Return what a class is called in a sentence."""
    name = names.get(label, str(label))
    return f"class {label}" if name == str(label) else name


@dataclass(frozen=True, eq=False)
class _Review:
    """What the page shows: its parts, the card of a finding, a row of samples and one of them."""

    findings: Findings
    pictures: Mapping[str, Tensor]
    names: Mapping[int, str]
    words: Callable[[int], str] | None = None

    @property
    def kind(self) -> str:
        return next((one for one in LOOK if one in self.pictures), "images")

    def parts(self) -> list[str | Notes]:
        findings, names = self.findings, self.names
        outstanding, all_ = len(findings.standing_out), len(findings)
        classes = list(dict.fromkeys(one.target for one in findings))
        truth = findings.predicted if findings.labels is None else findings.labels
        about = {
            **{name: findings.origin[name] for name in ("model", "data")},
            "discovery": findings.checksum(),
            "names": findings.names,
            "unsure": UNSURE,
        }
        right = ""
        if findings.labels is not None:
            right = _encoded((findings.predicted == findings.labels).byte())
        cards = ""
        for label in classes:
            cards += f"<h2>Class {escape(names.get(label, str(label)))}</h2>"
            for number, finding in enumerate(findings):
                if finding.target == label:
                    cards += self.card(number, finding)
        first = f"findings that stand out: {outstanding} of {all_}"
        looked = [
            f"{class_called(one.target, names)}, layer {one.layer}: {one.note}"
            for one in findings.searched
            if one.note
        ]
        explained = (
            "<p>Each finding is a feature that changes the network's answer for a class. "
            f"{LOOK[self.kind]} Tick what is wrong, set a verdict, and save the marks; "
            "<code>--attribute marks.json</code> of <code>xai-edit neutralize</code> and "
            f"<code>prune</code> takes them.</p>{BAR if 'images' in self.pictures else ''}"
        )
        return [
            Notes(findings.answer or first),
            explained if all_ else "",
            NOT_SHOWN if all_ and not self.pictures else "",
            _strip(findings, classes, names),
            f'<div id="review" data-about="{escape(json.dumps(about))}" '
            f'data-truth="{_encoded(truth.int())}" data-right="{right}">{cards}'
            f"{saving() if all_ else ''}</div>",
            "<h2>Classes and layers without a finding of their own</h2>" if looked else "",
            Notes(*looked, listed=True),
            f"<h2>Limits</h2>{Notes(*LIMITS, listed=True).html()}",
        ]

    def card(self, number: int, finding: Finding) -> str:
        name, of_class = class_called(finding.target, self.names), in_class(finding, self.findings)
        scores = finding.scores
        exact = torch.equal(scores.float().double(), scores)
        encoded = _encoded(scores.float() if exact else scores.double())
        also = ", ".join(
            f"{class_called(label, self.names)} at {layer}" for label, layer in finding.also
        )
        evidence = finding.evidence
        badge = "stands out" if evidence.stands_out else "does not stand out"
        badge = badge if evidence.within else "separates the whole class"
        titles = (
            f"Strongest in {name} – tick those without it",
            "Strongest in other classes – tick those without it",
            f"Least like it in {name if of_class.any() else 'all classes'} – tick those with it",
        )
        pair = zip(titles, shown_rows(finding, self.findings), (False, False, True), strict=True)
        shown, maps = "", iter(self.pictures.get(str(number), repeated(None)))
        for title, rows, ticked in pair:
            samples = zip(rows.tolist(), islice(maps, len(rows)), strict=True)
            shown += self.row(title, samples, ticked, name)
        plots = histogram(scores, of_class, finding.threshold, (name, "other classes"))
        plots += scatter(finding.points, finding.cluster, finding.part)
        unsure = int(finding.unsure.sum())
        return (
            f'<article class="finding" id="finding-{number}" data-finding="{number}" '
            f'data-target="{finding.target}" data-threshold="{finding.threshold!r}" '
            f'data-highest="{float(scores.max())!r}" data-width="{WIDTH}" '
            f'data-separation="{evidence.separation.value!r}" '
            f'data-bits="{32 if exact else 64}" data-scores="{encoded}">'
            f"<h3>Finding {number}: layer {escape(finding.layer)}"
            f'<span class="badge">{badge}, score {evidence.score:.2f}</span></h3>'
            f"<p>{escape(sentence(finding, name, 'other classes'))}"
            f"{escape(f' The same feature was found for {also}.') if also else ''}</p>"
            f"{verdicts(number, VERDICTS)}{shown}<div class='charts'>{plots}</div>"
            f"{_groups(number, finding, self.findings, name)}"
            f"<p>{counted(unsure, 'sample')} within 10 % of the threshold are unsure. The feature "
            f"is taken away from at most {GROUP} samples of each group that were not used to find "
            "it.</p>"
            f"{fields(number, int(finding.has.sum()), len(scores))}</article>"
        )

    def row(
        self, title: str, samples: Iterable[tuple[int, Tensor | None]], ticked: bool, target: str
    ) -> str:
        items = ""
        for at, relevance in samples:
            called = self.findings.names[at] if self.findings.names else f"sample {at}"
            seen = self.sample(at, called, relevance, target)
            label = f"Wrong: {called} {'has' if ticked else 'does not have'} the feature"
            items += (
                f'<li title="{escape(called)}"><label><input type="checkbox" data-sample="{at}" '
                f'data-has="{str(ticked).lower()}" aria-label="{escape(label)}">'
                f'<span class="two">{seen}</span></label></li>'
            )
        items = f'<ul class="thumbs {self.kind}">{items}</ul>' if items else "<p>none</p>"
        return f'<figure class="shown"><figcaption>{escape(title)}</figcaption>{items}</figure>'

    def sample(self, sample: int, called: str, relevance: Tensor | None, target: str) -> str:
        """Return one sample with the relevance through a finding, or its name alone."""
        if not self.pictures:
            return f'<span class="text">{escape(called)}</span>'
        at = torch.searchsorted(self.pictures["samples"], sample)
        if "tokens" in self.pictures:
            return passage(self.pictures["tokens"][at], relevance, self.words)
        if "signals" in self.pictures:
            text = called if relevance is None else f"{called}, with relevance for {target}"
            return waveform(self.pictures["signals"][at], relevance, text)
        image = self.pictures["images"][at]
        seen = picture(image, called, "photo")
        if relevance is not None:
            over = overlaid(image, relevance)
            seen = picture(over, f"relevance for {target}: {called}", "map") + seen
        return seen


def _strip(findings: Findings, classes: Sequence[int], names: Mapping[int, str]) -> str:
    """Return links to the findings of each class, in order."""
    lines = ""
    for label in classes:
        links = " ".join(
            f'<a href="#finding-{number}">{number}: {escape(one.layer)}, score '
            f"{one.evidence.score:.2f}</a>"
            for number, one in enumerate(findings)
            if one.target == label
        )
        lines += f"<li><strong>{escape(class_called(label, names))}</strong>: {links}</li>"
    return f'<ul class="strip">{lines}</ul>' if lines else ""


def _groups(number: int, finding: Finding, findings: Findings, name: str) -> str:
    """Return the table of the four pseudo-groups; the script redraws it."""
    called = (f"{name} with it", f"{name} without it", "others with it", "others without it")
    labelled = findings.labels is not None
    rows = ""
    for key, group in zip(GROUPS, called, strict=True):
        own = finding.evidence.groups[key]
        cells = [str(own.samples) if own.samples else EMPTY]
        if labelled:
            cells.append("–" if own.accuracy is None else _accuracy(own.accuracy, own.samples))
        ablated = "–" if own.ablated is None else _percent(own.ablated)
        listed = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += (
            f'<tr><th scope="row">{escape(group)}</th>{listed}'
            f'<td data-found="{ablated}">{ablated}</td></tr>'
        )
    without = "accuracy when it is taken away" if labelled else "predicted as before without it"
    heads = ["group", "samples", *(["accuracy"] if labelled else []), without]
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    return (
        f'<div class="scroll"><table class="groups"><caption>Groups of finding {number}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _accuracy(share: float, samples: int) -> str:
    """Return an accuracy, of few samples with Wilson's 95 % interval."""
    text = _percent(share)
    if samples >= FEW:
        return text
    right = torch.tensor([round(share * samples)])
    ((low, high),) = wilson_intervals(right, torch.tensor([samples]), CONFIDENCE)
    return f"{text} [{_percent(low)}, {_percent(high)}]"


def _encoded(values: Tensor) -> str:
    """Return the little-endian bytes of numbers as base64."""
    array = values.numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
