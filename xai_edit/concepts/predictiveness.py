"""What each subspace tells: the spurious feature, the class, or both, as average precisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_edit.concepts.average_precision import (
    average_precision,
    counted_once,
    resampled_counts,
)
from xai_edit.concepts.features import Features
from xai_edit.concepts.sample_scores import sample_scores
from xai_edit.concepts.subspaces import Subspaces

CONFIDENCE = 0.95
LINES = 20  # subspaces that the text shows

# Which groups of samples are to score high, and which low. A group is a place in GROUPS.
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
HEADINGS = ("all samples", "in the class", "in the rest", "all samples", "with it", "without it")


@dataclass(frozen=True)
class AveragePrecision:
    """An average precision, chance being the share of samples that are to be found.

    Attributes
    ----------
    value : float
        In [0, 1]; higher is better.
    interval : tuple of float
        Percentile interval of the bootstrap, lower and upper end.
    chance : float
        What a random ranking reaches on average when samples are many.
    """

    value: float
    interval: tuple[float, float]
    chance: float

    @property
    def over_chance(self) -> AveragePrecision:
        """The same on a scale on which chance is 0 and 1 stays: (AP − chance) / (1 − chance)."""

        def rescaled(value: float) -> float:
            return (value - self.chance) / (1 - self.chance)

        low, high = self.interval
        return AveragePrecision(rescaled(self.value), (rescaled(low), rescaled(high)), 0.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Predictiveness:
    """Average precisions of each subspace (concept-aware network pruning, the poster's table).

    ``spurious``, ``spurious_in_class`` and ``spurious_in_rest`` are those for having the spurious
    feature, among all samples, those of the class and all others; ``class``, ``class_with`` and
    ``class_without`` those for being of the class, among all samples and those with and without
    the feature. In the poster: AP_wm, AP_wm⁺, AP_wm⁻, AP_class, AP_class^wm, AP_class^nwm. Beside
    these six, which the text shows, ``rest_with`` and ``rest_without`` are those for being of the
    rest, since a subspace may predict either.

    Attributes
    ----------
    rows : tuple of dict
        For each subspace `AveragePrecision` by column; None where there are no labels, or all
        samples that the column looks at are alike.
    chance : dict
        By column the share of samples that are to be found; None as above.
    target : int or None
        The class; None where there are no labels.
    groups : dict of int
        Samples with and without the feature, of the class and of the rest; all are of the rest
        where there are no labels.
    score : {"relevance", "energy"}
        What ranks the samples.
    resamples, seed : int
        Of the intervals.

    Notes
    -----
    Average precision looks for high scores only. A subspace whose relevance is low where the
    feature is has an average precision below chance.
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
        """Return one column's values, a number a subspace.

        Raises
        ------
        ValueError
            If there is no such column, or the samples do not give it.
        """
        if self.chance.get(name) is None:
            known = [column for column, chance in self.chance.items() if chance is not None]
            raise ValueError(f"column: {name!r} given; there are {known}")
        return [entry.value for row in self.rows if (entry := row[name]) is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        rows = [
            {
                name: None if entry is None else {"value": entry.value, "interval": entry.interval}
                for name, entry in row.items()
            }
            for row in self.rows
        ]
        return {
            "subspaces": rows,
            "chance": dict(self.chance),
            "target": self.target,
            "groups": dict(self.groups),
            "score": self.score,
            "bootstrap": {
                "confidence": CONFIDENCE,
                "resamples": self.resamples,
                "seed": self.seed,
            },
        }

    def __str__(self) -> str:
        wide = 21
        shown = sorted(range(len(self)), key=lambda index: -self.column("spurious")[index])[:LINES]
        some = f" of the {LINES} best of {len(self)} subspaces" if len(shown) < len(self) else ""
        of = "the class" if self.target is None else f"class {self.target}"
        lines = [
            f"average precision by {self.score}{some}, {CONFIDENCE:.0%} intervals of "
            f"{self.resamples} resamples",
            f"{'':10}{'for the spurious feature':<{3 * wide}}for {of}",
            f"{'subspace':10}" + "".join(f"{heading:<{wide}}" for heading in HEADINGS),
        ]
        for index in sorted(shown):
            entries = [*self.rows[index].values()][: len(HEADINGS)]
            cells = [f"{'–' if entry is None else str(entry):<{wide}}" for entry in entries]
            lines.append(f"{index:<10}" + "".join(cells))
        shares = [*self.chance.values()][: len(HEADINGS)]
        chances = ["–" if value is None else f"{value:.3f}" for value in shares]
        lines.append(f"{'chance':10}" + "".join(f"{chance:<{wide}}" for chance in chances))
        return "\n".join(line.rstrip() for line in lines)


def predictiveness(
    subspaces: Subspaces,
    features: Features,
    *,
    spurious: Tensor | None = None,
    labels: Tensor | None = None,
    target: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Predictiveness:
    """Return how well each subspace tells the spurious feature, and how well the class.

    A sample's score is the subspace's relevance Σ (U_kᵀa)·(U_kᵀc) where the features have contexts
    (as on the poster), else its share of the activation's energy, Σ ‖U_kᵀ(a − mean)‖² over the
    sample's positions. For the class, contexts should explain the same output in all samples
    (``collect_features(…, target=0)``): the relevance of each sample for its own class is high in
    all of them.

    Parameters
    ----------
    subspaces : Subspaces
    features : Features
        Of samples with and without the feature, all classes.
    spurious : Tensor, optional
        Yes or no a sample, shape (samples,); the features' own attribute when left out.
    labels : Tensor, optional
        The class of each sample, shape (samples,); the features' own labels when left out. Without
        any, only the column ``spurious`` is known.
    target : int, optional
        The class that is looked for; when left out, the one whose relevance the features were
        collected for, else the one of which the largest share of samples has the feature, the
        first of equals.
    resamples : int
        Of the bootstrap, drawn within the four groups of feature and class.
    seed : int

    Raises
    ------
    ValueError
        If the feature is missing or the same in every sample, labels do not fit, or the target is
        none of them.
    """
    for name, number, least in (("resamples", resamples, 1), ("seed", seed, 0)):
        if type(number) is not int or number < least:
            raise ValueError(f"{name}: {number!r} given; it is a whole number from {least}")
    has = features.require_spurious(spurious).cpu()
    of_class, target = _of_class(features, labels, has, target)
    group_of = 2 * (~of_class).long() + (~has).long()
    members = [torch.nonzero(group_of == group).flatten() for group in range(len(GROUPS))]
    sizes = [len(rows) for rows in members]
    scores = sample_scores(subspaces, features)
    columns = {
        name: sides
        for name, sides in COLUMNS.items()
        if all(sum(sizes[group] for group in side) for side in sides)
        and (target is not None or name == "spurious")
    }

    def ranked(index: int) -> list[Tensor]:
        return [scores[rows, index].sort().values for rows in members]

    def table(counts: Sequence[Tensor]) -> Tensor:
        """Return average precisions, shape (subspaces, columns, resamples)."""
        found = []
        for index in range(len(subspaces)):
            own = ranked(index)
            found += [
                average_precision(own, counts, positive=positive, negative=negative)
                for positive, negative in columns.values()
            ]
        return torch.stack(found).view(len(subspaces), len(columns), -1)

    values = table(counted_once(sizes)).squeeze(2)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.cat([table(part) for part in resampled_counts(sizes, resamples, generator)], 2)
    low, high = np.quantile(draws.numpy(), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=2)
    chance: dict[str, float | None] = dict.fromkeys(COLUMNS)
    rows: list[dict[str, AveragePrecision | None]]
    rows = [dict.fromkeys(COLUMNS) for _ in range(len(subspaces))]
    for place, (name, sides) in enumerate(columns.items()):
        positives, negatives = (sum(sizes[group] for group in side) for side in sides)
        chance[name] = share = positives / (positives + negatives)
        for index, row in enumerate(rows):
            interval = float(low[index, place]), float(high[index, place])
            row[name] = AveragePrecision(float(values[index, place]), interval, share)
    score = "energy" if features.contexts is None else "relevance"
    groups = dict(zip(GROUPS, sizes, strict=True))
    return Predictiveness(tuple(rows), chance, target, groups, score, resamples, seed)


def _of_class(
    features: Features, labels: Tensor | None, has: Tensor, target: int | None
) -> tuple[Tensor, int | None]:
    """Return which samples are of the class, bool, and the class."""
    given = features.labels if labels is None else torch.as_tensor(labels)
    if given is None:
        if target is not None:
            raise ValueError(f"target: {target!r} given, but there are no labels")
        return torch.zeros_like(has), None
    given = given.cpu()
    if given.shape != has.shape:
        raise ValueError(
            f"labels: shape {tuple(given.shape)} given; one class for each of {len(has)} samples "
            "is needed"
        )
    classes = given.unique().tolist()
    explained = features.origin.get("target")
    if target is None:
        most = max(classes, key=lambda label: float(has[given == label].double().mean()))
        target = explained if isinstance(explained, int) and explained in classes else most
    if target not in classes:
        raise ValueError(f"target: {target!r} given; the samples' classes are {classes}")
    return given == target, int(target)
