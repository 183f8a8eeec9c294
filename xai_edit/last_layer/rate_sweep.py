"""Accuracy of the groups as a function of the neutralisation rate of one weight (Fig. 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xai_edit.last_layer.exact_dose import EditedWeight, group_accuracy, strongest_other, wins
from xai_edit.last_layer.head import HeadFeatures
from xai_edit.last_layer.objective import EditObjective
from xai_edit.last_layer.single_weight import anchor_point, orthogonal_weight


@dataclass(frozen=True, eq=False)
class RateSweep:
    """Accuracies at each neutralisation rate of one edited weight (the paper's Fig. 9).

    Attributes
    ----------
    row, column, anchor : int, int, float
        The class whose row is edited, the feature, and its value at which the edit leaves the
        output alone; 0 for a plain edit.
    rates, doses : Tensor, float64, shape (R,)
        Ascending rates, and what each adds to the weight.
    accuracy : Tensor, float64, shape (R, G)
        Of each group (class × attribute) that has samples.
    average, objective : Tensor, float64, shape (R,)
        Accuracy over all samples, and what ``rate="auto"`` maximises.
    removed, retained : Tensor or None, float64, shape (R,)
        Accuracy over the samples of the fictitious class and over the others (Fig. 8); None where
        the validation data has none.
    raised : Tensor or None, float64, shape (R,)
        Mean probability of the row's class over the former less that over the latter.

    Examples
    --------
    >>> operator = xe.FictitiousClass(select="gradient-activation")
    >>> (sweep,) = operator.sweep(model, data, attribute=attribute)
    >>> sweep.row, sweep.column
    (0, 3)
    >>> sweep.worst[0].item(), sweep.worst[sweep.best].item()
    (0.0, 1.0)
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

    def __repr__(self) -> str:
        return f"RateSweep(row {self.row}, column {self.column}: {len(self.rates)} rates)"

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
        """Position of the smallest rate with the least gap, the paper's choice."""
        return int(torch.nonzero(self.gap == self.gap.min())[0])

    def plot(self, axes: Any) -> None:
        """Draw worst-group and average accuracy against the rate on matplotlib axes (Fig. 9)."""
        smallest = float(self.rates[self.rates > 0].min())
        for values, name in ((self.average, "average"), (self.worst, "worst group")):
            axes.plot(self.rates, values, label=name)
        for at, style, name in ((self.best, ":", "auto"), (self.least_gap, "--", "least gap")):
            axes.axvline(float(self.rates[at]), linestyle=style, color="grey", label=name)
        axes.set_xscale("symlog", linthresh=smallest)
        axes.set_xlabel("neutralisation rate r")
        axes.set_ylabel("accuracy")
        axes.legend()


def rate_sweep(
    head: HeadFeatures,
    objective: EditObjective,
    row: int,
    column: int,
    *,
    rates: Sequence[float] | None = None,
    anchor: bool | Literal["auto"],
    others: Mapping[int, EditedWeight],
) -> RateSweep:
    """Return the sweep of one weight, with those of other rows edited; no forward pass a rate."""
    w = head.weight[row].double()
    if rates is None:  # most of the effect is about the rate at which the weight crosses zero
        logarithmic = float(w[column] ** 2 / (w @ w + 1)) * np.logspace(-2, 3, 101)
        rates = [*np.linspace(0, 1, 101), *logarithmic[logarithmic <= 1]]
    r = torch.from_numpy(np.unique(rates))
    doses = orthogonal_weight(w, column, r) - w[column]  # Eq. 8
    fixed = anchor_point(head, column, anchor, raised=bool(doses[-1] > 0)) or 0.0
    x, logits = objective.samples.features[:, column].double() - fixed, objective.logits(others)
    edited = logits[:, row] + doses[:, None] * x  # (R, samples)
    best_other, rival = strongest_other(logits, row)
    as_row = wins(edited, best_other, row, rival)
    right = torch.where(as_row, objective.labels == row, objective.labels == rival)
    rest = logits.index_fill(1, torch.tensor(row), -torch.inf)
    raised = objective.raised(row, (edited - rest.logsumexp(1)).sigmoid())
    has = objective.attribute == objective.values[row]
    removed, retained = (
        right[:, samples].double().mean(1) if samples.any() else None for samples in (has, ~has)
    )
    return RateSweep(
        *(row, column, r, doses, fixed, group_accuracy(right, objective.groups)),
        *(right.double().mean(1), removed, retained, raised),
        objective.of(right, () if raised is None else (raised,)),
    )
