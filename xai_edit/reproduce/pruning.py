"""Concept-aware pruning beside plain pruning: pairs of classes, one of which has a watermark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xai_edit.concepts.ablation import ablated
from xai_edit.core.checks import require
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.datasets.shortcuts import Mark, Shortcut
from xai_edit.reproduce import summaries, tables
from xai_edit.reproduce.experiments import Reproduction, Results
from xai_edit.reproduce.networks import build, load_weights
from xai_edit.reproduce.pruning_methods import (
    FINE_TUNED,
    FINE_TUNED_METHODS,
    METHODS,
    Context,
    fine_tuned,
)
from xai_edit.reproduce.training import fit

SHARES = (0.1, 0.2, 0.3, 0.4)
PLANNED = 250  # test images a class that subspaces are found from; the others measure
MEASURED = 200  # test images a class, each without and with the mark
BATCH = 64
PRETRAINED_RATE = 1e-4
ORANGE = torch.tensor([255, 102, 0, 255], dtype=torch.uint8)  # of the logo in ImageNet
FIELDS = (torch.arange(8)[:, None] // 2 + torch.arange(8) // 2) % 2  # of two by two pixels
WHITE = torch.full((1, 8, 8), 255)
PATTERNS = {
    "bar": ORANGE[:, None, None].expand(4, 5, 9),
    "checkerboard": torch.cat([FIELDS.expand(3, 8, 8) * 255, WHITE]).byte(),
}
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
    pattern : {"bar", "checkerboard"}
        The watermark of small images, half transparent and anywhere.
    marked_class : int
        The label of the class with the watermark.
    rows : (int, int) or None
        Of the classes among ImageNet's 1,000.
    """

    classes: tuple[Any, ...]
    layer: str
    strengths: tuple[float, ...] = (0.9,)
    shift: int = 0  # of training images, in pixels
    pattern: str = "bar"
    marked_class: int = 1
    rows: tuple[int, int] | None = None
    methods = tuple(METHODS)
    shares: ClassVar[tuple[float, ...]] = SHARES
    choices = (*Reproduction.choices, "classes", "strengths")
    summary = staticmethod(summaries.pair_pruning)
    tables = staticmethod(tables.pair_pruning)

    @property
    def place(self) -> str:
        """The layer, or that of another network."""
        return LAYERS.get(self.network.partition(":")[0], self.layer)

    def chosen(self, images: list[ImageSet]) -> list[ImageSet]:
        """Return the images of the two classes, as 0 and 1."""
        pair = torch.tensor(self.numbered(images[0]))
        both = [one[torch.isin(one.labels, pair)] for one in images]
        return [replace(one, labels=(one.labels == pair[1]).long()) for one in both]

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        own = {key: [*getattr(self, key)] for key in ("classes", "strengths", "shares")}
        return super().setting(*images) | own | {"layer": self.place}

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured at each strength."""
        return {
            str(strength): self.compared(self._context(seed, strength, *images))
            for strength in self.strengths
        }

    def compared(self, context: Context) -> dict[str, Any]:
        """Measure all methods on one network."""
        model, layer = context.model, context.layer
        rows: list[Results] = [context.measured("unpruned")]
        precisions = {}
        for method in filter(self.options.wants, METHODS):
            try:
                found, operator, images = METHODS[method](context)
            except ValueError as problem:
                rows.append({"method": method, "refused": str(problem)})
                continue
            finder = method.partition(": ")[2]
            if found is not None and finder not in precisions:
                with ablated(model, layer, *found):
                    rows.append(context.measured(f"ablation alone: {finder}"))
                precisions[finder] = context.precisions(found)
            for share in SHARES:
                with operator(share).plan(model, **images).applied(model):
                    rows.append(context.measured(method, share))
                    if found is not None:
                        kept = method.replace("CNP", "CNP, ablation kept")
                        with ablated(model, layer, *found):
                            rows.append(context.measured(kept, share))
        return {"rows": rows, "predictiveness": precisions}

    def numbered(self, train: ImageSet) -> tuple[int, int]:
        """Return the numbers of the two classes; the folders of ImageNet have names."""
        works = "give a pair, the class with the watermark second"
        require(len(self.classes) == 2, "classes", self.classes, works)
        first, second = self.classes
        if isinstance(first, int):
            return first, second
        assert not isinstance(train.source, Tensor)
        folders = {file.replace("\\", "/").split("/")[-2]: i for i, file in enumerate(train.source)}
        for name in self.classes:
            if name not in folders:
                raise ValueError(f"data-root: no folder {name!r} in train; {sorted(folders)[:5]} …")
        return int(train.labels[folders[first]]), int(train.labels[folders[second]])

    def _mark(self, side: int) -> Mark:
        """Return the real watermark of ImageNet's cartons, or the half-transparent pattern."""
        if self.rows is not None:
            logo = self.options.data_root / "watermark" / "carton_logo4.png"
            scale = side / 224
            size = (max(1, round(18 * scale)), max(1, round(210 * scale)))
            return Mark(logo, size=size, place=(round(110 * scale), round(10 * scale)))
        return Mark(PATTERNS[self.pattern], place=None, opacity=0.5)

    def _is_marked(self, labels: Tensor) -> Tensor:
        return (labels == self.marked_class).long()

    def _context(self, seed: int, strength: float, train: ImageSet, test: ImageSet) -> Context:
        """Plant the mark, train a network, and return both."""
        mark = self._mark(train.side)
        generator = torch.Generator().manual_seed(seed)
        rows = self._is_marked(train.labels).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)][: round(strength * len(rows))]
        attribute = torch.zeros_like(train.labels)
        attribute[rows] = 1
        smallest = int(test.labels.bincount().min())
        planned = min(PLANNED, smallest // 2)
        planning, held = test.first(planned), test.first(min(MEASURED, smallest - planned), planned)
        chance = torch.randperm(len(planning), generator=generator) % 2
        train = replace(train, attribute=attribute, planted=mark)
        return Context(
            model=self._network(train, seed),
            layer=self.place,
            seed=seed,
            train=train,
            planning=replace(planning, attribute=chance, planted=mark),
            test=Shortcut(mark, strength, self._is_marked).balanced(held, seed),
        )

    def _network(self, train: ImageSet, seed: int) -> nn.Module:
        """Return a network of the pair, trained here unless its weights are given."""
        schedule = self.schedule(train, BATCH)
        if self.options.weights is None:
            model = self.built(seed, train)
        elif self.options.weights == "DEFAULT":
            if self.rows is None:
                raise ValueError(
                    "weights: DEFAULT has the classes of ImageNet; give weights of two"
                )
            torch.manual_seed(seed)
            model = build(self.network, len(train.mean), 1000, train.side)
            cut_to(load_weights(model, self.network, "DEFAULT"), self.rows)
            model.to(self.options.device)
            schedule["learning_rate"] = PRETRAINED_RATE
        else:
            return self.trained(seed, train)
        batches = Epochs(train, seed, BATCH, flip=self.flip, shift=self.shift)
        return fit(model, batches, **schedule)


@dataclass(frozen=True, kw_only=True)
class TunedPairPruning(PairPruning):
    """The same in steps, with fine-tuning after each, on clean and on biased images."""

    methods = tuple(FINE_TUNED_METHODS)
    shares: ClassVar[tuple[float, ...]] = (FINE_TUNED,)

    def compared(self, context: Context) -> dict[str, Any]:
        """Measure all methods on one network."""
        rows = [context.measured("unpruned")]
        for method, share, network, plan in fine_tuned(context):
            if self.options.wants(method.partition(";")[0]):
                with plan().applied(network):
                    rows.append(context.measured(method, share, network))
        return {"rows": rows, "predictiveness": {}}


def cut_to(model: nn.Module, rows: Sequence[int]) -> None:
    """Leave a network some of its classes: rows of its last linear layer."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight = nn.Parameter(last.weight[list(rows)].clone())
        last.bias = nn.Parameter(last.bias[list(rows)].clone())
    last.out_features = len(rows)
