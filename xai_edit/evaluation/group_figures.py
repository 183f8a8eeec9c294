"""What is known of a classifier group by group: figures, their text and their JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from xai_edit.evaluation.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
    check_bootstrap,
    percentile_interval,
    resampled_shares,
)
from xai_edit.evaluation.demographics import Demographics, demographics

LINES = 20  # groups that the text shows

Group: TypeAlias = tuple[int, int]
"""A class and an attribute."""

Average: TypeAlias = Literal["average", "train_weighted", "balanced"]
AVERAGES: dict[Average, str] = {
    "average": "average over samples",
    "train_weighted": "average, train-weighted",
    "balanced": "average over groups (balanced)",
}


@dataclass(frozen=True)
class GroupIntervals:
    """Percentile bootstrap intervals of the figures of an `Accuracy`.

    Attributes
    ----------
    confidence : float
    resamples, seed : int
    groups : dict
        Of each group's accuracy, lower and upper end.
    worst : tuple of float
        Of the lowest accuracy, whichever group has it in a resample.
    averages, gaps : dict
        Of each average, and of the average less the worst, by the average's name.
    """

    confidence: float
    resamples: int
    seed: int
    groups: dict[Group, Interval]
    worst: Interval
    averages: dict[Average, Interval]
    gaps: dict[Average, Interval]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Right answers and samples of each (class, attribute) group. Higher is better.

    Groups without samples have no accuracy and play no part in the worst and the averages.

    Attributes
    ----------
    right, samples : Tensor, int64, shape (classes, attributes)
        Attributes run from 0; there is one column where none was given.
    predicted : Tensor or None, int64, shape (classes, attributes)
        How many samples of each attribute are taken for each class; `demographics` needs it.
    train_samples : Tensor or None, int64, shape (classes, attributes)
        Samples of each group in the training data, the weights of `train_weighted`.

    Raises
    ------
    ValueError
        If ``train_samples`` does not fit the samples.
    """

    right: Tensor
    samples: Tensor
    predicted: Tensor | None = None
    train_samples: Tensor | None = None

    def __post_init__(self) -> None:
        if self.train_samples is None:
            return
        counts = check_train_samples(self.train_samples, len(self.samples))
        object.__setattr__(self, "train_samples", counts)
        unseen = self._padded_train_samples()
        unseen[:, : self.samples.shape[1]][self.samples > 0] = 0
        for label, attribute in unseen.nonzero().tolist():
            raise ValueError(
                f"train_samples: group ({label}, {attribute}) has {unseen[label, attribute]}, and "
                "no samples in the data, so that its accuracy is not known; give samples of it"
            )

    @property
    def groups(self) -> dict[Group, float]:
        """Accuracy of each (class, attribute) group that has samples."""
        right, samples = self.right.tolist(), self.samples.tolist()
        return {
            (row, column): right[row][column] / samples[row][column]
            for row, column in self.samples.nonzero().tolist()
        }

    @property
    def worst(self) -> float:
        """Worst-group accuracy: the lowest of all groups that have samples."""
        return min(self.groups.values())

    @property
    def worst_group(self) -> Group:
        """The (class, attribute) group of lowest accuracy, the first of equals."""
        groups = self.groups
        return min(groups, key=lambda group: groups[group])

    @property
    def average(self) -> float:
        """Accuracy over all samples: every sample counts alike."""
        return int(self.right.sum()) / int(self.samples.sum())

    @property
    def train_weighted(self) -> float | None:
        """Mean of the group accuracies, each weighted by its share of the training data.

        What the literature on group robustness calls average (Sagawa et al. 2020, *Distributionally
        Robust Neural Networks for Group Shifts*). None without ``train_samples``.
        """
        if self.train_samples is None:
            return None
        return float(self._shares() @ self._weights()["train_weighted"])

    @property
    def balanced(self) -> float:
        """Mean of the group accuracies: every group counts alike."""
        return sum(self.groups.values()) / len(self.groups)

    @property
    def averages(self) -> dict[Average, float]:
        """The averages by their names; ``train_weighted`` only where it is known."""
        named: dict[Average, float | None] = {
            "average": self.average,
            "train_weighted": self.train_weighted,
            "balanced": self.balanced,
        }
        return {name: value for name, value in named.items() if value is not None}

    def gap(self, average: Average = "average") -> float:
        """Return an average less the worst-group accuracy. Lower is better.

        Parameters
        ----------
        average : {"average", "train_weighted", "balanced"}
            Which of them.

        Raises
        ------
        ValueError
            If there is no such average.
        """
        known = self.averages
        if average not in known:
            hint = "; train_weighted needs train_samples" if average == "train_weighted" else ""
            raise ValueError(f"average: {average!r} given; it is one of {', '.join(known)}{hint}")
        return known[average] - self.worst

    def of(self, *classes: int) -> float:
        """Accuracy over the samples of some classes (A_t of class unlearning)."""
        at = list(classes)
        known = range(len(self.samples))
        if not at or any(row not in known for row in at) or not self.samples[at].sum():
            raise ValueError(f"classes: no samples of {at}")
        return int(self.right[at].sum()) / int(self.samples[at].sum())

    def rest(self, *classes: int) -> float:
        """Accuracy over the samples of all other classes (A_g of class unlearning)."""
        return self.of(*[row for row in range(len(self.samples)) if row not in classes])

    def intervals(
        self, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED
    ) -> GroupIntervals:
        """Return bootstrap intervals of all figures.

        Samples are drawn anew within each group, since the sizes of the groups are a choice of
        whoever made the data. The worst group is looked for in each resample, so that its interval
        is that of a minimum and reaches low where several groups are nearly as bad. The interval of
        a group with no wrong answer has no width, however few its samples are.

        Parameters
        ----------
        confidence : float
            Share of the resamples inside each interval.
        resamples : int
        seed : int
        """
        check_bootstrap(confidence, resamples, seed)
        at = self.samples > 0
        draws = resampled_shares(self.right[at], self.samples[at], resamples=resamples, seed=seed)
        worst = draws.min(1)
        averages = {name: draws @ weights.numpy() for name, weights in self._weights().items()}
        return GroupIntervals(
            confidence,
            resamples,
            seed,
            {
                group: percentile_interval(drawn, confidence)
                for group, drawn in zip(self.groups, draws.T, strict=True)
            },
            percentile_interval(worst, confidence),
            {name: percentile_interval(drawn, confidence) for name, drawn in averages.items()},
            {
                name: percentile_interval(drawn - worst, confidence)
                for name, drawn in averages.items()
            },
        )

    def demographics(self, positive: int) -> Demographics:
        """Return how unequally a class is given to the groups of people that attributes stand for.

        Parameters
        ----------
        positive : int
            The class that is a benefit, such as "granted".

        Raises
        ------
        ValueError
            If it is no class, there is one attribute only, an attribute has no samples of the
            class, or ``predicted`` is None.
        """
        if self.predicted is None:
            raise ValueError("predicted: not counted; evaluate_groups counts it")
        return demographics(self.right, self.samples, self.predicted, positive)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values.

        ``groups`` lists ``class``, ``attribute``, ``samples``, ``right``, ``accuracy`` and
        ``interval`` of each group that has samples; ``worst`` is the entry of the worst of them,
        with the interval of the minimum. ``average``, ``train_weighted`` and ``balanced`` have
        their ``accuracy``, ``interval``, ``gap`` and ``gap_interval``; ``train_weighted`` is None
        where it is not known. ``samples`` counts all, ``bootstrap`` says how intervals were made.
        """
        intervals = self.intervals()
        listed = {
            (label, attribute): {
                "class": label,
                "attribute": attribute,
                "samples": int(self.samples[label, attribute]),
                "right": int(self.right[label, attribute]),
                "accuracy": accuracy,
                "interval": list(intervals.groups[label, attribute]),
            }
            for (label, attribute), accuracy in self.groups.items()
        }
        averages = {
            name: {
                "accuracy": value,
                "interval": list(intervals.averages[name]),
                "gap": self.gap(name),
                "gap_interval": list(intervals.gaps[name]),
            }
            for name, value in self.averages.items()
        }
        return {
            "samples": int(self.samples.sum()),
            "groups": [*listed.values()],
            "worst": {**listed[self.worst_group], "interval": list(intervals.worst)},
            **{name: averages.get(name) for name in AVERAGES},
            "bootstrap": {
                "confidence": intervals.confidence,
                "resamples": intervals.resamples,
                "seed": intervals.seed,
            },
        }

    def __str__(self) -> str:
        intervals, groups = self.intervals(), self.groups
        shown = sorted(sorted(groups, key=lambda group: groups[group])[:LINES])
        some = f", the {LINES} lowest of {len(groups)}" if len(shown) < len(groups) else ""
        interval = f"{intervals.confidence:.0%} interval"
        lines = [_row(f"accuracy by group{some}", ["samples", "accuracy", interval])]
        for group in shown:
            lines.append(self._line(f"  {self._name(group)}", group, intervals.groups[group]))
        worst = f"worst: {self._name(self.worst_group)}"
        lines += [self._line(worst, self.worst_group, intervals.worst), ""]
        lines.append(_row("", ["samples", "accuracy", interval, "gap to worst", interval]))
        for name, value in self.averages.items():
            cells = [str(int(self.samples.sum())), f"{value:.3f}", _ends(intervals.averages[name])]
            cells += [f"{self.gap(name):.3f}", _ends(intervals.gaps[name])]
            lines.append(_row(AVERAGES[name], cells))
        return "\n".join(lines)

    def _line(self, text: str, group: Group, interval: Interval) -> str:
        cells = [str(int(self.samples[group])), f"{self.groups[group]:.3f}", _ends(interval)]
        return _row(text, cells)

    def _name(self, group: Group) -> str:
        label, attribute = group
        named = self.samples.shape[1] > 1
        return f"class {label}, attribute {attribute}" if named else f"class {label}"

    def _shares(self) -> Tensor:
        """Return the accuracy of each group that has samples, float64, shape (G,)."""
        at = self.samples > 0
        return self.right[at].double() / self.samples[at]

    def _weights(self) -> dict[Average, Tensor]:
        """Return the weight of each group that has samples in each average, shape (G,)."""
        at = self.samples > 0
        sizes: dict[Average, Tensor] = {
            "average": self.samples[at],
            "balanced": torch.ones_like(self.samples[at]),
        }
        if self.train_samples is not None:
            sizes["train_weighted"] = self._padded_train_samples()[:, : at.shape[1]][at]
        return {name: size.double() / size.sum() for name, size in sizes.items()}

    def _padded_train_samples(self) -> Tensor:
        """Return a copy of the training counts with no fewer columns than ``samples``."""
        assert self.train_samples is not None  # asked before
        missing = max(0, self.samples.shape[1] - self.train_samples.shape[1])
        return torch.nn.functional.pad(self.train_samples.long().cpu(), (0, missing))


def check_train_samples(given: Any, classes: int | None = None) -> Tensor:
    """Return numbers of samples by class and attribute as a tensor; raise ValueError otherwise.

    Parameters
    ----------
    given : Tensor, array or nested lists
    classes : int, optional
        How many there must be, where that is known.
    """
    try:
        counts = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(
            f"train_samples: {given!r} given; give one number a group ({problem})"
        ) from None
    shape = tuple(counts.shape)
    if len(shape) != 2 or (classes is not None and shape[0] != classes):
        raise ValueError(
            f"train_samples: shape {shape} given; it is ({classes or 'classes'}, attributes)"
        )
    if counts.is_floating_point() or (counts < 0).any() or not counts.any():
        raise ValueError(
            f"train_samples: {counts.flatten()[:5].tolist()} … given; give whole numbers of "
            "samples, such as evaluate_groups(model, training_data).samples"
        )
    return counts


def _row(text: str, cells: list[str]) -> str:
    return f"{text:<32}" + "".join(f"{cell:>14}" for cell in cells)


def _ends(interval: Interval) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"
