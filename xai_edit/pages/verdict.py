"""The verdict of a run: what an edit changed, whom it harmed, what is unknown, what does better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xai_edit.core.text import escape, printable
from xai_edit.evaluation.accuracy import CONFIDENCE, FEW
from xai_edit.evaluation.intervals import Interval
from xai_edit.report.table import counted, named

BEFORE = "before"
UNSEEN = "harm there would not be seen"


@dataclass(frozen=True)
class Figure:
    """A figure by method, ``before`` first; ``lower`` where less of it is better.

    ``intervals`` are by method too, and may lack some. ``lowest``: it is the lowest accuracy over
    the parts, such as that of the worst group.
    """

    name: str
    values: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    lower: bool = False
    lowest: bool = False

    def gain(self, method: str, over: str) -> float:
        """Return by how much a method is better than another."""
        difference = self.values[method] - self.values[over]
        return -difference if self.lower else difference

    def within(self, method: str, of: str) -> bool:
        """Return whether the value of a method is in the interval of another."""
        low, high = self.intervals.get(of, (1.0, 0.0))
        return low <= self.values[method] <= high


@dataclass(frozen=True)
class Part:
    """A group or a class, with its accuracy and interval before, and its accuracy by method.

    Without samples there is none of them. ``planted``: its images have a planted mark.
    """

    name: str
    samples: int
    before: float | None = None
    interval: Interval | None = None
    after: Mapping[str, float] = field(default_factory=dict)
    planted: bool = False

    def accuracy(self, method: str) -> float | None:
        """Return the accuracy by a method, None where it is not known."""
        return self.before if method == BEFORE else self.after.get(method)

    def harmed(self, method: str) -> bool:
        """Return whether the accuracy fell below the interval before."""
        return self.interval is not None and self.after.get(method, 1.0) < self.interval[0]


@dataclass(frozen=True)
class Outcome:
    """What a run found, from which the verdict is made.

    Attributes
    ----------
    method, what : str
        The edit's method, and what it does, such as "changes 1 weight".
    figures : sequence of Figure
        The first is what the edit is for. A comparison method does better if it is not worse in
        any and better in one.
    beside : sequence of Figure
        Accuracies that may speak for the edit where the first figure does not, or against it.
    parts : sequence of Part
        All groups, or all classes, that could be harmed.
    kind : {"group", "class"}
        What the parts are.
    which : str
        Which of these the parts are, such as " to keep" where others are to be forgotten.
    reason : str or None
        Why there is no edit.
    advice : dict of str
        By comparison method, when to use it.
    further : str
        What to try where the edit is none, made nothing better or did what is `doubtful`.
    smaller : bool
        The edit makes the network smaller: it need not raise the figure.
    apart : set of str
        Comparison methods that do not do all that the edit is for, such as make the network
        smaller: the best of the others has a sentence of its own.
    unmeasured : sequence of str
        What else is not known.
    missed : str
        A sentence on what was asked for and not reached.
    """

    method: str
    what: str
    figures: Sequence[Figure]
    parts: Sequence[Part]
    kind: str = "group"
    which: str = ""
    reason: str | None = None
    advice: Mapping[str, str] = field(default_factory=dict)
    further: str = ""
    smaller: bool = False
    unmeasured: Sequence[str] = ()
    missed: str = ""
    apart: frozenset[str] = frozenset()
    beside: Sequence[Figure] = ()

    @property
    def better(self) -> bool:
        """Whether there is an edit and it does what it is for."""
        return self.reason is None and (
            self.smaller or self.figures[0].gain(self.method, BEFORE) > 0
        )

    @property
    def lost(self) -> list[Figure]:
        """The figures beside the first that fell."""
        return [one for one in self.beside if one.gain(self.method, BEFORE) < 0]

    @property
    def doubtful(self) -> bool:
        """Whether an edit that does what it is for costs as much: in harm, or in other figures."""
        if self.smaller:
            return any(part.harmed(self.method) for part in self.parts)
        return bool(self.lost) and self.figures[0].within(self.method, BEFORE)

    @property
    def plural(self) -> str:
        """What the parts are."""
        return "classes" if self.kind == "class" else "groups"

    def few(self, method: str) -> list[Part]:
        """Return the parts of lowest accuracy by a method, if each has fewer than FEW images."""
        known = [(one.accuracy(method), one) for one in self.parts if one.samples]
        least = min((value for value, _ in known if value is not None), default=None)
        lowest = [part for value, part in known if value is not None and value == least]
        return lowest if all(part.samples < FEW for part in lowest) else []

    def sure(self, method: str) -> float | None:
        """Return the lowest accuracy over the parts of at least FEW images."""
        many = [part.accuracy(method) for part in self.parts if part.samples >= FEW]
        return min((value for value in many if value is not None), default=None)

    def sure_gain(self, method: str) -> float:
        """Return how much that is above the lowest before; 0 where the first figure is another."""
        now, before = self.sure(method), self.sure(BEFORE)
        known = self.figures[0].lowest and now is not None and before is not None
        return now - before if known else 0.0  # type: ignore[operator]


def verdict(outcome: Outcome) -> list[str]:
    """Return the sentences: the change, harm, what is unknown, comparisons, and what to try."""
    sentences = [_change(outcome), *filter(None, [outcome.missed]), _harm(outcome)]
    alike = [
        replace(one, values={k: v for k, v in one.values.items() if k not in outcome.apart})
        for one in outcome.figures
    ]
    compared = (_comparison(one) for one in (replace(outcome, figures=alike), outcome))
    sentences += [*_unknown(outcome), *dict.fromkeys(compared), *_harmless(outcome)]
    if outcome.further and (not outcome.better or outcome.doubtful):
        sentences.append(f"To try next: {outcome.further}.")
    return sentences


def warnings(outcome: Outcome) -> list[str]:
    """Return what a reader has to know before any figure: which parts have no images, planted ones.

    And which figures are of few. For missing groups they name the ways out.
    """
    lines = []
    missing = [part.name for part in outcome.parts if not part.samples]
    planted = [part.name for part in outcome.parts if part.planted]
    if missing:
        line = f"0 images, not measured: {named(missing)}. The worst {outcome.kind} may be there."
        if outcome.kind == "group":
            plant = "--plant mark.png makes groups with the feature, by planting it into images "
            ways = [] if planted else [f"{plant}that lack it"]
            ways.append(
                "CounterfactualRetraining (neutralize --attribute marks.json --findings "
                "findings.safetensors) completes groups at a layer, for planning"
            )
            line += f" Ways out: {'; '.join(ways)}."
        lines.append(line)
    few = [
        f"{method}, {_told(outcome, one, method)}"
        for one in outcome.figures
        if one.lowest
        for method in one.values
        if outcome.few(method)
    ]
    if few:
        lines.append(f"the worst {outcome.kind} has fewer than {FEW} images: {named(few)}.")
    if planted:
        lines.append(
            f"planned and measured on images with a planted mark: {named(planted)}. The figures "
            "hold for real images as far as the mark looks like the feature."
        )
    return lines


def verdict_html(results: Mapping[str, Any]) -> str:
    """Return the warnings and the verdict in ``results``, for the top of a page."""
    warned = warnings_html(results["warnings"])
    listed = "".join(f"<li>{escape(line)}</li>" for line in results["verdict"])
    return f'<section class="verdict"><h2>Verdict</h2>{warned}<ul>{listed}</ul></section>'


def warnings_html(lines: Sequence[str]) -> str:
    """Return warnings as paragraphs."""
    return "".join(f"<p><strong>Warning:</strong> {escape(line)}</p>" for line in lines)


def verdict_text(results: Mapping[str, Any]) -> str:
    """Return the same as lines for a terminal."""
    lines = [*(f"Warning: {one}" for one in results["warnings"]), *results["verdict"]]
    return "\n".join(map(printable, lines))


def _told(outcome: Outcome, figure: Figure, method: str) -> str:
    """Return a figure, and where few images decide it their part and the lowest of the others."""
    text = f"{figure.values[method]:.3f}"
    if not figure.lowest or not (few := outcome.few(method)):
        return text
    of = named([f"{part.name}, {counted(part.samples, 'image')}" for part in few])
    sure, others = outcome.sure(method), f"{outcome.plural} of at least {FEW} images"
    return f"{text} [{of}; " + (f"no {others}]" if sure is None else f"{sure:.3f} over {others}]")


def _moved(outcome: Outcome, figures: Sequence[Figure], *, intervals: bool = False) -> str:
    """Return from what to what figures went, as one text, each with its interval if asked."""
    moves = []
    for one in figures:
        start, end = (_told(outcome, one, method) for method in (BEFORE, outcome.method))
        went = f"stays at {end}" if end == start else f"goes from {start} to {end}"
        if intervals and end != start and BEFORE in one.intervals:
            low, high = one.intervals[BEFORE]
            within = "within" if one.within(outcome.method, BEFORE) else "beyond"
            went += f", {within} its interval before ({low:.3f}–{high:.3f})"
        moves.append(f"{one.name} {went}")
    last = ", and " if intervals and figures[0].intervals else " and "
    return last.join([*filter(None, [", ".join(moves[:-1])]), moves[-1]])


def _change(outcome: Outcome) -> str:
    first, method = outcome.figures[0], outcome.method
    missing = [part.name for part in outcome.parts if not part.samples]
    without = f"; not measured, 0 images: {named(missing)}" if missing else ""
    if outcome.reason is not None:
        return (
            f"No edit, the network is as it was ({first.name} {_told(outcome, first, BEFORE)}"
            f"{without}): {outcome.reason}."
        )
    if not outcome.better:
        figures = [*outcome.figures, *outcome.beside]
        moved = _moved(outcome, figures)
        if outcome.sure_gain(method) > 0 or any(one.gain(method, BEFORE) > 0 for one in figures):
            aim = f"{'lower' if first.lower else 'raise'} {'the ' * first.lowest}{first.name}"
            return f"{_start(method)} {outcome.what} and did not {aim}: {moved}{without}."
        return (
            f"{_start(method)} made nothing better: {moved}{without}. Nothing speaks for this "
            f"edit, though it {outcome.what}."
        )
    moved = _moved(outcome, outcome.figures, intervals=True)
    if outcome.lost:
        moved += f", but {_moved(outcome, outcome.lost, intervals=True)}"
    return f"{_start(method)} {outcome.what}: {moved}{without}."


def _harm(outcome: Outcome) -> str:
    if outcome.reason is not None:
        return "Nothing was changed, so nothing was harmed."
    interval = f"{CONFIDENCE:.0%} interval before the edit"
    if harmed := _harmed(outcome, outcome.method):
        return f"It did harm, below the {interval}, to {harmed}."
    return f"No {outcome.kind}{outcome.which} that was measured fell below its {interval}."


def _harmed(outcome: Outcome, method: str) -> str:
    """Return the names of what a method harmed, with the accuracies; "" where there is none."""
    harmed = [part for part in outcome.parts if part.harmed(method)]
    return named(
        [f"{one.name} (from {one.before:.3f} to {one.after[method]:.3f})" for one in harmed]
    )


def _unknown(outcome: Outcome) -> list[str]:
    """Return what has no figure, what has an unsure one, and what is on planted images."""
    parts, sentences = outcome.parts, []
    few = [
        f"{part.name} ({counted(part.samples, 'image')}, {low:.3f}–{high:.3f})"
        for part in parts
        if 0 < part.samples < FEW and part.interval is not None
        for low, high in [part.interval]
    ]
    if missing := [part.name for part in parts if not part.samples]:
        sentences.append(f"Not measured, 0 images: {named(missing)}; {UNSEEN}.")
    elif not outcome.unmeasured and not few:
        sentences.append(f"All {len(parts)} {outcome.plural}{outcome.which} were measured.")
    sentences += [f"Not measured: {one}." for one in outcome.unmeasured]
    if few:
        sentences.append(
            f"Hardly measured, fewer than {FEW} images, with the interval before: {named(few)}."
        )
    if planted := [part.name for part in parts if part.planted]:
        sentences.append(f"Measured on planted images, not on real ones: {named(planted)}.")
    return sentences


def _comparison(outcome: Outcome) -> str:
    figures, first = outcome.figures, outcome.figures[0]
    own = outcome.method if outcome.better else BEFORE  # an edit that is worse is no bar
    others = [name for name in first.values if name not in (BEFORE, outcome.method)]
    if not others:
        return "No comparison method was measured."

    def total(name: str) -> float:
        return sum(figure.gain(name, own) for figure in figures)

    def told(name: str) -> str:
        if len(figures) == 1:
            return _told(outcome, first, name)
        each = [(figure.name.split(" (")[0], figure.values[name]) for figure in figures]
        return ", ".join(f"{short} {value:.3f}" for short, value in each)

    at_least = [name for name in others if min(one.gain(name, own) for one in figures) >= 0]
    # What is not worse anywhere comes first.
    best = max(at_least or others, key=total)
    against = f"{told(best)} against {told(own)}"
    if own == BEFORE:
        against += " of the network as it is"
    where = "here" if all(part.samples for part in outcome.parts) else "on what was measured"
    harmed = _harmed(outcome, best)
    harm = f", but it harms {harmed}" if harmed else ""
    if _hangs(outcome, best, own):
        few = f"hangs on fewer than {FEW} images"
        return f"Whether {best} does better {where} {few}: {against}{harm}."
    if not at_least or (own == BEFORE and not total(best)):
        return f"No comparison method does better {where}; the best, {best}, has {against}."
    advice = f"; {outcome.advice[best]}" if best in outcome.advice else ""
    if not total(best):
        how, sure = "as well", ""
    elif first.within(best, own):
        how, sure = "a little better", ", within the interval, which does not tell the two apart"
        advice = ""
    else:
        how, sure = "better", ""
    return f"{_start(best)} does {how} {where} ({against}){sure}{harm}{advice}."


def _hangs(outcome: Outcome, best: str, own: str) -> bool:
    """Return whether the order of two methods is another over the parts of at least FEW images."""
    first, sure = outcome.figures[0], [outcome.sure(name) for name in (best, own)]
    few = first.lowest and (outcome.few(best) or outcome.few(own))
    if not few or len(outcome.figures) > 1 or sure[0] is None or sure[1] is None:
        return False
    over_all, over_many = first.gain(best, own), sure[0] - sure[1]
    return (over_all > 0, over_all < 0) != (over_many > 0, over_many < 0)


def _harmless(outcome: Outcome) -> list[str]:
    """Return which comparison methods harm nothing and lose nothing, where the edit does harm."""
    if outcome.reason is not None or not _harmed(outcome, outcome.method):
        return []
    first = outcome.figures[0]
    safe = [
        f"{name} ({_told(outcome, first, name)})"
        for name in first.values
        if name not in (BEFORE, outcome.method)
        and not _harmed(outcome, name)
        and not _loses(outcome, name)
        and not _idle(outcome, name)
    ]
    kind = f"{outcome.kind}{outcome.which}"
    return [f"Without harm to any {kind} that was measured: {named(safe)}."] if safe else []


def _loses(outcome: Outcome, method: str) -> bool:
    """Return whether a method lowers a figure, also the lowest over parts that are not small."""
    figures = (one for one in (*outcome.figures, *outcome.beside) if method in one.values)
    return outcome.sure_gain(method) < 0 or any(one.gain(method, BEFORE) < 0 for one in figures)


def _idle(outcome: Outcome, method: str) -> bool:
    """Return whether a method leaves every figure and every part as it was."""
    figures = [(one.values[method], one.values[BEFORE]) for one in outcome.figures]
    parts = [(one.accuracy(method), one.before) for one in outcome.parts]
    return all(now == before for now, before in [*figures, *parts])


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]
