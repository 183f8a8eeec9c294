"""Choice of the subspaces to ablate, by what each tells and by what its ablation does to groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.concepts.candidates import (
    FOLDS,
    Fit,
    ablated_counts,
    dealt_out,
    numbered,
    within_strata_auc,
)
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import Finder
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import with_labels
from xai_edit.core.data import Data
from xai_edit.core.guard import require_finite
from xai_edit.core.layers import resolve_layers
from xai_edit.core.text import Plain, aligned
from xai_edit.core.wrapped import unwrapped


@dataclass(frozen=True)
class Candidate(Plain):
    """Subspaces that could be ablated, and what that does to the groups of the planning samples.

    Attributes
    ----------
    indices : tuple of int
        The subspaces; empty for ablating nothing.
    auc : float or None
        With which they tell the feature among samples of a class; None for nothing.
    worst : float
        Accuracy of the worst measured group, cross-validated.
    balanced : float
        Its mean over the measured groups.
    not_taken : str or None
        Why it was not chosen; None of the chosen one.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> finder = xe.ContrastivePCA(size=1)
    >>> choice = xe.choose_spurious(model, data, finder, features, layer="relu1")
    >>> [(one.indices, one.worst) for one in choice.candidates]
    [((), 0.0), ((0,), 1.0)]
    """

    indices: tuple[int, ...]
    auc: float | None
    worst: float
    balanced: float
    not_taken: str | None = None

    @property
    def score(self) -> float:
        """The mean of worst-group and balanced accuracy, by which candidates are compared."""
        return (self.worst + self.balanced) / 2

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.indices))
        return f"subspace{'s' * (len(self.indices) > 1)} {listed}" if listed else "nothing"


@dataclass(frozen=True, eq=False)
class Choice:
    """The subspaces to ablate, and all candidates with the reason why each was not taken.

    Attributes
    ----------
    subspaces : Subspaces
        As they are numbered here, see `numbered`.
    indices : tuple of int
        Those chosen; empty where ablating nothing is best.
    reason : str
        In one sentence.
    candidates : tuple of Candidate
        Nothing first.
    chance : tuple of float
        The 95% interval of the AUC of a subspace that has nothing to do with the feature.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> finder = xe.ContrastivePCA(size=1)
    >>> choice = xe.choose_spurious(model, data, finder, features, layer="relu1")
    >>> with xe.ablated(model, "relu1", choice.subspaces, choice.indices):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    subspaces: Subspaces
    indices: tuple[int, ...]
    reason: str
    candidates: tuple[Candidate, ...]
    chance: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the choice without the subspaces as JSON values."""
        listed = [one.to_dict() for one in self.candidates]
        return {"candidates": listed, "chance": [*self.chance], "reason": self.reason}

    def __str__(self) -> str:
        rows: list[list[Any]] = [["ablated", "AUC", "worst group", "balanced", "not taken"]]
        for one in self.candidates:
            rows.append([str(one), one.auc, one.worst, one.balanced, one.not_taken or "taken"])
        return f"{aligned(rows)}\n{self.reason}"


def choose_spurious(
    model: nn.Module,
    data: Data,
    subspaces: Subspaces | Finder,
    features: Features,
    *,
    layer: str,
    unit_axis: int | None = None,
) -> Choice:
    """Choose which subspaces of a spurious feature to ablate at a layer, or none.

    Candidates are ablating nothing; of a single subspace its first 1, 2 and 4 directions; of
    several the one that tells the feature best, the second, and both. The candidate whose ablation
    gives the highest mean of worst-group and balanced accuracy is chosen, the first of equals,
    among those whose AUC is not within chance.

    The AUC is that of ‖Uᵀ(a − μ₀)‖², summed over positions, between samples of the same class with
    and without the feature; μ₀ is the mean activation of those without it. Unlike an average
    precision it does not depend on how frequent the feature is.

    All figures are cross-validated: a finder is fitted to two thirds of the samples (of each group)
    and its subspaces are judged on the rest, three times. Given `Subspaces` are judged as they are.
    This takes one forward pass over the data, and what follows the layer once more for each
    candidate; where a residual path leads around the layer, one whole pass for each.

    Parameters
    ----------
    model : nn.Module
        A classifier, only read.
    data : iterable or Dataset
        The labelled samples of ``features``, in the same order.
    subspaces : Subspaces or finder
        A finder is fitted to the features.
    features : Features
        With the attribute of each sample. ValueError without, or if the labels are others.
    layer : str
        The layer of the features, whose first axis is the samples.
    unit_axis : int, optional
        The axis of its channels, see `xai_edit.core.axes.unit_axes`.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> finder = xe.ContrastivePCA(size=1)
    >>> choice = xe.choose_spurious(model, data, finder, features, layer="relu1")
    >>> choice.indices
    (0,)
    """
    model = unwrapped(model)
    resolve_layers(model, [layer])
    require_finite(model)
    has = features.require_attribute()
    labels = with_labels(features.labels).cpu()
    fold = dealt_out(2 * labels + has)
    if isinstance(subspaces, Subspaces):
        fold = torch.zeros_like(fold)
        whole = Fit(subspaces, features, labels, torch.ones_like(has))
        fits = [whole]
    else:
        whole = Fit(subspaces.fit(features), features, labels, torch.ones_like(has))
        fits = []
        for held in range(FOLDS):
            rows = fold != held
            fits.append(Fit(subspaces.fit(features.of(rows)), features, labels, rows))
    places = [at for at in whole.places if all(at in fit.places for fit in fits)]
    energies = torch.stack([fit.energies(places) for fit in fits])
    energy = energies[fold, torch.arange(len(fold))]  # of each sample, by the fit without it
    told, width = within_strata_auc(energy, has, labels * FOLDS + fold)
    counts = ablated_counts(model, data, layer, unit_axis, fits, places, fold, (labels, has))
    right, samples = counts[:, 0].double(), counts[0, 1]
    accuracies = (right / samples)[:, samples > 0]  # (candidates, measured groups)
    figures = [(float(one.min()), float(one.mean())) for one in accuracies]
    candidates = [
        Candidate(indices, auc, *figure)
        for indices, auc, figure in zip(
            [(), *map(whole.indices, places)], [None, *told.tolist()], figures, strict=True
        )
    ]
    telling = [one for one in candidates if one.auc is None or abs(one.auc - 0.5) > width]
    taken = max(telling, key=lambda one: one.score)  # the first of equals
    chance = (0.5 - width, 0.5 + width)
    listed = tuple(
        one if one is taken else replace(one, not_taken=_why_not(one, taken, chance, telling))
        for one in candidates
    )
    reason = _reason(taken, candidates, samples)
    return Choice(numbered(whole.subspaces), taken.indices, reason, listed, chance)


def _why_not(
    one: Candidate, taken: Candidate, chance: tuple[float, float], telling: list[Candidate]
) -> str:
    if one not in telling:
        low, high = chance
        return f"it does not tell the feature: AUC {one.auc:.2f}, by chance {low:.2f} to {high:.2f}"
    if one.score == taken.score:
        return f"no better than {taken}"
    return f"the mean of both, {one.score:.3f}, is below {taken.score:.3f} of {taken}"


def _reason(taken: Candidate, candidates: list[Candidate], samples: Tensor) -> str:
    """Return the choice in one sentence; ``samples`` are those of each group."""
    measured = samples[samples > 0]
    judged = f"on {int(measured.sum())} samples, {int(measured.min())} in the smallest group"
    classes = samples.sum(1) > 0
    if missing := int((samples[classes] == 0).sum()):
        judged += f", {missing} of {2 * int(classes.sum())} groups without any"

    def told(one: Candidate) -> str:
        return f"worst group {one.worst:.3f}, balanced {one.balanced:.3f}"

    nothing, *others = candidates
    if taken.indices:
        return (
            f"ablating {taken} (AUC {taken.auc:.2f}) is best for the groups: {told(taken)}, and "
            f"{told(nothing)} without ablation ({judged})"
        )
    if not others:
        return f"nothing could be ablated: the subspaces are all of the layer ({judged})"
    best = max(others, key=lambda one: one.score)
    if best.score > nothing.score:
        return (
            f"no subspace that helps tells the feature: ablating {best} gives {told(best)}, and "
            f"nothing {told(nothing)} ({judged}), but its AUC of {best.auc:.2f} is within chance"
        )
    return (
        f"ablating nothing is best for the groups: {told(nothing)}, and {told(best)} with {best} "
        f"ablated ({judged})"
    )
