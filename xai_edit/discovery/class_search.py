"""The search for features of one class: from relevance to findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from xai_edit.core.inputs import joined
from xai_edit.discovery import evidence as figures
from xai_edit.discovery.candidates import (
    Candidate,
    candidates,
    presences,
    relevant_directions,
    separated,
)
from xai_edit.discovery.channel_relevance import channel_relevance, moments
from xai_edit.discovery.evidence import Evidence, PseudoGroup
from xai_edit.discovery.findings import Finding, Searched
from xai_edit.discovery.progress import BACKWARD
from xai_edit.discovery.proposals import Method, proposals
from xai_edit.discovery.search import Search, some_of
from xai_edit.discovery.strategies import SMALLEST, Strategies
from xai_edit.discovery.transfer import SIZE, Recipients, Transferred
from xai_edit.lrp.lrp import LRP

RECIPIENTS = 64  # that a feature is put into
DONORS = 24  # that it is taken from
PER_LAYER = 3  # findings of a class and a layer, at most
SIZES = (1, 2, 4, 8)  # of a subspace
ENOUGH_EFFECT = 0.8  # of the effect at the largest size
NARROW = 5 * SIZE  # channels below which a random subspace holds a fifth or more of a feature
TRIED = 1000  # samples of a layer that features are put into, about


@dataclass(frozen=True, eq=False)
class _Class:
    """A class with the samples that it is explained on."""

    target: int
    rows: Tensor  # numbers of the samples, ascending
    fit: Tensor  # bool, shape (rows,): those to find with; the others judge
    away: Tensor  # numbers of samples of other classes that a feature is put into
    predicted: bool


def estimated_cost(search: Search, target: int, images: str, limit: int) -> int:
    """Return about how many samples `search_class` passes through the model."""
    of_class = int((search.predicted == target).sum())
    samples = min(limit, len(search.predicted) if images == "all" else of_class)
    return (BACKWARD + 1) * samples + len(search.pool) + TRIED * len(search.axes)


def search_class(
    search: Search,
    target: int,
    images: str,
    method: Method,
    scorer: LRP,
    limit: int,
    marked: Tensor | None = None,
) -> tuple[list[Finding], list[Searched]]:
    """Return the findings of a class, and what was looked at.

    ``marked``, bool, shape (samples,), divides the samples in place of the method.
    """
    one = _class_of(search, target, images, limit)
    samples, judging = len(one.rows), int((~one.fit).sum())
    if min(samples - judging, judging) < 2 * SMALLEST:
        note = f"too few samples ({samples}) to tell"
        return [], [Searched(target, layer, samples, 0, note) for layer in search.axes]
    others = min(len(one.away), int((search.predicted[search.others] != target).sum()))
    if others < SMALLEST:
        note = f"too few samples of other classes ({others}) to try a feature on"
        return [], [Searched(target, layer, samples, 0, note) for layer in search.axes]
    relevance = channel_relevance(
        search.model,
        search.samples,
        one.rows,
        one.fit,
        target=target,
        axes=search.axes,
        scorer=scorer,
    )
    divided = proposals(
        method,
        search.model,
        search.samples,
        one.rows,
        one.fit,
        target=target,
        shares={layer: each.shares for layer, each in relevance.items()},
        labels=search.labels,
        scorer=scorer,
        seed=search.seed,
        marked=marked,
    )
    parts = {
        layer: [(kind, part) for kind, each in kinds.items() for part in each.parts]
        for layer, kinds in divided.items()
    }
    masks = {layer: [part[one.fit] for _, part in each] for layer, each in parts.items()}
    by_part = moments(search.model, search.samples, one.rows[one.fit], masks, search.axes)
    found: dict[str, list[Candidate]] = {}
    for layer, each in relevance.items():
        found[layer] = candidates(by_part[layer], parts[layer])
        # Of a target explained on all samples none are left to compare a direction with.
        if method == "relevance" and marked is None and one.predicted:
            # A mark in one place differs from the mean of the class. What nearly all samples have
            # is near that mean, and differs from the mean of the others.
            vectors = each.vectors * (samples - judging)
            for mean in (by_part[layer][0].mean, search.mean_without(target, layer)):
                found[layer] += relevant_directions(each.cross[0], mean, vectors)
    judged = torch.cat([one.rows[~one.fit], search.pool]).unique()
    of_class = torch.isin(judged, one.rows)
    leading = {
        layer: [each.leading(SIZE).subspaces for each in same] for layer, same in found.items()
    }
    scores = presences(search.model, search.samples, judged, leading, search.axes)
    weights = figures.balanced_weights(search.predicted[judged])
    findings, notes = [], []
    for layer, same in found.items():
        most = max(each.count for each in divided[layer].values())
        note = "" if most > 1 or method != "relevance" else "one strategy"
        if marked is not None and not masks[layer]:
            note = "too few samples with or without the marked feature; explain all images"
        cross, own = relevance[layer].cross[1], []
        if same:
            kept = separated(same, scores[layer], judged, of_class, one.rows, one.fit, weights)
            own = _judged(search, one, layer, kept, divided[layer], cross)
        if not own and len(cross) < NARROW:
            few = (
                f"of {len(cross)} channels random subspaces hold much: a feature hardly stands out"
            )
            note = f"{note}; {few}" if note else few
        notes.append(Searched(target, layer, samples, most, note))
        findings += own
    return findings, notes


def _class_of(search: Search, target: int, images: str, limit: int) -> _Class:
    """Draw the samples of a class, and those of others that a feature is put into."""
    generator = torch.Generator().manual_seed(search.seed + target)
    every = images == "all"
    among = torch.ones_like(search.judging) if every else search.predicted == target
    rows = some_of(among.nonzero()[:, 0], limit, generator)
    away = search.pool if every else search.pool[search.predicted[search.pool] != target]
    away = some_of(away, RECIPIENTS, generator)
    return _Class(target, rows, ~search.judging[rows], away, not every)


def _judged(
    search: Search,
    one: _Class,
    layer: str,
    kept: Sequence[Candidate],
    divided: dict[str, Strategies],
    cross: Tensor,
) -> list[Finding]:
    """Return the candidates of a class and layer that are worth a look, as findings."""
    inputs = joined([batch.inputs for _, batch in search.samples.read(one.away)])
    generator = torch.Generator().manual_seed(search.seed)
    donors = search.values(layer, some_of(one.rows[one.fit], DONORS, generator))
    how = search.axes[layer], inputs, donors, search.seed, search.samples.passed
    recipients = Recipients(search.model, layer, *how)
    rated = []
    for candidate in kept:
        assert candidate.absent is not None  # it was separated
        lacking = torch.isin(one.away, candidate.absent)
        if int(lacking.sum()) < SMALLEST:
            continue  # there is nothing to put it into
        put = _put(search, candidate, recipients)
        if not put(SIZE).above_chance(one.target, lacking):
            continue
        finding = _finding(search, one, layer, candidate, SIZE, put(SIZE), divided, cross)
        if finding.evidence.worth_a_look:
            rated.append((finding, candidate, put))
    rated.sort(key=lambda each: each[0].evidence.rank, reverse=True)
    found = []
    for _, candidate, put in rated[:PER_LAYER]:
        size, transferred = _smallest(candidate, put, one.target)
        finding = _finding(search, one, layer, candidate, size, transferred, divided, cross)
        found.append(finding)
    return found


def _put(
    search: Search, candidate: Candidate, recipients: Recipients
) -> Callable[[int], Transferred]:
    """Return a function that puts so many leading directions of a candidate into recipients."""
    generator = torch.Generator().manual_seed(search.seed)
    assert candidate.donors is not None  # it was separated
    having, lacking = (some_of(rows, DONORS, generator) for rows in candidate.donors)
    with_it = search.values(recipients.layer, having)
    without = cache(partial(search.values, recipients.layer, lacking))

    @cache
    def put(size: int) -> Transferred:
        U = candidate.leading(size).subspaces.basis
        return recipients.put(U, with_it, without)

    return put


def _finding(
    search: Search,
    one: _Class,
    layer: str,
    candidate: Candidate,
    size: int,
    transferred: Transferred,
    divided: dict[str, Strategies],
    cross: Tensor,
) -> Finding:
    """Return a candidate as a finding, without what needs the presence in all samples."""
    assert candidate.absent is not None  # it was separated
    lacking = torch.isin(one.away, candidate.absent)
    by_feature, control = transferred.turned(one.target, lacking, predicted=one.predicted)
    subspaces = candidate.leading(size).subspaces
    shown = divided.get(candidate.kind, next(iter(divided.values())))
    separation = figures.Figure(candidate.separation, -1.0, 1.0, int((~one.fit).sum()))
    return Finding(
        target=one.target,
        layer=layer,
        axis=search.axes[layer],
        subspaces=subspaces,
        pooling=candidate.pooling,
        threshold=0.0,
        scores=torch.empty(0),
        evidence=Evidence(
            transfer=figures.mean_figure(by_feature.double() - control.double(), search.seed),
            control=float(control.double().mean()),
            effect=figures.mean_figure(transferred.gains(one.target, lacking), search.seed),
            separation=separation,
            reliance=figures.reliance(subspaces.basis, cross),
            groups=dict.fromkeys(figures.GROUPS, PseudoGroup(0, None, None)),
            predicted=one.predicted,
            within=candidate.part is not None,
        ),
        kind=candidate.kind,
        points=shown.points,
        cluster=shown.cluster,
        part=torch.ones_like(one.fit) if candidate.part is None else candidate.part,
        rows=one.rows,
    )


def _smallest(
    candidate: Candidate, put: Callable[[int], Transferred], target: int
) -> tuple[int, Transferred]:
    """Return the smallest size that has 80 % of the effect of the largest, and what it does."""
    most = candidate.subspaces.basis.shape[1]
    sizes = sorted({min(size, most) for size in SIZES})
    enough = ENOUGH_EFFECT * float(put(sizes[-1]).gains(target).mean())
    fewer = (size for size in sizes if float(put(size).gains(target).mean()) >= enough)
    size = next(fewer, sizes[-1])
    return size, put(size)
