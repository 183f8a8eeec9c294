"""Which subspaces hold a spurious feature and nothing of the class, by their average precisions.

A subspace is taken where, in the words of `Predictiveness`,

- for the feature, within the class and within the rest, the average precision lies above the middle
  between chance and 1, and its whole interval above chance; and
- for the class and for the rest, with the feature and without it, it lies below that middle.

The middle, (AP − chance) / (1 − chance) = ½, makes columns of different chance comparable. It parts
the two cases of the poster: .97 of a feature that .3 of the samples have is .95 of the way, .72 of
one that half of them have is .44. Whole intervals are not asked to lie beyond the middle: with some
hundred samples of each kind they are so wide that subspaces would be refused that do hold the
feature, as their ablation shows.

Columns over all samples decide nothing. In biased data the feature and the class go together, so
that what predicts one predicts the other; within samples of one kind it does not. The rest counts
as a class as well, since a subspace of its own is no more spurious than one of the class.
"""

from __future__ import annotations

from dataclasses import dataclass

from xai_edit.concepts.predictiveness import COLUMNS, GROUPS, AveragePrecision, Predictiveness

MIDDLE = 0.5
# Samples of a group below which its resamples are too much alike to tell how sure a figure is.
ENOUGH = 10

# What a column looks for, and among which samples.
OF_FEATURE = {
    "spurious_in_class": ("the feature", "in the class"),
    "spurious_in_rest": ("the feature", "in the rest"),
}
OF_CLASS = {
    "class_with": ("the class", "with the feature"),
    "class_without": ("the class", "without the feature"),
    "rest_with": ("the rest", "with the feature"),
    "rest_without": ("the rest", "without the feature"),
}
WORDS = OF_FEATURE | OF_CLASS


@dataclass(frozen=True)
class Choice:
    """Subspaces that were chosen, and why, or why none.

    Attributes
    ----------
    indices : tuple of int
        Best first; empty where none will do.
    reason : str
        One sentence.
    """

    indices: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return self.reason


def choose_spurious(table: Predictiveness) -> Choice:
    """Return the subspaces that predict the spurious feature and not the class, best first.

    Parameters
    ----------
    table : Predictiveness
        Of samples of all four kinds, as many of each as can be had: columns with fewer than ten
        samples to find, or fewer than ten others, are left out. Where feature or class are few,
        average precision asks much of the ranking, and intervals are wide.

    Returns
    -------
    Choice
    """
    of_feature = [name for name in OF_FEATURE if _enough(table, name)]
    of_class = [name for name in OF_CLASS if _enough(table, name)]
    if not of_feature or not of_class:
        held = ", ".join(f"{count} of the {group}" for group, count in table.groups.items())
        have = "there are no labels" if table.target is None else f"there are {held}"
        return Choice(
            (),
            "no subspace can be told to predict the spurious feature and not the class: it takes "
            f"{ENOUGH} samples each of a class with and without the feature, and of another class "
            f"with or without it, and {have}",
        )

    def weakest(index: int) -> str:
        return min(of_feature, key=lambda name: _entry(table, index, name).over_chance.value)

    def strength(index: int) -> float:
        return _entry(table, index, weakest(index)).over_chance.value

    def closest(index: int) -> str:
        return max(of_class, key=lambda name: _entry(table, index, name).over_chance.value)

    def told_apart(index: int) -> bool:
        bounds = [_entry(table, index, name).over_chance.interval[0] for name in of_feature]
        return strength(index) > MIDDLE and min(bounds) > 0

    def kept_apart(index: int) -> bool:
        return _entry(table, index, closest(index)).over_chance.value < MIDDLE

    ranked = sorted(range(len(table)), key=strength, reverse=True)
    telling = [index for index in ranked if told_apart(index)]
    chosen = tuple(index for index in telling if kept_apart(index))
    best = chosen[0] if chosen else ranked[0]
    feature, others = (_told(table, best, name) for name in (weakest(best), closest(best)))
    if chosen:
        listed = ", ".join(map(str, chosen))
        return Choice(
            chosen,
            f"of {len(table)} subspaces, those that predict the spurious feature and not the "
            f"class: {listed}; {best} has {feature}, and {others}",
        )
    none = "no subspace predicts the spurious feature and not the class: the best, "
    why = "; above the middle is asked, and the interval above chance"
    if telling:
        why = f", but also {others}; below the middle is asked there"
    return Choice((), f"{none}{best}, has {feature}{why}")


def _entry(table: Predictiveness, index: int, name: str) -> AveragePrecision:
    entry = table.rows[index][name]
    assert entry is not None  # enough samples
    return entry


def _enough(table: Predictiveness, name: str) -> bool:
    sizes = [[table.groups[GROUPS[group]] for group in side] for side in COLUMNS[name]]
    return table.chance[name] is not None and min(map(sum, sizes)) >= ENOUGH


def _told(table: Predictiveness, index: int, name: str) -> str:
    """Return an entry in words."""
    sought, among = WORDS[name]
    entry = _entry(table, index, name)
    middle = entry.chance + MIDDLE * (1 - entry.chance)
    return (
        f"average precision {entry} for {sought} {among}, where chance is {entry.chance:.2f} and "
        f"the middle {middle:.2f}"
    )
