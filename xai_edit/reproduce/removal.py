"""Figures 6, 7 and 8 of Hakemi et al.: classes and sub-classes removed by one weight."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.datasets.groups import parity_mnist
from xai_edit.datasets.papers import ImageSet, cifar10, cifar100
from xai_edit.edits.fictitious import FictitiousClass
from xai_edit.edits.head import HeadFeatures, collect_head_features
from xai_edit.edits.selection import Selection
from xai_edit.edits.single_weight import SingleWeight
from xai_edit.evaluation.groups import evaluate_head
from xai_edit.models.training import fit
from xai_edit.reproduce.experiments import COLOURED, Options, build, load_weights
from xai_edit.reproduce.runs import over_seeds

PLANNED = 100  # test images a class (a digit) that edits are planned from; the others measure
BATCH = 128
DRAWS = 10  # of classes to remove together
SELECTIONS: tuple[Selection, ...] = (
    "sca",
    "ca",
    "gradient-activation",
    "relevance",
    "weight",
    "random",
    "exact",
)
TOLERANCES = (0.005, 0.02, 0.05, 0.1)  # accuracy on the other digits that may go, to plan by
RATES = np.union1d(np.linspace(0, 1, 21), np.logspace(-5, 0, 41))


def remove_classes(name: str, options: Options) -> dict[str, Any]:
    """Remove each class by each selection, by one to three weights (Fig. 6).

    Raises
    ------
    ValueError, OSError
        If the data or the network is not there.
    """
    train, test = _read(cifar10, options)

    def one_seed(seed: int) -> dict[str, Any]:
        model = trained(train, options, "conv-2net", seed)
        planning, held = parts(model, test, seed)
        rows = []
        for select in SELECTIONS:
            for n_weights in (1, 2, 3) if select == "sca" else (1,):
                operator = SingleWeight(select, n_weights=n_weights, seed=seed)
                for target in options.classes or range(held.classes):
                    row: dict[str, Any] = {"select": select, "n_weights": n_weights}
                    row["class"] = target
                    try:
                        edit = operator.plan(model, planning, target=target)
                    except ValueError as problem:
                        rows.append(row | {"refused": str(problem)})
                        continue
                    rows.append(row | {"accuracy": _by_class(held.edited(edit))})
        return {"before": _by_class(held), "rows": rows}

    return over_seeds(options, _setting(name, options, "conv-2net", train, test), one_seed)


def remove_several(name: str, options: Options) -> dict[str, Any]:
    """Remove several classes at once, drawn at random, by one weight each (Fig. 7).

    Raises
    ------
    ValueError, OSError
        As for `remove_classes`.
    """
    of_ten = name == "fcr-multi"
    network = "conv-2net" if of_ten else "resnet18"
    train, test = _read(cifar10 if of_ten else cifar100, options)

    def one_seed(seed: int) -> dict[str, Any]:
        model = trained(train, options, network, seed)
        planning, held = parts(model, test, seed)
        before = np.array(_by_class(held))
        generator = np.random.default_rng(seed)
        rows = []
        for count in sorted({round(held.classes * share) for share in (0.2, 0.4, 0.6, 0.8, 0.98)}):
            if count == held.classes:
                continue
            for _ in range(DRAWS):
                gone = sorted(generator.choice(held.classes, count, replace=False).tolist())
                stay = [at for at in range(held.classes) if at not in gone]
                for select in ("sca", "exact"):
                    edit = SingleWeight(select).plan(model, planning, target=gone)
                    after = np.array(_by_class(held.edited(edit)))
                    told = {"select": select, "classes": gone, "removed": after[gone].mean()}
                    told |= {"retained": after[stay].mean(), "retained_before": before[stay].mean()}
                    rows.append({"count": count, **told})
        return {"before": before.tolist(), "rows": rows}

    return over_seeds(options, _setting(name, options, network, train, test), one_seed)


def remove_digits(name: str, options: Options) -> dict[str, Any]:
    """Remove each digit from a network of odd and even, at each rate and by each dose (Fig. 8).

    Raises
    ------
    ValueError, OSError
        As for `remove_classes`.
    """
    train, test = _read(parity_mnist, options)

    def one_seed(seed: int) -> dict[str, Any]:
        model = trained(train, options, "conv-2net", seed, classes=2)
        planning, held = parts(model, test, seed)
        curves, chosen = [], []
        for digit in options.classes or range(10):
            where: dict[str, Any] = {"fictitious": digit, "target": digit % 2}
            for operator in (FictitiousClass("sca"), FictitiousClass("gradient-activation")):
                (sweep,) = operator.sweep(
                    model, planning, validation=held, rates=RATES.tolist(), **where
                )
                row: dict[str, Any] = {"digit": digit, "select": operator.select}
                row["column"] = sweep.column
                assert sweep.removed is not None
                assert sweep.retained is not None
                told = {"removed": sweep.removed.tolist(), "retained": sweep.retained.tolist()}
                curves.append(row | told)
            for select, tolerance in product(SELECTIONS[::6], TOLERANCES):  # SCA and exact
                operator = FictitiousClass(select, aim="removal", tolerance=tolerance)
                edit = operator.plan(model, planning, **where)  # the rate or dose chosen here
                after = evaluate_head(held.edited(edit))
                right, samples = after.right.sum(0), after.samples.sum(0)
                own = torch.arange(10) == digit
                removed, retained = (right[at].sum() / samples[at].sum() for at in (own, ~own))
                row = {"digit": digit, "select": select, "tolerance": tolerance}
                chosen.append(row | {"removed": float(removed), "retained": float(retained)})
        accuracy = evaluate_head(held).average
        return {"before": accuracy, "rates": RATES.tolist(), "curves": curves, "chosen": chosen}

    return over_seeds(options, _setting(name, options, "conv-2net", train, test), one_seed)


def trained(
    train: ImageSet, options: Options, network: str, seed: int, *, classes: int | None = None
) -> nn.Module:
    """Train a network, or put the weights of ``options`` into it."""
    torch.manual_seed(seed)
    name = options.network or network
    count = classes or int(train.labels.max()) + 1
    model = build(name, len(train.mean), count, train.side).to(options.device)
    if options.weights is not None:
        return load_weights(model, name, options)
    colours = len(train.mean) == 3
    return fit(
        model,
        train.shuffled(1000 * seed, BATCH, flip=colours),
        epochs=_epochs(options, colours),
        steps=-(-len(train) // BATCH),
        **COLOURED["training"],
    )


def parts(model: nn.Module, test: ImageSet, seed: int) -> tuple[HeadFeatures, HeadFeatures]:
    """Return features to plan on and to measure on: test images in an order by the seed."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    mixed = test[order]
    least = int((test.labels if test.attribute is None else test.attribute).bincount().min())
    planned = min(PLANNED, max(1, least // 2))
    both = (mixed.first(planned), mixed.first(len(mixed), start=planned))
    grouped = test.attribute is not None
    planning, held = (collect_head_features(model, one, with_attribute=grouped) for one in both)
    return planning, held


def _read(reader: Any, options: Options) -> tuple[ImageSet, ImageSet]:
    extra = {} if options.side is None or reader is parity_mnist else {"side": options.side}
    train, test = (reader(options.data_root, split, **extra) for split in ("train", "test"))
    if options.limit is not None:
        return train.first(options.limit), test.first(options.limit)
    return train, test


def _epochs(options: Options, colours: bool) -> int:
    return options.epochs if options.epochs is not None else (10 if colours else 2)


def _setting(
    name: str, options: Options, network: str, train: ImageSet, test: ImageSet
) -> dict[str, Any]:
    return {
        "run": name,
        "network": options.network or network,
        "weights": options.weights,
        "epochs": None if options.weights else _epochs(options, len(train.mean) == 3),
        "limit": options.limit,
        "images": {"train": len(train), "test": len(test), "side": train.side},
    }


def _by_class(head: HeadFeatures) -> list[float]:
    """Return the accuracy on each class."""
    told = evaluate_head(head)
    right, samples = told.right.sum(1), told.samples.sum(1)
    accuracy: Tensor = right / samples
    return [round(value, 5) for value in accuracy.tolist()]
