"""Fictitious class removal: a spurious feature as a class of its own, removed by one weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.checks import fraction, one_of, require, whole_number
from xai_edit.core.data import Attribute, Data
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.affected_classes import affected_classes, features_with_attribute
from xai_edit.last_layer.exact_dose import EditedWeight
from xai_edit.last_layer.head import HeadFeatures
from xai_edit.last_layer.objective import Aim, EditObjective, Weights, best_weights, exact_weights
from xai_edit.last_layer.rate_sweep import RateSweep, rate_sweep
from xai_edit.last_layer.regression import one_row_a_class
from xai_edit.last_layer.single_weight import check_choices, dosed, editable, head_edit
from xai_edit.last_layer.weight_selection import Selection, most_significant, selection_scores

EFFECTS = {
    "worst-group": "raises the worst group",
    "removal": "lowers the accuracy on the samples with the feature and keeps that on the others",
    "indifference": "lowers what the feature adds to the class's probability",
}


@dataclass(frozen=True)
class FictitiousClass:
    """Neutralise a classifier's reliance on a spurious feature, by one weight an affected class.

    Hakemi et al., *Post-hoc Spurious Correlation Neutralization with Single-Weight Fictitious
    Class Unlearning*, Algorithm 2: a copy of the last layer learns the feature as a class of its
    own; the edge that serves it most (SCA, Eq. 6) is edited in the model itself, in the row of the
    class that the feature goes with. "auto" and "exact" need samples of every (class, feature)
    group.

    Parameters
    ----------
    select : str
        "sca" is the paper's selection with the edit of Eq. 8; others as for `SingleWeight`.
        "exact", ours, takes the weight and dose with the highest objective, without a copy.
    rate : "auto", "least-gap", float in [0, 1] or mapping of class to float
        Neutralisation rate r of Eq. 8. "auto" takes, row by row, the rate with the highest
        objective on the validation data; "least-gap", the paper's choice, the one with the least
        gap between average and worst-group accuracy, which a collapsed model has too.
    aim : {"worst-group", "removal", "indifference"}
        The objective. "worst-group": its accuracy. "removal", of a sub-class: a low accuracy with
        the feature, while that without it falls by at most ``tolerance``, a fraction.
        "indifference", for the same samples with and without the feature: it no longer raises the
        mean probability of the class; not with "exact".
    tolerance, anchor, seed
        As for `SingleWeight`.

    Examples
    --------
    >>> operator = xe.FictitiousClass(select="exact")
    >>> edit = operator.plan(model, data, attribute=attribute)
    >>> edit.size, edit.changes["fc2.weight"].position(0)
    (1, [0, 3])
    >>> with edit.applied(model):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    """

    select: Selection = "sca"
    rate: float | Mapping[int, float] | Literal["auto", "least-gap"] = "auto"
    aim: Aim = "worst-group"
    tolerance: float = 0.005
    anchor: bool | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self.select, self.anchor, self.rate, "auto")
        rate: Any = self.rate
        if isinstance(rate, str):
            works = "it is 'auto', 'least-gap' or a fraction in [0, 1]"
            require(rate in ("auto", "least-gap"), "rate", rate, works)
        elif isinstance(rate, Mapping):
            rate = {row: fraction(one, "rate", zero=True) for row, one in rate.items()}
        else:
            rate = fraction(rate, "rate", zero=True)
        one_of(self.aim, EFFECTS, "aim")
        if (self.select, self.aim) == ("exact", "indifference"):
            raise ValueError("aim: 'indifference' goes with the other selections, not with 'exact'")
        tolerance = fraction(self.tolerance, "tolerance", zero=True)
        vars(self).update(rate=rate, tolerance=tolerance, seed=whole_number(self.seed, "seed"))

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
        """Plan at most one weight for each affected class; model and data as for `SingleWeight`.

        Of one logit both classes have one row: the weight is for the class that the feature's
        highest value speaks for.

        The edit's origin has the figures before and after on the validation data, the classes left
        alone and why, with "exact" what `SingleWeight` reports, and the reason where no rate raises
        the objective.

        Parameters
        ----------
        attribute : callable, Tensor, Subspaces or None
            The feature: see `xai_edit.core.data.Attribute`; or a concept subspace of the last
            layer's inputs, whose stronger half by two means has the feature. ValueError if no
            sample has it, or every one.
        fictitious : int or sequence of int, optional
            The value that is the fictitious class, or one for each target. When left out, for an
            attribute of 0 and 1: without a target the value that speaks for each class; with one
            target 1; with several the value with which each is predicted more often.
        target : int or sequence of int, optional
            The classes the feature speaks for. When left out, for an attribute of 0 and 1, every
            class whose logit it moves (`affected_classes.moved_classes`); for ``aim="removal"``
            and an attribute of more values, the class whose share of the model's predictions rises
            most with each value of ``fictitious``. ValueError if the feature moves no class.
        validation : iterable, Dataset or HeadFeatures, optional
            Where the objective is measured; ``data`` when left out.
        """
        head, objective, left_alone = self._prepared(
            fictitious, target, model, data, attribute, validation
        )
        exact = self.select == "exact"
        found = exact_weights(objective) if exact else (self._weights(head, objective), {})
        weights, reported = found
        before, after = objective.figures({}), objective.figures(weights)
        rate: Any = self.rate
        if isinstance(rate, Mapping):
            rate = {str(row): rate[row] for row in objective.values}  # as JSON has it
        origin: dict[str, Any]
        origin = {"operator": "FictitiousClass", "select": self.select, "rate": rate}
        origin |= {"aim": self.aim, "samples": len(head.features)}
        origin |= {name: {"before": before[name], "after": after[name]} for name in after}
        origin |= reported
        if left_alone:
            origin["left_alone"] = left_alone
        if not weights:
            origin["reason"] = f"no edit of one weight {EFFECTS[self.aim]} on validation data"
        rows = [
            dosed(head, row, weight.column, weight.dose)
            | ({} if weight.rate is None else {"rate": weight.rate})
            for row, weight in weights.items()
        ]
        anchor = False if exact else self.anchor
        return head_edit(model, head, rows, origin, anchor=anchor)  # step 6

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
        """Return the accuracies over rates for each affected class, the others unedited.

        Arguments as for `plan`; not for ``select="exact"``. ``rates`` are in [0, 1]; the default
        has more about the rate at which the weight crosses zero, where most of the effect is.
        """
        if rates is not None:
            rates = [fraction(rate, "rates", zero=True) for rate in rates]
            require(bool(rates), "rates", rates, "give one or more, or leave it out for a grid")
        if self.select == "exact":
            raise ValueError("select: 'exact' finds its own dose; a sweep needs another selection")
        head, objective, _ = self._prepared(fictitious, target, model, data, attribute, validation)
        given: dict[str, Any] = {"rates": rates, "anchor": self.anchor, "others": {}}
        return [
            rate_sweep(head, objective, row, self._column(head, row, value), **given)
            for row, value in objective.values.items()
        ]

    def _prepared(
        self, fictitious: Any, target: Any, *samples: Any
    ) -> tuple[HeadFeatures, EditObjective, dict[str, str]]:
        """Return the planning features, the objective and the classes left alone."""
        head, judged = features_with_attribute(*samples)
        values, left_alone = affected_classes(head, fictitious, target, self.aim)
        if head.one_output and len(values) > 1:  # both classes have the one row
            if target is not None:
                raise ValueError(f"target: classes {[*values]} of one logit have one row; name one")
            other, kept = sorted(values, key=lambda row: values[row])
            left_alone[str(other)] = f"its row is that of class {kept} with the other sign"
            del values[other]
        if head.one_output and 0 in values:
            head, judged = head.mirrored(), judged.mirrored()
        if isinstance(self.rate, Mapping) and not values.keys() <= self.rate.keys():
            raise ValueError(
                f"rate: of classes {[*self.rate]} given; classes {[*values]} are edited"
            )
        return head, EditObjective(judged, values, self.aim, self.tolerance), left_alone

    def _weights(self, head: HeadFeatures, objective: EditObjective) -> Weights:
        """Return the weight of each row by Eq. 8, at the rates asked for."""
        columns = {row: self._column(head, row, value) for row, value in objective.values.items()}

        def turned(objective: EditObjective, row: int, others: Weights) -> EditedWeight:
            rate = self.rate[row] if isinstance(self.rate, Mapping) else self.rate
            given: dict[str, Any] = {"rates": None if isinstance(rate, str) else [rate]}
            given |= {"anchor": self.anchor, "others": others}
            sweep = rate_sweep(head, objective, row, columns[row], **given)
            at = sweep.least_gap if rate == "least-gap" else sweep.best
            dose, r = float(sweep.doses[at]), float(sweep.rates[at])
            return EditedWeight(sweep.column, dose, sweep.anchor, r)

        if self.rate == "auto":
            return best_weights(objective, turned)
        weights: Weights = {}
        for row in columns:
            weights[row] = turned(objective, row, weights)
        return weights

    def _column(self, head: HeadFeatures, row: int, value: int) -> int:
        """Return the feature whose edge serves the fictitious class most (steps 1 to 5).

        Its weight must add to the class's output in the model itself as well as in the copy.
        """
        assert self.select != "exact"
        assert head.attribute is not None
        x = head.features.double()  # M' is M up to here (step 1)
        if len(head.attribute.unique()) == 2:  # c̃ is one more class beside the labels (step 2)
            c = head.classes
            classes = torch.where(head.attribute == value, c, head.require_labels())
        else:  # the values are the classes of M', as the digits in odd and even
            c, classes = value, head.attribute
        present, classes = classes.unique(return_inverse=True)
        c = int(torch.searchsorted(present, c))
        W, b = fitted_last_layer(x, classes)  # steps 3 and 4
        (score,) = selection_scores(self.select, x, classes, W, b, [c], seed=self.seed)  # step 5
        mean = x[classes == c].mean(0)
        allowed = editable(head.weight[row].double(), mean) & (W[c] * mean > 0)
        return most_significant(score, allowed, 1, row)[0]


def fitted_last_layer(x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the last layer of the copy, all else frozen, and return its weight and bias."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler

    scaler, classifier = MaxAbsScaler(), LogisticRegression(max_iter=2000)
    with warnings.catch_warnings():  # many classes of one sample are no regression here
        warnings.filterwarnings("ignore", "The number of unique classes")
        classifier.fit(scaler.fit_transform(x.numpy()), classes.numpy())
    W, b = one_row_a_class(classifier.coef_ / scaler.scale_, classifier.intercept_)
    return torch.from_numpy(W), torch.from_numpy(b)
