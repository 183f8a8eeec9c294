"""What fictitious class removal is planned on and judged by: features, classes, objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import require, whole_numbers
from xai_edit.core.data import Attribute, Data, peek
from xai_edit.core.targets import class_list
from xai_edit.last_layer.exact_dose import Objective, removal, strongest_other, wins, with_margin
from xai_edit.last_layer.head import HeadFeatures, head_features
from xai_edit.last_layer.rate_sweep import RateSweep

# A feature affects a class if it moves its logit by at least this share of the largest move.
LEAST_MOVE = 0.5


@dataclass(frozen=True)
class Weight:
    """A weight of a row: what is added to it, and the feature value at which the edit is zero."""

    column: int
    dose: float
    anchor: float = 0.0
    rate: float | None = None
    bounded: bool = False


@dataclass(eq=False)
class Task:
    """The features to plan on and to judge by, and the rows that are to be edited."""

    head: HeadFeatures
    attribute: Tensor
    judged: HeadFeatures
    judged_attribute: Tensor
    values: dict[int, int]  # the fictitious class of each row
    aim: Literal["worst-group", "removal", "indifference"]
    tolerance: float
    left_alone: dict[str, str] = field(default_factory=dict)  # classes, and why
    columns: dict[int, int] = field(default_factory=dict)  # chosen so far, by row
    fixed: dict[int, int] | None = None  # columns of the only rows to edit, for "exact"
    balanced: bool = False  # whether the mean over groups is the objective, for a start
    quantile: float = 0.0  # of the margin by which answers have to hold

    def __post_init__(self) -> None:
        self.labels = labels = self.judged.require_labels()
        self.has = torch.isin(self.judged_attribute, torch.tensor([*self.values.values()])).long()
        cells = (int(self.judged_attribute.max()) + 1) * labels + self.judged_attribute
        self.groups = cells.unique(return_inverse=True)[1]
        wrong = self.has.bool() & (self.aim == "removal")
        self.before = with_margin(self.judged.logits(), labels, wrong, self.quantile)
        kept = (self.before.argmax(1) == labels)[self.has == 0].double()
        self.floor = float(kept.mean()) - self.tolerance

    @property
    def exact(self) -> tuple[Tensor, Objective]:
        """The groups and the objective that `best_dose` works with."""
        if self.aim == "removal":
            return self.has, removal(self.floor)
        return self.groups, _worst_then_mean if len(self.values) == 1 else self._of_groups

    def _of_groups(self, accuracy: Tensor) -> Tensor:
        if self.balanced:
            return accuracy.mean(-1)
        return accuracy.min(-1).values if len(self.values) == 1 else _worst_first(accuracy)

    def objective(self, right: Tensor, raised: Sequence[Tensor] = ()) -> Tensor:
        """Return what is to rise, of right answers (..., samples) and `raised` of rows, (...)."""
        if self.aim == "removal":
            return removal(self.floor)(means(right, self.has))
        if self.aim == "indifference" and raised:
            return -torch.stack([*raised]).clamp(min=0).sum(0)
        return self._of_groups(means(right, self.groups))

    def raised(self, row: int, probability: Tensor) -> Tensor | None:
        """Return the mean probability (..., samples) of a class with its value less without."""
        with_it = self.judged_attribute == self.values[row]
        if with_it.all() or not with_it.any():
            return None
        return probability[..., with_it].mean(-1) - probability[..., ~with_it].mean(-1)

    def logits(self, chosen: Mapping[int, Weight]) -> Tensor:
        """Return the judged samples' logits with some weights edited."""
        logits = self.before.clone()
        for row, weight in chosen.items():
            x = self.judged.features[:, weight.column].double()
            logits[:, row] += weight.dose * (x - weight.anchor)
        return logits

    def score(self, chosen: Mapping[int, Weight]) -> float:
        """Return the objective with some weights edited."""
        logits = self.logits(chosen)
        return float(self.objective(logits.argmax(1) == self.labels, self._all_raised(logits)))

    def figures(self, chosen: Mapping[int, Weight]) -> dict[str, float]:
        """Return what is reported with some weights edited."""
        logits = self.logits(chosen)
        found = self.accuracies(logits.argmax(1))
        if self.aim == "indifference":
            found["raised"] = float(max(self._all_raised(logits)))
        return found

    def accuracies(self, predicted: Tensor) -> dict[str, float]:
        """Return the accuracies that are reported for predicted classes."""
        right = predicted == self.labels
        found = {
            "worst_group": float(means(right, self.groups).min()),
            "average": float(right.double().mean()),
        }
        if self.aim == "removal":
            retained, removed = means(right, self.has).tolist()
            found |= {"retained": retained, "removed": removed}
        return found

    def _all_raised(self, logits: Tensor) -> list[Tensor]:
        if self.aim != "indifference":
            return []
        probability = logits.softmax(1)
        raised = [self.raised(row, probability[:, row]) for row in self.values]
        return [one for one in raised if one is not None]

    def sweep(
        self, row: int, column: int, rates: Tensor, doses: Tensor, anchor: float, logits: Tensor
    ) -> RateSweep:
        """Return what the doses of some rates do to one weight, from logits without that edit."""
        x = self.judged.features[:, column].double() - anchor
        edited = logits[:, row] + doses[:, None] * x  # (R, samples)
        best_other, rival = strongest_other(logits, row)
        as_row = wins(edited, best_other, row, rival)
        right = torch.where(as_row, self.labels == row, self.labels == rival)
        rest = logits.index_fill(1, torch.tensor(row), -torch.inf)
        raised = self.raised(row, (edited - rest.logsumexp(1)).sigmoid())
        with_it = self.judged_attribute == self.values[row]
        removed, retained = (
            right[:, samples].double().mean(1) if samples.any() else None
            for samples in (with_it, ~with_it)
        )
        return RateSweep(
            *(row, column, rates, doses, anchor, means(right, self.groups)),
            *(right.double().mean(1), removed, retained, raised),
            self.objective(right, () if raised is None else (raised,)),
        )


