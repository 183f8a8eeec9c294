"""Subspaces that may hold a feature, and how strongly each sample has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.concepts.finders import PRCA, ContrastivePCA
from xai_edit.concepts.presence import Pooling
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.guard import preserved
from xai_edit.discovery.channel_relevance import Moments, layer_vectors
from xai_edit.discovery.evidence import WORTH, two_means
from xai_edit.discovery.samples import Samples

DIRECTIONS = 8  # of a contrast, at most
CHANCE = 0.05  # of the largest contrast; directions below it are left out
RELEVANT = 3  # directions of PRCA
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
ALIKE = 0.9  # rank correlation from which two candidates are one
KEPT = 8  # candidates of a class and a layer


@dataclass(frozen=True, eq=False)
class Candidate:
    """A subspace that may hold a feature.

    Attributes
    ----------
    subspaces : Subspaces
        One block, its directions by descending contrast.
    part : Tensor or None, bool, shape (samples,)
        The samples of the class in which it is strong; None for all.
    kind : str
        How the part was found.
    pooling : {"max", "mean"}
        Over positions, of its presence.
    separation : float
        2·AUC − 1 of its presence between the part and the class's other samples, or without a part
        between the class and other classes, on samples that were not used to find it.
    absent : Tensor, int64
        Numbers of judging samples in which it is not, by 2-means of its presence.
    donors : tuple of Tensor
        Numbers of samples of the class with the feature and without it: of the part and of the
        others; without a part the thirds with the most and the least presence.
    """

    subspaces: Subspaces
    part: Tensor | None
    kind: str
    pooling: Pooling = "max"
    separation: float = 0.0
    absent: Tensor | None = None
    donors: tuple[Tensor, Tensor] | None = None

    def leading(self, size: int) -> Candidate:
        """Return the candidate with its leading directions alone."""
        size = min(size, self.subspaces.basis.shape[1])
        basis = self.subspaces.basis[:, :size].contiguous()
        return replace(self, subspaces=replace(self.subspaces, basis=basis, sizes=(size,)))


def candidates(
    both: tuple[Moments, Moments], parts: Sequence[tuple[str, Tensor]]
) -> list[Candidate]:
    """Return the contrast of each part against the rest, and of the rest against it."""
    found = []
    inside, outside = both
    for number, (kind, part) in enumerate(parts):
        contrast = inside.second[number] - outside.second[number]
        for sign, members in ((1, part), (-1, ~part)):
            subspaces = _contrastive(sign * contrast, inside.mean, int(members.sum()))
            if subspaces is not None:
                found.append(Candidate(subspaces, members, kind))
    return found


def relevant_directions(cross: Tensor, mean: Tensor, vectors: int) -> list[Candidate]:
    """Return the most relevant directions of a class, each as a candidate."""
    for count in range(RELEVANT, 0, -1):
        try:
            subspaces = PRCA(count).fit_moments(cross, mean, vectors)
        except ValueError:  # relevance is positive along fewer
            continue
        return [
            Candidate(replace(subspaces, basis=direction[:, None], sizes=(1,)), None, "relevance")
            for direction in subspaces.basis.T
        ]
    return []


def _contrastive(contrast: Tensor, mean: Tensor, samples: int) -> Subspaces | None:
    """Return the leading directions; others have chance differences of what both parts have."""
    values = torch.linalg.eigvalsh(contrast)
    if not values[-1] > len(values) * torch.finfo(values.dtype).eps * values.abs().max():
        return None
    size = min(DIRECTIONS, int((values > CHANCE * values[-1]).sum()))
    return ContrastivePCA(size).fit_moments(contrast, mean, samples)


def presence_of(a: Tensor, real: Tensor, subspaces: Sequence[Subspaces]) -> Tensor:
    """Return `xai_edit.concepts.presence` by maximum and by mean, shape (2, subspaces, samples).

    Over the positions ``real``, see `xai_edit.core.inputs.real_positions`.
    """
    U = torch.cat([one.basis for one in subspaces], 1)
    offset = torch.cat([one.mean.to(one.basis) @ one.basis for one in subspaces])
    c = (a @ U.to(a) - offset.to(a)).square()  # of all at once: one pass over the positions
    sizes = [one.basis.shape[1] for one in subspaces]
    square = torch.stack([part.sum(-1) for part in c.split(sizes, -1)]).where(real, 0)
    return torch.stack([square.amax(2), square.sum(2) / real.sum(1).clamp_min(1)])


def presences(
    model: nn.Module,
    samples: Samples,
    rows: Tensor,
    wanted: Mapping[str, Sequence[Subspaces]],
    axes: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return the presence of several subspaces of each layer, from one forward pass.

    Float64, shape (2, subspaces, samples): by maximum and by mean over positions.
    """
    own = {layer: axes[layer] for layer in wanted if wanted[layer]}
    found: dict[str, list[Tensor]] = {layer: [] for layer in own}
    with preserved(model):
        for _, batch in samples.read(rows):
            for layer, (a, real) in layer_vectors(model, batch.inputs, own).items():
                found[layer].append(presence_of(a, real, wanted[layer]).double().cpu())
    return {layer: torch.cat(found[layer], -1) for layer in own}


