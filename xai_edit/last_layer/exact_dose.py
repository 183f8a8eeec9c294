"""Exact selection of weights and doses of the last layer, in closed form from cached features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xai_edit.last_layer.head import HeadFeatures

# Numbers of samples × groups × features held at a time, few enough for a cache.
CHUNK = 250_000
# An edited weight is at most this many times the layer's largest. Digits need 5 to 9 times with
# ReLU features and 26 with tanh; without a bound, CelebA chose 381 times and did not generalise.
LARGEST = 50.0
FOLDS = 5
# Quantiles of the planning samples' margins that cross-validation chooses from.
MARGINS = (0.0, 0.05, 0.1, 0.25, 0.5)

Objective: TypeAlias = Callable[[Tensor], Tensor]
"""A function of group accuracies, shape (..., G), that is to be large, shape (...)."""

Doses: TypeAlias = dict[int, dict[int, float]]
"""What is added to weights, by row and column."""


def accuracy_by_dose(
    features: Tensor, logits: Tensor, labels: Tensor, groups: Tensor, row: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the accuracy of each group at every dose of every weight of a row, features in chunks.

    The logit of row c is affine in the edited weight, so sample s changes between "predicted c" and
    "not predicted c" at one dose, δ = −margin_s / x_js, the margin being the row's logit less the
    highest other. The accuracies change at these flips alone.

    ``features`` and ``logits`` are float64, ``labels`` and ``groups`` int64, shape (samples,), with
    groups numbered 0 … G−1, each with a sample. Yields the chunk's first feature; the flips,
    float64, shape (samples, chunk), ascending, infinite where a sample never changes; and the
    accuracies before the first flip, between two neighbours and after the last, float64, shape
    (samples + 1, chunk, G).
    """
    samples, d = features.shape
    best_other, rival = strongest_other(logits, row)
    margin = logits[:, row] - best_other
    unedited = wins(logits[:, row], best_other, row, rival).double()
    right_if_row, right_if_other = (labels == row).double(), (labels == rival).double()
    member = torch.nn.functional.one_hot(groups).double()  # (samples, G)
    width = max(1, CHUNK // (samples * member.shape[1]))
    for start in range(0, d, width):
        x = features[:, start : start + width]
        flips = torch.where(x != 0, -margin[:, None] / x, torch.inf)
        # At δ = −∞: positive features are not predicted c, negative ones are, zeros stay.
        at_first = torch.where(x > 0, 0.0, torch.where(x < 0, 1.0, unedited[:, None]))
        right = at_first * right_if_row[:, None] + (1 - at_first) * right_if_other[:, None]
        gain = x.sign() * (right_if_row - right_if_other)[:, None]  # when passing the flip upward
        flips, order = flips.sort(0)
        gained = (gain[..., None] * member[:, None, :]).gather(
            0, order[..., None].expand(-1, -1, member.shape[1])
        )
        first = torch.einsum("sj,sg->jg", right, member)
        counts = torch.cat([first[None], first + gained.cumsum(0)])
        yield start, flips, counts / member.sum(0)


def strongest_other(logits: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Return the highest logit of any other class and that class, each of shape (samples,)."""
    others = logits.clone()
    others[:, row] = -torch.inf
    best, rival = others.max(1)
    return best, rival


def wins(logit: Tensor, best_other: Tensor, row: int, rival: Tensor) -> Tensor:
    """Return where ``row`` is predicted; of equal logits argmax takes the lower class."""
    return (logit > best_other) | ((logit == best_other) & (row < rival))


def doses_between(flips: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Return a dose inside each interval that sorted flips (samples, d) cut, (samples + 1, d).

    NaN where there is none. ``low`` and ``high``, shape (d,), limit the doses.
    """
    infinite = torch.full_like(flips[:1], torch.inf)
    lower, upper = torch.cat([-infinite, flips]), torch.cat([flips, infinite])
    low, high = -infinite if low is None else low, infinite if high is None else high
    lower = torch.where(lower.isinf(), lower, lower.maximum(low))
    upper = torch.where(upper.isinf(), upper, upper.minimum(high))
    # The outer intervals have no end: a dose 1 % beyond the first and the last finite flip.
    lower = torch.where(lower.isinf(), upper - 0.02 * upper.abs().clamp(min=1.0), lower)
    upper = torch.where(upper.isinf(), lower + 0.02 * lower.abs().clamp(min=1.0), upper)
    lower, upper = lower.maximum(low), upper.minimum(high)
    doses = (lower + upper) / 2
    doses[~((lower < doses) & (doses < upper))] = torch.nan
    return doses


@dataclass(frozen=True)
class EditedWeight:
    """A weight of a row and the dose added to it."""

    column: int
    dose: float
    anchor: float = 0.0  # the feature's value that the edit leaves alone
    rate: float | None = None  # r of Eq. 8 where there is one
    bounded: bool = False  # whether a larger weight than `LARGEST` allows has a higher objective


def best_dose(
    head: HeadFeatures,
    row: int,
    groups: Tensor,
    objective: Objective,
    *,
    logits: Tensor | None = None,
    columns: Sequence[int] | None = None,
    added: Mapping[int, float] | None = None,
) -> tuple[EditedWeight, Tensor]:
    """Return the weight and dose of a row that maximise an objective, and the group accuracies.

    Among equals the smallest dose. ``groups`` as for `accuracy_by_dose`; ``columns`` are the
    features to choose from, all when left out. Where weights were edited already, ``logits`` are
    those to start from and ``added`` the doses in this row, by column.
    """
    kept = list(range(head.features.shape[1]) if columns is None else columns)
    weight = head.weight[row].double().clone()
    for column, dose in (added or {}).items():
        weight[column] += dose
    largest = float(head.weight.abs().max()) * LARGEST or torch.inf  # a head of zeros has no bound
    low, high = -largest - weight[kept], largest - weight[kept]
    best, chosen, unbounded = (-torch.inf, -torch.inf), None, -torch.inf
    x, z = head.features[:, kept].double(), head.logits() if logits is None else logits
    for start, flips, accuracy in accuracy_by_dose(x, z, head.require_labels(), groups, row):
        here = slice(start, start + flips.shape[1])
        doses = doses_between(flips, low[here], high[here])
        score = objective(accuracy)
        free = torch.where(doses_between(flips).isnan(), -torch.inf, score)
        unbounded = max(unbounded, float(free.max()))
        score = torch.where(doses.isnan(), -torch.inf, score)
        size = torch.where(score == score.max(), doses.abs(), torch.inf)
        at, column = divmod(int(size.argmin()), doses.shape[1])
        reached = (float(score[at, column]), -float(size[at, column]))
        if reached > best:
            best, chosen = reached, EditedWeight(kept[start + column], float(doses[at, column]))
            accuracies = accuracy[at, column]
    if chosen is None:
        raise ValueError(f"class {row}: every feature is zero in every sample; no weight matters")
    return replace(chosen, bounded=unbounded > best[0]), accuracies


def group_accuracy(right: Tensor, groups: Tensor) -> Tensor:
    """Return the share of right answers in each group, float64, (..., samples) to (..., G)."""
    member = torch.nn.functional.one_hot(groups).double()
    return right.double() @ member / member.sum(0)


def removal(floor: float) -> Objective:
    """Return the objective of a removal: group 1 wrong, group 0 no less right than a floor."""

    def objective(accuracy: Tensor) -> Tensor:
        kept, removed = accuracy[..., 0], accuracy[..., 1]
        return torch.where(kept >= floor, 1 - removed, kept - 1)

    return objective


def with_margin(logits: Tensor, labels: Tensor, wrong: Tensor, quantile: float) -> Tensor:
    """Return logits by which every answer has to hold by a margin.

    The margin is a quantile over samples of ``|label's logit − highest other|``. The label's logit
    is raised by it where the answer is to be ``wrong``, bool, (samples,), and lowered elsewhere.
    """
    if not quantile:
        return logits
    at = torch.arange(len(labels))
    others = logits.index_put((at, labels), torch.tensor(-torch.inf, dtype=logits.dtype))
    margin = torch.quantile((logits[at, labels] - others.max(1).values).abs(), quantile)
    return logits.index_put((at, labels), torch.where(wrong, margin, -margin), accumulate=True)


def best_margin(
    groups: Tensor,
    predicted: Callable[[Tensor], Sequence[Tensor]],
    objective: Callable[[Tensor], Tensor],
    figures: Callable[[Tensor], dict[str, float]],
) -> tuple[int, dict[str, Any]]:
    """Return which of `MARGINS` is best in cross-validation, and what is reported about it.

    The smallest of equals, and the first where a group has only one sample. The ``groups``, int64,
    shape (samples,), are dealt out over the folds in turn; -1 need not be in every fold.
    ``predicted`` plans on the samples of a mask and returns the class predicted for every sample
    with each margin. ``objective`` of predicted classes, (margins, samples), is to be large;
    ``figures`` are those of classes (samples,).
    """
    kinds, sizes = groups.unique(return_counts=True)
    folds = min(FOLDS, int(sizes[kinds >= 0].min()))
    if folds < 2:
        return 0, {"cross_validated": None, "margin": MARGINS[0]}
    fold = torch.empty_like(groups)
    for kind, size in zip(kinds, sizes.tolist(), strict=True):
        fold[groups == kind] = torch.arange(size) % folds
    held_out = torch.zeros(len(MARGINS), len(groups), dtype=torch.long)
    for held in range(folds):
        for at, classes in enumerate(predicted(fold != held)):
            held_out[at, fold == held] = classes[fold == held]
    best = int(objective(held_out).argmax())
    return best, {"cross_validated": figures(held_out[best]), "margin": MARGINS[best]}


def edited_logits(logits: Tensor, head: HeadFeatures, doses: Doses) -> Tensor:
    """Return logits with doses added to some weights."""
    logits = logits.clone()
    for row, added in doses.items():
        for column, dose in added.items():
            logits[:, row] += dose * head.features[:, column].double()
    return logits


def removal_doses(
    head: HeadFeatures,
    rows: Sequence[int],
    *,
    tolerance: float,
    n_weights: int = 1,
    quantile: float = 0.0,
    columns: Doses | None = None,
) -> tuple[Doses, list[int]]:
    """Return the doses that remove classes together, and the rows that `LARGEST` holds back.

    For each row in turn: accuracy on its class down, while that on the classes that stay falls by
    at most ``tolerance``. Rows that follow count as removed already, so no later dose takes back
    what one reached. Weights of a row are added while that helps. ``quantile`` is that of
    `with_margin`; ``columns`` are doses whose columns are kept.
    """
    labels = head.require_labels()
    gone = torch.isin(labels, torch.tensor(rows))
    for row in rows:
        if gone.all() or not (labels == row).any():
            raise ValueError(
                f"target: class {row} needs samples of its own and of classes that are not removed"
            )
    logits = with_margin(head.logits(), labels, gone, quantile)
    before = (logits.argmax(1) == labels)[~gone].double().mean()
    objective = removal(float(before) - tolerance)
    edited = logits.clone()
    edited[:, rows] = -torch.inf
    doses: Doses = {row: {} for row in rows}
    bounded = []
    for row in rows:
        judged = ~gone | (labels == row)
        part, own = head[judged], (labels[judged] == row).long()
        edited[:, row] = logits[:, row]
        reached = -torch.inf
        for only in [None] * n_weights if columns is None else [[at] for at in columns[row]]:
            found, accuracy = best_dose(
                part, row, own, objective, logits=edited[judged], columns=only, added=doses[row]
            )
            if float(objective(accuracy)) <= reached:
                break
            reached = float(objective(accuracy))
            doses[row][found.column] = doses[row].get(found.column, 0.0) + found.dose
            edited = edited_logits(edited, head, {row: {found.column: found.dose}})
            bounded += [row] * (found.bounded and row not in bounded)
    return doses, bounded


def planned_removal(
    head: HeadFeatures, rows: Sequence[int], *, tolerance: float, n_weights: int
) -> tuple[Doses, dict[str, Any]]:
    """Return `removal_doses` with the margin of `best_margin`, and what the edit reports.

    ``planned`` and ``cross_validated`` (None where a class has one sample) are the accuracies over
    the classes that stay and over those removed, on the planning data and on other folds;
    ``margin`` is the quantile; of the ``bounded`` classes a larger weight would remove more.
    """
    labels, logits = head.require_labels(), head.logits()
    gone = torch.isin(labels, torch.tensor(rows))

    def planned(part: HeadFeatures) -> tuple[list[Doses], list[int]]:
        search = partial(removal_doses, part, rows, tolerance=tolerance, n_weights=n_weights)
        edge, bounded = search()
        others = [search(quantile=quantile, columns=edge)[0] for quantile in MARGINS[1:]]
        return [edge, *others], bounded

    def predicted(samples: Tensor) -> list[Tensor]:
        choices, _ = planned(head[samples])
        return [edited_logits(logits, head, doses).argmax(1) for doses in choices]

    def accuracy(classes: Tensor) -> Tensor:
        return group_accuracy(classes == labels, gone.long())

    def figures(classes: Tensor) -> dict[str, float]:
        return dict(zip(("retained", "removed"), accuracy(classes).tolist(), strict=True))

    choices, bounded = planned(head)
    objective = removal(float(accuracy(logits.argmax(1))[0]) - tolerance)
    groups = torch.where(gone, labels, -1)
    best, reported = best_margin(groups, predicted, lambda z: objective(accuracy(z)), figures)
    reached = figures(edited_logits(logits, head, choices[best]).argmax(1))
    return choices[best], {"planned": reached, **reported, "bounded": bounded}