def prepared(
    model: nn.Module,
    data: Data | HeadFeatures,
    attribute: Attribute | Subspaces,
    fictitious: int | Sequence[int] | None,
    target: int | Sequence[int] | None,
    validation: Data | HeadFeatures | None,
    *,
    aim: Literal["worst-group", "removal", "indifference"],
    tolerance: float,
) -> Task:
    """Collect the features and infer which classes are edited; see `FictitiousClass.plan`."""
    head, judged = _collected(model, data, attribute, validation)
    attribute = _checked(head.attribute)
    judged_attribute = _checked(judged.attribute, "validation", fewest=1)
    labels = head.require_labels()
    if head.classes < 2:
        raise ValueError(
            f"model: layer {head.layer!r} has one output; a classifier with one for each "
            "class, two or more, is needed"
        )
    values, left_alone = _affected(head, labels, attribute, fictitious, target, aim)
    task = Task(
        *(head, attribute, judged, judged_attribute, values, aim, tolerance),
        left_alone=left_alone,
    )
    if aim == "removal" and {*attribute.unique().tolist()} <= {*values.values()}:
        raise ValueError(
            f"fictitious: {[*values.values()]} are all values of the feature; a removal needs "
            "samples of another one, to keep"
        )
    kinds = task.has if aim == "removal" else judged_attribute
    if aim != "worst-group" and len(kinds.unique()) < 2:
        raise ValueError("validation: needs samples with and without the feature")
    return task


def _affected(
    head: HeadFeatures,
    labels: Tensor,
    attribute: Tensor,
    fictitious: int | Sequence[int] | None,
    target: int | Sequence[int] | None,
    aim: str,
) -> tuple[dict[int, int], dict[str, str]]:
    """Return the rows to edit with their fictitious class, and the classes left alone with why."""
    kinds = attribute.unique().tolist()
    predicted = head.logits().argmax(1)
    rows = None if target is None else class_list(target, head.classes)
    yes_or_no = len(kinds) == 2 and max(kinds) == 1
    if fictitious is not None:
        bare = int(fictitious) if isinstance(fictitious, bool) else fictitious
        wanted = whole_numbers(bare, "fictitious", "give different values")
        for value in wanted:
            require(value in kinds, "fictitious", value, f"the values are {kinds[:10]}")
    elif len(kinds) > 2 or max(kinds) > 1:
        raise ValueError(
            f"attribute: values {kinds[:5]} given; it is yes or no (1 or 0), or name the value to "
            "act on by fictitious="
        )
    elif rows is None:
        wanted = kinds if aim != "removal" else [1]
    else:
        wanted = _speaking(predicted, attribute, rows) if len(rows) > 1 else [1]
    if rows is None and yes_or_no and aim != "removal":
        return moved_classes(head.logits(), labels, attribute, wanted)
    if rows is None:
        rows = [_favoured(predicted, attribute == value, head.classes) for value in wanted]
    if len(wanted) == 1:
        wanted *= len(rows)
    if len(rows) != len(wanted) or len({*rows}) < len(rows):
        raise ValueError(
            f"fictitious: values {wanted} for classes {rows}; give one for each target"
        )
    return dict(zip(rows, wanted, strict=True)), {}


