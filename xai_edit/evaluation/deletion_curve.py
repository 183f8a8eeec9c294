"""Deletion curves: accuracy while the highest-ranked units are switched off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from scipy.integrate import trapezoid
from torch import nn

from xai_edit.core.analysis import following_batch_norms, last_weighted
from xai_edit.core.checks import ascending, fraction, one_of, readable_again, with_labels
from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict, resolve_layers, run
from xai_edit.core.outputs import as_logits, evidence, outputs_of
from xai_edit.core.targets import class_list
from xai_edit.core.text import Plain
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.edits.switching_off import all_silencing_entries
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
        return float(trapezoid(self.accuracy, self.shares)) / (self.shares[-1] - self.shares[0])

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
        A classifier. Each share is applied as a `ModelEdit` and undone, bit for bit.
    data : iterable or Dataset
        Labelled batches, read once a share; other samples than those that were scored. TypeError
        if they can be read only once.
    layers : sequence of str, optional
        Scored layers whose units are switched off, a share of each. Default: all but the output.
    target : int, optional
        Measure the samples of this class and those of the others separately.
    shares : sequence of float in [0, 1]
        Ascending. Of each layer's units, rounded, at least one where the share is not 0.
    order : {"most", "least"}
        Highest score first, or lowest: with signed scores, units that speak against the target.
    """
    shares = checked_shares(shares)
    one_of(order, ("most", "least"), "order")
    readable_again(data, "a curve")
    sample = peek(data, model_device(model))[0].inputs[:1]
    if target is not None:
        with preserved(model), torch.no_grad():
            (target,) = class_list(target, predict(model, sample).shape[1])
    output = last_weighted(model, sample)
    scored = [name for name in scores if name != output]
    names = resolve_layers(model, scored if layers is None else layers)
    if output in names:
        raise ValueError(f"layers: {output!r} gives the output; its units are the classes")
    for name in names:
        if len(scores[name]) != (width := len(unit_weights(model, name))):
            raise ValueError(f"scores: {len(scores[name])} for the {width} units of layer {name!r}")
    norms = following_batch_norms(model, sample, names)
    ranked = {name: scores.rank(name) for name in names}
    if order == "least":
        ranked = {name: units.flip(0) for name, units in ranked.items()}
    points = []
    for share in shares:
        counts = {name: share_of(len(units), share) for name, units in ranked.items() if share}
        off = {name: units[: counts.get(name, 0)] for name, units in ranked.items()}
        entries = all_silencing_entries(model, off, norms)
        values = {name: (at, torch.zeros(len(at))) for name, at in entries.items()}
        with ModelEdit.between(model, values, {}).applied(model):
            points.append((sum(map(len, off.values())), *_measure(model, data, target)))
    units, accuracy, logit, probability, rest = zip(*points, strict=True)
    figures = units, accuracy, logit, probability, None if None in rest else rest
    return DeletionCurve(tuple(names), target, order, shares, *figures)


def checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of a curve as plain numbers, or raise ValueError."""
    works = "give two or more, ascending"
    return ascending(shares, "shares", partial(fraction, zero=True), works, least=2)


def _measure(
    model: nn.Module, data: Data, target: int | None
) -> tuple[float, float, float, float | None]:
    """Return accuracy, mean logit and probability of the samples measured, accuracy of the rest."""
    own, rest = torch.zeros(2, 4, dtype=torch.float64)
    with preserved(model), torch.no_grad():
        for batch in batches(data, model_device(model)):
            outputs = outputs_of(run(model, batch.inputs), batch.inputs)
            logits, explained = (one(outputs).cpu().double() for one in (as_logits, evidence))
            labels = with_labels(batch.labels, logits.shape[1]).cpu()
            right, at = logits.argmax(1) == labels, (torch.arange(len(labels)), labels)
            rows = [torch.ones_like(right), right, explained[at], logits.softmax(1)[at]]
            figures = torch.stack([row.double() for row in rows])  # (4, samples)
            of_target = labels == (labels if target is None else target)
            own += figures[:, of_target].sum(1)
            rest += figures[:, ~of_target].sum(1)
    if not own[0]:
        raise ValueError(f"data: no samples of class {target}")
    accuracy, logit, probability = (own[1:] / own[0]).tolist()
    return accuracy, logit, probability, float(rest[1] / rest[0]) if rest[0] else None
