"""Filters pruned at once, without fine-tuning, from few reference images, by each criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from xai_edit.attribution.coupling import channel_groups
from xai_edit.attribution.criteria import Activation, Random, Taylor, WeightMagnitude
from xai_edit.attribution.importance import TorchPruningImportance
from xai_edit.attribution.layers import CONVOLUTIONS
from xai_edit.attribution.scorers import LRP, Scorer
from xai_edit.attribution.trace import following_batch_norms
from xai_edit.attribution.units import Aggregate, UnitScores, score_units
from xai_edit.datasets.papers import ImageSet, cifar10
from xai_edit.edits.edit import ModelEdit
from xai_edit.edits.ranking import Prunable, prunable
from xai_edit.edits.schedule import Schedule, pruned
from xai_edit.reproduce.experiments import Options
from xai_edit.reproduce.removal import trained
from xai_edit.reproduce.runs import over_seeds

NETWORK, EPOCHS = "resnet20", 10
SHARES = tuple(percent / 100 for percent in range(5, 65, 5))
REFERENCES = 10  # training images a class that filters are scored on
MEASURED = 50  # test images a class, of all ten classes
CLASSES = 3  # that are told apart in the class-restricted task
DRAWS = 4  # of so many classes
RESTRICTED_SHARE = 0.4
RESTRICTED_MEASURED = 100  # test images of each of those classes


@dataclass(frozen=True)
class Criterion:
    """How a filter is scored.

    Attributes
    ----------
    scorer : callable
        Gives the scorer of a seed.
    behind_norm : bool
        Scores are read behind the batch norm that follows a convolution, which is what pruning
        switches off. The relevance of both places is one, as the norm is merged for LRP.
    aggregate : {"abs", "sum"}
        Whether samples are summed by their absolute values, or with their signs and the absolute
        value is that of the sum.
    """

    scorer: Callable[[int], Scorer]
    behind_norm: bool = False
    aggregate: Aggregate = "abs"


_IMPORTANCE = torch_pruning.importance
METHODS = {
    "LRP epsilon-plus": Criterion(lambda _: LRP("epsilon-plus", initial="one")),
    "LRP epsilon": Criterion(lambda _: LRP("epsilon", initial="one")),
    "Taylor": Criterion(lambda _: Taylor(), behind_norm=True),
    "Taylor (before the norm)": Criterion(lambda _: Taylor()),
    "Taylor (summed)": Criterion(lambda _: Taylor(), behind_norm=True, aggregate="sum"),
    "weight magnitude": Criterion(lambda _: WeightMagnitude()),
    "activation": Criterion(lambda _: Activation(), behind_norm=True),
    "activation (before the norm)": Criterion(lambda _: Activation()),
    "Torch-Pruning: magnitude": Criterion(
        lambda _: TorchPruningImportance(_IMPORTANCE.GroupMagnitudeImportance())
    ),
    "Torch-Pruning: Taylor": Criterion(
        lambda _: TorchPruningImportance(_IMPORTANCE.GroupTaylorImportance())
    ),
    "random": Criterion(Random),
}


def prune_few_shot(name: str, options: Options) -> dict[str, Any]:
    """Prune a network for CIFAR-10 by every criterion, for all classes and for three of them.

    Yeom et al. 2021, *Pruning by explaining*; Hatefi et al. 2024, *Pruning by explaining
    revisited*. Batch norms keep their statistics: nothing is trained or calibrated afterwards.

    Raises
    ------
    ValueError, OSError
        If the data or the network is not there, or a method is unknown.
    """
    for method in options.methods or ():
        if method not in METHODS:
            raise ValueError(f"methods: {method!r} given; they are {'; '.join(METHODS)}")
    methods = {key: METHODS[key] for key in options.methods or METHODS}
    options = replace(options, epochs=options.epochs or EPOCHS)
    side = options.side or 32
    train, test = (cifar10(options.data_root, split, side) for split in ("train", "test"))
    if options.limit is not None:
        train, test = train.first(options.limit), test.first(options.limit)

    def one_seed(seed: int) -> dict[str, Any]:
        model = trained(train, options, NETWORK, seed)
        return _compared(model, train, test, methods, seed)

    setting = {
        "run": name,
        "network": options.network or NETWORK,
        "weights": options.weights,
        "epochs": None if options.weights else options.epochs,
        "limit": options.limit,
        "images": {"train": len(train), "test": len(test), "side": side},
        "references": REFERENCES,
        "shares": [*SHARES],
        "restricted_share": RESTRICTED_SHARE,
        "methods": [*methods],
    }
    return over_seeds(options, setting, one_seed)


@dataclass(frozen=True)
class _Task:
    """Images that filters are scored on, others that measure, and the classes to choose from."""

    references: ImageSet
    measured: ImageSet
    classes: list[int]


def _compared(
    model: nn.Module,
    train: ImageSet,
    test: ImageSet,
    methods: Mapping[str, Criterion],
    seed: int,
) -> dict[str, Any]:
    """Return accuracies of one draw: by method and share, and on each draw of three classes."""
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        images[torch.randperm(len(images), generator=generator)] for images in (train, test)
    )
    every = [*range(int(test.labels.max()) + 1)]
    whole = _Task(train.first(REFERENCES), test.first(MEASURED), every)
    found = filters(model, whole.references)

    def curve(criterion: Criterion, task: _Task, shares: Sequence[float]) -> list[float]:
        plan = planned(model, task.references, found, criterion, seed)
        after = []
        for share in shares:
            with plan(share).applied(model):
                after.append(accuracy(model, task.measured, task.classes))
        return after

    all_classes: dict[str, Any] = {"unpruned": accuracy(model, whole.measured, every)}
    all_classes |= {key: curve(one, whole, SHARES) for key, one in methods.items()}
    restricted = []
    for _ in range(DRAWS):
        classes = sorted(torch.randperm(len(every), generator=generator)[:CLASSES].tolist())
        among = torch.tensor(classes)
        own, held = (
            images[torch.isin(images.labels, among)] for images in (whole.references, test)
        )
        task = _Task(own, held.first(RESTRICTED_MEASURED), classes)
        row = {"classes": classes, "unpruned": accuracy(model, task.measured, classes)}
        row |= {key: curve(one, task, [RESTRICTED_SHARE])[0] for key, one in methods.items()}
        restricted.append(row)
    return {"all": all_classes, "restricted": restricted}


def filters(model: nn.Module, images: ImageSet) -> Prunable:
    """Return the filters that can be pruned: those of all convolutions that are free to go."""
    inputs = next(iter(images))[0].to(next(model.parameters()).device)
    names = [key for key, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    return prunable(channel_groups(model, inputs[:1]), names)


def planned(
    model: nn.Module, images: ImageSet, found: Prunable, criterion: Criterion, seed: int
) -> Callable[[float], ModelEdit]:
    """Score the filters once; return what prunes a share of them, as `RelevancePruning` does."""
    inputs = next(iter(images))[0].to(next(model.parameters()).device)
    read = {layer: layer for layer in found.layers}
    if criterion.behind_norm:
        read |= following_batch_norms(model, inputs[:1], found.layers)
    told = score_units(
        model,
        images,
        criterion.scorer(seed),
        layers=[*read.values()],
        target="label",
        aggregate=criterion.aggregate,
    )
    sums = {layer: told.sums[place].abs() for layer, place in read.items()}
    scores = UnitScores(sums, told.samples)

    def plan(share: float) -> ModelEdit:
        schedule = Schedule(share, "global", 1)
        return pruned(model, inputs, found, schedule, score=lambda *_: scores, origin={})

    return plan


def accuracy(model: nn.Module, images: ImageSet, classes: Sequence[int]) -> float:
    """Return the share of images whose class has the highest logit of some classes."""
    device = next(model.parameters()).device
    among = torch.tensor(classes)
    right = 0
    with torch.no_grad():
        for inputs, labels, *_ in images:
            logits: Tensor = model(inputs.to(device)).cpu()[:, among]
            right += int((among[logits.argmax(1)] == labels).sum())
    return right / len(images)