def moved_classes(
    logits: Tensor, labels: Tensor, attribute: Tensor, values: Sequence[int]
) -> tuple[dict[int, int], dict[str, str]]:
    """Return the classes whose logit a value of a feature raises, with that value, and the others.

    Compares samples of the same label with and without the value: the mean change of a class's
    logit, weighted by the label's share of samples, less the median change over classes, which
    moves no prediction. A class is moved if the normal interval of its change, 95 % over all
    classes together, is above 0, and the change at least half of the largest.

    Parameters
    ----------
    logits : Tensor, float64, shape (samples, classes)
    labels, attribute : Tensor, int64, shape (samples,)
    values : sequence of int
        Those of the feature's values 0 and 1 to consider.

    Returns
    -------
    dict of int, dict of str
        The value of each class that is moved, and why each other class is left alone. ValueError
        where no class is moved.
    """
    with_it, classes = attribute == 1, logits.shape[1]
    strata = [labels == label for label in labels.unique()]
    # Where feature and label are one thing, all samples are compared.
    pairs = [(s & with_it, s & ~with_it) for s in strata]
    pairs = [pair for pair in pairs if min(int(side.sum()) for side in pair) > 1]
    pairs = pairs or [(with_it, ~with_it)]
    sizes = torch.tensor([float((a | b).sum()) for a, b in pairs], dtype=torch.double)
    share = (sizes / sizes.sum())[:, None]
    change = torch.stack([logits[a].mean(0) - logits[b].mean(0) for a, b in pairs])
    variance = torch.stack(
        [logits[a].var(0) / a.sum() + logits[b].var(0) / b.sum() for a, b in pairs]
    )
    change = (share * change).sum(0)
    change -= change.quantile(0.5)
    level = torch.tensor(1 - 0.025 / classes, dtype=torch.double)
    variance = (share**2 * variance).sum(0)
    width = torch.special.ndtri(level) * (variance + variance.quantile(0.5)).sqrt()
    moved, left_alone = {}, {}
    for row, (mean, half) in enumerate(zip(change.tolist(), width.tolist(), strict=True)):
        value = int(mean > 0)
        told = f"the feature changes its logit by {mean:.3g} ± {half:.2g}"
        if not abs(mean) > half:
            left_alone[str(row)] = told
        elif abs(mean) < LEAST_MOVE * float(change.abs().max()):
            left_alone[str(row)] = f"{told}, less than half of the largest change"
        elif value not in values:
            left_alone[str(row)] = f"{told}, so the value {value} speaks for it"
        else:
            moved[row] = value
    if not moved:
        row = int(change.abs().argmax())
        raise ValueError(
            f"attribute: no class is moved; the most is class {row}, {left_alone[str(row)]}; name "
            "target"
        )
    return moved, left_alone


