"""What the answers to a few images tell of wrong preprocessing or another order of the classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from xai_edit.evaluation.accuracy import least_above_chance
from xai_edit.evaluation.intervals import wilson_intervals

FAR_BELOW = 0.1
MOST = 10  # answers of one class, and three times its images, are too many
LEAST = 3  # images of a class of which more than half are answered as another


def not_expected(
    labels: Tensor, answers: Tensor, classes: int, card: float, names: Mapping[int, str]
) -> str | None:
    """Return what is wrong with the answers, or None.

    Classes whose images are answered in turn as each other, an accuracy near chance or far below
    that of the weights' card, or a class that is answered far more often than it is there.

    Parameters
    ----------
    labels, answers : Tensor, int64, shape (images,)
        The classes of some images, and those that the model predicts.
    classes : int
        How many the model has.
    card : float
        The accuracy in the description of the weights, or 0.
    names : dict of int to str
        Names of classes by number.
    """
    count, right = len(labels), int((labels == answers).sum())
    if turn := _in_turn(labels, answers):
        called = ", ".join(names.get(label, str(label)) for label in turn)
        return f"and most images of {called} are answered as each other"
    if right / count <= least_above_chance(classes, count):
        return f"near chance ({1 / classes:.3f})"
    (interval,) = wilson_intervals(torch.tensor([right]), torch.tensor([count]), 0.95)
    if interval[1] < card - FAR_BELOW:
        return f"far below the {card:.3f} of the weights' card"
    there, answered = (torch.bincount(one, minlength=classes) for one in (labels, answers))
    most = int((answered - 3 * there).argmax())
    if answered[most] >= MOST and answered[most] > 3 * there[most]:
        return f"{there[most]} are of {names.get(most, most)}, and {answered[most]} answered as it"
    return None


def _in_turn(labels: Tensor, answers: Tensor) -> list[int]:
    """Return classes each of which is mostly answered as the next, and the last as the first."""
    follows = {}
    for label in labels.unique().tolist():
        own = answers[labels == label]
        other = int(own.mode().values)
        if len(own) >= LEAST and 2 * (own == other).sum() > len(own) and other != label:
            follows[label] = other
    for first in follows:
        turn = [first]
        while (label := follows.get(turn[-1])) is not None and label not in turn:
            turn.append(label)
        if label == first:
            return turn
    return []
