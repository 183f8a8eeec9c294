"""Filters pruned at once, without fine-tuning, from few reference images, by each criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xai_edit.core.analysis import following_batch_norms
from xai_edit.core.data import model_device
from xai_edit.core.guard import copied
from xai_edit.core.layers import CONVOLUTIONS
from xai_edit.datasets.image_set import ImageSet
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.pruning.coupled_channels import channel_groups
from xai_edit.pruning.ranking import Prunable, prunable
from xai_edit.pruning.schedule import Schedule, pruned
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Reproduction
from xai_edit.reproduce.pruning_methods import SCORERS
from xai_edit.reproduce.training import logits_of
from xai_edit.scoring.criteria import Random
from xai_edit.scoring.unit_scores import Aggregate, UnitScores, score_units

SHARES = tuple(percent / 100 for percent in range(5, 65, 5))
REFERENCES = 10  # training images a class that filters are scored on
MEASURED = 50  # test images a class, of all ten classes
CLASSES = 3  # of the restricted task
DRAWS = 4  # of so many classes
RESTRICTED_SHARE = 0.4
RESTRICTED_MEASURED = 100  # test images of each of those classes


@dataclass(frozen=True)
class Criterion:
    """How a filter is scored.

    With ``behind_norm`` scores are read behind the batch norm that follows a convolution, which is
    what pruning switches off. LRP merges the norm, so that both places have one relevance.
    """

    scorer: Callable[[int], Scorer]  # of a seed
    behind_norm: bool = False
    aggregate: Aggregate = "abs"


METHODS = {
    "LRP epsilon-plus": Criterion(SCORERS["LRP"]),
    "LRP epsilon": Criterion(lambda _: LRP("epsilon", initial="one")),
    "Taylor": Criterion(SCORERS["Taylor"], behind_norm=True),
    "Taylor (before the norm)": Criterion(SCORERS["Taylor"]),
    "Taylor (summed)": Criterion(SCORERS["Taylor"], behind_norm=True, aggregate="sum"),
    "weight magnitude": Criterion(SCORERS["weight magnitude"]),
    "activation": Criterion(SCORERS["activation"], behind_norm=True),
    "activation (before the norm)": Criterion(SCORERS["activation"]),
    "Torch-Pruning: magnitude": Criterion(SCORERS["Torch-Pruning magnitude"]),
    "Torch-Pruning: Taylor": Criterion(SCORERS["Torch-Pruning Taylor"]),
    "random": Criterion(Random),
}


@dataclass(frozen=True, kw_only=True)
class FewShotPruning(Reproduction):
    """Every criterion, for all classes and for three of them.

    Yeom et al. 2021, *Pruning by explaining*; Hatefi et al. 2024, *Pruning by explaining
    revisited*. Batch norms keep their statistics: nothing is trained or calibrated afterwards.
    """

    methods = tuple(METHODS)
    summary = staticmethod(summaries.few_shot_pruning)
    tables = staticmethod(tables.few_shot_pruning)

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        return super().setting(*images) | {
            "references": REFERENCES,
            "shares": [*SHARES],
            "restricted_share": RESTRICTED_SHARE,
            "methods": [*(self.options.methods or METHODS)],
        }

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return accuracies by method and share, and on each draw of three classes."""
        model = self.trained(seed, images[0])
        methods = {key: METHODS[key] for key in self.options.methods or METHODS}
        generator = torch.Generator().manual_seed(seed)
        train, test = (one[torch.randperm(len(one), generator=generator)] for one in images)
        references = train.first(REFERENCES)
        found = filters(model, references)
        every = [*range(int(test.labels.max()) + 1)]

        def curve(own: ImageSet, criterion: Criterion, shares: Sequence[float]) -> list[float]:
            plan = planned(model, own, found, criterion, seed)
            after = []
            for share in shares:
                with plan(share).applied(model):
                    after.append(accuracy(model, measured, classes))
            return after

        classes, measured = every, test.first(MEASURED)
        all_classes: dict[str, Any] = {"unpruned": accuracy(model, measured, classes)}
        all_classes |= {key: curve(references, one, SHARES) for key, one in methods.items()}
        restricted = []
        for _ in range(DRAWS):
            classes = sorted(torch.randperm(len(every), generator=generator)[:CLASSES].tolist())
            among = torch.tensor(classes)
            own, held = (one[torch.isin(one.labels, among)] for one in (references, test))
            measured = held.first(RESTRICTED_MEASURED)
            row = {"classes": classes, "unpruned": accuracy(model, measured, classes)}
            for key, one in methods.items():
                (row[key],) = curve(own, one, [RESTRICTED_SHARE])
            restricted.append(row)
        return {"all": all_classes, "restricted": restricted}


def filters(model: nn.Module, images: ImageSet) -> Prunable:
    """Return the filters that can be pruned: those of all convolutions that are free to go."""
    inputs = next(iter(images))[0].to(model_device(model))
    names = [key for key, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    return prunable(channel_groups(model, inputs[:1]), names)


def planned(
    model: nn.Module, images: ImageSet, found: Prunable, criterion: Criterion, seed: int
) -> Callable[[float], ModelEdit]:
    """Score the filters once; return what prunes a share of them, as `RelevancePruning` does."""
    inputs = next(iter(images))[0].to(model_device(model))
    read = {layer: layer for layer in found.layers}
    if criterion.behind_norm:
        read |= following_batch_norms(model, inputs[:1], found.layers)
    layers, kind = [*read.values()], criterion.aggregate
    at_places = score_units(
        model, images, criterion.scorer(seed), layers=layers, target="label", aggregate=kind
    )
    sums = {layer: at_places.sums[place].abs() for layer, place in read.items()}
    scores = UnitScores(sums, at_places.samples)

    def plan(share: float) -> ModelEdit:
        schedule = Schedule(share, "global", 1)
        return pruned(
            model, copied(model).eval(), inputs, found, schedule, score=lambda *_: scores, origin={}
        )

    return plan


def accuracy(model: nn.Module, images: ImageSet, classes: Sequence[int]) -> float:
    """Return the share of images whose class has the highest logit of some classes."""
    among = torch.tensor([*classes])
    predicted = among[logits_of(model, images)[:, among].argmax(1)]
    return float((predicted == images.labels).double().mean())
