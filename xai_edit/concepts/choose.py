"""Choice of the subspaces that hold a spurious feature and nothing of the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xai_edit.concepts.predictiveness import COLUMNS, GROUPS, Predictiveness

MIDDLE = 0.5
ENOUGH = 10  # samples; resamples of fewer are too much alike for an interval

# What a column predicts.
OF_FEATURE = {
    "spurious_in_class": "the feature in the class",
    "spurious_in_rest": "the feature in the rest",
}
OF_CLASS = {
    "class_with": "the class with the feature",
    "class_without": "the class without the feature",
    "rest_with": "the rest with the feature",
    "rest_without": "the rest without the feature",
}


@dataclass(frozen=True)
class Choice:
    """Indices of the chosen subspaces, best first, and the reason in one sentence."""

    indices: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return self.reason


def choose_spurious(table: Predictiveness) -> Choice:
    """Return the subspaces that predict the spurious feature and not the class, best first.

    A subspace is chosen if its average precision

    - for the feature, within the class and within the rest, is above the middle between chance
      and 1, (AP − chance) / (1 − chance) = ½, with its whole interval above chance; and
    - for the class and for the rest, with the feature and without it, is below that middle.

    Columns over all samples do not count, since in biased data the feature and the class are
    correlated; nor do columns with fewer than ten positive or negative samples.
    """
    of_feature = [name for name in OF_FEATURE if _enough(table, name)]
    of_class = [name for name in OF_CLASS if _enough(table, name)]
    if not of_feature or not of_class:
        held = ", ".join(f"{count} of the {group}" for group, count in table.groups.items())
        have = "there are no labels" if table.target is None else f"there are {held}"
        return Choice(
            (),
            f"no subspace can be chosen: it takes {ENOUGH} samples each of a class with and "
            f"without the feature, and of another class with or without it, and {have}",
        )

    rows: Any = table.rows  # with enough samples no entry is None
    above = [{name: row[name].over_chance for name in (*of_feature, *of_class)} for row in rows]
    weakest = [min(of_feature, key=lambda name: row[name].value) for row in above]
    closest = [max(of_class, key=lambda name: row[name].value) for row in above]
    strength = [row[name].value for row, name in zip(above, weakest, strict=True)]

    def in_words(index: int, name: str) -> str:
        entry = rows[index][name]
        middle = entry.chance + MIDDLE * (1 - entry.chance)
        return (
            f"average precision {entry} for {(OF_FEATURE | OF_CLASS)[name]}, where chance is "
            f"{entry.chance:.2f} and the middle {middle:.2f}"
        )

    ranked = sorted(range(len(table)), key=strength.__getitem__, reverse=True)
    lower = [min(row[name].interval[0] for name in of_feature) for row in above]
    holding = [index for index in ranked if strength[index] > MIDDLE and lower[index] > 0]
    chosen = tuple(k for k in holding if above[k][closest[k]].value < MIDDLE)
    best = chosen[0] if chosen else ranked[0]
    feature, others = in_words(best, weakest[best]), in_words(best, closest[best])
    if chosen:
        listed = ", ".join(map(str, chosen))
        return Choice(
            chosen,
            f"of {len(table)} subspaces, those that predict the spurious feature and not the "
            f"class: {listed}; {best} has {feature}, and {others}",
        )
    why = "; it has to be above the middle, with its interval above chance"
    if holding:
        why = f", but also {others}; the latter has to be below the middle"
    return Choice(
        (),
        "no subspace predicts the spurious feature and not the class: the best, "
        f"{best}, has {feature}{why}",
    )


def _enough(table: Predictiveness, name: str) -> bool:
    sizes = [sum(table.groups[GROUPS[group]] for group in side) for side in COLUMNS[name]]
    return table.chance[name] is not None and min(sizes) >= ENOUGH