def _collected(
    model: nn.Module,
    data: Data | HeadFeatures,
    attribute: Attribute | Subspaces,
    validation: Any,
) -> tuple[HeadFeatures, HeadFeatures]:
    """Return the features to plan on and to judge by, with the spurious feature."""
    if isinstance(attribute, Subspaces):
        head = head_features(model, data)
        point = split_point(concept_strength(attribute, head.features))

        judged = head if validation is None else head_features(model, validation, name="validation")
        strong = [concept_strength(attribute, one.features) > point for one in (head, judged)]
        return replace(head, attribute=strong[0].long()), replace(
            judged, attribute=strong[1].long()
        )
    if attribute is not None and not callable(attribute):
        attribute = torch.as_tensor(attribute)
    head = head_features(model, data, attribute=attribute, with_attribute=True)
    if validation is None:
        return head, head
    if isinstance(validation, HeadFeatures):
        return head, head_features(model, validation, name="validation")
    # A vector counts the samples of the planning data, so validation carries its own.
    own = None if isinstance(attribute, Tensor) else attribute
    if isinstance(attribute, Tensor):
        first, validation = peek(validation)
        if first.groups is None:
            raise ValueError(
                "validation: needs the feature as its third element, since the vector given as "
                "attribute counts the samples of data"
            )
    return head, head_features(model, validation, attribute=own, with_attribute=True)


def _checked(attribute: Tensor | None, name: str = "attribute", *, fewest: int = 2) -> Tensor:
    if attribute is None or len(attribute.unique()) < fewest:
        raise ValueError(
            f"{name}: samples with and without the feature are needed; "
            f"{'none was' if attribute is None else 'only one kind was'} given"
        )
    require(
        not attribute.min() < 0, name, attribute.unique().tolist()[:5], "it is yes or no (1, 0)"
    )
    return attribute


def _favoured(predicted: Tensor, has: Tensor, classes: int) -> int:
    """Return the class that is predicted more with the feature than without, most of all."""
    shares = [
        torch.bincount(predicted[where], minlength=classes) / where.sum() for where in (has, ~has)
    ]
    rise = shares[0] - shares[1]
    if not rise.max() > 0:
        raise ValueError(
            "attribute: no class is predicted more often with the feature; name target"
        )
    return int(rise.argmax())


def _speaking(predicted: Tensor, attribute: Tensor, rows: Sequence[int]) -> list[int]:
    """Return for each class the kind of sample, 0 or 1, that it is predicted for more often."""
    shares = [[(predicted[attribute == k] == row).double().mean() for k in (0, 1)] for row in rows]
    return [int(own[0] <= own[1]) for own in shares]


def _worst_then_mean(accuracy: Tensor) -> Tensor:
    """Worst-group accuracy; the mean decides only among equals. Shape (..., G) to (...)."""
    return accuracy.min(-1).values + 1e-9 * accuracy.mean(-1)


def _worst_first(accuracy: Tensor) -> Tensor:
    """Worst-group accuracy; among equals the next worst decides, for one row may not be enough."""
    lowest = accuracy.sort(-1).values[..., :4]
    return lowest @ 1e-4 ** torch.arange(lowest.shape[-1], dtype=lowest.dtype)


def means(right: Tensor, groups: Tensor) -> Tensor:
    """Return the share of right answers in each group, float64, (..., samples) to (..., G)."""
    member = torch.nn.functional.one_hot(groups).double()
    return right.double() @ member / member.sum(0)


def concept_strength(subspaces: Subspaces, activations: Tensor) -> Tensor:
    """Return how strongly a concept is present in activations (samples, channels), (samples,).

    Of a single direction (a CAV) the projection with its sign, of more the length of the
    projection.
    """
    if len(subspaces) != 1:
        raise ValueError(
            f"attribute: {len(subspaces)} subspaces given; give one, "
            "Subspaces(s.block(k), (s.sizes[k],), s.mean)"
        )
    channels = len(subspaces.basis)
    if activations.shape[1] != channels:
        raise ValueError(
            f"attribute: a subspace of {channels} channels given, and the activations have "
            f"{activations.shape[1]}; collect the features of its own layer"
        )
    (projection,) = subspaces.project(activations.double())
    return projection[:, 0] if projection.shape[1] == 1 else projection.norm(dim=1)


def split_point(strength: Tensor) -> float:
    """Return the strength between samples with a concept and without, by two means."""
    from sklearn.cluster import KMeans

    ends = torch.stack([strength.min(), strength.max()])
    if ends[0] == ends[1]:
        raise ValueError("attribute: the concept is equally strong in all samples")
    fitted = KMeans(2, init=ends[:, None].numpy(), n_init=1).fit(strength[:, None].numpy())
    return float(fitted.cluster_centers_.mean())
