"""Which units are pruned: the lowest share of coupled channels, by the scores of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_edit.core.errors import UnknownLayerError
from xai_edit.pruning.coupled_channels import ChannelGroup
from xai_edit.scoring.unit_scores import UnitScores, share_of

Ranking = Literal["global", "local"]


@dataclass(frozen=True, eq=False)
class Prunable:
    """The groups of coupled units that may be pruned.

    Attributes
    ----------
    groups : tuple of ChannelGroup
    layers : tuple of str
        Those whose scores rank the units.
    fixed : dict of str
        Layers that have to stay, and why.
    """

    groups: tuple[ChannelGroup, ...]
    layers: tuple[str, ...]
    fixed: dict[str, str]

    @property
    def channels(self) -> int:
        """The number of channels of all layers of the groups."""
        return sum(group.units * width(group) for group in self.groups)


def width(group: ChannelGroup) -> int:
    """Return how many channels a unit of a group has in all its layers together."""
    return sum(channels.shape[1] for channels in group.layers.values())


def prunable(
    groups: Sequence[ChannelGroup],
    layers: Sequence[str],
    *,
    protect: Sequence[str] = (),
    named: bool = False,
) -> Prunable:
    """Return the groups in which a layer may be pruned and none is protected.

    Parameters
    ----------
    groups : sequence of ChannelGroup
        All of a model.
    layers, protect : sequence of str
        Layers to prune, and layers that keep all channels, with those coupled to theirs.
    named : bool
        Whether a user named the layers, so that each has to be prunable.

    Raises
    ------
    UnknownLayerError
        If a protected layer has no channels that could be pruned.
    ValueError
        If a named layer cannot be pruned, or nothing can.
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
        if name not in free and (named or not kept):
            reason = fixed.get(name, "it takes no part in the model's forward pass")
            raise ValueError(f"layers: the channels of {name!r} have to stay: {reason}")
    return Prunable(tuple(kept), tuple(name for name in layers if name in free), fixed)


def lowest_units(
    found: Prunable,
    scores: UnitScores,
    share: float,
    *,
    ranking: Ranking,
    gone: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the units of each group to prune: the lowest share, never the best of a group.

    A unit's score is the sum over its channels in all scored layers, each layer divided by its L1
    norm. As units of coupled layers go together, the share is met to within one unit.

    Parameters
    ----------
    found : Prunable
    scores : UnitScores
        Of ``found.layers``.
    share : float in (0, 1]
        Of all channels ("global") or of those of each group ("local").
    ranking : {"global", "local"}
    gone : sequence of Tensor, optional
        Units of each group that are off already and stay so.

    Returns
    -------
    list of Tensor, int64
        Of each group, ascending.
    """
    ranked, sizes = [], []
    for at, group in enumerate(found.groups):
        values = torch.zeros(group.units, dtype=torch.double)
        for layer, channels in group.layers.items():
            if layer in scores:
                values += scores.normalized(layer)[channels].sum(1)
        if gone is not None:
            values[gone[at]] = -torch.inf
        best = torch.argsort(values, descending=True, stable=True)[0]  # the first of equals
        values[best] = torch.inf
        ranked.append(values)
        sizes.append(torch.full((group.units,), width(group)))
    if ranking == "local":
        chosen = [_lowest(*group, share) for group in zip(ranked, sizes, strict=True)]
    else:
        parts = [len(values) for values in ranked]
        chosen = [*_lowest(torch.cat(ranked), torch.cat(sizes), share).split(parts)]
    return [flags.nonzero().flatten() for flags in chosen]


def _lowest(values: Tensor, sizes: Tensor, share: float) -> Tensor:
    """Return the lowest units whose channels together are nearest to the share, bool, (units,)."""
    order = torch.argsort(values, stable=True)
    order = order[values[order] < torch.inf]
    reached = torch.cat([torch.zeros(1, dtype=torch.long), sizes[order].cumsum(0)])
    count = int((reached - share_of(int(sizes.sum()), share)).abs().argmin())
    taken = torch.zeros(len(values), dtype=torch.bool)
    taken[order[:count]] = True
    return taken


def channels_of(found: Prunable, units: Sequence[Tensor]) -> dict[str, list[int]]:
    """Return the channels of units by layer, scored layers first."""
    by_layer: dict[str, list[int]] = {layer: [] for layer in found.layers}
    for group, chosen in zip(found.groups, units, strict=True):
        for layer, channels in group.layers.items():
            by_layer.setdefault(layer, []).extend(channels[chosen].flatten().tolist())
    return {layer: sorted(channels) for layer, channels in by_layer.items()}


def spared(found: Prunable, units: Sequence[Tensor]) -> list[str]:
    """Return the layers of which only the best unit of a group is left."""
    return [
        layer
        for group, chosen in zip(found.groups, units, strict=True)
        if group.units - len(chosen) == 1 < group.units
        for layer in group.layers
    ]
