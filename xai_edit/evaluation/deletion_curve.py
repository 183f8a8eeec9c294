"""Deletion curves: accuracy while the highest-ranked units are switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import following_batch_norms, last_weighted
from xai_edit.core.checks import ascending, fraction, one_of, with_labels
from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict, resolve_layers, run
from xai_edit.core.outputs import as_logits, evidence, outputs_of
from xai_edit.core.targets import class_list
from xai_edit.core.text import Plain
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.switching_off import switched_off
from xai_edit.scoring.criteria import unit_weights
from xai_edit.scoring.unit_scores import UnitScores, share_of

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class DeletionCurve(Plain):
    """Accuracy, logit and probability while more and more units are switched off.

    With a good ranking, most relevant units first, ``accuracy`` and ``logit`` fall early; with one
    of a class ``rest`` stays.

    Attributes
    ----------
    layers : tuple of str
    target : int or None
    order : str
        As given to `deletion_curve`.
    shares, units : tuple of float, tuple of int
        The share and the number of units that are off.
    accuracy, logit, probability : tuple of float
        Accuracy, mean logit and mean probability of the label, over the samples of the target. Of
        one logit z, that of class 0 is −z.
    rest : tuple of float, or None
        Accuracy over the samples of all other classes, where there are some.

    Examples
    --------
    >>> scores = xe.score_units(model, data, xe.LRP("epsilon"), target=1)
    >>> curve = xe.deletion_curve(model, data, scores, layers=["fc1"], target=1, shares=[0, 1 / 32])
    >>> curve.accuracy, curve.rest
    ((0.75, 0.0), (0.875, 0.875))
    """

    layers: tuple[str, ...]
    target: int | None
    order: str
    shares: tuple[float, ...]
    units: tuple[int, ...]
    accuracy: tuple[float, ...]
    logit: tuple[float, ...]
    probability: tuple[float, ...]
    rest: tuple[float, ...] | None

    @property
    def area(self) -> float:
        """Mean accuracy over the shares; lower is better, higher with ``order="least"``."""
        heights, at = torch.tensor([self.accuracy, self.shares], dtype=torch.float64)
        return float(torch.trapezoid(heights, at) / (at[-1] - at[0]))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, the area too, as JSON values."""
        return {**super().to_dict(), "area": self.area}


def deletion_curve(
    model: nn.Module,
    data: Data,
    scores: UnitScores,
    *,
    layers: Sequence[str] | str | None = None,
    target: int | None = None,
    shares: Sequence[float] = SHARES,
    order: Literal["most", "least"] = "most",
) -> DeletionCurve:
    """Switch off the top units, at several shares, and measure accuracy, logit and probability.

    Samek et al. 2017, *Evaluating the visualization of what a deep neural network has learned*,
    with units in the place of pixels. A unit is off when its incoming weights and its bias are
    zero, and so are the scale and the shift of a batch norm that follows.

    Parameters
    ----------
    model : nn.Module
        A classifier. Its units are off during a batch, then it is as it was, bit for bit.
    data : iterable or Dataset
        Labelled batches, read once; other samples than those that were scored.
    layers : sequence of str, optional
        Scored layers whose units are switched off, a share of each. Default: all but the output.
    target : int, optional
        Measure the samples of this class and those of the others separately.
    shares : sequence of float in [0, 1]
        Ascending. Of each layer's units, rounded, at least one where the share is not 0.
    order : {"most", "least"}
        Highest score first, or lowest: with signed scores, units that speak against the target.

    Examples
    --------
    >>> scores = xe.score_units(model, data, xe.LRP("epsilon"))
    >>> shares = [0.0, 1 / 32, 1.0]
    >>> curve = xe.deletion_curve(model, data, scores, layers=["conv"], shares=shares)
    >>> curve.units
    (0, 1, 32)
    """
    return curves_of(model, data, [(scores, layers)], target=target, shares=shares, order=order)[0]


