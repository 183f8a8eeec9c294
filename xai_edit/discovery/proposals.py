"""Ways to divide a class's samples: by relevance, and by the methods it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from xai_edit.core.checks import with_labels
from xai_edit.core.inputs import Inputs
from xai_edit.discovery.channel_relevance import POOLINGS
from xai_edit.discovery.samples import Samples
from xai_edit.discovery.strategies import (
    Strategies,
    ends_of_components,
    mixture,
    spectral,
    two_parts,
)
from xai_edit.last_layer.head import collect_head_features
from xai_edit.lrp.lrp import LRP

Method = Literal["relevance", "spray", "activations", "errors", "npca"]
METHODS = get_args(Method)
SIDE = 16  # of the relevance maps that SpRAy clusters, at most


def proposals(
    method: Method,
    model: nn.Module,
    samples: Samples,
    rows: Tensor,
    fit: Tensor,
    *,
    target: int,
    shares: Mapping[str, Tensor],
    labels: Tensor | None,
    scorer: LRP,
    seed: int,
    marked: Tensor | None = None,
) -> dict[str, dict[str, Strategies]]:
    """Return how a class's samples divide, by layer and by kind of division.

    ``"relevance"``: mixtures on the relevance of each layer's channels, by sum and by maximum.
    ``"spray"``: spectral clustering of relevance maps of the input (Lapuschkin et al. 2019).
    ``"activations"``: a mixture on the head's inputs (GEORGE, Sohoni et al. 2020).
    ``"errors"``: wrong answers against right ones (JTT, Liu et al. 2021).
    ``"npca"``: ends of the principal components of w_k ⊙ φ (Neuhaus et al. 2023).

    The last four do not depend on the layer, nor does ``marked``, bool, shape (all samples,), which
    divides in place of the method.
    """
    if marked is not None:
        one = two_parts(marked[rows], next(iter(shares.values()))[:, 0], fit)
        return {layer: {"marks": one} for layer in shares}
    if method == "relevance":
        return {
            layer: {
                pooling: mixture(values[:, at], fit, seed) for at, pooling in enumerate(POOLINGS)
            }
            for layer, values in shares.items()
        }
    if method == "spray":
        inputs = (batch.inputs for _, batch in samples.read(rows))
        one = spectral(relevance_maps(model, inputs, target, scorer), fit, seed)
    elif method == "errors":
        wrong = with_labels(labels)[rows] != target
        one = two_parts(wrong, next(iter(shares.values()))[:, 0], fit)
    else:
        batches = [(batch.inputs,) for _, batch in samples.read(rows)]
        head = collect_head_features(model, batches)
        if method == "npca":
            row = 1 if head.one_output else target  # the ends of −w ⊙ φ are those of w ⊙ φ
            one = ends_of_components(head.features * head.weight[row], fit)
        else:
            one = mixture(head.features, fit, seed)
    return {layer: {method: one} for layer in shares}


def relevance_maps(model: nn.Module, inputs: Iterable[Inputs], target: int, scorer: LRP) -> Tensor:
    """Return relevance maps of batches of inputs, summed over channels, shape (samples, pixels)."""
    maps = []
    for batch in inputs:
        heat = scorer.heatmap(model, batch, torch.full((len(batch),), target))
        if heat.ndim == 4:
            heat = heat.sum(1, keepdim=True)
            height, width = (min(SIDE, size) for size in heat.shape[2:])
            heat = nn.functional.adaptive_avg_pool2d(heat, (height, width))
        flat = heat.flatten(1).cpu()
        maps.append(flat / flat.abs().sum(1, keepdim=True).clamp_min(1e-30))
    return torch.cat(maps)
