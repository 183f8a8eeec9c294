"""Concept-aware pruning beside plain pruning: pairs of classes, one of which has a watermark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.criteria import Activation, Random, Taylor, WeightMagnitude
from xai_edit.attribution.importance import TorchPruningImportance
from xai_edit.attribution.scorers import LRP
from xai_edit.baselines.recovery import FineTuning
from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.cav import CAV
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.contrast import ContrastivePCA
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.features import Features
from xai_edit.concepts.pca import PCA
from xai_edit.concepts.prca import PRCA
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.datasets.papers import ImageSet, cifar10, imagenet, mnist
from xai_edit.datasets.planting import Mark, Shortcut
from xai_edit.edits.pruning import ConceptAwarePruning, RelevancePruning
from xai_edit.evaluation.groups import evaluate_groups
from xai_edit.models.training import fit
from xai_edit.reproduce.experiments import Options, build, load_weights
from xai_edit.reproduce.runs import over_seeds

SHARES = (0.1, 0.2, 0.3, 0.4)
REFERENCES = 10  # images a class that units are scored on
PLANNED = 250  # test images a class that subspaces are found from; the others measure
MEASURED = 200  # test images a class, each without and with the mark
LEARNING_RATE = 3e-3
RANK = 4  # directions of a finder whose subspaces are single directions
POSITIONS = 100  # of an image, at most
STEPS = 4  # of iterative pruning
FINE_TUNED = 0.4  # the share that it reaches
TUNING: dict[str, Any] = {"epochs": 1, "learning_rate": 0.01, "batch_size": 64}
LRP_PRUNING = LRP("epsilon-plus", initial="one")
Found = tuple[Subspaces, list[int]]


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


RECIPES = {
    "cnp-cifar10": Recipe(cifar10, (1, 9), "vgg-like", "relu2", 32, 30, (0.9,), shift=4),
    "cnp-mnist": Recipe(mnist, (3, 8), "vgg-like:0.5", "relu2", 28, 2, (0.9, 0.95, 0.99)),
    "cnp-subspaces": Recipe(
        imagenet, ("n02074367", "n02971356"), "vgg16", "features.28", 224, 5, (0.9,)
    ),
    "cnp-carton-dugong": Recipe(
        imagenet, ("n02074367", "n02971356"), "vgg16", "features.28", 224, 5, (0.9,)
    ),
    "cnp-crate-packet": Recipe(
        imagenet, ("n03871628", "n03127925"), "vgg16", "features.28", 224, 5, (0.9,)
    ),
}
LAYERS = {"resnet20": "layer1.2"}  # of networks other than the recipe's


@dataclass(frozen=True)
class Parts:
    """The images of one draw.

    Attributes
    ----------
    train : ImageSet
        With the mark on a share of the second class.
    clean : ImageSet
        The same images without it.
    planning : ImageSet
        Others, of both classes, each without or with the mark by chance: no pairs.
    plain, marked : ImageSet
        The planning images without and with it: pairs.
    test : ImageSet
        Others, each once without and once with it.
    """

    train: ImageSet
    clean: ImageSet
    planning: ImageSet
    plain: ImageSet
    marked: ImageSet
    test: ImageSet


def prune_pairs(name: str, options: Options) -> dict[str, Any]:
    """Prune networks that learned a watermark with one of two classes, by every method.

    Raises
    ------
    ValueError, OSError
        If the data or the network is not there, or a method is unknown.
    """
    recipe = RECIPES[name]
    for method in options.methods or ():
        if method not in METHODS:
            raise ValueError(f"methods: {method!r} given; they are {'; '.join(METHODS)}")
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
            found[str(strength)] = _compared(recipe, options, model, parts, seed)
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
        "shares": [*SHARES],
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
    torch.manual_seed(seed)
    network = options.network or recipe.network
    if options.weights is not None:
        classes = 1000 if options.weights == "DEFAULT" else 2
        model = build(network, len(train.mean), classes, train.side)
        return _two_of(load_weights(model, network, options), train).to(options.device)
    model = build(network, len(train.mean), 2, train.side).to(options.device)
    flip = recipe.read is not mnist
    data = train.shuffled(seed, 64, flip=flip, shift=recipe.shift)
    steps = -(-len(train) // 64)
    epochs = options.epochs or recipe.epochs
    return fit(model, data, epochs=epochs, steps=steps, learning_rate=LEARNING_RATE)


def _compared(
    recipe: Recipe, options: Options, model: nn.Module, parts: Parts, seed: int
) -> dict[str, Any]:
    """Measure all methods on one network."""
    layer = _layer(recipe, options)
    counts = _group_counts(parts.train)
    rows: list[dict[str, Any]] = []

    def measure(method: str, share: float | None = None, **more: Any) -> None:
        accuracy = evaluate_groups(model, parts.test, train_samples=counts)
        told = {
            "worst": accuracy.worst,
            "balanced": accuracy.balanced,
            "biased": accuracy.train_weighted,
        }
        groups = [accuracy.groups[key] for key in sorted(accuracy.groups)]
        rows.append({"method": method, "share": share, **told, "groups": groups, **more})

    measure("unpruned")
    context = _Context(model, parts, layer, seed)
    tables = {}
    for method, make in METHODS.items():
        if options.methods is not None and method not in options.methods:
            continue
        try:
            found, operator, data = make(context)
        except ValueError as problem:
            rows.append({"method": method, "refused": str(problem)})
            continue
        finder = method.partition(": ")[2]
        if found is not None and finder not in tables:
            with ablated(model, layer, *found):
                measure(f"ablation alone: {finder}")
            table = predictiveness(found[0], context.features(), resamples=200)
            tables[finder] = {"taken": [*found[1]], **table.to_dict()}
        for share in SHARES:
            with operator(share).plan(model, data).applied(model):
                measure(method, share)
                if found is not None:
                    with ablated(model, layer, *found):
                        measure(method.replace("CNP", "CNP, ablation kept"), share)
    if options.methods is None:
        for method, plan in _fine_tuned(context):
            with plan().applied(model):
                measure(method, FINE_TUNED)
    return {"rows": rows, "predictiveness": tables}


class _Context:
    """A network with what its methods share, each made when it is first asked for."""

    def __init__(self, model: nn.Module, parts: Parts, layer: str, seed: int) -> None:
        self.model, self.parts, self.layer, self.seed = model, parts, layer, seed
        self._features: Features | None = None
        self._found: dict[str, Found] = {}

    def references(self, *, clean: bool = False) -> ImageSet:
        """Return reference images from training: as they come, or without the mark."""
        train = self.parts.train
        assert train.attribute is not None
        rows = torch.arange(len(train)) if not clean else (train.attribute == 0).nonzero()[:, 0]
        chosen = torch.cat([rows[train.labels[rows] == label][:REFERENCES] for label in (0, 1)])
        return train[chosen]

    def features(self) -> Features:
        """Return the features of the planning images, relevance being that for class 1."""
        if self._features is None:
            self._features = collect_features(
                self.model,
                self.parts.planning,
                layer=self.layer,
                scorer=LRP_PRUNING,
                target=1,
                positions=POSITIONS,
                seed=self.seed,
            )
        return self._features

    def found(self, finder: str) -> Found:
        """Return the subspaces of a finder, and which are the mark's."""
        if finder not in self._found:
            self._found[finder] = FINDERS[finder](self)
        return self._found[finder]


