"""Fictitious class removal: a spurious feature as a class of its own, removed by one weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import fraction, one_of, require, whole_number
from xai_edit.core.data import Attribute, Data
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.exact_dose import MARGINS, best_dose, best_margin
from xai_edit.last_layer.fictitious_objective import Task, Weight, prepared
from xai_edit.last_layer.head import HeadFeatures
from xai_edit.last_layer.rate_sweep import RateSweep
from xai_edit.last_layer.single_weight import (
    anchor_point,
    check_choices,
    editable,
    head_edit,
    orthogonal_weight,
)
from xai_edit.last_layer.weight_selection import Selection, most_significant, selection_scores

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
        form, and needs no copy; margin and bound as for `SingleWeight`.
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
        check_choices(self.select, self.anchor)
        if self.select == "exact" and self.rate != "auto":
            raise ValueError("rate: goes with the other selections; 'exact' finds its own dose")
        if isinstance(self.rate, str):
            works = "it is 'auto', 'least-gap' or a fraction in [0, 1]"
            require(self.rate in ("auto", "least-gap"), "rate", self.rate, works)
        elif isinstance(self.rate, Mapping):
            rates = {row: fraction(rate, "rate", zero=True) for row, rate in self.rate.items()}
            object.__setattr__(self, "rate", rates)
        else:
            object.__setattr__(self, "rate", fraction(self.rate, "rate", zero=True))
        one_of(self.aim, REASONS, "aim")
        if (self.select, self.aim) == ("exact", "indifference"):
            raise ValueError("aim: 'indifference' goes with the other selections, not with 'exact'")
        object.__setattr__(self, "tolerance", fraction(self.tolerance, "tolerance", zero=True))
        object.__setattr__(self, "seed", whole_number(self.seed, "seed"))

    def plan(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        *,
        attribute: Attribute | Subspaces = None,
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
            Labelled batches, read once, or the result of `collect_head_features`.
        attribute : callable, Tensor, Subspaces or None
            The spurious feature of each sample: a function of a batch of inputs (a value a
            sample), a vector in the order of the data, a concept subspace of the last layer's
            inputs (its stronger half by two means), or the third element of the batches.
        fictitious : int or sequence of int, optional
            The value that is the fictitious class, or one for each target. When left out, of a
            feature that is yes or no: without a target the value that speaks for each class; with
            one target 1; with several the value with which each is predicted more often.
        target : int or sequence of int, optional
            The classes the feature speaks for. When left out, of a feature that is yes or no, every
            class whose logit it moves (`fictitious_objective.moved_classes`); for
            ``aim="removal"`` and of a feature of more values, the class whose share of the model's
            predictions rises most with each value of ``fictitious``.
        validation : iterable, Dataset or HeadFeatures, optional
            Where the objective is measured; ``data`` when left out. For ``aim="worst-group"`` its
            samples may all be with the feature, or all without.

        Returns
        -------
        ModelEdit
            At most one weight for each affected class; none, with the reason in its origin, where
            no rate raises the objective. The origin has the worst group and the average before and
            after, both on the validation data, the classes left alone with the reason where no
            target is named, and with "exact" what `SingleWeight` reports.

        Raises
        ------
        ValueError
            If the model has no final linear layer, labels or feature are missing, no sample or
            every sample has the feature, or it moves no class.
        """
        task = self._prepared(model, data, attribute, fictitious, target, validation)
        if self.select == "exact":
            chosen, reported = self._by_margin(task)
        else:
            chosen, reported = self._planned(task), {}
        before, after = task.figures({}), task.figures(chosen)
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
            **reported,
        }
        if task.left_alone:
            origin["left_alone"] = task.left_alone
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
        return head_edit(model, task.head, rows, origin, anchor=anchor)  # step 6

    def sweep(
        self,
        model: nn.Module,
        data: Data | HeadFeatures,
        *,
        attribute: Attribute | Subspaces = None,
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
        model, data, attribute, fictitious, target, validation
            As for `plan`.
        rates : sequence of float in [0, 1], optional
            To measure at. When left out, a grid over [0, 1] and a logarithmic one about the rate
            at which the weight crosses zero.
        """
        if rates is not None:
            rates = [fraction(rate, "rates", zero=True) for rate in rates]
            require(bool(rates), "rates", rates, "give one or more, or leave it out for a grid")
        if self.select == "exact":
            raise ValueError("select: 'exact' finds its own dose; a sweep needs another selection")
        task = self._prepared(model, data, attribute, fictitious, target, validation)
        return [self._sweep(task, row, task.logits({}), rates) for row in task.values]

    def _prepared(self, *given: Any) -> Task:
        task = prepared(*given, aim=self.aim, tolerance=self.tolerance)
        rows = [*task.values]
        if isinstance(self.rate, Mapping) and not {*rows} <= {*self.rate}:
            raise ValueError(f"rate: of classes {[*self.rate]} given; classes {rows} are edited")
        return task

    def _planned(self, task: Task) -> dict[int, Weight]:
        """Return the weights to edit by row; none where the worst group would not rise."""
        searching = self.select == "exact" or self.rate == "auto"
        if not searching:
            return self._improved(task, {}, 1)
        if len(task.values) == 1 or self.aim != "worst-group":
            chosen = self._improved(task, {}, ROUNDS)
        else:  # a second start: worst groups alone end in poor optima
            balanced = self._improved(replace(task, balanced=True), {}, ROUNDS)
            starts = [self._improved(task, start, ROUNDS) for start in ({}, balanced)]
            chosen = max(starts, key=task.score)
        worst = [task.figures(weights)["worst_group"] for weights in ({}, chosen)]
        return {} if self.aim == "worst-group" and not worst[1] > worst[0] else chosen

    def _improved(self, task: Task, start: Mapping[int, Weight], rounds: int) -> dict[int, Weight]:
        """Choose the weight of each row beside the others, again while the objective rises."""
        chosen = dict(start)
        reached = task.score(chosen)
        rows = [*(task.values if task.fixed is None else task.fixed)]
        for _ in range(rounds):
            helped = False
            for row in rows:
                others = {at: weight for at, weight in chosen.items() if at != row}
                found = self._weight(task, row, task.logits(others))
                score = task.score(others | {row: found})
                if rounds > 1 and score <= reached:
                    continue
                chosen[row], reached, helped = found, score, True
            if not helped or len(rows) == 1:
                break
        return chosen

    def _by_margin(self, task: Task) -> tuple[dict[int, Weight], dict[str, Any]]:
        """Choose exact weights by the margin that cross-validation finds best."""

        def planned(part: Task) -> list[dict[int, Weight]]:
            edge = self._planned(part)
            fixed = {row: weight.column for row, weight in edge.items()}
            parts = [replace(part, fixed=fixed, quantile=quantile) for quantile in MARGINS[1:]]
            return [edge, *(self._improved(by_margin, {}, ROUNDS) for by_margin in parts)]

        def predicted(samples: Tensor) -> list[Tensor]:
            attribute = task.judged_attribute[samples]
            part = replace(task, judged=task.judged[samples], judged_attribute=attribute)
            return [task.logits(chosen).argmax(1) for chosen in planned(part)]

        choices = planned(task)
        best, held_out = best_margin(
            task.groups, predicted, lambda classes: task.objective(classes == task.labels)
        )
        return choices[best], {
            "cross_validated": None if held_out is None else task.accuracies(held_out),
            "margin": MARGINS[best],
            "bounded": [row for row, weight in choices[0].items() if weight.bounded],
        }

    def _weight(self, task: Task, row: int, logits: Tensor) -> Weight:
        if self.select == "exact":
            columns = None if task.fixed is None else [task.fixed[row]]
            found = best_dose(task.judged, row, *task.exact, logits=logits, columns=columns)
            return Weight(found.column, found.dose, bounded=found.bounded)
        sweep = self._sweep(task, row, logits)
        if self.rate == "auto":
            at = sweep.best
        else:
            at = sweep.least_gap if self.rate == "least-gap" else len(sweep.rates) - 1
        return Weight(sweep.column, float(sweep.doses[at]), sweep.anchor, float(sweep.rates[at]))

    def _sweep(
        self, task: Task, row: int, logits: Tensor, rates: Sequence[float] | None = None
    ) -> RateSweep:
        if row not in task.columns:
            task.columns[row] = self._column(task, row)
        column, weights = task.columns[row], task.head.weight[row].double()
        if rates is None and isinstance(self.rate, str):
            crossing = float(weights[column] ** 2 / (weights @ weights + 1))
            logarithmic = crossing * np.logspace(-2, 3, 101)
            grid = np.union1d(np.linspace(0, 1, 101), logarithmic[logarithmic <= 1])
        elif rates is None:
            grid = np.array([0.0, self.rate[row] if isinstance(self.rate, Mapping) else self.rate])
        else:
            grid = np.unique(rates)
        r = torch.from_numpy(grid)
        doses = orthogonal_weight(weights, column, r) - weights[column]  # Eq. 8
        fixed = anchor_point(task.head, column, self.anchor, raised=bool(doses[-1] > 0)) or 0.0
        return task.sweep(row, column, r, doses, fixed, logits)

    def _column(self, task: Task, row: int) -> int:
        """Return the feature whose edge serves the fictitious class most in the copy M'.

        Its weight must add to the class's output in the model itself as well as in the copy.
        """
        assert self.select != "exact"
        head, c = task.head, task.values[row]  # M' ← M (step 1), the fictitious class c̃
        if len(task.attribute.unique()) == 2:  # c̃ is one more class beside the labels (step 2)
            classes = torch.where(task.attribute == c, head.classes, head.require_labels())
            c = head.classes
        else:  # the kinds are the classes, as the digits in odd and even
            classes = task.attribute
        present, place = classes.unique(return_inverse=True)
        c = int(torch.searchsorted(present, c))
        x = head.features.double()
        W, b = last_layer(x, place, self.classifier)  # steps 3 and 4
        (score,) = selection_scores(self.select, x, place, W, b, [c], seed=self.seed)  # step 5
        mean = x[place == c].mean(0)
        allowed = editable(head.weight[row].double(), mean) & (W[c] * mean > 0)
        try:
            return most_significant(score, allowed, 1, row)[0]
        except ValueError:
            raise ValueError(
                f"class {row}: no weight of its row passes the spurious feature on and is large "
                "enough to edit"
            ) from None


def last_layer(x: Tensor, place: Tensor, classifier: Any = None) -> tuple[Tensor, Tensor]:
    """Fit the last layer of the copy, all else frozen, and return its weight and bias."""
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler

    scaler = MaxAbsScaler().fit(x.numpy())
    chosen = LogisticRegression(max_iter=2000) if classifier is None else clone(classifier)
    with warnings.catch_warnings():  # many classes of one sample are no regression here
        warnings.filterwarnings("ignore", "The number of unique classes")
        fitted = chosen.fit(scaler.transform(x.numpy()), place.numpy())
    for name in ("coef_", "intercept_"):
        if not hasattr(fitted, name):
            raise ValueError(
                f"classifier: {type(fitted).__name__} has no {name}; give a linear one such as "
                "LogisticRegression"
            )
    coefficients = fitted.coef_ / scaler.scale_
    intercept = np.broadcast_to(fitted.intercept_, len(coefficients))
    if len(fitted.classes_) == 2:  # scikit-learn then gives the row of the second class alone
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercept = np.concatenate([-intercept / 2, intercept / 2])
    return torch.from_numpy(coefficients), torch.tensor(intercept)