def separated(
    found: Sequence[Candidate],
    scores: Tensor,
    judged: Tensor,
    of_class: Tensor,
    rows: Tensor,
    fit: Tensor,
    weights: Tensor,
) -> list[Candidate]:
    """Return at most eight different candidates, contrasts first, by separation.

    Those that do not separate are left out.
    A candidate is left out if its presence has a rank correlation above 0.9 with a better one.

    Parameters
    ----------
    scores : Tensor, shape (2, candidates, judged samples)
        See `presences`.
    judged : Tensor, int64, shape (judged samples,)
        Numbers of the samples.
    of_class : Tensor, bool, shape (judged samples,)
        Which of them are of the class.
    rows, fit : Tensor, int64 and bool, shape (samples,)
        Numbers of the class's samples, in the order of each candidate's part, and which of them
        were used to find.
    weights : Tensor, shape (judged samples,)
        With which each class counts alike.
    """
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    own = judged[of_class]
    at = torch.searchsorted(rows, own)
    rated: list[tuple[Candidate, Any]] = []
    for number, one in enumerate(found):
        best: tuple[Candidate, Tensor] | None = None
        for pooling, by_pooling in zip(POOLINGS, scores, strict=True):
            s = by_pooling[number]
            if one.part is None:
                truth, seen = of_class, s
                order, third = s[of_class].argsort(), len(own) // 3
                donors = own[order[-third:]], own[order[:third]]
            else:
                truth, seen = one.part[at], s[of_class]
                donors = rows[fit & one.part], rows[fit & ~one.part]
            if truth.all() or not truth.any() or not all(map(len, donors)):
                continue
            separation = 2 * float(roc_auc_score(truth.numpy(), seen.numpy())) - 1
            if best is None or separation > best[0].separation:
                named: Any = {"pooling": pooling, "separation": separation, "donors": donors}
                best = replace(one, **named), s
        if best is not None and best[0].separation > WORTH:
            candidate, s = best
            absent = judged[s <= two_means(s, weights)]
            rated.append((replace(candidate, absent=absent), rankdata(s.numpy())))
    # A contrast has directions enough to be ablated, a single one of PRCA comes after it.
    rated.sort(key=lambda pair: (pair[0].part is None, -pair[0].separation))
    kept: list[tuple[Candidate, Any]] = []
    for candidate, ranks in rated:
        if all(np.corrcoef(ranks, other)[0, 1] <= ALIKE for _, other in kept):
            kept.append((candidate, ranks))
    return [candidate for candidate, _ in kept[:KEPT]]
