"""The objective of edits of the last layer, and the search for one weight in each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from xai_edit.last_layer.exact_dose import (
    MARGINS,
    EditedWeight,
    Objective,
    best_dose,
    best_margin,
    group_accuracy,
    removal,
    with_margin,
)
from xai_edit.last_layer.head import HeadFeatures

Aim: TypeAlias = Literal["worst-group", "removal", "indifference"]

# The rows are gone through again, each chosen anew beside the others, while that helps.
ROUNDS = 10

Weights: TypeAlias = dict[int, EditedWeight]
"""The edited weight of each row."""

Choose: TypeAlias = "Callable[[EditObjective, int, Weights], EditedWeight]"
"""The best weight of a row by an objective, with the weights of other rows edited."""


@dataclass(eq=False)
class EditObjective:
    """The number that an edit is to raise, measured on samples; see `FictitiousClass`."""

    samples: HeadFeatures  # with labels and attribute
    values: Mapping[int, int]  # the fictitious class of each row to edit
    aim: Aim
    tolerance: float
    balanced: bool = False  # take the mean over groups instead of the worst one
    quantile: float = 0.0  # of the margin that answers have to keep, see `with_margin`

    def __post_init__(self) -> None:
        assert self.samples.attribute is not None
        self.labels, self.attribute = self.samples.require_labels(), self.samples.attribute
        self.has = torch.isin(self.attribute, torch.tensor([*self.values.values()])).long()
        cells = (int(self.attribute.max()) + 1) * self.labels + self.attribute
        self.groups = cells.unique(return_inverse=True)[1]
        removed = self.has.bool() & (self.aim == "removal")
        self.unedited = with_margin(self.samples.logits(), self.labels, removed, self.quantile)
        kept = (self.unedited.argmax(1) == self.labels)[self.has == 0].double()
        self.floor = float(kept.mean()) - self.tolerance
        kinds = self.has if self.aim == "removal" else self.attribute
        if self.aim != "worst-group" and len(kinds.unique()) < 2:
            raise ValueError("validation: needs samples with and without the feature")

    def of(self, right: Tensor, raised: Sequence[Tensor] = ()) -> Tensor:
        """Return the objective of right answers (..., samples), and of `raised`, shape (...)."""
        if self.aim == "indifference" and raised:
            return -torch.stack([*raised]).clamp(min=0).sum(0)
        if self.aim == "removal":
            return removal(self.floor)(group_accuracy(right, self.has))
        return self._of_groups(group_accuracy(right, self.groups))

    @property
    def of_accuracies(self) -> tuple[Tensor, Objective]:
        """The groups, and the objective as a function of their accuracies, for `best_dose`."""
        if self.aim == "removal":
            return self.has, removal(self.floor)
        if len(self.values) > 1:
            return self.groups, self._of_groups
        # The mean decides only among equals.
        return self.groups, lambda groups: self._of_groups(groups) + 1e-9 * groups.mean(-1)

    def _of_groups(self, accuracy: Tensor) -> Tensor:
        if self.balanced:
            return accuracy.mean(-1)
        if len(self.values) == 1:
            return accuracy.min(-1).values  # Eq. 1, with accuracy for the loss
        lowest = accuracy.sort(-1).values[..., :4]  # among equals the next worst decides
        return lowest @ 1e-4 ** torch.arange(lowest.shape[-1], dtype=lowest.dtype)

    def raised(self, row: int, probability: Tensor) -> Tensor | None:
        """Return a class's mean probability with its value less that without, shape (...).

        ``probability`` has shape (..., samples). None where all samples have the value, or none.
        """
        has = self.attribute == self.values[row]
        if has.all() or not has.any():
            return None
        return probability[..., has].mean(-1) - probability[..., ~has].mean(-1)

    def logits(self, weights: Mapping[int, EditedWeight]) -> Tensor:
        """Return the samples' logits with a weight in each of some rows edited."""
        logits = self.unedited.clone()
        for row, weight in weights.items():
            x = self.samples.features[:, weight.column].double()
            logits[:, row] += weight.dose * (x - weight.anchor)
        return logits

    def score(self, weights: Mapping[int, EditedWeight]) -> float:
        """Return the objective with some weights edited."""
        logits = self.logits(weights)
        return float(self.of(logits.argmax(1) == self.labels, self._all_raised(logits)))

    def figures(self, weights: Mapping[int, EditedWeight]) -> dict[str, float]:
        """Return the figures that an edit reports, with some weights edited."""
        logits = self.logits(weights)
        raised = self._all_raised(logits)
        figures = self.accuracies(logits.argmax(1))
        return {**figures, "raised": float(max(raised))} if raised else figures

    def accuracies(self, predicted: Tensor) -> dict[str, float]:
        """Return the accuracies that an edit reports, for predicted classes (samples,)."""
        right = predicted == self.labels
        worst = float(group_accuracy(right, self.groups).min())
        figures = {"worst_group": worst, "average": float(right.double().mean())}
        if self.aim == "removal":
            retained, removed = group_accuracy(right, self.has).tolist()
            figures |= {"retained": retained, "removed": removed}
        return figures

    def _all_raised(self, logits: Tensor) -> list[Tensor]:
        if self.aim != "indifference":
            return []
        probability = logits.softmax(1)
        raised = [self.raised(row, probability[:, row]) for row in self.values]
        return [one for one in raised if one is not None]


