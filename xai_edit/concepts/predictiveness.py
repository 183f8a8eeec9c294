"""Average precisions with which each subspace predicts the spurious feature and the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_edit.concepts.average_precision import average_precision, resampled_counts
from xai_edit.concepts.features import Features
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import one_class_a_sample, require, whole_number
from xai_edit.core.text import aligned

CONFIDENCE = 0.95
LINES = 20  # subspaces that the text shows
VECTORS = 2**16  # that are projected at once

# Positive and negative samples of each column, as indices of GROUPS.
GROUPS = ("class with", "class without", "rest with", "rest without")
COLUMNS = MappingProxyType(
    {
        "spurious": ((0, 2), (1, 3)),
        "spurious_in_class": ((0,), (1,)),
        "spurious_in_rest": ((2,), (3,)),
        "class": ((0, 1), (2, 3)),
        "class_with": ((0,), (2,)),
        "class_without": ((1,), (3,)),
        "rest_with": ((2,), (0,)),
        "rest_without": ((3,), (1,)),
    }
)
SHOWN = [*COLUMNS][:6]
HEADINGS = ["subspace", "all samples", "in the class", "in the rest"]
HEADINGS += ["all samples", "with it", "without it"]


@dataclass(frozen=True)
class AveragePrecision:
    """An average precision, its 95% bootstrap interval, and chance: the share of positives.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> table = xe.predictiveness(xe.ContrastivePCA(size=1).fit(features), features)
    >>> table.rows[0]["spurious"].value, table.rows[0]["spurious"].interval
    (1.0, (1.0, 1.0))
    """

    value: float
    interval: tuple[float, float]
    chance: float

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Predictiveness:
    """Average precisions of each subspace (the table of the poster on concept-aware pruning).

    The columns ``spurious``, ``spurious_in_class`` and ``spurious_in_rest`` predict the spurious
    feature among all samples, those of the class and all others (AP_wm, AP_wm⁺, AP_wm⁻ on the
    poster). ``class``, ``class_with`` and ``class_without`` predict the class among all samples and
    those with and without the feature (AP_class, AP_class^wm, AP_class^nwm); ``rest_with`` and
    ``rest_without`` the other classes.

    Attributes
    ----------
    rows : tuple of dict
        For each subspace the `AveragePrecision` by column; None without labels, or where all
        samples of the column are positive or all are negative.
    chance : dict
        By column the share of positive samples; None as above.
    target : int or None
        The class; None without labels.
    groups : dict of int
        The number of samples by class and feature; without labels all are of the rest.
    score : {"relevance", "energy"}
        By which samples are ranked.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> table = xe.predictiveness(xe.ContrastivePCA(size=1).fit(features), features)
    >>> table.score, table.groups
    ('energy', {'class with': 60, 'class without': 20, 'rest with': 40, 'rest without': 120})
    """

    rows: tuple[dict[str, AveragePrecision | None], ...]
    chance: dict[str, float | None]
    target: int | None
    groups: dict[str, int]
    score: str
    resamples: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[float]:
        """Return the average precision of each subspace in one column; ValueError if unknown."""
        known = [column for column, chance in self.chance.items() if chance is not None]
        require(name in known, "column", name, f"there are {known}")
        return [entry.value for row in self.rows if (entry := row[name]) is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        rows = [
            {
                name: one and {"value": one.value, "interval": one.interval}
                for name, one in row.items()
            }
            for row in self.rows
        ]
        bootstrap = {"confidence": CONFIDENCE, "resamples": self.resamples, "seed": self.seed}
        shown = {name: getattr(self, name) for name in ("chance", "target", "groups", "score")}
        return {"subspaces": rows, **shown, "bootstrap": bootstrap}

    def __str__(self) -> str:
        column = self.column("spurious")
        shown = sorted(range(len(self)), key=lambda index: -column[index])[:LINES]
        some = f" of the {LINES} best of {len(self)} subspaces" if len(shown) < len(self) else ""
        of = "the class" if self.target is None else f"class {self.target}"
        rows = [[index, *(self.rows[index][name] for name in SHOWN)] for index in sorted(shown)]
        return (
            f"average precision by {self.score}{some}, {CONFIDENCE:.0%} intervals of "
            f"{self.resamples} resamples\nthree columns for the spurious feature, three for {of}\n"
            + aligned([HEADINGS, *rows, ["chance", *(self.chance[name] for name in SHOWN)]])
        )


def sample_scores(subspaces: Subspaces, features: Features) -> Tensor:
    """Return the relevance or energy of each sample by subspace, float64, (samples, subspaces).

    With contexts the score is the relevance Σ (U_kᵀa)·(U_kᵀc) over the sample's positions, else the
    activations' energy Σ ‖U_kᵀ(a − mean)‖². ValueError if the numbers of channels differ.

    Examples
    --------
    >>> from xai_edit.concepts.predictiveness import sample_scores
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> scores = sample_scores(xe.ContrastivePCA(size=1).fit(features), features)
    >>> scores.shape, scores[attribute].min() > scores[~attribute].max()
    (torch.Size([240, 1]), tensor(True))
    """
    activations = features.activations.split(VECTORS)
    if features.contexts is None:
        projected = map(subspaces.project, activations)
        parts = [torch.stack([part.square().sum(1) for part in a], 1) for a in projected]
    else:
        contexts = features.contexts.split(VECTORS)
        parts = [subspaces.split(a, c)[0] for a, c in zip(activations, contexts, strict=True)]
    return features.per_sample(torch.cat(parts).cpu())


def predictiveness(
    subspaces: Subspaces,
    features: Features,
    *,
    attribute: Tensor | None = None,
    labels: Tensor | None = None,
    target: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Predictiveness:
    """Return how well each subspace predicts the spurious feature, and how well the class.

    Samples are ranked by `sample_scores`. Collect contexts for one class
    (``collect_features(…, target=0)``): the relevance for its label is high in every sample.
    ValueError if the feature is missing or the same in every sample, or labels or target do not
    fit.

    Parameters
    ----------
    subspaces : Subspaces
    features : Features
        Of samples of all classes, with and without the feature.
    attribute, labels : Tensor, optional
        Whether each sample has the feature, and its class, shape (samples,); those of the features
        when left out. Without labels only the column ``spurious`` is known.
    target : int, optional
        When left out, the class that the contexts explain, else the one of which the largest share
        of samples has the feature.
    resamples, seed : int
        Of the bootstrap within the four groups of class and feature.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> table = xe.predictiveness(xe.ContrastivePCA(size=1).fit(features), features)
    >>> table.column("spurious"), table.target
    ([1.0], 0)
    """
    resamples = whole_number(resamples, "resamples", least=1)
    seed = whole_number(seed, "seed")
    has = features.require_attribute(attribute)
    of_class, target = _of_class(features, labels, has, target)
    group_of = 2 * (~of_class).long() + (~has).long()
    members = [torch.nonzero(group_of == group).flatten() for group in range(len(GROUPS))]
    sizes = [len(rows) for rows in members]
    shares: dict[str, float] = {}
    for name, sides in COLUMNS.items():
        positives, negatives = (sum(sizes[group] for group in side) for side in sides)
        if positives and negatives and (target is not None or name == "spurious"):
            shares[name] = positives / (positives + negatives)
    scores = sample_scores(subspaces, features)
    ranked = [[own[rows].sort().values for rows in members] for own in scores.T]

    def table(counts: Sequence[Tensor]) -> Tensor:
        """Return average precisions, shape (subspaces, columns, resamples)."""
        cells = [
            average_precision(groups, counts, positive=positive, negative=negative)
            for groups in ranked
            for positive, negative in (COLUMNS[name] for name in shares)
        ]
        return torch.stack(cells).view(len(subspaces), len(shares), -1)

    each_once = [torch.arange(size + 1).double()[:, None] for size in sizes]
    values = table(each_once).squeeze(2).tolist()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.cat([table(part) for part in resampled_counts(sizes, resamples, generator)], 2)
    low, high = np.quantile(draws.numpy(), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=2)
    rows: list[dict[str, AveragePrecision | None]] = []
    for value, ends in zip(values, np.stack([low, high], 2).tolist(), strict=True):
        of_subspace = map(AveragePrecision, value, map(tuple, ends), shares.values())
        rows.append(dict.fromkeys(COLUMNS) | dict(zip(shares, of_subspace, strict=True)))
    score = "energy" if features.contexts is None else "relevance"
    groups = dict(zip(GROUPS, sizes, strict=True))
    chance = dict.fromkeys(COLUMNS) | shares
    return Predictiveness(tuple(rows), chance, target, groups, score, resamples, seed)


def _of_class(
    features: Features, labels: Tensor | None, has: Tensor, target: int | None
) -> tuple[Tensor, int | None]:
    """Return which samples are of the class, bool, and the class."""
    labels = features.labels if labels is None else torch.as_tensor(labels)
    if labels is None:
        require(target is None, "target", target, "the samples have no labels")
        return torch.zeros_like(has), None
    labels = labels.cpu()
    one_class_a_sample(labels)
    works = f"one class for each of {len(has)} samples is needed"
    require(labels.shape == has.shape, "labels", tuple(labels.shape), works)
    shares = {int(one): float(has[labels == one].double().mean()) for one in labels.unique()}
    if target is None:
        explained = features.origin.get("target")
        most = max(shares, key=shares.__getitem__)
        target = explained if isinstance(explained, int) and explained in shares else most
    require(target in shares, "target", target, f"the samples' classes are {[*shares]}")
    return labels == target, target