def paired_differences(context: _Context) -> Found:
    """Return the main directions of what the mark changes in the same images; needs pairs."""
    both = [
        collect_features(context.model, images, layer=context.layer, positions=None)
        for images in (context.parts.plain, context.parts.marked)
    ]
    change = (both[1].activations - both[0].activations).double()
    directions = torch.linalg.eigh(change.T @ change).eigenvectors.flip(1)[:, :RANK]
    mean = both[0].activations.double().mean(0)
    return Subspaces(directions.contiguous(), (RANK,), mean), [0]


def _by_precision(subspaces: Subspaces, features: Features, count: int) -> Found:
    precision = torch.tensor(predictiveness(subspaces, features, resamples=1).column("spurious"))
    return subspaces, precision.argsort(descending=True, stable=True)[:count].tolist()


def _of_relevance(kind: type[PCA] | type[PRCA], context: _Context) -> Found:
    return _by_precision(kind(None).fit(context.features()), context.features(), RANK)


def _disentangled(context: _Context) -> Found:
    found = DRSA(4, seed=context.seed).fit(context.features())
    return _by_precision(found, context.features(), 1)


FINDERS: dict[str, Callable[[_Context], Found]] = {
    "paired differences": paired_differences,
    "CAV": lambda context: (CAV().fit(context.features()), [0]),
    "CAV (logistic)": lambda context: (CAV("logistic").fit(context.features()), [0]),
    "contrastive PCA": lambda context: (ContrastivePCA(RANK).fit(context.features()), [0]),
    "PCA": partial(_of_relevance, PCA),
    "PRCA": partial(_of_relevance, PRCA),
    "DRSA": _disentangled,
}
Made = tuple[Found | None, Callable[[float], Any], ImageSet]
"""The subspaces that are ablated, the operator of each share, and the reference images."""


