"""What all reproductions share: the user's options, the loop over seeds, and runs that go on."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from tqdm import tqdm

from xai_edit.core.checks import distinct, one_of, require
from xai_edit.core.files import clear_parts, write_atomically
from xai_edit.datasets.image_set import Epochs, ImageSet
from xai_edit.edits.model_edit import versions
from xai_edit.reproduce.networks import build, load_weights
from xai_edit.reproduce.training import fit, trained_once

Results: TypeAlias = dict[str, Any]
Table: TypeAlias = list[list[str]]
"""Rows of cells, the first of which is the head."""

BATCH = 128  # images a step of training


@dataclass(frozen=True)
class Options:
    """What a user may choose; see ``xai-edit reproduce --help``."""

    data_root: Path
    out: Path
    network: str | None = None
    weights: str | None = None
    epochs: int | None = None
    limit: int | None = None
    side: int | None = None
    classes: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] | None = None
    device: str = "cpu"
    quiet: bool = False
    command: str = ""

    def wants(self, method: str) -> bool:
        """Return whether a method is to be run; without ``methods`` all are."""
        return self.methods is None or method in self.methods


@dataclass(frozen=True, kw_only=True)
class Reproduction(ABC):
    """A table or figure of a paper: its data, its network, its methods and what is measured.

    Attributes
    ----------
    name, title : str
        As on the command line, and what it shows.
    read : callable
        Reads a split of the data: ``read(folder, split)`` or ``read(folder, split, side)``.
    network : str
        See `build`.
    side : int or None
        Of the images; None where the reader has one size.
    training : mapping
        Arguments of `fit`.
    flip : bool
        Whether images are mirrored by chance in training.
    """

    name: str
    title: str
    read: Callable[..., ImageSet]
    network: str
    epochs: int
    side: int | None = None
    training: Mapping[str, float] = field(default_factory=dict)
    flip: bool = False
    options: Options = Options(Path(), Path())
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    methods: ClassVar[Collection[str]] = ()  # that are compared and that a user may choose from
    choices: ClassVar[tuple[str, ...]] = ("network", "epochs", "side")  # options instead of fields

    @abstractmethod
    def summary(self, results: Mapping[str, Any]) -> Results:
        """Return the means and spreads of a run's results that its tables and figures show."""

    @abstractmethod
    def tables(self, summary: Mapping[str, Any]) -> dict[str, Table]:
        """Return the tables of a summary, with the paper's figures beside, by their titles."""

    def run(self, options: Options) -> Results:
        """Measure what ``results.json`` does not have yet, and write it after each part.

        ValueError or OSError if the data or the network is not there, an option is wrong, or the
        folder has a run with other settings.
        """
        for method in options.methods or ():
            require(bool(self.methods), "methods", method, f"{self.name} has none to choose from")
            one_of(method, self.methods, "methods")
        distinct(options.seeds, "seeds", "name each seed once")
        chosen = self.with_options(options)
        images = chosen.images()
        results, path = opened(options, chosen.setting(*images))
        for _ in chosen.measured(results, *images):
            write_atomically(path, json.dumps(results, indent=1).encode())
        return results

    def with_options(self, options: Options) -> Reproduction:
        """Return the reproduction with a user's options in place of its own settings."""
        own = {key: getattr(self, key) for key in self.choices}
        given = {key: getattr(options, key) or value for key, value in own.items() if value}
        return replace(self, options=options, **given)

    def one_seed(self, seed: int, *images: ImageSet) -> dict[str, Any]:
        """Return what is measured on the network of one seed, as JSON values."""
        raise NotImplementedError

    def measured(self, results: Results, *images: ImageSet) -> Iterator[None]:
        """Add seed after seed to the results, yielding after each."""
        found = results.setdefault("seeds", {})
        todo = [seed for seed in self.options.seeds if str(seed) not in found]
        for seed in tqdm(todo, desc=self.name, unit="seed", disable=self.options.quiet):
            found[str(seed)] = self.one_seed(seed, *images)
            yield

    def images(self) -> list[ImageSet]:
        """Read the splits, at most ``limit`` images a class of each."""
        root, limit = self.options.data_root, self.options.limit
        side = {} if self.side is None else {"side": self.side}
        chosen = self.chosen([self.read(root, split, **side) for split in self.splits])
        return chosen if limit is None else [one.first(limit) for one in chosen]

    def chosen(self, images: list[ImageSet]) -> list[ImageSet]:
        """Return the images that the run is about."""
        return images

    def setting(self, *images: ImageSet) -> dict[str, Any]:
        """Return what has to be the same for a run to go on."""
        options = self.options
        sizes = {split: len(one) for split, one in zip(self.splits, images, strict=True)}
        return {
            "run": self.name,
            "network": self.network,
            "weights": options.weights,
            "epochs": self.epochs,
            "limit": options.limit,
            "methods": None if options.methods is None else [*options.methods],
            "images": {**sizes, "side": images[0].side},
        }

    def built(self, seed: int, images: ImageSet) -> nn.Module:
        """Return an untrained network; the seed draws its weights."""
        torch.manual_seed(seed)
        classes = int(images.labels.max()) + 1
        model = build(self.network, len(images.mean), classes, images.side)
        return model.to(self.options.device)

    def trained(self, seed: int, images: ImageSet, file: Path | None = None) -> nn.Module:
        """Return a network with the user's weights, else trained on the images.

        With a ``file`` it is trained once and kept there.
        """
        model = self.built(seed, images)
        if self.options.weights is not None:
            return load_weights(model, self.network, self.options.weights)
        batches = Epochs(images, 1000 * seed, BATCH, flip=self.flip)

        def train(model: nn.Module) -> nn.Module:
            return fit(model, batches, **self.schedule(images))

        return train(model) if file is None else trained_once(file, model, train)

    def schedule(self, images: ImageSet, batch_size: int = BATCH) -> Any:
        """Return the arguments of `fit` for batches of these images."""
        return {"epochs": self.epochs, "steps": -(-len(images) // batch_size), **self.training}


@contextmanager
def refusals(rows: list[Results], row: Mapping[str, Any]) -> Iterator[None]:
    """Add a row with the reason where what is tried in the block raises ValueError."""
    try:
        yield
    except ValueError as problem:
        rows.append({**row, "refused": str(problem)})


def opened(options: Options, setting: Mapping[str, Any]) -> tuple[Results, Path]:
    """Return what a run has measured so far, and the file it is written to.

    ValueError if the folder holds a run with other settings, or a file that is no run.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    clear_parts(options.out, path.name)
    results: Any = {}
    if path.is_file():
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"out: {path} is damaged ({problem}); give another folder") from None
        if not isinstance(results, dict):
            raise ValueError(f"out: {path} is not of a run; give another folder")
    if any(results.get(key, value) != value for key, value in setting.items()):
        raise ValueError(f"out: {path} is of a run with other settings; give another folder")
    return results | {**setting, "command": options.command, "versions": versions()}, path
