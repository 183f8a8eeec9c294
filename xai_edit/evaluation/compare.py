"""How alike scorers rank units: rank correlation, overlap of the top share, deletion curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.analysis import last_weighted
from xai_edit.core.checks import distinct, fraction
from xai_edit.core.data import Data, batches, model_device, peek
from xai_edit.core.errors import UnknownLayerError
from xai_edit.core.layers import resolve_layers
from xai_edit.core.targets import Target, checked_target
from xai_edit.core.text import aligned
from xai_edit.core.wrapped import unwrapped
from xai_edit.evaluation.deletion_curve import DeletionCurve, checked_shares, curves_of
from xai_edit.lrp.lrp import LRP, Scorer, describe
from xai_edit.scoring.unit_scores import Aggregate, UnitScores, score_units, share_of

Scorers: TypeAlias = Mapping[str, Scorer | str] | Sequence[Scorer | str]
"""Name → scorer, or scorers that name themselves; a word is the preset of an LRP rule."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Agreement of several scorers on the ranking of units in some layers.

    Attributes
    ----------
    scores : dict of UnitScores
        Scorer → its scores, in the order of all rows and columns.
    share : float
        The top share of units that ``overlap`` compares.
    rank_correlation, overlap : dict of Tensor, float64, shape (scorers, scorers)
        Layer → Spearman's correlation of each two scorers, and the share of top units that they
        have in common, about ``share`` for unrelated rankings. NaN where one gives all units the
        same score.
    deletion : dict of dict of DeletionCurve
        Layer → scorer → curve; empty without ``deletion``.

    Examples
    --------
    >>> scorers = {"logit": "epsilon", "one": xe.LRP("epsilon", initial="one")}
    >>> compared = xe.compare_scorers(model, data, scorers, target=0)
    >>> compared.layers, compared.overlap["fc1"].diag()
    (['conv', 'fc1', 'fc2'], tensor([1., 1.], dtype=torch.float64))
    """

    scores: dict[str, UnitScores]
    share: float
    rank_correlation: dict[str, Tensor]
    overlap: dict[str, Tensor]
    deletion: dict[str, dict[str, DeletionCurve]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The scorers' names."""
        return [*self.scores]

    @property
    def layers(self) -> list[str]:
        """The layers' names."""
        return [*self.rank_correlation]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values, NaN as None; `UnitScores.save` keeps the scores."""
        layers: dict[str, Any] = {}
        for layer, correlation in self.rank_correlation.items():
            curves = {name: one.to_dict() for name, one in self.deletion.get(layer, {}).items()}
            figures = {
                "rank_correlation": _json(correlation),
                "overlap": _json(self.overlap[layer]),
            }
            layers[layer] = {**figures, "deletion": curves}
        origins = {name: scores.origin for name, scores in self.scores.items()}
        return {"scorers": origins, "share": self.share, "layers": layers}

    def __str__(self) -> str:
        top = f"share of its top {self.share:.0%} in common"
        lines = [f"rank correlation with {self.names[0]} / {top}"]
        rows = [["", *self.names]]
        for layer in self.layers:
            pairs = zip(self.rank_correlation[layer][0], self.overlap[layer][0], strict=True)
            rows.append([layer, *(f"{rho:.3f} / {common:.2f}" for rho, common in pairs)])
        lines.append(aligned(rows))
        if self.deletion:
            lines.append("mean accuracy while the top units are switched off, lower is better")
            rows = [["", *self.names]]
            for layer, curves in self.deletion.items():
                rows.append([layer, *(f"{curve.area:.3f}" for curve in curves.values())])
            lines.append(aligned(rows))
        return "\n".join(lines)


def compare_scorers(
    model: nn.Module,
    data: Data | None,
    scorers: Scorers,
    *,
    layers: Sequence[str] | str | None = None,
    target: Target = "label",
    share: float = 0.1,
    aggregate: Aggregate = "sum",
    deletion: Sequence[float] | None = None,
    deletion_layers: Sequence[str] | str | None = None,
    held_out: Data | None = None,
) -> Comparison:
    """Score the same samples with several scorers and compare their rankings.

    ``layers``, ``target`` and ``aggregate`` are as for `score_units`.

    Parameters
    ----------
    data : iterable or Dataset, or None
        Read once: each batch goes to every scorer. For a class as ``target``, samples of it.
    scorers : mapping or sequence
        Name → scorer, or scorers under their own names; ``"epsilon"`` is ``LRP("epsilon")``.
    share : float in (0, 1]
        The top share of each layer that is compared.
    deletion : sequence of float, optional
        Shares of a deletion curve for each scorer; needs ``held_out``.
    deletion_layers : sequence of str, optional
        Layers that get a curve, one each. Default: all but the output.
    held_out : iterable or Dataset, optional
        Labelled samples for the curves, other than ``data``, read once. Errors as for
        `deletion_curve`.

    Examples
    --------
    >>> compared = xe.compare_scorers(model, data, ["epsilon", xe.Taylor()], target=0, share=1 / 32)
    >>> compared.names, compared.overlap["fc1"]
    (['epsilon', 'Taylor()'], tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64))
    """
    named = named_scorers(scorers)
    fraction(share, "share")
    model = unwrapped(model)
    known = resolve_layers(model, layers)
    target = checked_target(target)
    if (deletion is None) != (held_out is None) or (deletion is None and deletion_layers):
        raise ValueError("deletion: a curve needs its shares and held_out data; give both or none")
    shares = () if deletion is None else checked_shares(deletion)
    chosen = None if deletion_layers is None else resolve_layers(model, deletion_layers)
    for name in chosen or ():
        if name not in known:
            raise UnknownLayerError.of(name, known, "compared layers")
    scores = _scored(model, data, named, layers, {"target": target, "aggregate": aggregate})
    names = next(iter(scores.values())).layers
    rows = {layer: torch.stack([one[layer] for one in scores.values()]) for layer in names}
    curves: dict[str, dict[str, DeletionCurve]] = {}
    if held_out is not None:
        first, held_out = peek(held_out, model_device(model))
        output = last_weighted(model, first.inputs[:1])
        measured = {"target": target if isinstance(target, int) else None, "shares": shares}
        found = chosen or [name for name in names if name != output]
        curves = _curves(model, held_out, scores, found, measured)
    correlation = {layer: rank_correlation(rows[layer]) for layer in names}
    overlap = {layer: top_overlap(rows[layer], share) for layer in names}
    return Comparison(scores, share, correlation, overlap, curves)


def rank_correlation(rows: Tensor) -> Tensor:
    """Return Spearman's correlation of each two rows, shape (rows, rows); NaN for a constant one.

    ``rows`` has shape (rows, units). Tied scores share their mean rank.
    """
    from scipy.stats import rankdata  # takes long to import

    ranks: Tensor = torch.from_numpy(rankdata(rows.numpy(), axis=1))
    ranks = ranks - ranks.mean(1, keepdim=True)
    ranks = ranks / ranks.norm(dim=1, keepdim=True)  # 0/0 = NaN where all scores are equal
    return (ranks @ ranks.T).clamp(-1, 1)


def top_overlap(rows: Tensor, share: float) -> Tensor:
    """Return the share of top units that each two rows have in common; NaN for a constant one."""
    count = share_of(rows.shape[1], share)
    top = torch.argsort(rows, dim=1, descending=True, stable=True)[:, :count]
    chosen = torch.zeros_like(rows).scatter_(1, top, 1.0)
    chosen[(rows == rows[:, :1]).all(1)] = torch.nan
    return chosen @ chosen.T / count


def named_scorers(scorers: Scorers) -> dict[str, Scorer]:
    """Return the scorers by name; raise where there are none or two of one name."""
    if isinstance(scorers, str) or not isinstance(scorers, (Mapping, Sequence)):
        raise TypeError(f"scorers: {scorers!r} given; give several in a list, or name → scorer")
    if isinstance(scorers, Mapping):
        pairs = list(scorers.items())
    else:
        pairs = [(one if isinstance(one, str) else describe(one), one) for one in scorers]
    names = [name for name, _ in pairs]
    distinct(names, "scorers", "give one or more, each under its own name")
    return {name: LRP(one) if isinstance(one, str) else one for name, one in pairs}


def _scored(
    model: nn.Module,
    data: Data | None,
    named: dict[str, Scorer],
    layers: Sequence[str] | str | None,
    options: dict[str, Any],
) -> dict[str, UnitScores]:
    """Score batch by batch, so that every scorer sees the same samples, also of an iterator."""
    scores: dict[str, UnitScores] = {}
    reading = [name for name, scorer in named.items() if getattr(scorer, "needs_data", True)]
    for batch in batches(data, model_device(model)) if reading and data is not None else ():
        for name in reading:
            one = [(batch.inputs, batch.labels)]
            part = score_units(model, one, named[name], layers=layers, **options)
            scores[name] = scores[name].merge(part) if name in scores else part
            layers = part.layers  # without unused layers, where none were named
    for name in named:
        if name not in scores:
            scores[name] = score_units(model, None, named[name], layers=layers, **options)
    return {name: scores[name] for name in named}


def _curves(
    model: nn.Module,
    data: Data,
    scores: dict[str, UnitScores],
    layers: Sequence[str],
    options: dict[str, Any],
) -> dict[str, dict[str, DeletionCurve]]:
    """Measure the curve of each different ranking once; return them by layer and scorer."""
    orders = {
        (layer, name): (layer, *one.rank(layer).tolist())
        for layer in layers
        for name, one in scores.items()
    }
    different = {order: (scores[name], layer) for (layer, name), order in orders.items()}
    found = curves_of(model, data, [*different.values()], **options)
    curves = dict(zip(different, found, strict=True))
    return {layer: {name: curves[orders[layer, name]] for name in scores} for layer in layers}


def _json(matrix: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in matrix.tolist()]
