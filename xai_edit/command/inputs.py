"""The options of the command ``xai-edit`` as objects: a model, data, a scorer."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from xai_edit.command.categories import by_category, card_of
from xai_edit.command.load import Images, Preprocessing, load_images, load_model, preprocessing_of
from xai_edit.command.output import say
from xai_edit.command.own_data import is_own, load_own
from xai_edit.core.checks import one_of
from xai_edit.core.data import Data
from xai_edit.core.training import seeded
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.lrp.patterns import fit_patterns
from xai_edit.lrp.presets import PRESETS
from xai_edit.scoring.criteria import Activation, Random, Taylor, WeightMagnitude

SEED = 0  # of random weights and inputs, and of the order of training images
OTHERS: dict[str, Callable[[], Scorer]] = {
    "random": Random,
    "weight-magnitude": WeightMagnitude,
    "taylor": Taylor,
    "activation": Activation,
}


class Batches(DataLoader[Any]):
    """Images as batches, with a progress bar on stderr in each pass.

    They are in their order, or ``shuffled`` in a random one that changes with each pass; ``doing``
    is the text of the bar.
    """

    def __init__(
        self, options: argparse.Namespace, images: Any, doing: str, *, shuffled: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(SEED) if shuffled else None
        how = {"shuffle": shuffled, "generator": generator, "num_workers": options.workers}
        super().__init__(images, options.batch_size, **how)
        self.bar: dict[str, Any] = {"desc": doing, "disable": options.quiet, "total": len(self)}

    def __iter__(self) -> Any:
        return iter(tqdm(super().__iter__(), unit="batch", leave=False, **self.bar))


def model_of(options: argparse.Namespace) -> nn.Module:
    """Return the model with its weights, on its device."""
    require_device(options.device)
    with seeded(SEED):
        model = load_model(options.model, weights=options.weights, classes=options.outputs)
    if options.weights is None:
        note(options, f"model: {options.model} as built: no --weights given")
    return model.to(options.device)


def images_of(options: argparse.Namespace, spec: str, split: str | None = None) -> Images:
    """Return the data that ``spec`` names, sample by sample."""
    if is_own(spec):
        own = load_own(spec, options.command, limit=options.limit)
        note(options, f"data: {spec}, {own}, as they are")
        return own
    preprocessing = preprocessing_given(options)
    how = {"root": options.data_root, "split": split or options.split, "limit": options.limit}
    images = load_images(spec, preprocessing=preprocessing, label=options.label, **how)
    categories = card_of(options.model, options.weights).get("categories")
    if categories and options.label is None:
        images = by_category(images, categories)
    note(options, f"data: {spec}, {images}; as inputs {preprocessing}")
    return images


def preprocessing_given(options: argparse.Namespace) -> Preprocessing:
    """Return the preprocessing of the model, changed by the options."""
    asked = {name: getattr(options, name) for name in ("resize", "mean", "std")}
    return preprocessing_of(options.model, options.weights, shape=options.input_size, **asked)


def require_device(name: str) -> None:
    """Raise `ValueError` if a device cannot be used."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device: {name!r} cannot be used: {problem}") from None


def require_known(*names: str) -> None:
    """Raise `ValueError` if there is no scorer of a name."""
    for name in names:
        one_of(name, (*PRESETS, *OTHERS), "scorer")


def lrp_of(name: str, options: argparse.Namespace, model: nn.Module, data: Data) -> LRP:
    """Return LRP with a preset, which may need the bounds of its inputs or patterns."""
    parameters: dict[str, Any] = {}
    needed = inspect.signature(PRESETS[name]).parameters if name in PRESETS else ()
    if "low" in needed:
        if is_own(options.data):
            works = "images have them, such as a folder"
            raise ValueError(f"scorer: {name!r} needs the bounds of inputs; {works}")
        parameters["low"], parameters["high"] = preprocessing_given(options).bounds
    if "patterns" in needed:
        parameters["patterns"] = fit_patterns(model, data)
    return LRP(name, **parameters)


def scorer_of(name: str, options: argparse.Namespace, model: nn.Module, data: Data) -> Scorer:
    """Return the scorer of a name."""
    return OTHERS[name]() if name in OTHERS else lrp_of(name, options, model, data)


def note(options: argparse.Namespace, text: str) -> None:
    """Print a line on stderr, unless ``--quiet`` is given."""
    if not options.quiet:
        say(text, sys.stderr)
