"""What fictitious class removal is planned on and judged by: features, groups, objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.targets import class_list, whole_list
from xai_edit.concepts.presence import concept_strength, split_point
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import Attribute, Data, peek
from xai_edit.edits.exact import removal
from xai_edit.edits.head import HeadFeatures, head_features


@dataclass(frozen=True)
class Weight:
    """A weight of a row, what is added to it, and where the edit is anchored."""

    column: int
    dose: float
    anchor: float = 0.0
    rate: float | None = None


@dataclass(eq=False)
class Task:
    """The features to plan on and to judge by, and what is to be edited."""

    head: HeadFeatures
    attribute: Tensor
    judged: HeadFeatures
    judged_attribute: Tensor
    groups: Tensor  # of the judged samples: (class, attribute), numbered from 0
    has: Tensor  # of the judged samples: 1 with the feature
    values: dict[int, int]  # the fictitious class of each row
    floor: float | None  # accuracy to keep without the feature, of a removal
    indifferent: bool
    columns: dict[int, int] = field(default_factory=dict)  # found so far, by row
    rates: Sequence[float] | None = None  # to sweep, where they are given
    balanced: bool = False  # whether the mean over groups is the objective, for a start

    def __post_init__(self) -> None:
        self.before = self.judged.logits()
        self.labels = self.judged.require_labels()

    @property
    def exact(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The groups and the objective that `best_dose` works with."""
        if self.floor is None:
            one = len(self.values) == 1
            return self.groups, _worst_then_mean if one else self.of_groups
        return self.has, removal(self.floor)

    def of_groups(self, accuracy: Tensor) -> Tensor:
        """Return the objective of group accuracies, (..., G) to (...)."""
        if self.balanced:
            return accuracy.mean(-1)
        return accuracy.min(-1).values if len(self.values) == 1 else _worst_first(accuracy)

    def logits(self, chosen: Mapping[int, Weight]) -> Tensor:
        """Return the judged samples' logits with some weights edited."""
        logits = self.before.clone()
        for row, weight in chosen.items():
            x = self.judged.features[:, weight.column].double()
            logits[:, row] += weight.dose * (x - weight.anchor)
        return logits

    def judge(self, chosen: Mapping[int, Weight]) -> dict[str, float]:
        """Return the figures with some weights edited; "objective" is what is to rise."""
        logits = self.logits(chosen)
        right = logits.argmax(1) == self.labels
        accuracy = group_means(right, self.groups)
        worst, average = float(accuracy.min()), float(right.double().mean())
        objective = float(self.of_groups(accuracy))
        told = {"worst_group": worst, "average": average, "objective": objective}
        if self.floor is not None:
            parted = group_means(right, self.has)
            told |= {"retained": float(parted[0]), "removed": float(parted[1])}
            told["objective"] = float(removal(self.floor)(parted))
        if self.indifferent:
            raised = []
            for row, value in self.values.items():
                probability, with_it = logits.softmax(1)[:, row], self.judged_attribute == value
                raised.append(float(probability[with_it].mean() - probability[~with_it].mean()))
            told |= {"raised": max(raised), "objective": -sum(max(one, 0.0) for one in raised)}
        return told


def prepared(
    model: nn.Module,
    data: Data | HeadFeatures,
    spurious: Attribute | Subspaces,
    fictitious: int | Sequence[int] | None,
    target: int | Sequence[int] | None,
    validation: Data | HeadFeatures | None,
    *,
    aim: str,
    tolerance: float,
) -> Task:
    """Collect the features, tell what is to be edited, and check that it can be.

    Arguments and errors as for `xai_edit.FictitiousClass.plan`.
    """
    if isinstance(spurious, Subspaces):
        head = head_features(model, data)
        point = split_point(concept_strength(spurious, head.features))

        def told(features: HeadFeatures) -> Tensor:
            return (concept_strength(spurious, features.features) > point).long()

        attribute = _checked(told(head))
        judged = head if validation is None else head_features(model, validation, name="validation")
        judged_attribute = told(judged)
    else:
        head, judged = _collected(model, data, spurious, validation)
        attribute = _checked(head.attribute)
        judged_attribute = _checked(judged.attribute, "validation", fewest=1)
    head.require_labels()
    if head.classes < 2:
        raise ValueError(
            f"model: layer {head.layer!r} has one output; a classifier with one for each "
            "class, two or more, is needed"
        )
    kinds = attribute.unique().tolist()
    predicted = head.logits().argmax(1)
    rows = None if target is None else class_list(target, head.classes)
    if fictitious is None:
        if max(kinds) > 1 or len(kinds) > 2:
            raise ValueError(
                f"spurious: values {kinds[:5]} given; it is yes or no (1 or 0), or name the "
                "value to act on by fictitious="
            )
        several = rows is not None and len(rows) > 1
        fictitious = _speaking(predicted, attribute, rows) if rows and several else 1
    wanted = whole_list(
        int(fictitious) if isinstance(fictitious, bool) else fictitious, "fictitious"
    )
    if not wanted:
        raise ValueError(f"fictitious: {fictitious!r} given; give one value, or one per target")
    for value in wanted:
        if value not in kinds:
            raise ValueError(f"fictitious: {value} given; the values are {kinds[:10]}")
    if rows is None:
        rows = [_favoured(predicted, attribute == value, head.classes) for value in wanted]
    if len(wanted) == 1:
        wanted *= len(rows)
    if len(rows) != len(wanted) or len({*rows}) < len(rows):
        raise ValueError(
            f"fictitious: values {wanted} for classes {rows}; give one for each target"
        )
    has = (judged_attribute[:, None] == torch.tensor(wanted)).any(1)
    labels = judged.require_labels()
    floor = None
    alike = has.all() or not has.any()
    if aim == "indifference":
        alike = len(judged_attribute.unique()) < 2
    if aim != "worst-group" and alike:
        raise ValueError("validation: needs samples with and without the feature")
    if aim == "removal":
        before = (judged.logits().argmax(1) == labels).double()
        floor = float(before[~has].mean()) - tolerance
    cells = (int(judged_attribute.max()) + 1) * labels + judged_attribute
    groups = cells.unique(return_inverse=True)[1]
    values = dict(zip(rows, wanted, strict=True))
    indifferent = aim == "indifference"
    return Task(
        *(head, attribute, judged, judged_attribute, groups, has.long()),
        *(values, floor, indifferent),
    )


