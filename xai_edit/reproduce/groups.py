"""Table 1 and Fig. 9 of Hakemi et al.: a spurious feature neutralised, group by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from xai_edit.baselines.groups import erm, group_dro, jtt
from xai_edit.baselines.robustness import LastLayerRetraining
from xai_edit.datasets.groups import celeba, metashift, waterbirds
from xai_edit.datasets.papers import ImageSet, mnist
from xai_edit.datasets.planting import Colours, Shortcut
from xai_edit.edits.fictitious import FictitiousClass
from xai_edit.edits.head import HeadFeatures, collect_head_features
from xai_edit.edits.leace import LEACE
from xai_edit.evaluation.group_figures import Accuracy
from xai_edit.evaluation.groups import evaluate_groups, evaluate_head
from xai_edit.reproduce.experiments import Options, build, load_weights
from xai_edit.reproduce.runs import over_seeds

TRAINED = ("group DRO", "JTT")  # methods that train from the start
STRENGTHS = (0.9, 0.95, 0.97)  # ρ of the coloured digits
LABELLED = 100  # images of each group that coloured digits are edited from
RED_OR_GREEN = Colours([(255, 0, 0), (0, 255, 0)])


@dataclass(frozen=True)
class Recipe:
    """How the networks of a data set are trained; rates and penalties are those of the sources."""

    network: str
    epochs: int
    batch_size: int
    erm: Mapping[str, Any]
    group_dro: Mapping[str, Any]
    jtt: Mapping[str, Any]


PAPERS: dict[str, tuple[Callable[..., ImageSet], Recipe]] = {
    "fcr-waterbirds": (
        waterbirds,
        Recipe(
            "resnet50",
            300,
            128,
            {"learning_rate": 1e-3, "weight_decay": 1e-4},
            {"learning_rate": 1e-5, "weight_decay": 1.0},
            {"learning_rate": 1e-5, "weight_decay": 1.0, "first_epochs": 60, "upweight": 100},
        ),
    ),
    "fcr-celeba": (
        celeba,
        Recipe(
            "resnet50",
            50,
            128,
            {"learning_rate": 1e-4, "weight_decay": 1e-4},
            {"learning_rate": 1e-5, "weight_decay": 0.1},
            {"learning_rate": 1e-5, "weight_decay": 0.1, "first_epochs": 1, "upweight": 50},
        ),
    ),
    # No source gives numbers for these groups: those of Waterbirds, with fewer epochs.
    "fcr-metashift": (
        metashift,
        Recipe(
            "resnet50",
            100,
            16,
            {"learning_rate": 1e-4, "weight_decay": 1e-4},
            {"learning_rate": 1e-5, "weight_decay": 1.0},
            {"learning_rate": 1e-5, "weight_decay": 1.0, "first_epochs": 20, "upweight": 20},
        ),
    ),
}
COLOURED_DIGITS = Recipe(
    "conv-2net",
    2,
    128,
    {"learning_rate": 1e-2},
    {"learning_rate": 1e-2, "weight_decay": 1e-2},
    {"learning_rate": 1e-2, "first_epochs": 1, "upweight": 10},
)


def neutralize_published(name: str, options: Options) -> dict[str, Any]:
    """Run Waterbirds, CelebA or MetaShift: edits planned on the validation split, as in DFR.

    Training starts from the weights of ImageNet with ``weights="DEFAULT"``; with a file it is the
    trained network itself, and methods that train are left out.

    Raises
    ------
    ValueError, OSError
        If the data or the network is not there.
    """
    _check_methods(options)
    read, recipe = PAPERS[name]
    extra = {} if options.side is None else {"side": options.side}
    train, validation, test = (
        read(options.data_root, split, **extra) for split in ("train", "val", "test")
    )
    if options.limit is not None:
        train, validation, test = (one.first(options.limit) for one in (train, validation, test))

    def one_seed(seed: int) -> dict[str, Any]:
        return _compared(recipe, options, train, validation, test, seed)

    return over_seeds(options, _setting(name, options, recipe, train, test), one_seed)


def neutralize_colours(name: str, options: Options) -> dict[str, Any]:
    """Run coloured digits: below 5 or not, where red and green go with it in a share ρ.

    Raises
    ------
    ValueError, OSError
        As for `neutralize_published`.
    """
    _check_methods(options)
    train, test = (
        mnist(options.data_root, split).regrouped(lambda digit: (digit >= 5).long())
        for split in ("train", "test")
    )
    if options.limit is not None:
        train, test = train.first(options.limit), test.first(options.limit)

    def one_seed(seed: int) -> dict[str, Any]:
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        half, found = test[order], {}
        labelled = min(LABELLED, len(half) // 8)
        for strength in STRENGTHS:
            shortcut = Shortcut(RED_OR_GREEN, strength)
            both = shortcut.balanced(half, seed)
            # A digit is in both colours: planning takes the first images, measuring the others.
            found[str(strength)] = _compared(
                COLOURED_DIGITS,
                options,
                shortcut.train(train, seed),
                both.first(labelled),
                both.first(len(both), start=labelled),
                seed,
            )
        return found

    return over_seeds(options, _setting(name, options, COLOURED_DIGITS, train, test), one_seed)


class _Samples(Dataset[tuple[Tensor, int, int]]):
    """Images one by one, so that those in files need not be in memory together."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        ((inputs, label, attribute),) = self.images[torch.tensor([index])]
        return inputs[0], int(label), int(attribute)


