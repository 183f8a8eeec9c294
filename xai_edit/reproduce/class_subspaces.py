"""What a new probe finds of a class whose subspace was removed, beside a retrained network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from xai_edit.comparisons.logit_mask import LogitMask
from xai_edit.concepts.ablation import with_identity
from xai_edit.core.checks import distinct, one_of, require, whole_number
from xai_edit.core.counting import count_by_group
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.evaluation.accuracy import Accuracy
from xai_edit.evaluation.evaluate_groups import evaluate_head
from xai_edit.evaluation.recovery import probe
from xai_edit.forgetting.class_subspace import ClassSubspaceRemoval
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import BATCH, Reproduction, Results
from xai_edit.reproduce.training import fit

PLANNED, VALIDATED = 36, 64  # test images a class: to plan from, and for the number of directions
PROBED, JUDGED = 200, 150  # test images a class: to fit the new probe on, and for all figures
STAGES = {  # of networks, in order
    "resnet20": ("layer1", "layer2", "layer3"),
    "vgg-like": ("pool1", "pool2", "pool3"),
    "conv-2net": ("pool1", "pool2", "relu_fc1"),
}
REMOVALS = {
    "ESC, all positions": ClassSubspaceRemoval(method="esc"),
    "LEACE, all positions": ClassSubspaceRemoval(method="leace"),
}
FOLDED, EVERY_STAGE = "LEACE, last layer folded", "LEACE, every stage in turn"
NOTHING, MASK, RETRAINED = "not edited", "logit mask", "retrained without the class"


@dataclass(frozen=True, kw_only=True)
class SubspaceRemoval(Reproduction):
    """Each class removed by each subspace at each stage, and a network retrained without it.

    Lee et al. 2025, *ESC: Erasing Space Concept for Knowledge Deletion*; Belrose et al. 2023,
    *LEACE*. With weights that were trained elsewhere nothing is retrained.
    """

    classes: tuple[int, ...]
    methods = (NOTHING, MASK, FOLDED, *REMOVALS, EVERY_STAGE, RETRAINED)
    choices = (*Reproduction.choices, "classes")
    summary = staticmethod(summaries.subspace_removal)
    tables = staticmethod(tables.subspace_removal)

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Check the network and the classes; return what has to be the same to go on."""
        one_of(self.network.partition(":")[0], STAGES, "network")
        held = images[1].labels.bincount(minlength=int(images[0].labels.max()) + 1)
        for target in distinct(self.classes, "classes", "name each class once"):
            whole_number(target, "classes", most=len(held) - 1)
        works = "planning, choosing, fitting a probe and judging need a test image a class each"
        require(int(held.min()) >= 4, "limit", int(held.min()), works)
        return super().setting(*images)

    def measured(self, results: Results, *images: ImageSet) -> Iterator[None]:
        """Add class after class to the results, yielding after each."""
        rows: list[Results] = results.setdefault("rows", [])
        done = {(row["seed"], row["class"]) for row in rows}
        todo = [each for each in product(self.options.seeds, self.classes) if each not in done]
        network: OneNetwork | None = None
        for seed, target in tqdm(todo, desc=self.name, unit="class", disable=self.options.quiet):
            if network is None or network.seed != seed:
                network = OneNetwork(self, seed, *images)
            rows += network.rows(target)
            yield


class OneNetwork:
    """A network of one seed with the images of each purpose."""

    def __init__(self, run: SubspaceRemoval, seed: int, train: ImageSet, test: ImageSet) -> None:
        self.run, self.seed, self.train = run, seed, train
        mixed = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))]
        least, wanted = int(test.labels.bincount().min()), (PLANNED, VALIDATED, PROBED, JUDGED)
        counts = [max(1, one * min(least, sum(wanted)) // sum(wanted)) for one in wanted]
        starts = [sum(counts[:at]) for at in range(len(counts))]
        parts = [mixed.first(n, start=at) for n, at in zip(counts, starts, strict=True)]
        self.planning, self.validation, self.probing, self.judging = parts
        self.stages = STAGES[run.network.partition(":")[0]]
        self.model = run.trained(seed, train)
        self.unedited = self._features(self.model)

    def rows(self, target: int) -> list[Results]:
        """Return the figures of each method for one class."""
        wants, rows = self.run.options.wants, []

        def add(method: str, features: list[HeadFeatures], **more: Any) -> None:
            where = {"seed": self.seed, "class": target, "method": method, **more}
            rows.append(where | self._figures(target, *features))

        if wants(NOTHING):
            add(NOTHING, self.unedited)
        if wants(MASK):
            edit = LogitMask().plan(self.model, self.planning, target=target)
            add(MASK, [one.edited(edit) for one in self.unedited])
        if wants(FOLDED):
            operator = ClassSubspaceRemoval(directions=1)
            edit = operator.plan(self.model, self.planning, target=target)
            add(FOLDED, [one.edited(edit) for one in self.unedited], directions=1)
        for layer, (name, removal) in product(self.stages, REMOVALS.items()):
            if wants(name):
                network, number = self._removed(replace(removal, layer=layer), target)
                add(name, self._features(network), layer=layer, directions=number)
        if wants(EVERY_STAGE):
            network = self.model
            for layer in self.stages:
                network = self._place(network, layer)
                operator = ClassSubspaceRemoval(layer, directions=1)
                operator.plan(network, self.planning, target=target).apply(network)
            add(EVERY_STAGE, self._features(network), directions=1)
        if wants(RETRAINED) and self.run.options.weights is None:
            add(RETRAINED, self._features(self._retrained(target)))
        return rows

    def _retrained(self, target: int) -> nn.Module:
        """Return a network that was trained as the first, on the images of the other classes."""
        run, others = self.run, self.train[self.train.labels != target]
        batches = Epochs(others, 1000 * self.seed, BATCH, flip=run.flip)
        return fit(run.built(self.seed, self.train), batches, **run.schedule(others))

    def _place(self, network: nn.Module, layer: str) -> nn.Module:
        return with_identity(network, layer, next(iter(self.planning))[0])

    def _removed(self, removal: ClassSubspaceRemoval, target: int) -> tuple[nn.Module, int]:
        """Remove with the smallest number of directions that silences, at whatever cost.

        Where none does, with the most that were tried.
        """
        assert removal.layer is not None
        network = self._place(self.model, removal.layer)
        *_, last = removal.sweep(network, self.planning, target=target, validation=self.validation)
        number = int(last["directions"])
        chosen = replace(removal, directions=number)
        return chosen.plan(network, self.planning, target=target).apply(network), number

    def _features(self, network: nn.Module) -> list[HeadFeatures]:
        """Return the inputs of the last layer on the images for the probe and for the figures."""
        return [collect_head_features(network, one) for one in (self.probing, self.judging)]

    def _figures(self, target: int, probing: HeadFeatures, judging: HeadFeatures) -> Results:
        """Return A_t and A_g of the network and of a new probe of all classes."""
        answers = probe(probing.features, probing.require_labels())(judging.features)
        counts = count_by_group(answers, judging.require_labels(), judging.classes)
        accuracy, probed = evaluate_head(judging), Accuracy(*counts)
        figures = {"A_t": accuracy.of(target), "A_g": accuracy.rest(target)}
        return figures | {"probe": probed.of(target), "probe_rest": probed.rest(target)}
