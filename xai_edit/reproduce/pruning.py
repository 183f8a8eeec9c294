"""Concept-aware pruning beside plain pruning: pairs of classes, one of which has a watermark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.predictiveness import Predictiveness, predictiveness
from xai_edit.datasets.papers import ImageSet, cifar10, imagenet, mnist
from xai_edit.datasets.planting import Mark, Shortcut
from xai_edit.evaluation.groups import evaluate_groups
from xai_edit.models.training import fit
from xai_edit.reproduce.experiments import Options, build, load_weights
from xai_edit.reproduce.pruning_methods import (
    FINE_TUNED,
    FINE_TUNED_METHODS,
    METHODS,
    Context,
    Parts,
    fine_tuned,
)
from xai_edit.reproduce.runs import over_seeds

SHARES = (0.1, 0.2, 0.3, 0.4)
PLANNED = 250  # test images a class that subspaces are found from; the others measure
MEASURED = 200  # test images a class, each without and with the mark
MANY = 8  # subspaces
LEARNING_RATE = 3e-3
PRETRAINED_RATE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """The images of a pair, its network, and where its subspaces are."""

    read: Callable[..., ImageSet]
    classes: tuple[Any, Any]  # without the watermark, with it
    network: str
    layer: str
    side: int
    epochs: int
    strengths: tuple[float, ...]
    shift: int = 0  # of training images, in pixels
    fine_tuned: bool = False  # whether pruning goes in steps, with fine-tuning after each
    rows: tuple[int, int] | None = None  # of the classes among ImageNet's 1,000


CIFAR = Recipe(cifar10, (1, 9), "vgg-like", "relu2", 32, 30, (0.9,), shift=4)
CARTON = Recipe(
    imagenet,
    ("n02074367", "n02971356"),
    "vgg16",
    "features.28",
    224,
    5,
    (0.9,),
    rows=(149, 478),
)
RECIPES = {
    "cnp-cifar10": CIFAR,
    "cnp-fine-tuned": replace(CIFAR, fine_tuned=True),
    "cnp-mnist": Recipe(mnist, (3, 8), "vgg-like:0.5", "relu2", 28, 2, (0.9, 0.95, 0.99)),
    "cnp-subspaces": CARTON,
    "cnp-carton-dugong": CARTON,
    "cnp-crate-packet": replace(CARTON, classes=("n03871628", "n03127925"), rows=(692, 519)),
}
LAYERS = {"resnet20": "layer1.2", "vgg-like": "relu2"}  # of networks other than a recipe's


def prune_pairs(name: str, options: Options) -> dict[str, Any]:
    """Prune networks that learned a watermark with one of two classes, by every method.

    Raises
    ------
    ValueError, OSError
        If the data or the network is not there, or a method is unknown.
    """
    recipe = RECIPES[name]
    known = FINE_TUNED_METHODS if recipe.fine_tuned else METHODS
    for method in options.methods or ():
        if method not in known:
            raise ValueError(f"methods: {method!r} given; they are {'; '.join(known)}")
    side = options.side or recipe.side
    extra = {} if recipe.read is mnist else {"side": side}
    train, test = (recipe.read(options.data_root, split, **extra) for split in ("train", "test"))
    classes = _numbered(recipe, options, train)
    train, test = (_pair(images, classes) for images in (train, test))
    if options.limit is not None:
        train, test = train.first(options.limit), test.first(options.limit)
    mark = _mark(recipe, options, side)
    strengths = options.strengths or recipe.strengths

    def one_seed(seed: int) -> dict[str, Any]:
        found = {}
        for strength in strengths:
            parts = _parts(train, test, mark, strength, seed)
            model = _trained(recipe, options, parts.train, seed)
            context = Context(model, parts, _layer(recipe, options), seed)
            compare = _tuned if recipe.fine_tuned else _compared
            found[str(strength)] = compare(context, options.methods)
        return found

    setting = {
        "run": name,
        "network": options.network or recipe.network,
        "weights": options.weights,
        "epochs": options.epochs or recipe.epochs,
        "limit": options.limit,
        "side": side,
        "classes": [*classes],
        "strengths": [*strengths],
        "methods": None if options.methods is None else [*options.methods],
        "shares": [FINE_TUNED] if recipe.fine_tuned else [*SHARES],
        "layer": _layer(recipe, options),
    }
    return over_seeds(options, setting, one_seed)


def _layer(recipe: Recipe, options: Options) -> str:
    name = (options.network or recipe.network).partition(":")[0]
    return LAYERS.get(name, recipe.layer)


def _numbered(recipe: Recipe, options: Options, train: ImageSet) -> tuple[int, int]:
    """Return the numbers of the two classes; the folders of ImageNet have names."""
    given: Sequence[Any] = options.classes or recipe.classes
    if len(given) != 2:
        raise ValueError(f"classes: {given} given; a pair is two, that with the watermark second")
    if isinstance(given[0], int):
        return given[0], given[1]
    assert not isinstance(train.source, Tensor)
    folders = {file.replace("\\", "/").split("/")[-2]: i for i, file in enumerate(train.source)}
    for name in given:
        if name not in folders:
            raise ValueError(f"data-root: no folder {name!r} in train; {sorted(folders)[:5]} …")
    return int(train.labels[folders[given[0]]]), int(train.labels[folders[given[1]]])


def _pair(images: ImageSet, classes: tuple[int, int]) -> ImageSet:
    kept = images[torch.isin(images.labels, torch.tensor(classes))]
    return replace(kept, labels=(kept.labels == classes[1]).long())


def _mark(recipe: Recipe, options: Options, side: int) -> Mark:
    """Return the real watermark of cartons at its place, or a half-transparent pattern."""
    if recipe.read is imagenet:
        logo = options.data_root / "watermark" / "carton_logo4.png"
        scale = side / 224
        size = (max(1, round(18 * scale)), max(1, round(210 * scale)))
        return Mark(logo, size=size, place=(round(110 * scale), round(10 * scale)))
    orange = torch.tensor([255, 102, 0, 255], dtype=torch.uint8)  # of the logo in ImageNet
    return Mark(orange[:, None, None].expand(4, 5, 9), place=None, opacity=0.5)


def _parts(train: ImageSet, test: ImageSet, mark: Mark, strength: float, seed: int) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    rows = (train.labels == 1).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)][: round(strength * len(rows))]
    attribute = torch.zeros_like(train.labels)
    attribute[rows] = 1
    smallest = int(test.labels.bincount().min())
    planned = min(PLANNED, smallest // 2)
    planning, held = test.first(planned), test.first(min(MEASURED, smallest - planned), planned)
    chance = torch.randperm(len(planning), generator=generator) % 2

    def shown(images: ImageSet, attribute: Tensor) -> ImageSet:
        return replace(images, attribute=attribute, planted=mark)

    none, every = torch.zeros_like(planning.labels), torch.ones_like(planning.labels)
    return Parts(
        shown(train, attribute),
        shown(train, torch.zeros_like(attribute)),
        shown(planning, chance),
        shown(planning, none),
        shown(planning, every),
        Shortcut(mark, strength).balanced(held, seed),
    )


def _trained(recipe: Recipe, options: Options, train: ImageSet, seed: int) -> nn.Module:
    """Return a network of the pair, trained here but where its weights are given."""
    torch.manual_seed(seed)
    network = options.network or recipe.network
    learning_rate = LEARNING_RATE
    if options.weights is None:
        model = build(network, len(train.mean), 2, train.side)
    else:
        classes = 1000 if options.weights == "DEFAULT" else 2
        model = build(network, len(train.mean), classes, train.side)
        model = load_weights(model, network, options)
        if classes == 2:
            return model.to(options.device)
        if recipe.rows is None:
            raise ValueError("weights: DEFAULT has the classes of ImageNet; give weights of two")
        cut_to(model, recipe.rows)
        learning_rate = PRETRAINED_RATE
    data = train.shuffled(seed, 64, flip=recipe.read is not mnist, shift=recipe.shift)
    epochs, steps = options.epochs or recipe.epochs, -(-len(train) // 64)
    return fit(
        model.to(options.device), data, epochs=epochs, steps=steps, learning_rate=learning_rate
    )


def cut_to(model: nn.Module, rows: Sequence[int]) -> None:
    """Leave a network some of its classes: rows of its last linear layer."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight = nn.Parameter(last.weight[list(rows)].clone())
        last.bias = nn.Parameter(last.bias[list(rows)].clone())
    last.out_features = len(rows)