def curves_of(
    model: nn.Module,
    data: Data,
    rankings: Sequence[tuple[UnitScores, Sequence[str] | str | None]],
    *,
    target: int | None,
    shares: Sequence[float],
    order: Literal["most", "least"] = "most",
) -> list[DeletionCurve]:
    """Return the `deletion_curve` of the scores and layers of each ranking, from one pass."""
    shares = checked_shares(shares)
    one_of(order, ("most", "least"), "order")
    model = unwrapped(model)
    first, data = peek(data, model_device(model))
    sample = first.inputs[:1]
    if target is not None:
        with preserved(model), torch.no_grad():
            (target,) = class_list(target, predict(model, sample).shape[1])
    output = last_weighted(model, sample)
    ranked = [_ranked(model, scores, layers, output, order) for scores, layers in rankings]
    off = [
        {name: units[: share_of(len(units), share) if share else 0] for name, units in one.items()}
        for one in ranked
        for share in shares
    ]
    norms = following_batch_norms(model, sample, [*{name: 0 for one in ranked for name in one}])
    points = _points(model, data, off, norms, target)
    curves = []
    for one in ranked:
        own = [(sum(map(len, off.pop(0).values())), *points.pop(0)) for _ in shares]
        units, accuracy, logit, probability, rest = zip(*own, strict=True)
        figures = units, accuracy, logit, probability, None if None in rest else rest
        curves.append(DeletionCurve(tuple(one), target, order, shares, *figures))
    return curves


def checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of a curve as plain numbers, or raise ValueError."""
    works = "give two or more, ascending"
    return ascending(shares, "shares", partial(fraction, zero=True), works, least=2)


def _ranked(
    model: nn.Module,
    scores: UnitScores,
    layers: Sequence[str] | str | None,
    output: str | None,
    order: Literal["most", "least"],
) -> dict[str, Tensor]:
    """Return the units of each layer in the order in which they are switched off."""
    scored = [name for name in scores if name != output]
    names = resolve_layers(model, scored if layers is None else layers)
    if output in names:
        raise ValueError(f"layers: {output!r} gives the output; its units are the classes")
    for name in names:
        if len(scores[name]) != (width := len(unit_weights(model, name))):
            raise ValueError(f"scores: {len(scores[name])} for the {width} units of layer {name!r}")
    ranked = {name: scores.rank(name) for name in names}
    return ranked if order == "most" else {name: one.flip(0) for name, one in ranked.items()}


Point: TypeAlias = tuple[float, float, float, float | None]
"""Accuracy, mean logit and probability of the samples measured, accuracy of the rest."""


def _points(
    model: nn.Module,
    data: Data,
    off: Sequence[Mapping[str, Tensor]],
    norms: Mapping[str, str],
    target: int | None,
) -> list[Point]:
    """Return what is measured with each of several choices of units off; data is read once."""
    own, rest = torch.zeros(2, len(off), 4, dtype=torch.float64)
    with preserved(model), torch.no_grad():
        for batch in batches(data, model_device(model)):
            for at, units in enumerate(off):
                with switched_off(model, units, norms):
                    outputs = outputs_of(run(model, batch.inputs), batch.inputs)
                logits, explained = (one(outputs).cpu().double() for one in (as_logits, evidence))
                labels = with_labels(batch.labels, logits.shape[1]).cpu()
                right, row = logits.argmax(1) == labels, (torch.arange(len(labels)), labels)
                rows = [torch.ones_like(right), right, explained[row], logits.softmax(1)[row]]
                figures = torch.stack([one.double() for one in rows])  # (4, samples)
                of_target = labels == (labels if target is None else target)
                own[at] += figures[:, of_target].sum(1)
                rest[at] += figures[:, ~of_target].sum(1)
    if not own[0, 0]:
        raise ValueError(f"data: no samples of class {target}")
    points: list[Point] = []
    for mine, other in zip(own.tolist(), rest.tolist(), strict=True):
        accuracy, logit, probability = (figure / mine[0] for figure in mine[1:])
        points.append((accuracy, logit, probability, other[1] / other[0] if other[0] else None))
    return points
