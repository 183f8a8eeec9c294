"""``RateSweep``: what one edited weight does to the groups, rate by rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RateSweep:
    """What one edited weight does to the groups at each neutralisation rate (the paper's Fig. 9).

    Attributes
    ----------
    row, column : int
        The class whose row is edited and the feature, chosen by the operator's score.
    rates : Tensor, float64, shape (R,)
        Ascending. When none are given: from 0, a grid over [0, 1] and a logarithmic one about the
        rate at which the weight crosses zero, where most of the effect is.
    doses : Tensor, float64, shape (R,)
        What each rate adds to the weight.
    anchor : float
        Value of the feature at which the edit leaves the output alone; 0 for a plain edit.
    accuracy : Tensor, float64, shape (R, G)
        Of each (class, spurious feature) group that has samples.
    average : Tensor, float64, shape (R,)
        Accuracy over all samples.
    removed, retained : Tensor or None, float64, shape (R,)
        Accuracy over the samples of the fictitious class and over the others (Fig. 8); None where
        the validation data has none.
    raised : Tensor or None, float64, shape (R,)
        Mean probability of the row's class over the former less that over the latter.
    objective : Tensor, float64, shape (R,)
        What ``rate="auto"`` makes as large as it can.
    """

    row: int
    column: int
    rates: Tensor
    doses: Tensor
    anchor: float
    accuracy: Tensor
    average: Tensor
    removed: Tensor | None
    retained: Tensor | None
    raised: Tensor | None
    objective: Tensor

    @property
    def worst(self) -> Tensor:
        """Worst-group accuracy, float64, shape (R,)."""
        return self.accuracy.min(1).values

    @property
    def gap(self) -> Tensor:
        """Average less worst-group accuracy, float64, shape (R,)."""
        return self.average - self.worst

    @property
    def best(self) -> int:
        """Position of the smallest rate with the highest objective."""
        return int(torch.nonzero(self.objective == self.objective.max())[0])

    @property
    def least_gap(self) -> int:
        """Position of the smallest rate with the least gap, the paper's choice.

        A collapsed model has no gap: see what ``worst`` says there.
        """
        return int(torch.nonzero(self.gap == self.gap.min())[0])

    def plot(self, axes: Any) -> None:
        """Draw worst-group and average accuracy against the rate (Fig. 9).

        Parameters
        ----------
        axes : matplotlib.axes.Axes
        """
        smallest = float(self.rates[self.rates > 0].min())
        for values, name in ((self.average, "average"), (self.worst, "worst group")):
            axes.plot(self.rates, values, label=name)
        for at, style, name in ((self.best, ":", "auto"), (self.least_gap, "--", "least gap")):
            axes.axvline(float(self.rates[at]), linestyle=style, color="grey", label=name)
        axes.set_xscale("symlog", linthresh=smallest)
        axes.set_xlabel("neutralisation rate r")
        axes.set_ylabel("accuracy")
        axes.legend()
