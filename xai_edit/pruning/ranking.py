"""Ranking of coupled channels by the scores of their layers, and the lowest share of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_edit.core.errors import UnknownLayerError
from xai_edit.pruning.coupled_channels import ChannelGroup
from xai_edit.scoring.unit_scores import UnitScores, share_of

Ranking = Literal["global", "local"]
STAYS = "it only makes a gate and has no relevance, so all its units stay"
GOES = "it only makes a gate; its units go with those of"


@dataclass(frozen=True, eq=False)
class Prunable:
    """The groups of coupled units that may be pruned."""

    groups: tuple[ChannelGroup, ...]
    layers: tuple[str, ...]  # whose scores rank the units
    fixed: dict[str, str]  # by layer that has to stay, the reason
    gates: frozenset[str] = frozenset()  # layers that may only make a gate; see `kept_gates`


def width(group: ChannelGroup) -> int:
    """Return the number of channels of a unit in all layers of its group."""
    return sum(channels.shape[1] for channels in group.layers.values())


def prunable(
    groups: Sequence[ChannelGroup],
    layers: Sequence[str],
    *,
    protect: Sequence[str] = (),
    named: bool = False,
    gates: frozenset[str] = frozenset(),
) -> Prunable:
    """Return the groups that have a layer to prune and no protected one.

    UnknownLayerError if a protected layer has no channels; ValueError with the reasons if no layer
    can be pruned, or with ``named`` any of the layers cannot.
    """
    known = {name for group in groups for name in group.layers}
    for name in protect:
        if name not in known:
            raise UnknownLayerError.of(name, sorted(known), "layers with channels to prune")
    kept: list[ChannelGroup] = []
    fixed: dict[str, str] = {}
    for group in groups:
        wanted = [name for name in group.layers if name in layers]
        guarded = [name for name in group.layers if name in protect]
        reason = f"{guarded[0]!r} is protected" if guarded else group.fixed
        if reason is not None:
            fixed |= dict.fromkeys(wanted, reason)
        elif wanted:
            kept.append(group)
    free = {name for group in kept for name in group.layers}
    for name in layers:
        if name not in known:
            fixed[name] = "it takes no part in the model's forward pass"
    stay = [name for name in layers if name not in free]
    if stay and (named or not kept):
        raise ValueError(f"layers: {_why(stay, fixed)}")
    return Prunable(tuple(kept), tuple(name for name in layers if name in free), fixed, gates)


def _why(layers: Sequence[str], reasons: dict[str, str]) -> str:
    """Return a sentence that says why the channels of layers have to stay."""
    alike: dict[str, list[str]] = {}  # by the reason without the name of a module
    for name in layers:
        alike.setdefault(re.sub("'[^']*'", "", reasons[name]), []).append(name)
    parts = []
    for first, *others in alike.values():
        more = f" and {len(others)} more" if others else ""
        parts.append(f"the channels of {first!r}{more} have to stay: {reasons[first]}")
    return "; ".join(parts)


def kept_gates(found: Prunable, scores: UnitScores) -> dict[str, str]:
    """Return the layers that only make a gate, and whether they stay or go with what they gate.

    Such a layer reaches the output only as a factor of a product, and all its scores are zero, as
    a rule of relevance that takes gates for constants gives it none.
    """
    zero = {name for name in found.gates if name in scores and not scores.sums[name].any()}
    gates: dict[str, str] = {}
    for group in found.groups:
        ranked = [name for name in group.layers if name in scores and name not in zero]
        reason = f"{GOES} {ranked[0]!r}, which it gates" if ranked else STAYS
        gates |= {name: reason for name in group.layers if name in zero}
    return gates


def lowest_units(
    found: Prunable, scores: UnitScores, share: float, *, ranking: Ranking, gone: Sequence[Tensor]
) -> list[Tensor]:
    """Return the units of each group with the lowest scores, int64, without the group's best.

    A unit's score is the sum over its channels in all scored layers, each layer divided by its L1
    norm. The share is of all channels ("global") or of those of each group ("local"), met to within
    one unit, and includes the units of each group that are already ``gone``. Groups of layers that
    only make a gate (`kept_gates`) are not ranked.
    """
    ranked, sizes = [], []
    gates = kept_gates(found, scores)
    for group, pruned in zip(found.groups, gone, strict=True):
        if stays(group, gates):
            ranked.append(torch.full((group.units,), torch.inf, dtype=torch.double))
            sizes.append(torch.zeros(group.units, dtype=torch.long))
            continue
        values = torch.zeros(group.units, dtype=torch.double)
        for layer, channels in group.layers.items():
            if layer in scores:
                values += scores.normalized(layer)[channels].sum(1)
        values[pruned] = -torch.inf
        best = torch.argsort(values, descending=True, stable=True)[0]  # the first of equals
        values[best] = torch.inf
        ranked.append(values)
        sizes.append(torch.full((group.units,), width(group)))
    if ranking == "local":
        chosen = [_lowest(*group, share) for group in zip(ranked, sizes, strict=True)]
    else:
        parts = [len(values) for values in ranked]
        chosen = [*_lowest(torch.cat(ranked), torch.cat(sizes), share).split(parts)]
    return [
        before if stays(group, gates) else flags.nonzero().flatten()
        for group, before, flags in zip(found.groups, gone, chosen, strict=True)
    ]


def stays(group: ChannelGroup, gates: Mapping[str, str]) -> bool:
    """Return whether a group is not ranked, by the result of `kept_gates`."""
    return any(gates.get(name) == STAYS for name in group.layers)


def _lowest(values: Tensor, sizes: Tensor, share: float) -> Tensor:
    """Return the lowest units whose number of channels is nearest to the share, bool, (units,)."""
    order = torch.argsort(values, stable=True)
    order = order[values[order] < torch.inf]
    reached = torch.cat([torch.zeros(1, dtype=torch.long), sizes[order].cumsum(0)])
    count = int((reached - share_of(int(sizes.sum()), share)).abs().argmin())
    lowest = torch.zeros(len(values), dtype=torch.bool)
    lowest[order[:count]] = True
    return lowest


def channels_of(found: Prunable, units: Sequence[Tensor]) -> dict[str, list[int]]:
    """Return the channels of units, ascending, by layer; scored layers come first."""
    by_layer: dict[str, list[int]] = {layer: [] for layer in found.layers}
    for group, chosen in zip(found.groups, units, strict=True):
        for layer, channels in group.layers.items():
            by_layer.setdefault(layer, []).extend(channels[chosen].flatten().tolist())
    return {layer: sorted(channels) for layer, channels in by_layer.items()}
