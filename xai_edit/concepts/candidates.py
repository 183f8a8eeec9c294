"""Candidates for an ablation: their energy in samples, its AUC, and accuracies once ablated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from scipy.special import ndtri
from torch import Tensor, nn

from xai_edit.concepts.ablation import SubspaceAblation
from xai_edit.concepts.features import Features
from xai_edit.concepts.predictiveness import CONFIDENCE, VECTORS
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import with_labels
from xai_edit.core.counting import add_counts, count_by_group
from xai_edit.core.data import Data, batches, model_device, together
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, joined
from xai_edit.core.layers import layer_module, predict, replaced, run
from xai_edit.core.outputs import logits_of
from xai_edit.lrp.canonizers import same_values

FOLDS = 3
SIZES = (1, 2, 4)  # leading directions of a single subspace that are tried
ROUNDING = 1e-4  # of the largest logit
Change: TypeAlias = Callable[[Tensor], Tensor]
PLACES = ((0,), (1,), (0, 1))  # of several subspaces, by AUC: the best, the second, both


def numbered(subspaces: Subspaces) -> Subspaces:
    """Return subspaces as a choice numbers them: a single one is cut into its directions.

    Examples
    --------
    >>> from xai_edit.concepts.candidates import numbered
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.PCA(n_subspaces=2).fit(features)
    >>> one = xe.Subspaces(subspaces.basis, (2,), subspaces.mean)
    >>> numbered(one).sizes
    (1, 1)
    """
    if len(subspaces) > 1:
        return subspaces
    return replace(subspaces, sizes=(1,) * subspaces.basis.shape[1])


class Fit:
    """Subspaces found from some samples, in the order in which they are tried."""

    def __init__(
        self, subspaces: Subspaces, features: Features, labels: Tensor, rows: Tensor
    ) -> None:
        subspaces.require_channels(features.activations)
        self.subspaces = numbered(subspaces)
        has = features.require_attribute()
        a = features.activations.double().cpu()
        centre = a[features.by_vector(rows & ~has)].mean(0)
        parts = []
        for part in a.split(VECTORS):
            along = ((part - centre) @ self.subspaces.basis).square()
            blocks = along.split(self.subspaces.sizes, dim=1)
            parts.append(torch.stack([block.sum(1) for block in blocks], 1))
        self.energy = features.per_sample(torch.cat(parts))
        self.order = [*range(len(self.subspaces))]
        places: tuple[tuple[int, ...], ...] = PLACES
        if len(subspaces) > 1:
            told, _ = within_strata_auc(self.energy[rows], has[rows], labels[rows])
            self.order = torch.argsort((told - 0.5).abs(), descending=True, stable=True).tolist()
        else:
            most = min(len(self.order), SIZES[-1])
            sizes = [*(size for size in SIZES if size < most), most]
            places = tuple(tuple(range(size)) for size in sizes)
        # Without a direction left, all samples are alike.
        self.places = [
            at
            for at in places
            if max(at) < len(self.order)
            and self.subspaces.directions(self.indices(at)).shape[1] < len(centre)
        ]

    def ablation(self, places: tuple[int, ...], axis: int) -> SubspaceAblation:
        """Return the ablation of a candidate."""
        directions = self.subspaces.directions(self.indices(places))
        return SubspaceAblation(directions, self.subspaces.mean, axis)

    def indices(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Return the subspaces at some places of the order."""
        return tuple(self.order[place] for place in places)

    def energies(self, candidates: list[tuple[int, ...]]) -> Tensor:
        """Return the energy of each sample by candidate, float64, shape (samples, candidates)."""
        columns = [self.energy[:, list(self.indices(at))].sum(1) for at in candidates]
        return torch.stack(columns, 1) if columns else self.energy[:, :0]


def within_strata_auc(scores: Tensor, has: Tensor, strata: Tensor) -> tuple[Tensor, float]:
    """Return P(score with > score without) over pairs of a stratum, and its spread by chance.

    Scores have the shape (samples, columns), the areas under the curve (columns,); equal scores
    count half. The second number is half the 95% interval around ½ of scores without any relation
    to ``has`` (Mann and Whitney 1947; strata weighted by their pairs). Without pairs the areas are
    ½ and it is ½.
    """
    wins = scores.new_zeros(scores.shape[1])
    pairs, variance = 0, 0.0
    for one in strata.unique():
        own = strata == one
        above, below = (scores[own & side].T.contiguous() for side in (has, ~has))
        below = below.sort(1).values
        number = above.shape[1] * below.shape[1]
        if number:
            smaller = torch.searchsorted(below, above)
            not_larger = torch.searchsorted(below, above, right=True)
            wins += (smaller + not_larger).sum(1) / 2
            pairs += number
            variance += number * (above.shape[1] + below.shape[1] + 1) / 12
    if not pairs:
        return torch.full_like(wins, 0.5), 0.5
    width = float(ndtri((1 + CONFIDENCE) / 2)) * variance**0.5 / pairs
    return wins / pairs, min(width, 0.5)