METHODS = (
    *("FCR: SCA", "FCR: SCA (least gap)", "FCR: SCA (one class)"),
    *("FCR: gradient × activation", "FCR: exact", "LEACE", "DFR", *TRAINED),
)


def _compared(
    recipe: Recipe,
    options: Options,
    train: ImageSet,
    validation: ImageSet,
    test: ImageSet,
    seed: int,
) -> dict[str, Any]:
    """Train a network, edit it by each method, and measure all on the test images."""
    counts = _counts(train)
    fit: dict[str, Any] = {
        "epochs": options.epochs or recipe.epochs,
        "batch_size": recipe.batch_size,
        "seed": seed,
    }
    make = partial(_built, recipe, options, train)
    data = train if isinstance(train.source, Tensor) else _Samples(train)
    if options.weights in (None, "DEFAULT"):
        model = erm(make, data, **fit, **recipe.erm).model
    else:
        model = load_weights(make(), options.network or recipe.network, options)
    planning, held = (
        collect_head_features(model, images, with_attribute=True) for images in (validation, test)
    )
    one_kind = planning.attribute is not None and len(planning.attribute.unique()) < 2
    # MetaShift: all validation images are on shelves, so backgrounds are learned from training.
    source = collect_head_features(model, train, with_attribute=True) if one_kind else planning
    rows = [{"method": "unedited (ERM)", **_figures(evaluate_head(held, train_samples=counts))}]
    for method, plan in _edits(model, source, planning).items():
        if not _wanted(options, method):
            continue
        try:
            edit = plan()
        except ValueError as problem:
            rows.append({"method": method, "refused": str(problem)})
            continue
        told = _figures(evaluate_head(held.edited(edit), train_samples=counts))
        more = {key: edit.origin[key] for key in ("rows", "reason") if key in edit.origin}
        rows.append({"method": method, **told, "weights_changed": edit.size, **more})
    if options.weights in (None, "DEFAULT"):
        first = min(recipe.jtt["first_epochs"], fit["epochs"])
        trained = {
            "group DRO": partial(group_dro, make, data, validation=validation, **recipe.group_dro),
            "JTT": partial(
                jtt, make, data, validation=validation, **{**recipe.jtt, "first_epochs": first}
            ),
        }
        for method, train_it in trained.items():
            if not _wanted(options, method):
                continue
            other = train_it(**fit).model
            figures = _figures(evaluate_groups(other, test, train_samples=counts))
            rows.append({"method": method, **figures})
    return {"rows": rows, "sweeps": _sweeps(model, source, planning)}