def _plain(scorer: Callable[[int], Any], context: _Context, *, clean: bool = False) -> Made:
    def operator(share: float) -> RelevancePruning:
        return RelevancePruning(share, scorer(context.seed))

    return None, operator, context.references(clean=clean)


def _torch_pruning(name: str, _: int) -> TorchPruningImportance:
    import torch_pruning  # only here: slow to import

    return TorchPruningImportance(getattr(torch_pruning.importance, name)())


def _aware(finder: str, context: _Context, *, clean: bool = False) -> Made:
    found = context.found(finder)

    def operator(share: float) -> ConceptAwarePruning:
        return ConceptAwarePruning(context.layer, *found, share, LRP_PRUNING)

    return found, operator, context.references(clean=clean)


METHODS: dict[str, Callable[[_Context], Made]] = {
    "LRP": partial(_plain, lambda _: LRP_PRUNING),
    "LRP, clean references": partial(_plain, lambda _: LRP_PRUNING, clean=True),
    "weight magnitude": partial(_plain, lambda _: WeightMagnitude()),
    "Taylor": partial(_plain, lambda _: Taylor()),
    "activation": partial(_plain, lambda _: Activation()),
    "Torch-Pruning magnitude": partial(_plain, partial(_torch_pruning, "GroupMagnitudeImportance")),
    "Torch-Pruning Taylor": partial(_plain, partial(_torch_pruning, "GroupTaylorImportance")),
    "random": partial(_plain, Random),
    **{f"CNP: {finder}": partial(_aware, finder) for finder in FINDERS},
    "CNP, clean references: paired differences": partial(_aware, "paired differences", clean=True),
}
TUNED = "after fine-tuning"


def _fine_tuned(context: _Context) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield methods that prune step by step and fine-tune after each."""
    biased, clean = context.references(), context.references(clean=True)
    found = context.found("contrastive PCA")
    plain = RelevancePruning(FINE_TUNED, LRP_PRUNING, steps=STEPS)
    for kind, images in (("clean", context.parts.clean), ("biased", context.parts.train)):
        # Without its attribute the biased set would not be known to be one: no warning is wanted.
        order = images.shuffled(context.seed, TUNING["batch_size"])
        tune = FineTuning(_Labelled(order), **TUNING, seed=context.seed)
        for method, operator, data in (
            ("LRP", plain, biased),
            (
                "LRP, clean references",
                RelevancePruning(FINE_TUNED, LRP_PRUNING, steps=STEPS),
                clean,
            ),
            ("random", RelevancePruning(FINE_TUNED, Random(context.seed), steps=STEPS), biased),
            (
                "CNP: contrastive PCA",
                ConceptAwarePruning(context.layer, *found, FINE_TUNED, LRP_PRUNING, steps=STEPS),
                biased,
            ),
        ):
            yield (
                f"{method}, {TUNED} on {kind} images",
                partial(operator.plan, context.model, data, fine_tune=tune),
            )


class _Labelled:
    """Batches of images and labels, without the attribute."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels, *_ in self.images:
            yield inputs, labels


def _group_counts(images: ImageSet) -> Tensor:
    """Return the number of images by class and attribute, int64, shape (2, 2)."""
    assert images.attribute is not None
    return (images.labels * 2 + images.attribute).bincount(minlength=4).view(2, 2)


def _two_of(model: nn.Module, train: ImageSet) -> nn.Module:
    """Return a network of ImageNet's 1,000 classes cut to the rows of the two, if it has more."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    if last.out_features == 2:
        return model
    raise ValueError(
        f"weights: a network of {last.out_features} classes ({name!r}); fine-tune it on the two "
        "classes first and give its weights"
    )
