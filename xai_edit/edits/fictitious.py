"""Fictitious class removal: a spurious feature as a class of its own, removed by one weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import Attribute, Data
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.exact import best_dose, removal, strongest_other, wins
from xai_edit.edits.fictitious_copy import fictitious_column
from xai_edit.edits.fictitious_task import Task, Weight, group_means, prepared
from xai_edit.edits.head import HeadFeatures
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
        task = self._prepared(model, data, spurious, fictitious, target, validation)
        before = task.judge({})
        searching = self.select == "exact" or self.rate == "auto"
        chosen: dict[int, Weight] = {}
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
        task = self._prepared(model, data, spurious, fictitious, target, validation)
        task.rates = rates
        return [self._sweep(task, row, task.logits({})) for row in task.values]

    def _prepared(self, *given: Any) -> Task:
        task = prepared(*given, aim=self.aim, tolerance=self.tolerance)
        rows = [*task.values]
        if isinstance(self.rate, Mapping) and not {*rows} <= {*self.rate}:
            raise ValueError(f"rate: of classes {[*self.rate]} given; classes {rows} are edited")
        return task

    def _chosen(self, task: Task, start: Mapping[int, Weight], rounds: int) -> dict[int, Weight]:
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

    def _weight(self, task: Task, row: int, logits: Tensor) -> Weight:
        if self.select == "exact":
            groups, objective = task.exact
            column, dose, _ = best_dose(task.judged, row, groups, objective, logits=logits)
            return Weight(column, dose)
        sweep = self._sweep(task, row, logits)
        if self.rate == "auto":
            at = sweep.best
        else:
            at = sweep.least_gap if self.rate == "least-gap" else len(sweep.rates) - 1
        return Weight(sweep.column, float(sweep.doses[at]), sweep.anchor, float(sweep.rates[at]))

    def _sweep(self, task: Task, row: int, logits: Tensor) -> RateSweep:
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
        accuracy = torch.stack([group_means(at_rate, task.groups) for at_rate in right])
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
            parted = torch.stack([group_means(at_rate, task.has) for at_rate in right])
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