def _wanted(options: Options, method: str) -> bool:
    return options.methods is None or method in options.methods


def _edits(
    model: nn.Module, source: HeadFeatures, planning: HeadFeatures
) -> dict[str, Callable[[], Any]]:
    both: dict[str, Any] = {
        "fictitious": [0, 1],
        "validation": planning,
    }  # each value speaks for a class
    one: dict[str, Any] = {"fictitious": 1, "validation": planning}
    plans: dict[str, Callable[..., Any]] = {
        "FCR: SCA": partial(FictitiousClass().plan, **both),
        "FCR: SCA (least gap)": partial(FictitiousClass(rate="least-gap").plan, **both),
        "FCR: SCA (one class)": partial(FictitiousClass().plan, **one),
        "FCR: gradient × activation": partial(FictitiousClass("gradient-activation").plan, **both),
        "FCR: exact": partial(FictitiousClass("exact").plan, **both),
        "LEACE": LEACE().plan,
    }
    made: dict[str, Callable[[], Any]] = {
        name: partial(plan, model, source) for name, plan in plans.items()
    }
    made["DFR"] = partial(LastLayerRetraining(C="auto").plan, model, planning)
    return made


def _sweeps(model: nn.Module, source: HeadFeatures, planning: HeadFeatures) -> list[dict[str, Any]]:
    """Return the course over rates (Fig. 9) of the class that is favoured most."""
    try:
        sweeps = FictitiousClass().sweep(model, source, fictitious=1, validation=planning)
    except ValueError as problem:
        return [{"refused": str(problem)}]
    return [
        {
            "class": sweep.row,
            "rates": sweep.rates.tolist(),
            "worst": sweep.worst.tolist(),
            "average": sweep.average.tolist(),
            "best": sweep.best,
            "least_gap": sweep.least_gap,
        }
        for sweep in sweeps
    ]


def _built(recipe: Recipe, options: Options, train: ImageSet) -> nn.Module:
    name = options.network or recipe.network
    channels = 3 if train.planted is not None else len(train.mean)
    model = build(name, channels, int(train.labels.max()) + 1, train.side)
    if options.weights == "DEFAULT":
        weights = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict()
        own = model.state_dict()
        fitting = {key: value for key, value in weights.items() if value.shape == own[key].shape}
        model.load_state_dict(own | fitting)
    return model.to(options.device)


def _counts(images: ImageSet) -> Tensor:
    """Return the number of images of each group, int64, shape (classes, attributes)."""
    assert images.attribute is not None
    classes, attributes = int(images.labels.max()) + 1, int(images.attribute.max()) + 1
    cells = images.labels * attributes + images.attribute
    return cells.bincount(minlength=classes * attributes).view(classes, attributes)


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "worst": accuracy.worst,
        "average": accuracy.train_weighted,
        "plain": accuracy.average,
        "balanced": accuracy.balanced,
        "right": accuracy.right.tolist(),
        "samples": accuracy.samples.tolist(),
    }


def _check_methods(options: Options) -> None:
    for method in options.methods or ():
        if method not in METHODS:
            raise ValueError(f"methods: {method!r} given; they are {'; '.join(METHODS)}")


def _setting(
    name: str, options: Options, recipe: Recipe, train: ImageSet, test: ImageSet
) -> dict[str, Any]:
    return {
        "run": name,
        "network": options.network or recipe.network,
        "weights": options.weights,
        "epochs": options.epochs or recipe.epochs,
        "limit": options.limit,
        "methods": None if options.methods is None else [*options.methods],
        "images": {"train": len(train), "test": len(test), "side": train.side},
    }
