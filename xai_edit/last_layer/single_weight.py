"""Class removal by one weight of the last layer (Algorithm 1), and its new value (Eq. 7, 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xai_edit.core.checks import fraction, one_of, whole_number
from xai_edit.core.data import Data
from xai_edit.core.targets import class_list, classes_to_remove
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.exact_dose import planned_removal
from xai_edit.last_layer.head import HeadFeatures, head_features
from xai_edit.last_layer.weight_selection import (
    Scored,
    Selection,
    most_significant,
    selection_scores,
)

# Eq. 7 divides by the weight, so a weight that is nearly zero would be sent far away.
SMALLEST_WEIGHT = 1e-3
# Where a signed feature is held fixed: its extreme value on the side that the edit raises.
ANCHOR_QUANTILE = 1e-3


def orthogonal_weight(row: Tensor, column: int | Tensor, rate: float | Tensor = 1.0) -> Tensor:
    """Return the value that turns the hyperplane of ``row``, w, about the axis of ``column``, j.

    At ``rate`` r = 1 the normals (w, −1) before and after are orthogonal. Eq. 8 simplifies to
    w_j − r (‖w‖² + 1) / w_j and crosses zero at r = w_j² / (‖w‖² + 1).
    """
    w = row.double()
    return w[column] - rate * (w @ w + 1) / w[column]  # Eq. 8; Eq. 7 at r = 1


def editable(row: Tensor, mean_feature: Tensor) -> Tensor:
    """Return which weights of a row Eq. 7 may change, bool, shape (d,).

    They add to the output, w_j · E[x_j] > 0, or they would raise it when flipped; none is tiny.
    """
    return (row * mean_feature > 0) & (row.abs() >= SMALLEST_WEIGHT * row.abs().max())


@dataclass(frozen=True)
class SingleWeight:
    """Make a classifier stop predicting classes, by one weight of its last layer for each.

    Hakemi et al., *Post-hoc Spurious Correlation Neutralization with Single-Weight Fictitious
    Class Unlearning*, Algorithm 1.

    The new weight is some ten times the largest of its layer (``times_largest`` in the edit's
    origin), which quantisation with one scale a tensor pays for.

    Parameters
    ----------
    select : str
        "sca" takes the edge with the highest SCA score (Eq. 6) and turns it by Eq. 7 or 8; "ca",
        "gradient-activation", "relevance", "weight" and "random" choose by other scores, see
        `weight_selection.selection_scores`. "exact", ours, scores every weight of the row at every
        dose in closed form and takes the one that removes most of the class while the accuracy on
        the classes that stay falls by at most ``tolerance``, a fraction; with a margin that
        five-fold cross-validation chooses, and a new weight of at most 50 times the largest.
    rate : float in [0, 1]
        Neutralisation rate r of Eq. 8; 1 is Eq. 7. Not with "exact", which finds its own dose.
    n_weights : int
        Weights edited for each class: those of highest score, each turned as if alone (Fig. 6).
        "exact" adds one after another, as long as it helps.
    anchor : "auto" or bool
        Also correct the output's bias so that the edit leaves the feature's extreme value alone.
        "auto" does it where the feature takes negative values (tanh, GELU, layer norm), for which
        the plain edit raises the class on other samples. Not with "exact".
    tolerance, seed
        For "exact" and for "random".

    Examples
    --------
    >>> edit = xe.SingleWeight().plan(model, data, target=1)
    >>> edit.size, edit.changes["fc2.weight"].position(0)
    (1, [1, 1])
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data).of(1)
    0.0
    """

    select: Selection = "sca"
    rate: float = 1.0
    n_weights: int = 1
    anchor: bool | Literal["auto"] = "auto"
    tolerance: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self.select, self.anchor, self.rate, 1)
        vars(self).update(  # plain numbers, since the edit's origin is JSON
            rate=fraction(self.rate, "rate", zero=True),
            n_weights=whole_number(self.n_weights, "n_weights", least=1),
            seed=whole_number(self.seed, "seed"),
            tolerance=fraction(self.tolerance, "tolerance", zero=True),
        )

    def plan(
        self, model: nn.Module, data: Data | HeadFeatures, *, target: int | Sequence[int]
    ) -> ModelEdit:
        """Plan the removal of one class or several; the model is only read.

        The edit's origin lists the class, column, old and new value of each weight; with "exact"
        also what `exact_dose.planned_removal` reports.

        Parameters
        ----------
        model : nn.Module
            A classifier; ValueError if its logits are not W x + b (`collect_head_features`). Of
            one output, class 1 is edited through its row, class 0 through minus that row.
        data : iterable, Dataset or HeadFeatures
            Labelled samples of the class and of others, or the result of `collect_head_features`.
        target : int or sequence of int
            The classes to remove; "exact" plans them together, the others each on its own.
            ValueError if one is out of range or absent, or has too few weights to edit.
        """
        head = head_features(model, data)
        listed = classes_to_remove if head.one_output else class_list  # they have one row
        targets = listed(target, head.classes)
        if head.one_output and targets == [0]:
            head = head.mirrored()  # class 0 has the same row with the other sign
        origin: dict[str, Any] = {"operator": "SingleWeight", "select": self.select}
        origin["samples"] = len(head.features)
        if self.select == "exact":
            doses, reported = planned_removal(
                head, targets, tolerance=self.tolerance, n_weights=self.n_weights
            )
            rows = [
                dosed(head, row, column, dose)
                for row, added in doses.items()
                for column, dose in added.items()
            ]
            return head_edit(model, head, rows, origin | reported, anchor=False)
        x, labels, rows = head.features, head.require_labels(), []
        scores = selection_scores(
            self.select, x, labels, head.weight, head.bias, targets, seed=self.seed
        )
        for row, score in zip(targets, scores, strict=True):
            weights = head.weight[row]
            allowed = editable(weights, x[labels == row].mean(0))
            for column in most_significant(score, allowed, self.n_weights, row):  # step 7
                new = float(orthogonal_weight(weights, column, self.rate))  # step 8
                rows.append({"class": row, "column": column, "weight": new, "rate": self.rate})
                rows[-1]["score"] = float(score[column])
        return head_edit(model, head, rows, origin, anchor=self.anchor)


def check_choices(select: object, anchor: object, rate: object, default: object) -> None:
    """Raise ValueError unless selection and anchor are among their values and go together."""
    one_of(select, (*get_args(Scored), "exact"), "select")
    one_of(anchor, (True, False, "auto"), "anchor")
    if anchor is True and select == "exact":
        raise ValueError("anchor: True goes with the other selections; 'exact' scores plain edits")
    if select == "exact" and rate != default:
        raise ValueError("rate: goes with the other selections; 'exact' finds its own dose")


def anchor_point(
    head: HeadFeatures, column: int, anchor: bool | Literal["auto"], *, raised: bool
) -> float | None:
    """Return the value of a feature at which an anchored edit leaves the output alone."""
    x = head.features[:, column].double()
    if not (bool(x.min() < 0) if anchor == "auto" else anchor):
        return None
    return float(torch.quantile(x, 1 - ANCHOR_QUANTILE if raised else ANCHOR_QUANTILE))


def dosed(head: HeadFeatures, row: int, column: int, dose: float) -> dict[str, Any]:
    """Return a row of `head_edit` that adds a dose to a weight."""
    return {"class": row, "column": column, "weight": float(head.weight[row, column]) + dose}


def head_edit(
    model: nn.Module,
    head: HeadFeatures,
    rows: Sequence[dict[str, Any]],
    origin: dict[str, Any],
    *,
    anchor: bool | Literal["auto"],
) -> ModelEdit:
    """Return the edit that sets weights of the head, and corrects biases where it is anchored.

    ``rows`` have ``class``, ``column`` and new ``weight``, and go into the origin as they are.
    """
    weight = head.weight.double().clone()
    bias = None if head.bias is None else head.bias.double().clone()
    largest = float(weight.abs().max())
    reported, corrected = [], False
    for row in rows:
        at, column, value = row["class"], row["column"], row["weight"]
        old = float(head.weight[at, column])
        weight[at, column] = value
        fixed = anchor_point(head, column, anchor, raised=value > old)
        if fixed is not None:
            if bias is None:
                raise ValueError(
                    f"anchor: layer {head.layer!r} has no bias to correct; give anchor=False"
                )
            bias[at] -= (value - old) * fixed
            corrected = True
        times = abs(value) / largest if largest else None  # a head of zeros has no largest
        reported.append(row | {"old": old, "anchored": fixed is not None, "times_largest": times})
    origin = {**origin, "layer": head.layer, "rows": reported}
    return head.edit(model, origin, weight=weight, bias=bias if corrected else None)
