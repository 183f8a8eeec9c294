"""The search for one weight in each of several rows, each chosen beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from xai_edit.last_layer.exact_dose import MARGINS, EditedWeight, best_dose, best_margin
from xai_edit.last_layer.objective import EditObjective

# The rows are gone through again, each chosen anew beside the others, while that helps.
ROUNDS = 10

Weights: TypeAlias = dict[int, EditedWeight]
"""The edited weight of each row."""

Choose: TypeAlias = Callable[[EditObjective, int, Weights], EditedWeight]
"""The best weight of a row by an objective, with the weights of other rows edited."""


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