def dealt_out(groups: Tensor) -> Tensor:
    """Return the fold of each sample; those of a group are dealt out in turn."""
    fold = torch.zeros_like(groups)
    for one in groups.unique():
        own = groups == one
        fold[own] = torch.arange(int(own.sum())) % FOLDS
    return fold


def ablated_counts(
    model: nn.Module,
    data: Data,
    layer: str,
    unit_axis: int | None,
    fits: list[Fit],
    places: list[tuple[int, ...]],
    fold: Tensor,
    groups: tuple[Tensor, Tensor],
) -> Tensor:
    """Return `count_by_group` for no ablation and each candidate, (1 + candidates, 3, classes, 2).

    Each sample is ablated by the subspaces of its fold, which were found without it. ``groups`` are
    the labels and the attribute.
    """
    labels, has = groups
    counts: list[Tensor] = [torch.zeros(3, 0, 2, dtype=torch.long) for _ in (None, *places)]
    maps: list[list[SubspaceAblation]] = []
    seen: list[Tensor | None] = []
    start, at_once = 0, False
    with preserved(model), torch.no_grad():
        device = model_device(model)
        for batch in batches(data, device):
            if not seen:
                axis = unit_axes(model, batch.inputs, [layer], unit_axis)[layer]
                maps = [[f.ablation(at, axis).to(device) for f in fits] for at in places]
            rows = slice(start, start + len(batch))
            start += len(batch)
            if start > len(fold):
                raise ValueError(
                    f"data: {start} samples or more, but the features are of {len(fold)}; give the "
                    "same samples in the same order"
                )
            held = fold[rows].to(device)
            if not seen:
                few = batch.inputs[:2], [partial(_by_fold, own, held[:2], layer) for own in maps]
                at_once = _passes_on_all(model, layer, *few)
            changes = [partial(_by_fold, own, held, layer) for own in maps]
            logits_of_each = _stacked if at_once else _one_by_one
            for at, logits in enumerate(logits_of_each(model, layer, batch.inputs, changes)):
                truth = with_labels(batch.labels, logits.shape[1])
                found = count_by_group(logits.argmax(1), truth, logits.shape[1], has[rows])
                counts[at] = add_counts(counts[at], found)
            seen.append(batch.labels)
    given = together(seen, "labels")
    if given is None or not torch.equal(given.cpu(), labels):
        raise ValueError(
            f"data: its {start} samples are not the {len(labels)} of the features, by their "
            "labels; give the same samples in the same order, not shuffled"
        )
    return torch.stack(counts)


def _by_fold(maps: list[SubspaceAblation], fold: Tensor, layer: str, values: Tensor) -> Tensor:
    """Return a layer's values, each sample's changed by the map of its fold."""
    if len(values) != len(fold):
        raise ValueError(
            f"layer: {layer!r} has values of {len(values)} samples for {len(fold)} inputs; name a "
            "layer whose first axis is the samples"
        )
    changed = values.clone()
    for number in fold.unique().tolist():
        changed[fold == number] = maps[number](values[fold == number])
    return changed


def _one_by_one(
    model: nn.Module, layer: str, inputs: Inputs, changes: Sequence[Change]
) -> list[Tensor]:
    """Return the logits without a change of a layer's values, and with each."""
    logits = [predict(model, inputs)]
    for change in changes:
        with replaced(model, layer, change):
            logits.append(predict(model, inputs))
    return logits


def _stacked(
    model: nn.Module, layer: str, inputs: Inputs, changes: Sequence[Change]
) -> list[Tensor]:
    """Return the same from one pass: what follows the layer gets all versions as one batch."""
    copies = 1 + len(changes)

    def stack(_: nn.Module, __: Any, values: Tensor) -> Tensor:
        return torch.cat([values, *(change(values) for change in changes)])

    with layer_module(model, layer).register_forward_hook(stack):
        logits = logits_of(run(model, inputs), joined([inputs] * copies))
    return [*logits.chunk(copies)]


def _passes_on_all(model: nn.Module, layer: str, inputs: Inputs, changes: Sequence[Change]) -> bool:
    """Return whether the logits depend on the samples' values at a layer alone, by two samples.

    They do not where a residual path leads around it.
    """
    if len(inputs) < 2:  # which would be broadcast
        return False
    separate = _one_by_one(model, layer, inputs, changes)
    try:
        stacked = _stacked(model, layer, inputs, changes)
    except ValueError:  # of the number of samples
        return False
    return same_values(torch.cat(separate), torch.cat(stacked), ROUNDING)
