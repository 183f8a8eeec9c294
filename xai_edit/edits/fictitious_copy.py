"""The copy M' of Algorithm 2: its last layer has the spurious feature among its classes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_edit.edits.head import HeadFeatures
from xai_edit.edits.selection import Scored, most_significant, selection_scores
from xai_edit.edits.single_weight import editable


def fictitious_column(
    head: HeadFeatures,
    attribute: Tensor,
    fictitious: int,
    row: int,
    *,
    select: Scored = "sca",
    classifier: Any = None,
    seed: int = 0,
) -> int:
    """Return the feature whose edge serves the fictitious class most in the copy M'.

    Its weight must add to the class's output in the model itself as well as in the copy.

    Parameters
    ----------
    head : HeadFeatures
        With labels. The copy is the model up to here.
    attribute : Tensor, int64, shape (samples,)
        Of two kinds, the fictitious class is one more class beside the labels; of more (the digits
        in odd and even), the kinds are the classes of the copy.
    fictitious : int
        The value of the attribute that is the fictitious class c̃.
    row : int
        Row of the model's own head that is to be edited.
    select, seed
        See `xai_edit.edits.selection.selection_scores`.
    classifier : scikit-learn classifier, optional
        Fitted on the features, with ``coef_`` and ``intercept_``; logistic regression when left
        out.

    Raises
    ------
    ValueError
        If no weight may be edited.
    """
    labels = head.require_labels()
    if len(attribute.unique()) == 2:
        classes = torch.where(attribute == fictitious, head.classes, labels)  # step 2
        own = head.classes
    else:
        classes, own = attribute, fictitious
    present, place = classes.unique(return_inverse=True)
    x = head.features.double()
    copy, bias = _fitted(x, place, classifier)  # step 4
    own = int(torch.searchsorted(present, own))
    (score,) = selection_scores(select, x, place, copy, bias, [own], seed=seed)  # step 5
    mean = x[place == own].mean(0)
    allowed = editable(head.weight[row].double(), mean) & (copy[own] * mean > 0)
    try:
        return most_significant(score, allowed, 1, row)[0]
    except ValueError:
        raise ValueError(
            f"class {row}: no weight of its row passes the spurious feature on and is large "
            "enough to edit"
        ) from None


def _fitted(x: Tensor, place: Tensor, classifier: Any) -> tuple[Tensor, Tensor]:
    """Fit the last layer of the copy, alone (steps 3 and 4), and return its weight and bias."""
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