class _Rows:
    """What is measured on one network, row by row."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.counts = _group_counts(context.parts.train)
        self.rows: list[dict[str, Any]] = []

    def measure(
        self, method: str, share: float | None = None, network: nn.Module | None = None
    ) -> None:
        """Add a row: the accuracies of the network as it is now."""
        model = self.context.model if network is None else network
        accuracy = evaluate_groups(model, self.context.parts.test, train_samples=self.counts)
        self.rows.append(
            {
                "method": method,
                "share": share,
                "worst": accuracy.worst,
                "balanced": accuracy.balanced,
                "biased": accuracy.train_weighted,
                "groups": [accuracy.groups[key] for key in sorted(accuracy.groups)],
            }
        )


def _compared(context: Context, methods: Sequence[str] | None) -> dict[str, Any]:
    """Measure all methods on one network."""
    model, layer, rows = context.model, context.layer, _Rows(context)
    rows.measure("unpruned")
    tables = {}
    for method, make in METHODS.items():
        if methods is not None and method not in methods:
            continue
        try:
            found, operator, data = make(context)
        except ValueError as problem:
            rows.rows.append({"method": method, "refused": str(problem)})
            continue
        finder = method.partition(": ")[2]
        if found is not None and finder not in tables:
            with ablated(model, layer, *found):
                rows.measure(f"ablation alone: {finder}")
            table = predictiveness(found[0], context.features(), resamples=200)
            tables[finder] = _told(table, found[1])
        for share in SHARES:
            with operator(share).plan(model, data).applied(model):
                rows.measure(method, share)
                if found is not None:
                    with ablated(model, layer, *found):
                        rows.measure(method.replace("CNP", "CNP, ablation kept"), share)
    return {"rows": rows.rows, "predictiveness": tables}


def _told(table: Predictiveness, taken: Sequence[int]) -> dict[str, Any]:
    """Return a table by the numbers of subspaces: of all, or if they are many, of those taken."""
    told = table.to_dict()
    shown = range(len(table)) if len(table) <= MANY else taken
    subspaces = {str(index): told["subspaces"][index] for index in shown}
    return {**told, "taken": [*taken], "subspaces": subspaces}


def _tuned(context: Context, methods: Sequence[str] | None) -> dict[str, Any]:
    """Measure pruning in steps with fine-tuning after each, on clean and on biased images."""
    rows = _Rows(context)
    rows.measure("unpruned")
    for method, share, network, plan in fine_tuned(context):
        if methods is None or method.partition(";")[0] in methods:
            with plan().applied(network):
                rows.measure(method, share, network)
    return {"rows": rows.rows, "predictiveness": {}}


def _group_counts(images: ImageSet) -> Tensor:
    """Return the number of images by class and attribute, int64, shape (2, 2)."""
    assert images.attribute is not None
    return (images.labels * 2 + images.attribute).bincount(minlength=4).view(2, 2)
