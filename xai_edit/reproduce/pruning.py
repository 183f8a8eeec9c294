"""Concept-aware pruning beside plain pruning: pairs of classes, one of which has a watermark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.predictiveness import predictiveness
from xai_edit.core.checks import require
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.datasets.shortcuts import Mark, Shortcut
from xai_edit.evaluation.evaluate_groups import evaluate_groups
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Options, Reproduction, Results, Table
from xai_edit.reproduce.networks import build, load_weights
from xai_edit.reproduce.pruning_methods import (
    FINE_TUNED,
    FINE_TUNED_METHODS,
    METHODS,
    Context,
    Found,
    fine_tuned,
)
from xai_edit.reproduce.training import fit

SHARES = (0.1, 0.2, 0.3, 0.4)
PLANNED = 250  # test images a class that subspaces are found from; the others measure
MEASURED = 200  # test images a class, each without and with the mark
MANY = 8  # subspaces
BATCH = 64
PRETRAINED_RATE = 1e-4
LAYERS = {"resnet20": "layer1.2", "vgg-like": "relu2"}  # of networks other than a recipe's


@dataclass(frozen=True, kw_only=True)
class PairPruning(Reproduction):
    """Networks that learned a watermark with one of two classes, pruned by every method.

    Attributes
    ----------
    classes : tuple
        Without the watermark, and with it: labels, or folders of ImageNet.
    layer : str
        Where the subspaces are.
    strengths : tuple of float
        Shares of the training images of the second class with the watermark.
    shift : int
        Of training images, in pixels.
    rows : (int, int) or None
        Of the classes among ImageNet's 1,000.
    """

    classes: tuple[Any, Any]
    layer: str
    strengths: tuple[float, ...] = (0.9,)
    shift: int = 0
    rows: tuple[int, int] | None = None
    methods = tuple(METHODS)
    shares: ClassVar[tuple[float, ...]] = SHARES

    @property
    def in_folders(self) -> bool:
        """Whether the classes are folders of ImageNet, whose cartons have a real watermark."""
        return isinstance(self.classes[0], str)

    def chosen(self, options: Options, images: list[ImageSet]) -> list[ImageSet]:
        """Return the images of the two classes, as 0 and 1."""
        classes = self._numbered(options, images[0])
        pairs = [one[torch.isin(one.labels, torch.tensor(classes))] for one in images]
        return [replace(one, labels=(one.labels == classes[1]).long()) for one in pairs]

    def setting(self, options: Options, *images: ImageSet) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        return super().setting(options, *images) | {
            "classes": [*(options.classes or self.classes)],
            "strengths": [*(options.strengths or self.strengths)],
            "shares": [*self.shares],
            "layer": self._layer(options),
        }

    def one_seed(self, options: Options, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured at each strength."""
        found = {}
        for strength in options.strengths or self.strengths:
            context = self._context(options, seed, strength, *images)
            found[str(strength)] = self.compared(options, context)
        return found

    def compared(self, options: Options, context: Context) -> dict[str, Any]:
        """Measure all methods on one network."""
        model, layer, rows = context.model, context.layer, Rows(context)
        rows.measure("unpruned")
        precisions = {}
        for method, make in METHODS.items():
            if not options.wants(method):
                continue
            try:
                found, operator, data = make(context)
            except ValueError as problem:
                rows.rows.append({"method": method, "refused": str(problem)})
                continue
            finder = method.partition(": ")[2]
            if found is not None and finder not in precisions:
                with ablated(model, layer, *found):
                    rows.measure(f"ablation alone: {finder}")
                precisions[finder] = _precisions(found, context)
            for share in SHARES:
                with operator(share).plan(model, data).applied(model):
                    rows.measure(method, share)
                    if found is not None:
                        with ablated(model, layer, *found):
                            rows.measure(method.replace("CNP", "CNP, ablation kept"), share)
        return {"rows": rows.rows, "predictiveness": precisions}

    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return figures by strength, method and share over networks, and average precisions."""
        return summaries.pair_pruning(results)

    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return worst-group and balanced accuracy by method and share, and average precisions."""
        return tables.pair_pruning(summary)

    def _layer(self, options: Options) -> str:
        name = (options.network or self.network).partition(":")[0]
        return LAYERS.get(name, self.layer)

    def _numbered(self, options: Options, train: ImageSet) -> tuple[int, int]:
        """Return the numbers of the two classes; the folders of ImageNet have names."""
        given: Sequence[Any] = options.classes or self.classes
        works = "give a pair, the class with the watermark second"
        require(len(given) == 2, "classes", given, works)
        if isinstance(given[0], int):
            return given[0], given[1]
        assert not isinstance(train.source, Tensor)
        folders = {file.replace("\\", "/").split("/")[-2]: i for i, file in enumerate(train.source)}
        for name in given:
            if name not in folders:
                raise ValueError(f"data-root: no folder {name!r} in train; {sorted(folders)[:5]} …")
        return int(train.labels[folders[given[0]]]), int(train.labels[folders[given[1]]])

    def _mark(self, options: Options, side: int) -> Mark:
        """Return the real watermark of cartons at its place, or a half-transparent pattern."""
        if self.in_folders:
            logo = options.data_root / "watermark" / "carton_logo4.png"
            scale = side / 224
            size = (max(1, round(18 * scale)), max(1, round(210 * scale)))
            return Mark(logo, size=size, place=(round(110 * scale), round(10 * scale)))
        orange = torch.tensor([255, 102, 0, 255], dtype=torch.uint8)  # of the logo in ImageNet
        return Mark(orange[:, None, None].expand(4, 5, 9), place=None, opacity=0.5)

    def _context(
        self, options: Options, seed: int, strength: float, train: ImageSet, test: ImageSet
    ) -> Context:
        """Plant the mark, train a network, and return both."""
        mark = self._mark(options, train.side)
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

        train = shown(train, attribute)
        return Context(
            model=self._network(options, train, seed),
            layer=self._layer(options),
            seed=seed,
            train=train,
            planning=shown(planning, chance),
            test=Shortcut(mark, strength).balanced(held, seed),
        )

    def _network(self, options: Options, train: ImageSet, seed: int) -> nn.Module:
        """Return a network of the pair, trained here unless its weights are given."""
        if options.weights == "DEFAULT":
            rows = self.rows
            if rows is None:
                raise ValueError(
                    "weights: DEFAULT has the classes of ImageNet; give weights of two"
                )
            torch.manual_seed(seed)
            network = options.network or self.network
            model = build(network, len(train.mean), 1000, train.side)
            cut_to(load_weights(model, network, options.weights), rows)
            model, rate = model.to(options.device), {"learning_rate": PRETRAINED_RATE}
        elif options.weights is not None:
            return self.trained(options, seed, train)
        else:
            model, rate = self.built(options, seed, train), {}
        batches = Epochs(train, seed, BATCH, flip=self.flip, shift=self.shift)
        return fit(model, batches, **self.schedule(options, train, BATCH) | rate)


