"""Fictitious class removal: a spurious feature as a class of its own, removed by one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.attribution.targets import class_list, whole_list
from xai_edit.concepts.presence import concept_strength, split_point
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import Attribute, Data, peek
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.exact import best_dose, removal, strongest_other, wins
from xai_edit.edits.fictitious_copy import fictitious_column
from xai_edit.edits.head import HeadFeatures, head_features
from xai_edit.edits.rate_sweep import RateSweep
from xai_edit.edits.selection import Selection, check_selection
from xai_edit.edits.single_weight import (
    anchor_point,
    check_anchor,
    check_rate,
    check_tolerance,
    check_whole,
    head_edit,
    orthogonal_weight,
)

# Rows are gone through again, each chosen anew beside the others, while that helps.
ROUNDS = 10
REASONS = {
    "worst-group": "raises the worst group",
    "removal": "lowers the accuracy on the samples with the feature and keeps that on the others",
    "indifference": "lowers what the feature adds to the class's probability",
}


@dataclass(frozen=True)
class FictitiousClass:
    """Take away a classifier's reliance on a spurious feature, by one weight an affected class.

    Hakemi et al., *Post-hoc Spurious Correlation Neutralization with Single-Weight Fictitious
    Class Unlearning*, Algorithm 2: a copy of the last layer learns the spurious feature as a class
    of its own; the edge that serves it most (SCA, Eq. 6) is edited in the model itself, in the row
    of the class that the feature goes with.

    What each step needs: the copy, labels and the spurious feature; ``rate="auto"`` and "exact",
    samples of every group, also those where feature and class do not go together.

    Parameters
    ----------
    select : str
        "sca" is the paper's selection with the edit of Eq. 8; others as for `SingleWeight`.
        "exact", ours, takes the weight and dose of the row with the highest objective, in closed
        form, and needs no copy.
    rate : "auto", "least-gap", float in [0, 1] or mapping of class to float
        Neutralisation rate r of Eq. 8. "auto" takes, row by row, the rate with the highest
        objective on the validation data. "least-gap" takes the one with the least gap between
        average and worst-group accuracy there, as the paper does; a collapsed model has no gap
        either. Not with "exact", which finds its own dose.
    aim : {"worst-group", "removal", "indifference"}
        The objective. "worst-group": its accuracy. "removal", of a sub-class: accuracy on the
        samples with the feature down, subject to accuracy on those without it no more than
        ``tolerance`` below what it was. "indifference", where the same samples are given with and
        without the feature: it no longer raises the mean probability of the class. Not with
        "exact", since that is no count of samples.
    tolerance : float
        For ``aim="removal"``, as a fraction.
    classifier : scikit-learn classifier, optional
        The last layer of the copy; logistic regression when left out.
    anchor : "auto" or bool
        See `SingleWeight`.
    seed : int
        For ``select="random"``.
    """

    select: Selection = "sca"
    rate: float | Mapping[int, float] | Literal["auto", "least-gap"] = "auto"
    aim: Literal["worst-group", "removal", "indifference"] = "worst-group"
    tolerance: float = 0.005
    classifier: Any = None
    anchor: bool | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_selection(self.select)
        check_anchor(self.anchor, self.select)
        if self.select == "exact" and self.rate != "auto":
            raise ValueError("rate: goes with the other selections; 'exact' finds its own dose")
        if isinstance(self.rate, str):
            if self.rate not in ("auto", "least-gap"):
                raise ValueError(
                    f"rate: {self.rate!r} given; it is 'auto', 'least-gap' or a fraction in [0, 1]"
                )
        elif isinstance(self.rate, Mapping):
            rates = {row: check_rate(rate) for row, rate in self.rate.items()}
            object.__setattr__(self, "rate", rates)
        else:
            object.__setattr__(self, "rate", check_rate(self.rate))
        if self.aim not in REASONS:
            raise ValueError(f"aim: {self.aim!r} given; it is one of {', '.join(REASONS)}")
        if (self.select, self.aim) == ("exact", "indifference"):
            raise ValueError("aim: 'indifference' goes with the other selections, not with 'exact'")
        object.__setattr__(self, "tolerance", check_tolerance(self.tolerance))
        object.__setattr__(self, "seed", check_whole(self.seed, "seed"))

    def plan(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        *,
        spurious: Attribute | Subspaces = None,
        fictitious: int | Sequence[int] | None = None,
        target: int | Sequence[int] | None = None,
        validation: Data | HeadFeatures | None = None,
    ) -> ModelEdit:
        """Plan the edit; the model is only read.

        Parameters
        ----------
        model : nn.Module
            A classifier that ends in a linear layer.
        data : iterable, Dataset or HeadFeatures
            Labelled batches, or what `xai_edit.edits.head.collect_head_features` gave. One pass.
        spurious : callable, Tensor, Subspaces or None
            The spurious feature of each sample: a function of a batch of inputs (a value a
            sample), a vector in the order of the data, a concept subspace of the last layer's
            inputs (its stronger half by two means), or the third element of the batches.
        fictitious : int or sequence of int, optional
            The value that is the fictitious class, or one for each target. When left out, of a
            feature that is yes or no, 1; of several targets the value with which each is predicted
            more often.
        target : int or sequence of int, optional
            The classes the feature speaks for. When left out, the class whose share of the
            model's predictions rises most from samples without the feature to samples with it.
        validation : iterable, Dataset or HeadFeatures, optional
            Where the objective is measured; ``data`` when left out. For ``aim="worst-group"`` its
            samples may all be with the feature, or all without.

        Returns
        -------
        ModelEdit
            One weight for each affected class; none, with the reason in its origin, where no rate
            raises the objective. The origin tells the worst group and the average before and
            after, both on the validation data.

        Raises
        ------
        ValueError
            If the model has no final linear layer, labels or feature are missing, no sample or
            every sample has the feature, or it raises the predictions of no class.
        """
        task = self._task(model, data, spurious, fictitious, target, validation)
        before = task.judge({})
        searching = self.select == "exact" or self.rate == "auto"
        chosen: dict[int, _Weight] = {}
        if searching and len(task.values) > 1 and self.aim == "worst-group":
            task.balanced = True  # a second start: worst groups alone end in poor optima
            balanced = self._chosen(task, {}, ROUNDS)
            task.balanced = False
            starts = [self._chosen(task, start, ROUNDS) for start in ({}, balanced)]
            chosen = max(starts, key=lambda start: task.judge(start)["objective"])
        else:
            chosen = self._chosen(task, {}, ROUNDS if searching else 1)
        after = task.judge(chosen)
        helped = self.aim != "worst-group" or after["worst_group"] > before["worst_group"]
        if searching and not helped:
            chosen, after = {}, before
        origin = {
            "operator": "FictitiousClass",
            "select": self.select,
            "rate": (
                {str(row): self.rate[row] for row in task.values}  # as JSON has it
                if isinstance(self.rate, Mapping)
                else self.rate
            ),
            "aim": self.aim,
            "samples": len(task.head.features),
            **{name: {"before": before[name], "after": after[name]} for name in after},
        }
        del origin["objective"]
        if not chosen:
            origin["reason"] = f"no edit of one weight {REASONS[self.aim]} on validation data"
        rows = [
            {
                "class": row,
                "column": weight.column,
                "weight": float(task.head.weight[row, weight.column]) + weight.dose,
                **({} if weight.rate is None else {"rate": weight.rate}),
            }
            for row, weight in chosen.items()
        ]
        anchor = False if self.select == "exact" else self.anchor
        return head_edit(model, task.head, rows, origin, anchor=anchor)

    def sweep(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        *,
        spurious: Attribute | Subspaces = None,
        fictitious: int | Sequence[int] | None = None,
        target: int | Sequence[int] | None = None,
        validation: Data | HeadFeatures | None = None,
        rates: Sequence[float] | None = None,
    ) -> list[RateSweep]:
        """Return the whole course over rates for each affected class.

        One feature pass over each data set, no forward pass a rate. Each class is swept with the
        others unedited. Not for ``select="exact"``, which goes by dose.

        Parameters
        ----------
        model, data, spurious, fictitious, target, validation
            As for `plan`.
        rates : sequence of float in [0, 1], optional
            To measure at. When left out, a grid over [0, 1] and a logarithmic one about the rate
            at which the weight crosses zero.
        """
        if rates is not None:
            rates = [check_rate(rate) for rate in rates]
            if not rates:
                raise ValueError("rates: none given; give one or more, or leave it out for a grid")
        if self.select == "exact":
            raise ValueError("select: 'exact' finds its own dose; a sweep needs another selection")
        task = self._task(model, data, spurious, fictitious, target, validation)
        task.rates = rates
        return [self._sweep(task, row, task.logits({})) for row in task.values]

    def _task(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        spurious: Attribute | Subspaces,
        fictitious: int | Sequence[int] | None,
        target: int | Sequence[int] | None,
        validation: Data | HeadFeatures | None,
    ) -> _Task:
        if isinstance(spurious, Subspaces):
            head = head_features(model, data)
            point = split_point(concept_strength(spurious, head.features))

            def told(features: HeadFeatures) -> Tensor:
                return (concept_strength(spurious, features.features) > point).long()

            attribute = _checked(told(head))
            judged = (
                head if validation is None else head_features(model, validation, name="validation")
            )
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
        if isinstance(self.rate, Mapping) and not {*rows} <= {*self.rate}:
            raise ValueError(f"rate: of classes {[*self.rate]} given; classes {rows} are edited")
        has = (judged_attribute[:, None] == torch.tensor(wanted)).any(1)
        labels = judged.require_labels()
        floor = None
        one_kind = len(judged_attribute.unique()) < 2
        if one_kind if self.aim == "indifference" else self.aim == "removal" and has.all():
            raise ValueError("validation: needs samples with and without the feature")
        if self.aim == "removal":
            before = (judged.logits().argmax(1) == labels).double()
            floor = float(before[~has].mean()) - self.tolerance
        cells = (int(judged_attribute.max()) + 1) * labels + judged_attribute
        groups = cells.unique(return_inverse=True)[1]
        values = dict(zip(rows, wanted, strict=True))
        indifferent = self.aim == "indifference"
        return _Task(
            *(head, attribute, judged, judged_attribute, groups, has.long()),
            *(values, floor, indifferent),
        )

    def _chosen(self, task: _Task, start: Mapping[int, _Weight], rounds: int) -> dict[int, _Weight]:
        """Choose the weight of each row beside the others, again while the objective rises."""
        chosen = dict(start)
        reached = task.judge(chosen)["objective"]
        for _ in range(rounds):
            helped = False
            for row in task.values:
                others = {at: weight for at, weight in chosen.items() if at != row}
                found = self._weight(task, row, task.logits(others))
                score = task.judge(others | {row: found})["objective"]
                if rounds > 1 and score <= reached:
                    continue
                chosen[row], reached, helped = found, score, True
            if not helped:
                break
        return chosen

    def _weight(self, task: _Task, row: int, logits: Tensor) -> _Weight:
        if self.select == "exact":
            groups, objective = task.exact
            column, dose, _ = best_dose(task.judged, row, groups, objective, logits=logits)
            return _Weight(column, dose)
        sweep = self._sweep(task, row, logits)
        if self.rate == "auto":
            at = sweep.best
        else:
            at = sweep.least_gap if self.rate == "least-gap" else len(sweep.rates) - 1
        return _Weight(sweep.column, float(sweep.doses[at]), sweep.anchor, float(sweep.rates[at]))

    def _sweep(self, task: _Task, row: int, logits: Tensor) -> RateSweep:
        assert self.select != "exact"
        column = task.columns.get(row)
        if column is None:
            column = task.columns[row] = fictitious_column(
                task.head,
                task.attribute,
                task.values[row],
                row,
                select=self.select,
                classifier=self.classifier,
                seed=self.seed,
            )
        weights = task.head.weight[row].double()
        crossing = float(weights[column] ** 2 / (weights @ weights + 1))
        if task.rates is not None:
            rates = np.unique(task.rates)
        elif isinstance(self.rate, str):
            logarithmic = crossing * np.logspace(-2, 3, 101)
            rates = np.union1d(np.linspace(0, 1, 101), logarithmic[logarithmic <= 1])
        else:
            rate = self.rate[row] if isinstance(self.rate, Mapping) else self.rate
            rates = np.array([0.0, rate])
        doses = torch.tensor(
            [float(orthogonal_weight(weights, column, rate) - weights[column]) for rate in rates],
            dtype=torch.double,
        )
        fixed = anchor_point(task.head, column, self.anchor, raised=bool(doses[-1] > 0)) or 0.0
        x = task.judged.features[:, column].double() - fixed
        labels = task.judged.require_labels()
        best_other, rival = strongest_other(logits, row)
        as_row = wins(logits[:, row] + doses[:, None] * x, best_other, row, rival)  # (R, samples)
        right = torch.where(as_row, labels == row, labels == rival)
        accuracy = torch.stack([_group_means(at_rate, task.groups) for at_rate in right])
        with_it = task.judged_attribute == task.values[row]
        removed, retained = (
            right[:, samples].double().mean(1) if samples.any() else None
            for samples in (with_it, ~with_it)
        )
        rest = logits.clone()
        rest[:, row] = -torch.inf
        probability = (logits[:, row] + doses[:, None] * x - rest.logsumexp(1)).sigmoid()
        raised = None
        if removed is not None and retained is not None:
            raised = probability[:, with_it].mean(1) - probability[:, ~with_it].mean(1)
        objective = task.of_groups(accuracy)
        if task.floor is not None:
            parted = torch.stack([_group_means(at_rate, task.has) for at_rate in right])
            objective = removal(task.floor)(parted)
        if task.indifferent and raised is not None:
            objective = -raised.clamp(min=0)
        return RateSweep(
            row,
            column,
            torch.from_numpy(rates),
            doses,
            fixed,
            accuracy,
            right.double().mean(1),
            removed,
            retained,
            raised,
            objective,
        )


@dataclass(frozen=True)
class _Weight:
    """A weight of a row, what is added to it, and where the edit is anchored."""

    column: int
    dose: float
    anchor: float = 0.0
    rate: float | None = None


@dataclass(eq=False)
class _Task:
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

    def logits(self, chosen: Mapping[int, _Weight]) -> Tensor:
        """Return the judged samples' logits with some weights edited."""
        logits = self.before.clone()
        for row, weight in chosen.items():
            x = self.judged.features[:, weight.column].double()
            logits[:, row] += weight.dose * (x - weight.anchor)
        return logits

    def judge(self, chosen: Mapping[int, _Weight]) -> dict[str, float]:
        """Return the figures with some weights edited; "objective" is what is to rise."""
        logits = self.logits(chosen)
        right = logits.argmax(1) == self.labels
        accuracy = _group_means(right, self.groups)
        worst, average = float(accuracy.min()), float(right.double().mean())
        objective = float(self.of_groups(accuracy))
        told = {"worst_group": worst, "average": average, "objective": objective}
        if self.floor is not None:
            parted = _group_means(right, self.has)
            told |= {"retained": float(parted[0]), "removed": float(parted[1])}
            told["objective"] = float(removal(self.floor)(parted))
        if self.indifferent:
            raised = []
            for row, value in self.values.items():
                probability, with_it = logits.softmax(1)[:, row], self.judged_attribute == value
                raised.append(float(probability[with_it].mean() - probability[~with_it].mean()))
            told |= {"raised": max(raised), "objective": -sum(max(one, 0.0) for one in raised)}
        return told


def _collected(
    model: nn.Module, data: Data | HeadFeatures, spurious: Attribute, validation: Any
) -> tuple[HeadFeatures, HeadFeatures]:
    if spurious is not None and not callable(spurious):
        spurious = torch.as_tensor(spurious)
    head = head_features(model, data, attribute=spurious, with_attribute=True)
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
    return head, head_features(model, validation, attribute=own, with_attribute=True)


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


def _group_means(right: Tensor, groups: Tensor, count: int = 0) -> Tensor:
    """Return the share of right answers in each group, float64, (G,); NaN in an empty one."""
    sizes = torch.bincount(groups, minlength=count)
    return torch.bincount(groups, weights=right.double(), minlength=len(sizes)) / sizes
