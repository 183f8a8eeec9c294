"""The search for features: class after class, from relevance to findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import require
from xai_edit.core.data import Data, model_device, together
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import joined
from xai_edit.core.layers import predict, run, tapped
from xai_edit.core.targets import class_list
from xai_edit.discovery import evidence as figures
from xai_edit.discovery.candidates import (
    POOLINGS,
    SIZE,
    Candidate,
    candidates,
    presences,
    relevant_directions,
    separated,
)
from xai_edit.discovery.channel_relevance import channel_relevance, moments
from xai_edit.discovery.default_layers import default_layers
from xai_edit.discovery.evidence import Evidence, PseudoGroup
from xai_edit.discovery.findings import Finding, Searched, same_feature
from xai_edit.discovery.proposals import Method, proposals
from xai_edit.discovery.samples import Samples
from xai_edit.discovery.strategies import SMALLEST, Strategies
from xai_edit.discovery.transfer import Recipients, Transferred, changed
from xai_edit.lrp.lrp import LRP

JUDGING = 1 / 3  # of the samples; they are not used to find
OTHERS = 600  # samples of all classes that judge, at most
RECIPIENTS = 100  # that a feature is put into
DONORS = 24  # that it is taken from
PER_LAYER = 3  # findings of a class and a layer, at most
SIZES = (1, 2, 4, 8)  # of a subspace
ENOUGH_EFFECT = 0.8  # of the effect at the largest size
GROUP = 64  # samples of a pseudo-group that are ablated
TYPICAL = 0.95  # quantile of margins that counts as the target, where it is never predicted


@dataclass(frozen=True, eq=False)
class _Class:
    """A class with the samples that it is explained on."""

    target: int
    rows: Tensor  # numbers of the samples, ascending
    fit: Tensor  # bool, shape (rows,): those to find with; the others judge
    away: Tensor  # numbers of samples of other classes that a feature is put into
    typical: float | None


@dataclass(eq=False)
class Search:
    """A model and its data during a search."""

    model: nn.Module
    samples: Samples
    axes: dict[str, int]
    seed: int
    predicted: Tensor
    labels: Tensor | None
    classes: int
    judging: Tensor  # bool, shape (samples,)
    pool: Tensor  # numbers of judging samples of all classes, ascending

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        data: Data,
        layers: Sequence[str] | None,
        unit_axis: int | None,
        seed: int,
    ) -> Search:
        """Predict all samples, and draw those that judge."""
        samples = Samples(data, model_device(model))
        predicted, labels, classes = [], [], 0
        axes: dict[str, int] = {}
        for batch in samples.first_pass():
            if not axes:
                layers = default_layers(model, batch.inputs) if layers is None else layers
                axes = unit_axes(model, batch.inputs, layers, unit_axis)
            with preserved(model), torch.no_grad():
                logits = predict(model, batch.inputs)
            classes = logits.shape[1]
            predicted.append(logits.argmax(1).cpu())
            labels.append(batch.labels)
        every = torch.cat(predicted)
        generator = torch.Generator().manual_seed(seed)
        judging = torch.rand(len(every), generator=generator) < JUDGING
        each = max(20, OTHERS // max(1, len(every.unique())))
        pool = [
            _some((judging & (every == one)).nonzero()[:, 0], each, generator)
            for one in every.unique().tolist()
        ]
        return cls(
            model,
            samples,
            axes,
            seed,
            every,
            together(labels, "labels"),
            classes,
            judging,
            torch.cat(pool).sort().values,
        )

    def targets(self, target: int | Sequence[int] | None, images: str) -> list[int]:
        """Return the classes to look at, those with the fewest samples first."""
        if target is not None:
            return class_list(target, self.classes)
        works = "name the target classes"
        require(images == "predicted", "target", target, works)
        counts = self.predicted.bincount(minlength=self.classes)
        order = counts.argsort(stable=True)
        return [one for one in order.tolist() if counts[one]]

    def of_class(
        self,
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
        one = self._class(target, images, limit)
        samples, judging = len(one.rows), int((~one.fit).sum())
        if min(samples - judging, judging) < 2 * SMALLEST:
            note = f"too few samples ({samples}) to tell"
            return [], [Searched(target, layer, samples, 0, note) for layer in self.axes]
        relevance = channel_relevance(
            self.model,
            self.samples,
            one.rows,
            one.fit,
            target=target,
            axes=self.axes,
            scorer=scorer,
        )
        divided = proposals(
            method,
            self.model,
            self.samples,
            one.rows,
            one.fit,
            target=target,
            shares={layer: each.shares for layer, each in relevance.items()},
            labels=self.labels,
            scorer=scorer,
            seed=self.seed,
            marked=marked,
        )
        parts = {
            layer: [(kind, part) for kind, each in kinds.items() for part in each.parts]
            for layer, kinds in divided.items()
        }
        masks = {layer: [part[one.fit] for _, part in each] for layer, each in parts.items()}
        by_part = moments(self.model, self.samples, one.rows[one.fit], masks, self.axes)
        found: dict[str, list[Candidate]] = {}
        for layer, each in relevance.items():
            found[layer] = candidates(by_part[layer], parts[layer])
            if method == "relevance" and marked is None:
                vectors, mean = each.vectors * (samples - judging), by_part[layer][0].mean
                found[layer] += relevant_directions(each.cross[0], mean, vectors)
        judged = torch.cat([one.rows[~one.fit], self.pool]).unique()
        of_class = torch.isin(judged, one.rows)
        leading = {
            layer: [each.leading(SIZE).subspaces for each in same] for layer, same in found.items()
        }
        scores = presences(self.model, self.samples, judged, leading, self.axes)
        findings, notes = [], []
        for layer, same in found.items():
            most = max(each.count for each in divided[layer].values())
            note = "" if most > 1 or method != "relevance" else "one strategy"
            if marked is not None and not masks[layer]:
                note = "too few samples with or without the marked feature; explain all images"
            notes.append(Searched(target, layer, samples, most, note))
            if same:
                kept = separated(same, scores[layer], judged, of_class, one.rows, one.fit)
                cross = relevance[layer].cross[1]
                findings += self._judged(one, layer, kept, divided[layer], cross)
        return findings, notes

    def _class(self, target: int, images: str, limit: int) -> _Class:
        """Draw the samples of a class, and those of others that a feature is put into."""
        generator = torch.Generator().manual_seed(self.seed + target)
        every = images == "all"
        among = torch.ones_like(self.judging) if every else self.predicted == target
        rows = _some(among.nonzero()[:, 0], limit, generator)
        away = self.pool if every else self.pool[self.predicted[self.pool] != target]
        away = _some(away, RECIPIENTS, generator)
        return _Class(target, rows, ~self.judging[rows], away, TYPICAL if every else None)

    def _judged(
        self,
        one: _Class,
        layer: str,
        kept: Sequence[Candidate],
        divided: dict[str, Strategies],
        cross: Tensor,
    ) -> list[Finding]:
        """Return the candidates of a class and layer that are worth a look, as findings."""
        if not len(one.away):
            return []
        inputs = joined([batch.inputs for _, batch in self.samples.read(one.away)])
        recipients = Recipients(self.model, layer, self.axes[layer], inputs, self.seed)
        rated = []
        for candidate in kept:
            put = self._put(candidate, recipients)
            finding = self._finding(one, layer, candidate, SIZE, put(SIZE), divided, cross)
            if finding.evidence.worth_a_look:
                rated.append((finding, candidate, put))
        rated.sort(key=lambda each: -each[0].evidence.score)
        found = []
        for _, candidate, put in rated[:PER_LAYER]:
            size, transferred = _smallest(candidate, put, one.target)
            finding = self._finding(one, layer, candidate, size, transferred, divided, cross)
            found.append(finding)
        return found

    def _put(self, candidate: Candidate, recipients: Recipients) -> Callable[[int], Transferred]:
        """Return a function that puts so many leading directions of a candidate into recipients."""
        generator = torch.Generator().manual_seed(self.seed)
        with_it, without = (
            self._values(recipients.layer, _some(rows, DONORS, generator))
            for rows in candidate.donors
        )

        def put(size: int) -> Transferred:
            return recipients.put(candidate.leading(size).subspaces.basis, with_it, without)

        return put

    def _finding(
        self,
        one: _Class,
        layer: str,
        candidate: Candidate,
        size: int,
        transferred: Transferred,
        divided: dict[str, Strategies],
        cross: Tensor,
    ) -> Finding:
        """Return a candidate as a finding, without what needs the presence in all samples."""
        by_feature, control = transferred.turned(one.target, one.typical)
        subspaces = candidate.leading(size).subspaces
        shown = divided.get(candidate.kind, next(iter(divided.values())))
        separation = figures.Figure(candidate.separation, -1.0, 1.0, int((~one.fit).sum()))
        return Finding(
            target=one.target,
            layer=layer,
            axis=self.axes[layer],
            subspaces=subspaces,
            pooling=candidate.pooling,
            threshold=0.0,
            scores=torch.empty(0),
            evidence=Evidence(
                transfer=figures.mean_figure(by_feature.double() - control.double(), self.seed),
                control=float(control.double().mean()),
                effect=transferred.effect(one.target),
                separation=separation,
                reliance=figures.reliance(subspaces.basis, cross),
                groups=dict.fromkeys(figures.GROUPS, PseudoGroup(0, None, None)),
            ),
            kind=candidate.kind,
            points=shown.points,
            cluster=shown.cluster,
            part=torch.ones_like(one.fit) if candidate.part is None else candidate.part,
            rows=one.rows,
        )

    def finished(self, found: Sequence[Finding]) -> list[Finding]:
        """Return findings with presence, threshold and groups, joined and in order."""
        if not found:
            return []
        wanted: dict[str, list[Finding]] = {}
        for one in found:
            wanted.setdefault(one.layer, []).append(one)
        every = torch.arange(len(self.predicted))
        scores = presences(
            self.model,
            self.samples,
            every,
            {layer: [one.subspaces for one in same] for layer, same in wanted.items()},
            self.axes,
        )
        whole = []
        for layer, same in wanted.items():
            for number, one in enumerate(same):
                own = scores[layer][POOLINGS.index(one.pooling), number]
                judged = torch.cat([self.pool, one.rows[self.judging[one.rows]]]).unique()
                weights = figures.balanced_weights(self.predicted[judged])
                threshold = figures.two_means(own[judged], weights)
                inside = one.rows[self.judging[one.rows]]
                part = one.part[self.judging[one.rows]]
                evidence = one.evidence
                if not part.all():
                    separation = figures.separation_figure(own[inside], part, self.seed)
                    evidence = replace(evidence, separation=separation)
                whole.append(replace(one, scores=own, threshold=threshold, evidence=evidence))
        whole.sort(key=lambda one: -one.evidence.score)
        kept: list[Finding] = []
        for one in whole:
            for number, better in enumerate(kept):
                if same_feature(better, one, self.predicted):
                    also = (*better.also, (one.target, one.layer))
                    kept[number] = replace(better, also=tuple(dict.fromkeys(also)))
                    break
            else:
                kept.append(one)
        return [self._with_groups(one) for one in kept]

    def _with_groups(self, finding: Finding) -> Finding:
        """Add the accuracy of the four pseudo-groups, before and after ablation."""
        truth = self.predicted if self.labels is None else self.labels
        of_class, has = truth == finding.target, finding.has
        generator = torch.Generator().manual_seed(self.seed)
        masks = (of_class & has, of_class & ~has, ~of_class & has, ~of_class & ~has)
        groups = {}
        for name, mask in zip(figures.GROUPS, masks, strict=True):
            members = mask.nonzero()[:, 0]
            if not len(members):
                groups[name] = PseudoGroup(0, None, None)
                continue
            right = (self.predicted == truth)[members].double().mean()
            some = _some((mask & self.judging).nonzero()[:, 0], GROUP, generator)
            ablated = None if not len(some) else self._ablated_accuracy(finding, some, truth)
            accuracy = None if self.labels is None else float(right)
            groups[name] = PseudoGroup(len(members), accuracy, ablated)
        return replace(finding, evidence=replace(finding.evidence, groups=groups))

    def _ablated_accuracy(self, finding: Finding, rows: Tensor, truth: Tensor) -> float:
        """Return the share of samples that keep their class when the subspace is ablated."""

        def ablate(values: Tensor) -> Tensor:
            a = values.movedim(finding.axis, -1)
            return finding.subspaces.ablate(a, [0]).movedim(-1, finding.axis)

        right = 0
        with preserved(self.model), torch.no_grad(), changed(self.model, finding.layer, ablate):
            for numbers, batch in self.samples.read(rows):
                logits = predict(self.model, batch.inputs)
                right += int((logits.argmax(1).cpu() == truth[numbers]).sum())
        return right / len(rows)

    def _values(self, layer: str, rows: Tensor) -> Tensor:
        """Return a layer's values in some samples."""
        values = []
        with preserved(self.model), torch.no_grad():
            for _, batch in self.samples.read(rows):
                with tapped(self.model, [layer]) as tap:
                    run(self.model, batch.inputs)
                values.append(tap.values[layer])
        return torch.cat(values)


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return at most so many of the rows, drawn at random, ascending."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values


def _smallest(
    candidate: Candidate, put: Callable[[int], Transferred], target: int
) -> tuple[int, Transferred]:
    """Return the smallest size that has 80 % of the effect of the largest, and what it does."""
    most = candidate.subspaces.basis.shape[1]
    sizes = sorted({min(size, most) for size in SIZES})
    tried = {size: put(size) for size in sizes}
    enough = ENOUGH_EFFECT * tried[sizes[-1]].effect(target)
    size = next((size for size in sizes if tried[size].effect(target) >= enough), sizes[-1])
    return size, tried[size]