def _collected(
    model: nn.Module, data: Data | HeadFeatures, spurious: Attribute, validation: Any
) -> tuple[HeadFeatures, HeadFeatures]:
    if spurious is not None and not callable(spurious):
        spurious = torch.as_tensor(spurious)
    head = head_features(
        model, data, attribute=spurious, with_attribute=True, attribute_name="spurious"
    )
    if validation is None:
        return head, head
    if isinstance(validation, HeadFeatures):
        return head, head_features(model, validation, name="validation")
    # A vector counts the samples of the planning data, so validation carries its own.
    own = None if isinstance(spurious, Tensor) else spurious
    if isinstance(spurious, Tensor):
        first, validation = peek(validation)
        if first.groups is None:
            raise ValueError(
                "validation: needs the feature as its third element, since the vector given as "
                "spurious counts the samples of data"
            )
    return head, head_features(
        model, validation, attribute=own, with_attribute=True, attribute_name="spurious"
    )


def _checked(attribute: Tensor | None, name: str = "spurious", *, fewest: int = 2) -> Tensor:
    if attribute is None or len(attribute.unique()) < fewest:
        raise ValueError(
            f"{name}: samples with and without the feature are needed; "
            f"{'none was' if attribute is None else 'only one kind was'} given"
        )
    if attribute.min() < 0:
        raise ValueError(
            f"{name}: values {attribute.unique().tolist()[:5]} given; it is yes or no (1 or 0)"
        )
    return attribute


def _favoured(predicted: Tensor, has: Tensor, classes: int) -> int:
    """Return the class that is predicted more with the feature than without, most of all."""
    shares = [
        torch.bincount(predicted[where], minlength=classes) / where.sum() for where in (has, ~has)
    ]
    rise = shares[0] - shares[1]
    if not rise.max() > 0:
        raise ValueError("spurious: no class is predicted more often with the feature; name target")
    return int(rise.argmax())


def _speaking(predicted: Tensor, attribute: Tensor, rows: Sequence[int]) -> list[int]:
    """Return for each class the kind of sample, 0 or 1, that it is predicted for more often."""
    kinds = attribute.unique().tolist()
    shares = [
        [float((predicted[attribute == k] == row).double().mean()) for k in kinds] for row in rows
    ]
    return [kinds[0] if own[0] > own[1] else kinds[1] for own in shares]


def _worst_then_mean(accuracy: Tensor) -> Tensor:
    """Worst-group accuracy; the mean decides only among equals. Shape (..., G) to (...)."""
    return accuracy.min(-1).values + 1e-9 * accuracy.mean(-1)


def _worst_first(accuracy: Tensor) -> Tensor:
    """Worst-group accuracy; among equals the next worst decides, and the next. (..., G) to (...).

    For several rows: one of them alone does not raise the worst group where another keeps one
    just as low.
    """
    lowest = accuracy.sort(-1).values[..., :4]
    return lowest @ 1e-4 ** torch.arange(lowest.shape[-1], dtype=lowest.dtype)


def group_means(right: Tensor, groups: Tensor, count: int = 0) -> Tensor:
    """Return the share of right answers in each group, float64, (G,); NaN in an empty one."""
    sizes = torch.bincount(groups, minlength=count)
    return torch.bincount(groups, weights=right.double(), minlength=len(sizes)) / sizes
