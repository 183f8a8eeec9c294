"""The evidence for a feature: figures on samples that were not used to find it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_edit.evaluation.intervals import percentile_interval

# Transfer (lower end) times separation. On networks kept for choosing, the best of a clean one is
# 0.53, the worst of a marked one 0.80.
STANDS_OUT = 0.6
WORTH = 0.5  # the least separation
CONFIDENCE, RESAMPLES = 0.95, 1000
GROUPS = ("class with", "class without", "rest with", "rest without")


@dataclass(frozen=True)
class Figure:
    """A figure with its 95% bootstrap interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class PseudoGroup:
    """Samples of the target's class, or of others, with or without the feature.

    ``accuracy`` is the share of right answers, None without labels or samples. ``ablated`` is that
    share after ablation, or without labels the share predicted as before, of at most 64 of the
    samples that were not used to find the feature; None where there is none.
    """

    samples: int
    accuracy: float | None
    ablated: float | None


@dataclass(frozen=True)
class Evidence:
    """Figures about a feature, but for the groups on samples that were not used to find it.

    Of all candidates the strongest are reported, and they are chosen on the same samples: the
    intervals say how a figure varies with the samples, not what choosing adds to it.

    Attributes
    ----------
    transfer : Figure
        Share of other classes' samples that become the target when coefficients of the class's
        samples with the feature are put into them, less the share ``control``. Where the target was
        explained on all samples: share of all samples without the feature whose margin grows by
        more than the standard deviation of margins.
    predicted : bool
        Whether the target was explained on the samples predicted as it.
    control : float
        The larger of the shares by random subspaces, and by coefficients of the class's samples
        without the feature.
    effect : Figure
        How much more the target's margin grows, in logits, than by the strongest control.
    separation : Figure
        2·AUC − 1 of presence between samples of the class in which it is strong and the others.
    reliance : float
        Share of the class's relevance that passes through the subspace.
    groups : dict of PseudoGroup
        By "class with", "class without", "rest with", "rest without"; of all samples, those used
        to find included.
    within : bool
        Whether the separation is between samples of the class. Otherwise it is of the class from
        the others, which its content separates too.

    Examples
    --------
    >>> evidence = xe.discover(model, data, target=0, layers=["relu1"]).found[0].evidence
    >>> evidence.stands_out, evidence.groups["class with"].samples
    (True, 60)
    """

    transfer: Figure
    control: float
    effect: Figure
    separation: Figure
    reliance: float
    groups: dict[str, PseudoGroup]
    predicted: bool = True
    within: bool = True

    @property
    def score(self) -> float:
        """The lower end of the transfer times the separation."""
        return max(0.0, self.transfer.low) * max(0.0, self.separation.value)

    @property
    def rank(self) -> tuple[bool, float, float]:
        """What findings are ordered by: the score, of equal ones the effect times separation.

        Those that stand out come first. Where the separation is of the whole class, which its
        content separates too, the score counts half.
        """
        score = self.score if self.within else self.score / 2
        return self.stands_out, score, self.effect.low * self.separation.value

    @property
    def stands_out(self) -> bool:
        """Whether the score is above what class content reaches in networks without a shortcut.

        What separates the whole class does not stand out by itself.
        """
        return self.within and self.score >= STANDS_OUT

    @property
    def worth_a_look(self) -> bool:
        """Whether the feature surely changes the prediction, and divides the class."""
        return self.effect.low > 0 and self.separation.value > WORTH

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {**asdict(self), "score": self.score, "stands_out": self.stands_out}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """Return the evidence that `to_dict` described."""
        return cls(
            Figure(**values["transfer"]),
            values["control"],
            Figure(**values["effect"]),
            Figure(**values["separation"]),
            values["reliance"],
            {name: PseudoGroup(**one) for name, one in values["groups"].items()},
            values["predicted"],
            values.get("within", True),
        )


def mean_figure(values: Tensor, seed: int) -> Figure:
    """Return the mean of values, shape (samples,), with its bootstrap interval."""
    drawn = values.double().numpy()
    random = np.random.default_rng(seed)
    rows = random.integers(len(drawn), size=(RESAMPLES, len(drawn)))
    low, high = percentile_interval(drawn[rows].mean(1), CONFIDENCE)
    return Figure(float(drawn.mean()), low, high, len(drawn))


def separation_figure(scores: Tensor, part: Tensor, seed: int) -> Figure:
    """Return 2·AUC − 1 between a part of the samples and the others, with its interval.

    The bootstrap draws within both sides.
    """
    sides = [scores[part].double().numpy(), scores[~part].double().numpy()]
    if not all(map(len, sides)):
        return Figure(0.0, -1.0, 1.0, len(scores))
    random = np.random.default_rng(seed)
    draws = [
        _separation(*(random.choice(side, len(side)) for side in sides))
        for _ in range(RESAMPLES // 5)
    ]
    low, high = percentile_interval(np.array(draws), CONFIDENCE)
    return Figure(_separation(*sides), low, high, len(scores))


def _separation(above: Any, below: Any) -> float:
    """Return P(above > below) − P(above < below) of two samples of numbers."""
    order = np.sort(below)
    smaller = np.searchsorted(order, above, side="left")
    not_larger = np.searchsorted(order, above, side="right")
    return float((smaller + not_larger).mean() / len(order) - 1)


def two_means(scores: Tensor, weights: Tensor) -> float:
    """Return the threshold that divides presence scores, shape (samples,), by weighted 2-means.

    Of their roots, which are lengths: squares of a feature that is strong vary so much that the
    threshold between the means is above many of them.
    """
    from sklearn.cluster import KMeans

    column = scores.double().sqrt().numpy()[:, None]
    fitted = KMeans(2, n_init=5, random_state=0).fit(column, sample_weight=weights.numpy())
    return float(fitted.cluster_centers_.mean()) ** 2


def balanced_weights(classes: Tensor) -> Tensor:
    """Return weights with which each class counts alike, float64, shape (samples,)."""
    _, which, counts = classes.unique(return_inverse=True, return_counts=True)
    weights: Tensor = 1 / counts[which].double()
    return weights


def reliance(U: Tensor, cross: Tensor) -> float:
    """Return Σ (Uᵀa)·(Uᵀc) / Σ a·c from E[a cᵀ], shape (channels, channels)."""
    total = float(torch.trace(cross))
    return float(torch.trace(U.T @ cross @ U)) / total if total else 0.0
