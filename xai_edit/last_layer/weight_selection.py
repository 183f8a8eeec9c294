"""The choice of an edge of a row of the last layer, by SCA and by the scores it is compared to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from xai_edit.last_layer.sca_scores import absent, edge_scores_of

Scored = Literal["sca", "ca", "gradient-activation", "relevance", "weight", "random"]
Selection = Literal[Scored, "exact"]


def selection_scores(
    select: Scored,
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: Sequence[int],
    *,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the score of every edge into each of some outputs, float64, shape (d,).

    ``select`` is "sca" (Eq. 6), "ca" (Eq. 5), "gradient-activation" (their comparison in Fig. 8),
    "relevance" (LRP of the last layer: w_j·x_j summed over the output's class), "weight" (its size)
    or "random", by ``seed``. The others as for `sca_scores.edge_scores`.

    Examples
    --------
    >>> from xai_edit.last_layer.weight_selection import selection_scores
    >>> head = xe.collect_head_features(model, data)
    >>> x, W, b = head.features, head.weight, head.bias
    >>> [score.argmax().item() for score in selection_scores("relevance", x, labels, W, b, [0, 1])]
    [3, 1]
    """
    if select in ("sca", "ca", "gradient-activation"):
        for edges in edge_scores_of(features, labels, weight, bias, outputs):
            score: Tensor = getattr(edges, select.replace("-", "_"))
            yield score.clone()
        return
    for output in outputs:
        own = labels == output
        if not own.any():
            raise absent(output)
        row = weight[output].double()
        if select == "relevance":
            yield row * features[own].double().sum(0)
        elif select == "weight":
            yield row.abs()
        else:
            generator = torch.Generator().manual_seed(1000 * seed + output)
            yield 1 - torch.rand(len(row), generator=generator, dtype=torch.double)  # never 0


def most_significant(score: Tensor, allowed: Tensor, count: int, row: int) -> list[int]:
    """Return the edges of highest score that may be edited, best first, or raise ValueError."""
    score = torch.where(allowed & (score > 0), score, -torch.inf)
    editable = int((score > 0).sum())
    if editable < count:
        number = f"only {editable} of {count} weights" if editable else "no weight"
        raise ValueError(
            f"class {row}: {number} of its row can be edited; a weight has to add to the class and "
            "not be nearly 0"
        )
    return score.argsort(descending=True, stable=True)[:count].tolist()
