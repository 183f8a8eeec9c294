"""Accuracy, averages, gaps and demographic rates by group, from counts of right answers."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.checks import fraction, one_of, require, whole_number
from xai_edit.core.targets import class_list
from xai_edit.core.text import Plain, aligned
from xai_edit.evaluation.intervals import (
    Interval,
    percentile_interval,
    resampled_shares,
    wilson_intervals,
)

LINES = 20  # groups that the text shows
FEW = 10  # samples; a group of fewer is marked, since its accuracy says little
CONFIDENCE, RESAMPLES, SEED = 0.95, 2000, 0


def least_above_chance(classes: int, samples: int) -> float:
    """Return the accuracy two standard errors above 1 / classes, that of guessing."""
    chance = 1 / classes
    return chance + 2 * math.sqrt(chance * (1 - chance) / samples)


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
    """Intervals of the figures of an `Accuracy`.

    ``groups`` are Wilson score intervals, the others percentile bootstrap intervals of
    `resampled_shares`; both have a width also where no answer is wrong. ``worst`` is that of the
    lowest accuracy, whichever group has it in a resample; ``gaps`` are those of each average less
    the worst.

    Examples
    --------
    >>> intervals = xe.evaluate_groups(model, data, groups=attribute).intervals()
    >>> [round(end, 3) for end in intervals.groups[1, 1]]
    [0.0, 0.161]
    """

    confidence: float
    resamples: int
    seed: int
    groups: dict[Group, Interval]
    worst: Interval
    averages: dict[Average, Interval]
    gaps: dict[Average, Interval]


@dataclass(frozen=True)
class Rate:
    """How often the positive class is predicted for one attribute.

    ``true_positive_rate`` is over the ``positives``, its samples of that class.

    Examples
    --------
    >>> accuracy = xe.evaluate_groups(model, data, groups=attribute)
    >>> accuracy.demographics(positive=0).rates[1]
    Rate(attribute=1, true_positive_rate=1.0, positives=60, positive_rate=1.0, samples=100)
    """

    attribute: int
    true_positive_rate: float
    positives: int
    positive_rate: float
    samples: int


@dataclass(frozen=True)
class Demographics(Plain):
    """Differences in rates between groups of people, 0 to 1. Lower is better; 0 is equality.

    Each is the highest rate less the lowest, also within each resample of its interval, which
    therefore never reaches below 0. Equal opportunity is in the true positive rate (Hardt et al.
    2016, *Equality of Opportunity in Supervised Learning*), demographic parity in the positive rate
    (Dwork et al. 2012, *Fairness through Awareness*). ``rates`` are of the attributes with samples.

    Examples
    --------
    >>> accuracy = xe.evaluate_groups(model, data, groups=attribute)
    >>> unequal = accuracy.demographics(positive=0)
    >>> unequal.equal_opportunity_difference, round(unequal.demographic_parity_difference, 3)
    (0.0, 0.857)
    """

    positive: int  # the class that is a benefit
    equal_opportunity_difference: float
    equal_opportunity_interval: Interval
    demographic_parity_difference: float
    demographic_parity_interval: Interval
    rates: tuple[Rate, ...]
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        caption = f"class {self.positive} predicted, by attribute"
        rows: list[list[Any]] = [[caption, "true positive rate", "of", "rate", "of"]]
        rows += [[f"  attribute {one.attribute}", *astuple(one)[1:]] for one in self.rates]
        rows.append(["", "difference", f"{self.confidence:.0%} interval"])
        for name in ("equal opportunity", "demographic parity"):
            start = name.replace(" ", "_")
            figures = [getattr(self, f"{start}_{what}") for what in ("difference", "interval")]
            rows.append([f"{name} difference", *figures])
        return aligned(rows)


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Right answers and samples of each (class, attribute) group. Higher is better.

    Groups without samples have no accuracy and play no part in the worst and the averages, so the
    worst group is that of the `missing` and the `absent` left out.

    Attributes
    ----------
    right, samples : Tensor, int64, shape (classes, attributes)
        Attributes are numbered from 0; without any there is one column.
    predicted : Tensor or None, int64, shape (classes, attributes)
        How many samples of each attribute are predicted as each class; `demographics` needs it.
    train_samples : Tensor or None, int64, shape (classes, attributes)
        Samples of each group in the training data, the weights of `train_weighted`. ValueError if
        they do not fit the samples.

    Examples
    --------
    >>> accuracy = xe.evaluate_groups(model, data, groups=attribute)
    >>> accuracy.of(0), accuracy.rest(0), accuracy.worst, round(accuracy.gap(), 3)
    (1.0, 0.75, 0.0, 0.833)
    """

    right: Tensor
    samples: Tensor
    predicted: Tensor | None = None
    train_samples: Tensor | None = None

    def __post_init__(self) -> None:
        if self.train_samples is None:
            return
        counts = check_train_samples(self.train_samples, len(self.samples)).long().cpu()
        counts = nn.functional.pad(counts, (0, max(0, self.samples.shape[1] - counts.shape[1])))
        object.__setattr__(self, "train_samples", counts)
        unseen = counts.clone()
        unseen[:, : self.samples.shape[1]][self.samples > 0] = 0
        for label, attribute in unseen.nonzero().tolist():
            raise ValueError(
                f"train_samples: group ({label}, {attribute}) has {unseen[label, attribute]}, and "
                "no samples in the data, so that its accuracy is not known; give samples of it"
            )

    @property
    def groups(self) -> dict[Group, float]:
        """Accuracy of each (class, attribute) group that has samples."""
        shares = (self.right.double() / self.samples).tolist()
        return {(row, at): shares[row][at] for row, at in self.samples.nonzero().tolist()}

    @property
    def missing(self) -> list[Group]:
        """Groups without samples, of the classes and the attributes that have some elsewhere."""
        known = (self.samples.sum(1) > 0)[:, None] & (self.samples.sum(0) > 0)
        return [(row, at) for row, at in (known & (self.samples == 0)).nonzero().tolist()]

    @property
    def absent(self) -> list[int]:
        """Classes without any samples."""
        return (self.samples.sum(1) == 0).nonzero()[:, 0].tolist()

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
        """Accuracy over all samples."""
        return int(self.right.sum()) / int(self.samples.sum())

    @property
    def train_weighted(self) -> float | None:
        """Mean of the group accuracies, each weighted by its share of the training data.

        The average of Sagawa et al. 2020, *Distributionally Robust Neural Networks for Group
        Shifts*. None without ``train_samples``.
        """
        weights = self._weights().get("train_weighted")
        if weights is None:
            return None
        return float(torch.tensor([*self.groups.values()], dtype=torch.double) @ weights)

    @property
    def balanced(self) -> float:
        """Mean of the group accuracies."""
        return sum(self.groups.values()) / len(self.groups)

    @property
    def averages(self) -> dict[Average, float]:
        """The averages by their names; ``train_weighted`` only where it is known."""
        figures = {name: getattr(self, name) for name in AVERAGES}
        return {name: value for name, value in figures.items() if value is not None}

    def gap(self, average: Average = "average") -> float:
        """Return an average less the worst-group accuracy. Lower is better.

        ValueError if there is no such average; ``train_weighted`` needs ``train_samples``.
        """
        known = self.averages
        if average == "train_weighted":
            require(average in known, "average", average, "it needs train_samples")
        return known[one_of(average, known, "average")] - self.worst

    def of(self, *classes: int) -> float:
        """Accuracy over the samples of some classes (A_t of class unlearning)."""
        at = [row for row in classes if 0 <= row < len(self.samples)]
        if len(at) < len(classes) or not self.samples[at].sum():
            raise ValueError(f"classes: no samples of {[*classes]}")
        return int(self.right[at].sum()) / int(self.samples[at].sum())

    def rest(self, *classes: int) -> float:
        """Accuracy over the samples of all other classes (A_g of class unlearning)."""
        return self.of(*[row for row in range(len(self.samples)) if row not in classes])

    def intervals(
        self, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED
    ) -> GroupIntervals:
        """Return intervals of all figures: Wilson's for the groups, by bootstrap for the others.

        In the bootstrap, samples are drawn with replacement within each group; an interval holds
        ``confidence`` of the resamples. The worst group is that of each resample.
        """
        fraction(confidence, "confidence", one=False)
        whole_number(resamples, "resamples", least=1)
        whole_number(seed, "seed")
        at = self.samples > 0
        right, samples = self.right[at], self.samples[at]
        draws = resampled_shares(right, samples, resamples=resamples, seed=seed)
        worst = draws.min(1)
        averages = {name: draws @ weights.numpy() for name, weights in self._weights().items()}
        interval = partial(percentile_interval, confidence=confidence)
        return GroupIntervals(
            confidence,
            resamples,
            seed,
            dict(zip(self.groups, wilson_intervals(right, samples, confidence), strict=True)),
            interval(worst),
            {name: interval(drawn) for name, drawn in averages.items()},
            {name: interval(drawn - worst) for name, drawn in averages.items()},
        )

    def demographics(self, positive: int) -> Demographics:
        """Return how unequally a class is predicted for the groups of people in the attribute.

        ``positive`` is the class that is a benefit, such as "granted". ValueError if it is no
        class, there is one attribute only, one has no samples of it, or ``predicted`` is None.
        """
        if self.predicted is None:
            raise ValueError("predicted: not counted; evaluate_groups counts it")
        (positive,) = class_list(positive, len(self.samples))
        people = self.samples.sum(0)
        known = people.nonzero()[:, 0]
        if len(known) < 2:
            raise ValueError(
                f"groups: samples of {len(known)} attribute; differences need two or more, given "
                "to evaluate_groups as groups"
            )
        for attribute in known[self.samples[positive, known] == 0].tolist():
            raise ValueError(
                f"positive: attribute {attribute} has no samples of class {positive}; a true "
                "positive rate needs some of each attribute"
            )
        columns, differences = [known.tolist()], []
        for hits, total in (
            (self.right[positive, known], self.samples[positive, known]),
            (self.predicted[positive, known], people[known]),
        ):
            rates = (hits.double() / total).tolist()
            draws = resampled_shares(hits, total, resamples=RESAMPLES, seed=SEED)
            interval = percentile_interval(draws.max(1) - draws.min(1), CONFIDENCE)
            differences.append((max(rates) - min(rates), interval))
            columns += [rates, total.tolist()]
        opportunity, parity = differences
        return Demographics(positive, *opportunity, *parity, tuple(map(Rate, *columns)))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values.

        ``groups`` lists ``class``, ``attribute``, ``samples``, ``right``, ``accuracy`` and
        ``interval`` of each group that has samples; ``worst`` is the entry of the worst of them,
        with the interval of the minimum. ``missing`` lists ``class`` and ``attribute`` of the
        groups that are not measured, ``absent`` the classes without samples. ``average``,
        ``train_weighted`` (or None) and ``balanced`` have their ``accuracy``, ``interval``, ``gap``
        and ``gap_interval``.
        """
        found = self.intervals()
        listed: dict[Group, dict[str, Any]] = {}
        for group, accuracy in self.groups.items():
            row: dict[str, Any] = {"class": group[0], "attribute": group[1]}
            row |= {"samples": int(self.samples[group]), "right": int(self.right[group])}
            listed[group] = row | {"accuracy": accuracy, "interval": list(found.groups[group])}
        averages: dict[str, Any] = dict.fromkeys(AVERAGES)
        for name, value in self.averages.items():
            row = {"accuracy": value, "interval": list(found.averages[name])}
            averages[name] = row | {"gap": self.gap(name), "gap_interval": list(found.gaps[name])}
        return {
            "samples": int(self.samples.sum()),
            "groups": [*listed.values()],
            "worst": {**listed[self.worst_group], "interval": list(found.worst)},
            "missing": [{"class": label, "attribute": has} for label, has in self.missing],
            "absent": self.absent,
            **averages,
            "bootstrap": {key: getattr(found, key) for key in ("confidence", "resamples", "seed")},
        }

    def __str__(self) -> str:
        found = self.to_dict()
        groups, samples, missing = found["groups"], found["samples"], found["missing"]
        lowest = sorted(groups, key=itemgetter("accuracy"))[:LINES]
        some = f", the {LINES} lowest of {len(groups)}" if len(lowest) < len(groups) else ""
        head = ["samples", "accuracy", f"{CONFIDENCE:.0%} interval"]

        def name(group: dict[str, Any]) -> str:
            attribute = f", attribute {group['attribute']}" if self.samples.shape[1] > 1 else ""
            few = f" (fewer than {FEW})" if group.get("samples", FEW) < FEW else ""
            return f"class {group['class']}{attribute}{few}"

        def row(start: str, group: dict[str, Any]) -> list[Any]:
            return [start + name(group), group["samples"], group["accuracy"], group["interval"]]

        rows: list[list[Any]] = [[f"accuracy by group{some}", *head]]
        rows += [row("  ", group) for group in groups if group in lowest]
        rows += [[f"  {name(group)}", 0, "not measured"] for group in missing[:LINES]]
        if len(missing) > LINES:
            rows.append([f"  {len(missing) - LINES} more groups", 0, "not measured"])
        if self.absent:
            rows.append([f"  {len(self.absent)} of {len(self.samples)} classes", 0, "not measured"])
        worst = "worst measured: " if missing or self.absent else "worst: "
        rows += [row(worst, found["worst"]), [], ["", *head, "gap to worst", head[-1]]]
        rows += [[AVERAGES[one], samples, *found[one].values()] for one in self.averages]
        return aligned([[tuple(c) if isinstance(c, list) else c for c in row] for row in rows])

    def _weights(self) -> dict[Average, Tensor]:
        """Return the weight of each group that has samples in each average, shape (G,)."""
        at = self.samples > 0
        sizes: dict[Average, Tensor] = {
            "average": self.samples[at],
            "balanced": torch.ones_like(self.samples[at]),
        }
        if self.train_samples is not None:
            sizes["train_weighted"] = self.train_samples[:, : at.shape[1]][at]
        return {name: size.double() / size.sum() for name, size in sizes.items()}


def check_train_samples(samples: Any, classes: int | None = None) -> Tensor:
    """Return numbers of samples by class and attribute as a tensor, or raise ValueError."""
    try:
        counts: Tensor = torch.as_tensor(samples)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ValueError(
            f"train_samples: {samples!r} given; give one number a group ({problem})"
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
