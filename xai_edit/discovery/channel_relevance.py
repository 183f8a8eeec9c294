"""Relevance of a class by channel of some layers, for each sample, and moments of the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xai_edit.concepts.collect import require_same_values
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, real_positions
from xai_edit.core.layers import unit_axis_of, values_of
from xai_edit.discovery.progress import BACKWARD
from xai_edit.discovery.samples import Samples
from xai_edit.lrp.contexts import ContextGather, Take
from xai_edit.lrp.lrp import LRP

POOLINGS = ("sum", "max")


def vectors_of(values: Tensor, axis: int) -> Tensor:
    """Return a layer's values as vectors of its channels, shape (samples, positions, channels)."""
    axis = unit_axis_of(values, axis)
    channels = values.shape[axis]
    positions = math.prod(values.shape[1:]) // channels
    return values.movedim(axis, -1).reshape(len(values), positions, channels)


def layer_vectors(
    model: nn.Module, inputs: Inputs, axes: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the vectors of some layers, by `vectors_of`, and which of them are no padding.

    From one forward pass; ``axes`` are the layers' unit axes. ValueError for a layer without part
    in it.
    """
    values = values_of(model, [*axes], inputs)
    vectors = {layer: vectors_of(values[layer], axis) for layer, axis in axes.items()}
    return {layer: (a, real_positions(inputs, a)) for layer, a in vectors.items()}


@dataclass(frozen=True, eq=False)
class ChannelRelevance:
    """Relevance of the samples of one class at one layer.

    Attributes
    ----------
    shares : Tensor, shape (samples, 2, channels)
        The sum and the maximum over positions of the relevance R = a ⊙ c of each channel, divided
        by the sum of absolute values over channels.
    cross : Tensor, float64, shape (2, channels, channels)
        E[a cᵀ] over the vectors of the samples to find with, and of the others.
    vectors : int
        Vectors of a sample.
    """

    shares: Tensor
    cross: Tensor
    vectors: int


def channel_relevance(
    model: nn.Module,
    samples: Samples,
    rows: Tensor,
    fit: Tensor,
    *,
    target: int,
    axes: Mapping[str, int],
    scorer: LRP,
) -> dict[str, ChannelRelevance]:
    """Return the relevance for a class at each layer, from one scoring pass over some samples.

    Parameters
    ----------
    rows : Tensor, int64, shape (samples,)
        Numbers of the samples, ascending.
    fit : Tensor, bool, shape (samples,)
        Which of them are to find with.
    axes : mapping from layer names to int
        The unit axis of each layer.
    """

    def draw(values: Tensor, name: str) -> Take:
        return lambda tensor: vectors_of(tensor, axes[name])

    layers = [*axes]
    shares: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    cross: dict[str, Tensor] = {}
    vectors: dict[str, int] = {}
    done = 0
    gather = ContextGather(draw)
    _, first = next(samples.read(rows[:1]))
    with preserved(model):
        plain = values_of(model, layers, first.inputs)
        with scorer.session(model, first.inputs, layers, gather) as (score, canonizers):
            for _, batch in samples.read(rows, cost=BACKWARD):
                chosen = torch.full((len(batch),), target, device=batch.inputs.device)
                pairs = score(batch.inputs, chosen)
                to_find = fit[done : done + len(batch)]
                done += len(batch)
                for layer in layers:
                    require_same_values(layer, plain[layer], gather, canonizers)
                    a, c = pairs[layer].unbind(1)
                    R = a * c
                    pooled = torch.stack([R.sum(1), R.amax(1)], 1)
                    total = pooled.abs().sum(-1, keepdim=True)
                    shares[layer].append((pooled / total.clamp_min(1e-30)).float().cpu())
                    if layer not in cross:
                        cross[layer] = torch.zeros(2, a.shape[2], a.shape[2], dtype=torch.double)
                        vectors[layer] = a.shape[1]
                    for side, part in enumerate((to_find, ~to_find)):
                        a_p, c_p = (one[part.to(one.device)].flatten(0, 1) for one in (a, c))
                        cross[layer][side] += (a_p.T @ c_p).double().cpu()
    counts = torch.tensor([int(fit.sum()), int((~fit).sum())]).clamp_min(1)
    return {
        layer: ChannelRelevance(
            torch.cat(shares[layer]),
            cross[layer] / (counts * vectors[layer])[:, None, None],
            vectors[layer],
        )
        for layer in layers
    }


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a layer's vectors by part of the samples.

    Attributes
    ----------
    second : Tensor, float64, shape (parts, channels, channels)
        E[a aᵀ] within each part, over positions that are no padding.
    mean : Tensor, float64, shape (channels,)
        E[a] over all samples.
    """

    second: Tensor
    mean: Tensor


def moments(
    model: nn.Module,
    samples: Samples,
    rows: Tensor,
    parts: Mapping[str, Sequence[Tensor]],
    axes: Mapping[str, int],
) -> dict[str, tuple[Moments, Moments]]:
    """Return the moments within each layer's parts, and within their complements.

    ``parts`` are masks over ``rows``, bool, shape (samples,). From one forward pass.
    """
    layers = [*axes]
    inside: dict[str, list[Tensor]] = {}
    whole: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    vectors: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    done = 0
    with preserved(model):
        for _, batch in samples.read(rows):
            now = slice(done, done + len(batch))
            done += len(batch)
            for layer, (a, real) in layer_vectors(model, batch.inputs, axes).items():
                a = torch.where(real[..., None], a, 0)
                vectors[layer].append(real.sum(1).cpu())
                if layer not in whole:
                    square = torch.zeros(a.shape[2], a.shape[2], dtype=torch.double)
                    whole[layer] = square
                    mean[layer] = square[0].clone()
                    inside[layer] = [square.clone() for _ in parts[layer]]
                whole[layer] += _gram(a)
                mean[layer] += a.sum((0, 1)).double().cpu()
                for total, part in zip(inside[layer], parts[layer], strict=True):
                    total += _gram(a[part[now].to(a.device)])
    result = {}
    for layer in layers:
        each = torch.cat(vectors[layer])  # vectors of each sample
        counts = torch.tensor([int(each[part].sum()) for part in parts[layer]]).view(-1, 1, 1)
        second = torch.stack([*inside[layer], whole[layer]])[: len(parts[layer])]
        rest = whole[layer] - second
        mu = mean[layer] / each.sum()
        result[layer] = Moments(second / counts, mu), Moments(rest / (each.sum() - counts), mu)
    return result


def _gram(a: Tensor) -> Tensor:
    """Return Σ a aᵀ over samples and positions, float64, shape (channels, channels)."""
    flat = a.flatten(0, 1)
    return (flat.T @ flat).double().cpu()