@dataclass(frozen=True, kw_only=True)
class TunedPairPruning(PairPruning):
    """The same in steps, with fine-tuning after each, on clean and on biased images."""

    methods = FINE_TUNED_METHODS
    shares: ClassVar[tuple[float, ...]] = (FINE_TUNED,)

    def compared(self, options: Options, context: Context) -> dict[str, Any]:
        """Measure all methods on one network."""
        rows = Rows(context)
        rows.measure("unpruned")
        for method, share, network, plan in fine_tuned(context):
            if options.wants(method.partition(";")[0]):
                with plan().applied(network):
                    rows.measure(method, share, network)
        return {"rows": rows.rows, "predictiveness": {}}


def cut_to(model: nn.Module, rows: Sequence[int]) -> None:
    """Leave a network some of its classes: rows of its last linear layer."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight = nn.Parameter(last.weight[list(rows)].clone())
        last.bias = nn.Parameter(last.bias[list(rows)].clone())
    last.out_features = len(rows)


class Rows:
    """What is measured on one network, row by row."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.counts = context.train.counts()
        self.rows: list[dict[str, Any]] = []

    def measure(
        self, method: str, share: float | None = None, network: nn.Module | None = None
    ) -> None:
        """Add a row: the accuracies of the network as it is now."""
        model = self.context.model if network is None else network
        accuracy = evaluate_groups(model, self.context.test, train_samples=self.counts)
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


def _precisions(found: Found, context: Context) -> dict[str, Any]:
    """Return average precisions by subspace: of all, or if they are many, of those taken."""
    subspaces, taken = found
    table = predictiveness(subspaces, context.features, resamples=200)
    content = table.to_dict()
    shown = range(len(table)) if len(table) <= MANY else taken
    by_number = {str(index): content["subspaces"][index] for index in shown}
    return {**content, "taken": [*taken], "subspaces": by_number}
