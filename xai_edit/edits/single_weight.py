"""Class removal by one weight of the last layer: which weight, and what it becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_edit.attribution.targets import class_list
from xai_edit.checks import whole_number
from xai_edit.data import Data
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.exact import removal_doses
from xai_edit.edits.head import HeadFeatures, head_features
from xai_edit.edits.selection import (
    Selection,
    check_selection,
    most_significant,
    selection_scores,
)

# Eq. 7 divides by the weight, so a weight that is nearly zero would be sent far away.
SMALLEST_WEIGHT = 1e-3
# Where a signed feature is held fixed: its extreme value on the side that the edit raises.
ANCHOR_QUANTILE = 1e-3


def orthogonal_weight(row: Tensor, column: int | Tensor, rate: float = 1.0) -> Tensor:
    """Return the value that turns the hyperplane of ``row`` about one axis (Eq. 7 and 8).

    At rate 1 the normals (w, −1) before and after are orthogonal. Between, Eq. 8 is exactly
    w_j − r (‖w‖² + 1) / w_j; it crosses zero at r = w_j² / (‖w‖² + 1).

    Parameters
    ----------
    row : Tensor, shape (d,)
        Weights of one output.
    column : int or Tensor
        The feature j, or several.
    rate : float
        r in [0, 1].
    """
    w = row.double()
    return w[column] - rate * (w @ w + 1) / w[column]  # Eq. 8; Eq. 7 at r = 1


def plain_number(given: Any) -> float:
    """Return a number of Python, NumPy or torch as a float; NaN for anything else."""
    if isinstance(given, Tensor) and given.ndim == 0 and given.dtype is not torch.bool:
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, Real):
        return math.nan
    return float(given)


def check_rate(rate: Any) -> float:
    """Return a rate in [0, 1], or raise ValueError, asking whether a larger one is in percent."""
    number = plain_number(rate)
    if not 0 <= number <= 1:
        percent = "; is it in percent?" if number > 1 else ""
        raise ValueError(f"rate: {rate!r} given; it is a fraction in [0, 1]{percent}")
    return number


def check_tolerance(tolerance: Any) -> float:
    """Return a tolerance in [0, 1], or raise ValueError."""
    if not 0 <= plain_number(tolerance) <= 1:
        raise ValueError(f"tolerance: {tolerance!r} given; it is a fraction in [0, 1]")
    return plain_number(tolerance)


def check_whole(number: Any, name: str) -> int:
    """Return a whole number as an int, or raise ValueError."""
    return whole_number(number, name, least=None)


def editable(row: Tensor, mean_feature: Tensor) -> Tensor:
    """Tell which weights of a row Eq. 7 may change, bool, shape (d,).

    Those that add to the output (w_j · E[x_j] > 0: an edge that lowers the class would raise it
    when flipped) and are not nearly zero.
    """
    return (row * mean_feature > 0) & (row.abs() >= SMALLEST_WEIGHT * row.abs().max())


@dataclass(frozen=True)
class SingleWeight:
    """Make a classifier stop predicting classes, by one weight of its last layer for each.

    Hakemi et al., *Post-hoc Spurious Correlation Neutralization with Single-Weight Fictitious
    Class Unlearning*, Algorithm 1.

    The new weight is some ten times the largest of its layer, which quantisation with one scale a
    tensor pays for; ``times_largest`` in the edit's origin tells how many.

    Parameters
    ----------
    select : str
        "sca" takes the edge with the highest SCA score (Eq. 6) and turns it by Eq. 7 or 8; "ca",
        "gradient-activation", "relevance", "weight" and "random" choose by other scores, see
        `xai_edit.edits.selection.selection_scores`. "exact", ours, scores every weight of the row
        at every dose in closed form and takes the one that removes most of the class while the
        accuracy on the other classes falls by at most ``tolerance``.
    rate : float in [0, 1]
        Neutralisation rate r of Eq. 8; 1 is Eq. 7. Not with "exact", which finds its own dose.
    dose : float, optional
        What is added to the weight, instead of a rate.
    n_weights : int
        Weights edited for each class: those of highest score, each turned as if alone (the paper's
        Fig. 6). "exact" adds one after another, as long as it helps.
    anchor : "auto" or bool
        Also correct the output's bias so that the edit leaves the feature's extreme value alone.
        "auto" does it where the feature takes negative values (tanh, GELU, layer norm), for which
        the plain edit raises the class on other samples. Not with "exact", which counts what its
        dose does to every sample.
    tolerance : float
        For "exact": accuracy on the other classes, as a fraction, that may be lost on the planning
        data.
    seed : int
        For "random".
    """

    select: Selection = "sca"
    rate: float = 1.0
    dose: float | None = None
    n_weights: int = 1
    anchor: bool | Literal["auto"] = "auto"
    tolerance: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        check_selection(self.select)
        check_anchor(self.anchor, self.select)
        # Numbers of NumPy and torch become plain ones: the edit's origin is JSON.
        object.__setattr__(self, "rate", check_rate(self.rate))
        object.__setattr__(self, "n_weights", check_whole(self.n_weights, "n_weights"))
        object.__setattr__(self, "seed", check_whole(self.seed, "seed"))
        object.__setattr__(self, "tolerance", check_tolerance(self.tolerance))
        if self.select == "exact" and (self.rate != 1.0 or self.dose is not None):
            name = "rate" if self.dose is None else "dose"
            raise ValueError(f"{name}: goes with the other selections; 'exact' finds its own dose")
        if self.dose is not None:
            dose = plain_number(self.dose)
            if not math.isfinite(dose) or dose == 0:
                raise ValueError(f"dose: {self.dose!r} given; it is a finite number other than 0")
            object.__setattr__(self, "dose", dose)
            if self.rate != 1.0:
                raise ValueError("dose: given with a rate; give one of them")
        if self.n_weights < 1:
            raise ValueError(f"n_weights: {self.n_weights} given; it is at least 1")

    def plan(
        self, model: nn.Module, data: Data | HeadFeatures, *, target: int | Sequence[int]
    ) -> ModelEdit:
        """Plan the removal of one class or several; the model is only read.

        Parameters
        ----------
        model : nn.Module
            A classifier that ends in a linear layer.
        data : iterable, Dataset or HeadFeatures
            ``(input, label)`` batches with samples of the class and of others. One pass; none with
            what `xai_edit.edits.head.collect_head_features` gave.
        target : int or sequence of int
            The class or classes to remove, planned on the unedited model.

        Returns
        -------
        ModelEdit
            Its origin lists per weight the class, the column, the old and new value, and whether
            the bias was anchored.

        Raises
        ------
        ValueError
            If the model has no final linear layer, a class is out of range or absent, or too few
            weights of its row can be edited.
        """
        head = head_features(model, data)
        targets = class_list(target, head.classes)
        if self.select == "exact":
            rows = [row for target in targets for row in self._exact(head, target)]
        else:
            rows = self._scored(head, targets)
        return head_edit(
            model,
            head,
            rows,
            {
                "operator": "SingleWeight",
                "select": self.select,
                "samples": len(head.features),
            },
            anchor=False if self.select == "exact" else self.anchor,
        )

    def _scored(self, head: HeadFeatures, targets: Sequence[int]) -> list[dict[str, Any]]:
        labels = head.require_labels()
        assert self.select != "exact"
        scores = selection_scores(
            self.select, head.features, labels, head.weight, head.bias, targets, seed=self.seed
        )
        rows = []
        for target, score in zip(targets, scores, strict=True):
            weights = head.weight[target]
            allowed = editable(weights, head.features[labels == target].mean(0))
            for column in most_significant(score, allowed, self.n_weights, target):
                how: dict[str, Any]
                if self.dose is None:
                    turned = orthogonal_weight(weights, column, self.rate)
                    how = {"weight": turned, "rate": self.rate}
                else:
                    how = {"weight": float(weights[column]) + self.dose}
                row = {"class": target, "column": column, **how, "score": float(score[column])}
                rows.append(row)
        return rows

    def _exact(self, head: HeadFeatures, target: int) -> list[dict[str, Any]]:
        doses, found = removal_doses(
            head, target, tolerance=self.tolerance, n_weights=self.n_weights
        )
        return [
            {
                "class": target,
                "column": column,
                "weight": float(head.weight[target, column]) + dose,
                **found,
            }
            for column, dose in doses.items()
        ]


def check_anchor(anchor: object, select: str) -> None:
    """Raise ValueError unless ``anchor`` is one of its values and goes with the selection."""
    if anchor not in (True, False, "auto"):
        raise ValueError(f"anchor: {anchor!r} given; it is True, False or 'auto'")
    if anchor is True and select == "exact":
        raise ValueError("anchor: True goes with the other selections; 'exact' scores plain edits")


def anchor_point(
    head: HeadFeatures, column: int, anchor: bool | Literal["auto"], *, raised: bool
) -> float | None:
    """Return the value of a feature at which an anchored edit leaves the output alone."""
    x = head.features[:, column].double()
    if not (bool(x.min() < 0) if anchor == "auto" else anchor):
        return None
    return float(torch.quantile(x, 1 - ANCHOR_QUANTILE if raised else ANCHOR_QUANTILE))


def head_edit(
    model: nn.Module,
    head: HeadFeatures,
    rows: Sequence[dict[str, Any]],
    origin: dict[str, Any],
    *,
    anchor: bool | Literal["auto"],
) -> ModelEdit:
    """Make the edit that sets one weight in each of some rows of the head.

    Parameters
    ----------
    model : nn.Module
        The model.
    head : HeadFeatures
        Its head.
    rows : sequence of dict
        Each with ``class`` (the row), ``column`` and ``weight`` (the new value); what else it
        holds goes into the edit's origin.
    origin : dict
        See `ModelEdit`.
    anchor : "auto" or bool
        See `SingleWeight`.
    """
    d = head.weight.shape[1]
    largest = float(head.weight.abs().max())
    index, new, told = [], [], []
    biases: dict[int, float] = {}
    for row in rows:
        at, column, value = row["class"], row["column"], float(row["weight"])
        old = float(head.weight[at, column])
        index.append(at * d + column)
        new.append(value)
        fixed = anchor_point(head, column, anchor, raised=value > old)
        if fixed is not None:
            if head.bias is None:
                raise ValueError(
                    f"anchor: layer {head.layer!r} has no bias to correct; give anchor=False"
                )
            biases[at] = biases.get(at, float(head.bias[at])) - (value - old) * fixed
        times = abs(value) / largest if largest else None  # a head of zeros has no largest
        more = {"old": old, "anchored": fixed is not None, "times_largest": times}
        told.append({**row, "weight": value, **more})
    weight = (torch.tensor(index), torch.tensor(new, dtype=torch.double))
    values = {head.parameter("weight"): weight}
    if biases:
        bias = torch.tensor([*biases.values()], dtype=torch.double)
        values[head.parameter("bias")] = (torch.tensor([*biases]), bias)
    return ModelEdit.between(model, values, {**origin, "layer": head.layer, "rows": told})
