"""Is a class given to groups of people alike? Differences in opportunity and in parity."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from xai_edit.attribution.targets import class_list
from xai_edit.evaluation.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
    percentile_interval,
    resampled_shares,
)


@dataclass(frozen=True)
class Rate:
    """How often the positive class is predicted in one group of people.

    Attributes
    ----------
    attribute : int
        The group.
    true_positive_rate : float
        Share of its samples of the positive class that are taken for it.
    positives : int
        What that is measured on.
    positive_rate : float
        Share of all its samples that are taken for the positive class.
    samples : int
        What that is measured on.
    """

    attribute: int
    true_positive_rate: float
    positives: int
    positive_rate: float
    samples: int


@dataclass(frozen=True)
class Demographics:
    """Differences between groups of people, 0 to 1. Lower is better; 0 is alike for all.

    Each is the highest rate less the lowest. Intervals are made as in `Accuracy.intervals`, with
    highest and lowest looked for in each resample, so that they never reach below 0.

    Attributes
    ----------
    positive : int
        The class that is a benefit.
    equal_opportunity_difference : float
        In the true positive rate (Hardt et al. 2016, *Equality of Opportunity in Supervised
        Learning*).
    equal_opportunity_interval : tuple of float
    demographic_parity_difference : float
        In the rate at which the positive class is predicted (Dwork et al. 2012, *Fairness through
        Awareness*).
    demographic_parity_interval : tuple of float
    rates : tuple of Rate
        Of each attribute that has samples.
    confidence : float
    """

    positive: int
    equal_opportunity_difference: float
    equal_opportunity_interval: Interval
    demographic_parity_difference: float
    demographic_parity_interval: Interval
    rates: tuple[Rate, ...]
    confidence: float = CONFIDENCE

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; keys are the attributes' names, tuples are lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def __str__(self) -> str:
        lines = [
            f"class {self.positive} predicted, by attribute",
            f"{'':<32}{'true positive rate':>20}{'of':>7}{'rate':>9}{'of':>7}",
        ]
        for one in self.rates:
            lines.append(
                f"{f'  attribute {one.attribute}':<32}{one.true_positive_rate:>20.3f}"
                f"{one.positives:>7}{one.positive_rate:>9.3f}{one.samples:>7}"
            )
        for text, value, (low, high) in (
            (
                "equal opportunity difference",
                self.equal_opportunity_difference,
                self.equal_opportunity_interval,
            ),
            (
                "demographic parity difference",
                self.demographic_parity_difference,
                self.demographic_parity_interval,
            ),
        ):
            told = f"{self.confidence:.0%} interval {low:.3f}–{high:.3f}"
            lines.append(f"{text:<32}{value:>7.3f}, {told}")
        return "\n".join(lines)


def demographics(right: Tensor, samples: Tensor, predicted: Tensor, positive: int) -> Demographics:
    """Compute the differences from counts; see `Accuracy.demographics`.

    Parameters
    ----------
    right, samples, predicted : Tensor, int64, shape (classes, attributes)
        As in `Accuracy`.
    positive : int

    Raises
    ------
    ValueError
        See `Accuracy.demographics`.
    """
    (positive,) = class_list(positive, len(samples))
    people = samples.sum(0)
    known = people.nonzero()[:, 0]
    if len(known) < 2:
        raise ValueError(
            f"groups: samples of {len(known)} attribute; differences need two or more, given to "
            "evaluate_groups as groups"
        )
    for attribute in known.tolist():
        if not samples[positive, attribute]:
            raise ValueError(
                f"positive: attribute {attribute} has no samples of class {positive}; a true "
                "positive rate needs some of each attribute"
            )
    counts = (
        (right[positive, known], samples[positive, known]),
        (predicted[positive, known], people[known]),
    )
    rates = [(hits.double() / total).tolist() for hits, total in counts]
    intervals = []
    for hits, total in counts:
        draws = resampled_shares(hits, total, resamples=RESAMPLES, seed=SEED)
        intervals.append(percentile_interval(draws.max(1) - draws.min(1), CONFIDENCE))
    return Demographics(
        positive,
        max(rates[0]) - min(rates[0]),
        intervals[0],
        max(rates[1]) - min(rates[1]),
        intervals[1],
        tuple(
            Rate(*told)
            for told in zip(
                known.tolist(),
                rates[0],
                counts[0][1].tolist(),
                rates[1],
                counts[1][1].tolist(),
                strict=True,
            )
        ),
    )
