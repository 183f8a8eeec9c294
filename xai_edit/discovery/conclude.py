"""The end of a search: presence in all samples, thresholds, groups, and the same feature once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict, replaced
from xai_edit.discovery import evidence as figures
from xai_edit.discovery.candidates import POOLINGS, presences
from xai_edit.discovery.evidence import PseudoGroup
from xai_edit.discovery.findings import Finding
from xai_edit.discovery.search import Search, some_of

GROUP = 64  # samples of a pseudo-group that are ablated
SAME = 0.5  # Cohen's κ from which two findings hold the same feature


def concluded(search: Search, found: Sequence[Finding]) -> list[Finding]:
    """Return findings with presence, threshold and groups, joined and in order."""
    if not found:
        return []
    wanted: dict[str, list[Finding]] = {}
    for one in found:
        wanted.setdefault(one.layer, []).append(one)
    every = torch.arange(len(search.predicted))
    scores = presences(
        search.model,
        search.samples,
        every,
        {layer: [one.subspaces for one in same] for layer, same in wanted.items()},
        search.axes,
    )
    whole = [
        _with_presence(search, one, scores[layer][:, number])
        for layer, same in wanted.items()
        for number, one in enumerate(same)
    ]
    whole = [one for one in whole if one.evidence.worth_a_look]  # still, with fewer directions
    whole.sort(key=lambda one: one.evidence.rank, reverse=True)
    kept: list[Finding] = []
    for one in whole:
        for number, better in enumerate(kept):
            if same_feature(better, one, search.predicted):
                also = (*better.also, (one.target, one.layer))
                kept[number] = replace(better, also=tuple(dict.fromkeys(also)))
                break
        else:
            kept.append(one)
    return [_with_groups(search, one) for one in kept]


def same_feature(one: Finding, other: Finding, predicted: Tensor) -> bool:
    """Return whether two findings hold the same feature.

    Presence has to agree over all samples, and among the samples predicted as either target:
    Cohen's κ of at least 0.5. A feature of all of a class is not one of 90 % of it.
    """
    everywhere = torch.ones_like(predicted, dtype=torch.bool)
    places = (everywhere, predicted == one.target, predicted == other.target)
    return all(_kappa(one.has[rows], other.has[rows]) >= SAME for rows in places if rows.any())


def _kappa(one: Tensor, other: Tensor) -> float:
    """Return Cohen's κ of two yes-or-no answers; 1 where both are the same in every sample."""
    agreement = float((one == other).double().mean())
    p, q = float(one.double().mean()), float(other.double().mean())
    chance = p * q + (1 - p) * (1 - q)
    return 1.0 if chance == 1 and agreement == 1 else (agreement - chance) / max(1 - chance, 1e-12)


def _with_presence(search: Search, finding: Finding, scores: Tensor) -> Finding:
    """Add presence, by the pooling that separates better, its threshold and separation.

    ``scores`` has the shape (2, samples).
    """
    judging = search.judging[finding.rows]
    own = finding.rows[judging]
    judged = torch.cat([search.pool, own]).unique()
    part, seen = finding.part[judging], own
    if part.all():  # the class against others
        part, seen = torch.isin(judged, own), judged
    separations = [figures.separation_figure(one[seen], part, search.seed) for one in scores]
    best = max(range(len(POOLINGS)), key=lambda at: separations[at].value)
    weights = figures.balanced_weights(search.predicted[judged])
    return replace(
        finding,
        scores=scores[best],
        pooling=POOLINGS[best],
        threshold=figures.two_means(scores[best][judged], weights),
        evidence=replace(finding.evidence, separation=separations[best]),
    )


def _with_groups(search: Search, finding: Finding) -> Finding:
    """Add the accuracy of the four pseudo-groups, before and after ablation."""
    truth = search.predicted if search.labels is None else search.labels
    of_class, has = truth == finding.target, finding.has
    generator = torch.Generator().manual_seed(search.seed)
    masks = (of_class & has, of_class & ~has, ~of_class & has, ~of_class & ~has)
    groups = {}
    for name, mask in zip(figures.GROUPS, masks, strict=True):
        members = mask.nonzero()[:, 0]
        if not len(members):
            groups[name] = PseudoGroup(0, None, None)
            continue
        right = (search.predicted == truth)[members].double().mean()
        some = some_of((mask & search.judging).nonzero()[:, 0], GROUP, generator)
        ablated = None if not len(some) else _ablated_accuracy(search, finding, some, truth)
        accuracy = None if search.labels is None else float(right)
        groups[name] = PseudoGroup(len(members), accuracy, ablated)
    return replace(finding, evidence=replace(finding.evidence, groups=groups))


def _ablated_accuracy(search: Search, finding: Finding, rows: Tensor, truth: Tensor) -> float:
    """Return the share of samples that keep their class when the subspace is ablated."""

    def ablate(values: Tensor) -> Tensor:
        a = values.movedim(finding.axis, -1)
        return finding.subspaces.ablate(a, [0]).movedim(-1, finding.axis)

    right = 0
    with preserved(search.model), torch.no_grad(), replaced(search.model, finding.layer, ablate):
        for numbers, batch in search.samples.read(rows):
            logits = predict(search.model, batch.inputs)
            right += int((logits.argmax(1).cpu() == truth[numbers]).sum())
    return right / len(rows)