def best_weights(objective: EditObjective, choose: Choose) -> Weights:
    """Return weights that raise the objective; none where the worst group would not rise."""
    rows = [*objective.values]
    weights = _improved(objective, choose, {}, rows)
    if objective.aim != "worst-group":
        return weights
    if len(rows) > 1:  # a second start: worst groups alone end in poor optima
        balanced = _improved(replace(objective, balanced=True), choose, {}, rows)
        starts = [weights, _improved(objective, choose, balanced, rows)]
        weights = max(starts, key=objective.score)
    before, after = (objective.figures(edited)["worst_group"] for edited in ({}, weights))
    return weights if after > before else {}


def exact_weights(objective: EditObjective) -> tuple[Weights, dict[str, Any]]:
    """Return weights in closed form, and what is reported about their choice.

    The margin that the answers keep is chosen by cross-validation, see `exact_dose.best_margin`.
    """

    def planned(part: EditObjective) -> list[Weights]:
        edge = best_weights(part, _exact_weight)
        columns = {row: weight.column for row, weight in edge.items()}
        choose = partial(_exact_weight, columns=columns)
        parts = [replace(part, quantile=quantile) for quantile in MARGINS[1:]]
        return [edge, *(_improved(with_margin, choose, {}, columns) for with_margin in parts)]

    def predicted(samples: Tensor) -> list[Tensor]:
        part = replace(objective, samples=objective.samples[samples])
        return [objective.logits(weights).argmax(1) for weights in planned(part)]

    def of_classes(classes: Tensor) -> Tensor:
        return objective.of(classes == objective.labels)

    choices = planned(objective)
    best, reported = best_margin(objective.groups, predicted, of_classes, objective.accuracies)
    bounded = [row for row, weight in choices[0].items() if weight.bounded]
    return choices[best], {**reported, "bounded": bounded}


def _improved(
    objective: EditObjective, choose: Choose, start: Weights, rows: Iterable[int]
) -> Weights:
    """Choose the weight of each row beside the others, again while the objective rises."""
    weights, reached = dict(start), objective.score(start)
    for _ in range(ROUNDS):
        before = reached
        for row in rows:
            others = {at: weight for at, weight in weights.items() if at != row}
            weight = choose(objective, row, others)
            score = objective.score(others | {row: weight})
            if score > reached:
                weights[row], reached = weight, score
        if reached == before or len([*rows]) == 1:
            break
    return weights


def _exact_weight(
    objective: EditObjective, row: int, others: Weights, columns: Mapping[int, int] | None = None
) -> EditedWeight:
    """Return the best weight of a row in closed form; ``columns`` keeps the column of each row."""
    logits, kept = objective.logits(others), None if columns is None else [columns[row]]
    groups, wanted = objective.of_accuracies
    return best_dose(objective.samples, row, groups, wanted, logits=logits, columns=kept)[0]
