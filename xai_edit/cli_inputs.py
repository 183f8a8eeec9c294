"""What the command ``xai-edit`` is given, as objects: a model, data, a scorer."""

# What takes long to import is imported where it is used, so that --help comes at once.
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from xai_edit.attribution.scorers import LRP, Scorer
    from xai_edit.data import Data
    from xai_edit.loading import Images, Preprocessing

SEED = 0  # of weights and inputs that are not given, and of the order of training
OTHERS = ("random", "weight-magnitude", "taylor", "activation")


@dataclass(frozen=True)
class Batches:
    """Batches with a progress bar on stderr, a new one in each pass."""

    loader: DataLoader[Any]
    doing: str
    quiet: bool

    def __str__(self) -> str:
        return str(self.loader.dataset)

    def __iter__(self) -> Iterator[Any]:
        from tqdm import tqdm

        bar = tqdm(self.loader, self.doing, unit="batch", leave=False, disable=self.quiet)
        return iter(bar)


def model_of(given: argparse.Namespace) -> nn.Module:
    """Return the model that is asked for, with its weights, on its device."""
    import torch

    from xai_edit.loading import load_model

    require_device(given.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = load_model(given.model, weights=given.weights, classes=given.outputs)
    if given.weights is None:
        note(given, f"model: {given.model} as it is made: no --weights given")
    return model.to(given.device)


def data_of(given: argparse.Namespace, spec: str, doing: str, split: str | None = None) -> Batches:
    """Return the data that is asked for, as batches."""
    from xai_edit.loading import load_data

    preprocessing = preprocessing_given(given)
    where: dict[str, Any] = {"root": given.data_root, "split": split or given.split}
    how: dict[str, Any] = {"limit": given.limit, "batch_size": given.batch_size}
    loader = load_data(spec, **where, preprocessing=preprocessing, **how)
    note(given, f"data: {spec}, {loader.dataset}; as inputs {preprocessing}")
    return Batches(loader, doing, given.quiet)


def images_of(given: argparse.Namespace, spec: str, part: str | None = None) -> Images:
    """Return the data that is asked for, image by image."""
    found: Any = data_of(given, spec, "reading", part).loader.dataset
    return found  # type: ignore[no-any-return]


def batches_of(
    given: argparse.Namespace, found: Dataset[Any], doing: str, *, shuffled: bool = False
) -> Batches:
    """Return images as batches, in their order or the same random one each time."""
    import torch
    from torch.utils.data import DataLoader

    how: dict[str, Any] = {"batch_size": given.batch_size}
    if shuffled:
        how |= {"shuffle": True, "generator": torch.Generator().manual_seed(SEED)}
    return Batches(DataLoader(found, **how), doing, given.quiet)


def preprocessing_given(given: argparse.Namespace) -> Preprocessing:
    """Return what is done to images: as usual for the model, but for what is given."""
    from xai_edit.loading import preprocessing_of

    asked = {name: getattr(given, name) for name in ("resize", "mean", "std")}
    return preprocessing_of(given.model, given.weights, shape=given.input_size, **asked)


def require_device(name: str) -> None:
    """Raise `ValueError` if a device cannot be used."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device: {name!r} cannot be used: {problem}") from None


def spurious_of(given: argparse.Namespace, whole: Images) -> list[int]:
    """Return which images have the spurious feature, 0 or 1 for each."""
    from xai_edit.spurious import read_spurious

    folder = Path(given.data) if Path(given.data).is_dir() else Path(given.data).parent
    return read_spurious(given.spurious, whole, folder)


def count_marked(given: argparse.Namespace, spurious: list[int]) -> dict[str, Any]:
    """Return what a run tells of them."""
    having = sum(spurious)
    return {"name": given.spurious, "with": having, "without": len(spurious) - having}


def require_known(name: str) -> None:
    """Raise `ValueError` if there is no scorer of a name."""
    from xai_edit.attribution.rules import PRESETS

    if name not in (*PRESETS, *OTHERS):
        raise ValueError(f"scorer: {name!r} given; it is one of {', '.join((*PRESETS, *OTHERS))}")


def lrp_of(name: str, given: argparse.Namespace, model: nn.Module, data: Data) -> LRP:
    """Return LRP with a preset, which may need the bounds of its inputs or patterns."""
    import inspect

    from xai_edit.attribution.patterns import fit_patterns
    from xai_edit.attribution.rules import PRESETS
    from xai_edit.attribution.scorers import LRP

    parameters: dict[str, Any] = {}
    needed = inspect.signature(PRESETS[name]).parameters if name in PRESETS else ()
    if "low" in needed:
        parameters["low"], parameters["high"] = preprocessing_given(given).bounds
    if "patterns" in needed:
        parameters["patterns"] = fit_patterns(model, data)
    return LRP(name, **parameters)


def scorer_of(name: str, given: argparse.Namespace, model: nn.Module, data: Data) -> Scorer:
    """Return the scorer of a name."""
    from xai_edit.attribution.criteria import Activation, Random, Taylor, WeightMagnitude

    others: tuple[Callable[[], Scorer], ...] = (Random, WeightMagnitude, Taylor, Activation)
    made = dict(zip(OTHERS, others, strict=True))
    return made[name]() if name in made else lrp_of(name, given, model, data)


def run_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return what made the files of a run."""
    from xai_edit.edits.edit import versions

    return {
        "command": given.line,
        "versions": versions(),
        "model": {"name": given.model, "weights": given.weights, "classes": given.outputs},
        "preprocessing": asdict(preprocessing_given(given)),
    }


def note(given: argparse.Namespace, text: str) -> None:
    """Print a line on stderr, but with ``--quiet``."""
    if not given.quiet:
        print(text, file=sys.stderr)
