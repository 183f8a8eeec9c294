"""Exact selection of one weight and its dose, in closed form from cached features.

The logit of row c is affine in the edited weight, so a sample s changes between "predicted c" and
"not predicted c" at one known dose, δ = −margin_s / x_js, where the margin is the row's logit less
the highest other logit. Sorting these doses scores every dose of a feature without a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xai_edit.edits.head import HeadFeatures

# Numbers held at a time: samples × groups × features of one chunk, few enough for a cache.
CHUNK = 250_000


def accuracy_by_dose(
    features: Tensor, logits: Tensor, labels: Tensor, groups: Tensor, row: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for chunks of features, the accuracy of each group at each distinct dose.

    Parameters
    ----------
    features : Tensor, float64, shape (samples, d)
    logits : Tensor, float64, shape (samples, classes)
    labels : Tensor, int64, shape (samples,)
    groups : Tensor, int64, shape (samples,)
        Numbered 0 … G−1, each with a sample.
    row : int
        The row of the head whose weights are tried.

    Yields
    ------
    start : int
        The chunk's first feature.
    doses : Tensor, float64, shape (samples + 1, chunk)
        One dose δ between each two neighbouring flips, ascending; NaN where two flips coincide.
    accuracy : Tensor, float64, shape (samples + 1, chunk, G)
        The accuracy of each group with weight w_row,j + δ.
    """
    samples, d = features.shape
    best_other, other_class = strongest_other(logits, row)
    margin = logits[:, row] - best_other
    as_it_is = wins(logits[:, row], best_other, row, other_class).double()
    right_if_row = (labels == row).double()
    right_if_other = (labels == other_class).double()
    member = torch.nn.functional.one_hot(groups).double()  # (samples, G)
    sizes = member.sum(0)
    width = max(1, CHUNK // (samples * member.shape[1]))
    for start in range(0, d, width):
        x = features[:, start : start + width]
        flips = torch.where(x != 0, -margin[:, None] / x, torch.inf)
        # At δ = −∞: positive features are not predicted c, negative ones are, zeros stay.
        at_first = torch.where(x > 0, 0.0, torch.where(x < 0, 1.0, as_it_is[:, None]))
        right = at_first * right_if_row[:, None] + (1 - at_first) * right_if_other[:, None]
        gain = x.sign() * (right_if_row - right_if_other)[:, None]  # when passing the flip upward
        flips, order = flips.sort(0)
        gained = (gain[..., None] * member[:, None, :]).gather(
            0, order[..., None].expand(-1, -1, member.shape[1])
        )
        first = torch.einsum("sj,sg->jg", right, member)
        counts = torch.cat([first[None], first + gained.cumsum(0)])
        yield start, _between(flips), counts / sizes


def strongest_other(logits: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Return the highest logit of any other class and that class, each of shape (samples,)."""
    others = logits.clone()
    others[:, row] = -torch.inf
    best, rival = others.max(1)
    return best, rival


def wins(logit: Tensor, best_other: Tensor, row: int, rival: Tensor) -> Tensor:
    """Tell where ``row`` is predicted; of equal logits argmax takes the lower class."""
    return (logit > best_other) | ((logit == best_other) & (row < rival))


def _between(flips: Tensor) -> Tensor:
    """Return a dose inside each interval that the sorted flips cut; NaN where there is none."""
    inner = (flips[:-1] + flips[1:]) / 2
    inner[~((flips[:-1] < inner) & (inner < flips[1:]))] = torch.nan
    low = flips[:1] - flips[:1].abs().clamp(min=1.0) * 0.01
    # The last interval begins at the last finite flip; zeros of the feature never flip.
    finite = torch.where(flips.isfinite(), flips, -torch.inf).max(0, keepdim=True).values
    high = finite + finite.abs().clamp(min=1.0) * 0.01
    doses = torch.cat([low, inner, torch.full_like(low, torch.nan)])
    last = flips.isfinite().sum(0, keepdim=True)
    doses.scatter_(0, last, high)
    doses[~doses.isfinite()] = torch.nan
    return doses


def best_dose(
    head: HeadFeatures,
    row: int,
    groups: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    logits: Tensor | None = None,
) -> tuple[int, float, Tensor]:
    """Return the feature and dose of a row that maximise an objective of the group accuracies.

    Among equals the smallest dose is taken.

    Parameters
    ----------
    head : HeadFeatures
        With labels.
    row : int
        Row of the head to edit.
    groups : Tensor, int64, shape (samples,)
        Numbered 0 … G−1, each with a sample.
    objective : callable
        Group accuracies, shape (..., G), to a number each, shape (...).
    logits : Tensor, optional
        Logits to start from, where other rows were edited already.

    Returns
    -------
    column : int
    dose : float
        To be added to the weight.
    accuracy : Tensor, float64, shape (G,)
        Of each group, with the edit.
    """
    labels = head.require_labels()
    best: tuple[float, float, int, Tensor] | None = None
    if logits is None:
        logits = head.logits()
    for start, doses, accuracy in accuracy_by_dose(
        head.features.double(), logits, labels, groups, row
    ):
        score = objective(accuracy)
        score[doses.isnan()] = -torch.inf
        top = score.max()
        size = torch.where(score == top, doses.abs(), torch.inf)
        at = int(size.argmin())
        found = (float(top), -float(size.flatten()[at]))
        if best is None or found > best[:2]:
            column = at % doses.shape[1]
            best = (*found, start + column, accuracy.flatten(0, 1)[at])
            dose = float(doses.flatten()[at])
    if best is None or best[0] == -torch.inf:
        raise ValueError(f"class {row}: every feature is zero in every sample; no weight matters")
    return best[2], dose, best[3]


def removal(floor: float) -> Callable[[Tensor], Tensor]:
    """Return the objective of a removal: accuracy on group 1 down, that on group 0 above a floor.

    It takes group accuracies, shape (..., 2), to one number each; above 0 only where the floor is
    kept.
    """

    def objective(accuracy: Tensor) -> Tensor:
        kept, removed = accuracy[..., 0], accuracy[..., 1]
        return torch.where(kept >= floor, 1 - removed, -removed)

    return objective


def removal_doses(
    head: HeadFeatures, row: int, *, tolerance: float, n_weights: int = 1
) -> tuple[dict[int, float], dict[str, Any]]:
    """Return the weights of a row and their doses that remove a class, the others' accuracy kept.

    The objective: accuracy on the class down, subject to accuracy on all other samples no more
    than ``tolerance`` below what it was, both on the planning data. Weights are added one after
    another, each the best beside those before it, as long as that helps.
    """
    labels = head.require_labels()
    own = (labels == row).long()  # group 1 is the class
    if not 0 < int(own.sum()) < len(own):
        raise ValueError(f"target: class {row} needs samples of its own and of other classes")
    logits = head.logits()
    before = (logits.argmax(1) == labels).double()
    objective = removal(float(before[own == 0].mean()) - tolerance)
    doses: dict[int, float] = {}
    told: dict[str, Any] = {}
    reached = -torch.inf
    for _ in range(n_weights):
        column, dose, accuracy = best_dose(head, row, own, objective, logits=logits)
        if float(objective(accuracy)) <= reached:
            break
        reached = float(objective(accuracy))
        doses[column] = doses.get(column, 0.0) + dose
        logits[:, row] += dose * head.features[:, column].double()
        told = {"retained": float(accuracy[0]), "removed": float(accuracy[1])}
    return doses, told
