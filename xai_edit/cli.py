"""The command ``xai-edit``."""

# What takes long to import is imported where it is used, so that --help comes at once.
from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xai_edit.cli_options import parser

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from xai_edit.attribution.scorers import LRP, Scorer
    from xai_edit.data import Data
    from xai_edit.evaluation.comparison import Comparison
    from xai_edit.loading import Images, Preprocessing

SEED = 0  # of weights and inputs that are not given, and of the order of training


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 on success, 1 where ``check`` found something wrong with the model, 2 on bad input.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process when left out.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_args(arguments)
    given.line = shlex.join(["xai-edit", *arguments])
    try:
        return RUN[given.command](given)
    except (ValueError, TypeError, OSError) as problem:
        # Messages of other libraries may have several lines.
        print(f"xai-edit: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2


def _demo(given: argparse.Namespace) -> int:
    from xai_edit.demo import run

    run(given.out, seed=given.seed, quick=given.quick, quiet=given.quiet)
    return 0


def _report(given: argparse.Namespace) -> int:
    from xai_edit.report.page import write_report

    print(write_report(given.folder))
    return 0


def _check(given: argparse.Namespace) -> int:
    import torch

    from xai_edit.attribution.check import check_model
    from xai_edit.data import peek
    from xai_edit.loading import preprocessing_of

    _known(given.composite)
    data = None if given.data is None else _data(given, given.data, "reading")
    model = _model(given)
    if data is not None:
        inputs = peek(data, given.device)[0].inputs
    else:
        shape = given.input_size or preprocessing_of(given.model, given.weights).shape
        generator = torch.Generator().manual_seed(SEED)
        inputs = torch.randn(2, *shape, generator=generator).to(given.device)
        _note(given, f"data: none given; 2 inputs of random numbers, {'×'.join(map(str, shape))}")
    composite = _lrp(given.composite, given, model, [inputs])
    check = check_model(model, inputs, composite, layers=given.layers)
    print(_json(check.to_dict()) if given.json else check)
    return 0 if check.ok else 1


def _score(given: argparse.Namespace) -> int:
    from xai_edit.attribution.units import score_units, share_of
    from xai_edit.edits.edit import versions
    from xai_edit.evaluation.comparison import compare_scorers
    from xai_edit.evaluation.deletion import SHARES
    from xai_edit.files import write_atomically

    share_of(1, given.share)
    if given.held_out and not given.compare:
        raise ValueError("--held-out: given without --compare, whose deletion curves need it")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)  # fails now, not after the long part
    names = given.compare or [given.composite]
    for name in names:
        _known(name)
    data = _data(given, given.data, "scoring")
    curves: dict[str, Any] = {}
    if given.held_out:
        curves = {"deletion": SHARES, "held_out": _data(given, given.held_out, "deletion curves")}
    model = _model(given)
    scorers = {name: _scorer(name, given, model, data) for name in names}
    how = {"layers": given.layers, "target": given.target, "aggregate": given.aggregate}
    results: dict[str, Any] = {
        "run": "compare" if given.compare else "score",
        "command": given.line,
        "versions": versions(),
        "model": {"name": given.model, "weights": given.weights, "classes": given.outputs},
        "data": {"name": given.data, "found": str(data), "held_out": given.held_out},
        "preprocessing": asdict(_preprocessing(given)),
        "target": given.target,
        "aggregate": given.aggregate,
        "share": given.share,
    }
    found: Any
    if given.compare:
        found = compare_scorers(model, data, scorers, share=given.share, **how, **curves)
        results |= found.to_dict()
    else:
        found = score_units(model, data, scorers[given.composite], **how)
        results |= {"scorer": found.origin, "samples": found.samples, "layers": {}}
        for name in found:
            top = found.top(name, share=given.share).tolist()
            listed = [{"unit": unit, "score": float(found[name][unit])} for unit in top]
            results["layers"][name] = {"units": len(found[name]), "top": listed}
    print(_json(results) if given.json else found)
    if given.out is not None:
        if given.compare:
            _draw(given, found, model, data, scorers)
        else:
            found.save(given.out / "scores.safetensors")
        file = given.out / ("comparison.json" if given.compare else "results.json")
        write_atomically(file, _json(results).encode())
        _note(given, f"written: {file}")
    return 0


def _unlearn(given: argparse.Namespace) -> int:
    from dataclasses import replace

    from xai_edit.edits.path import PathPerturbation
    from xai_edit.report.terminal import unlearning_table
    from xai_edit.unlearn import classes_named, run, split

    _known(given.composite)
    how = {name: getattr(given, name) for name in ("share", "rank", "k", "scope", "bound")}
    operator = PathPerturbation(given.layers, **how)
    (given.out / "edits").mkdir(parents=True, exist_ok=True)  # fails now, not after the long part

    whole, read = _images(given, given.data), partial(_read, given)
    parts = split(whole, classes_named(given.forget, whole.classes), given.samples)
    train = None if given.train_data is None else _images(given, given.train_data, "train")
    model = _model(given)
    scorer = _scorer(given.composite, given, model, read(parts.own, "fitting patterns"))
    about = {
        **_about(given),
        "data": {"name": given.data, "found": str(whole), "train": given.train_data},
    }
    where: dict[str, Any] = {"train": train, "out": given.out, "read": read}
    operator = replace(operator, scorer=scorer)
    results, timing = run(model, operator, parts, **where, about=about)
    print(_json(results) if given.json else unlearning_table(results, timing))
    _note(given, f"written: {given.out / 'report.html'}")
    return 0


def _neutralize(given: argparse.Namespace) -> int:
    from xai_edit.edits.fictitious import FictitiousClass
    from xai_edit.neutralize import run, split
    from xai_edit.report.terminal import neutralizing_table
    from xai_edit.unlearn import classes_named

    operator = FictitiousClass(select=given.select, rate=given.rate)
    (given.out / "edits").mkdir(parents=True, exist_ok=True)  # fails now, not after the long part
    whole = _images(given, given.data)
    spurious = _spurious(given, whole)
    target = None if given.target is None else classes_named(given.target, whole.classes)
    parts = split(whole, spurious)
    about = {
        **_about(given),
        "data": {"name": given.data, "found": str(whole)},
        "spurious": _marked(given, spurious),
    }
    where: dict[str, Any] = {"out": given.out, "read": partial(_read, given)}
    results, timing = run(_model(given), operator, parts, target=target, **where, about=about)
    print(_json(results) if given.json else neutralizing_table(results, timing))
    _note(given, f"written: {given.out / 'report.html'}")
    return 0


def _prune(given: argparse.Namespace) -> int:
    from xai_edit.edits.pruning import ConceptAwarePruning, RelevancePruning
    from xai_edit.prune import run
    from xai_edit.prune_plans import finder_named, split
    from xai_edit.report.pruning import pruning_table

    how = {"share": given.share, "steps": given.steps, "protect": tuple(given.protect)}
    operator: RelevancePruning | ConceptAwarePruning = RelevancePruning(**how)
    if given.spurious is not None:
        if given.layer is None:
            raise ValueError("layer: none given; --spurious needs the layer of the subspaces")
        finder = finder_named(given.finder or "contrastive-pca")
        operator = ConceptAwarePruning(given.layer, finder, "auto", **how)
    elif given.layer is not None or given.finder is not None:
        name = "finder" if given.layer is None else "layer"
        raise ValueError(f"{name}: given without --spurious, whose feature is looked for there")
    (given.out / "edits").mkdir(parents=True, exist_ok=True)  # fails now, not after the long part
    whole = _images(given, given.data)
    spurious = None if given.spurious is None else _spurious(given, whole)
    parts = split(whole, spurious)
    about = {
        **_about(given),
        "data": {"name": given.data, "found": str(whole)},
        "spurious": None if spurious is None else _marked(given, spurious),
    }
    where: dict[str, Any] = {"out": given.out, "read": partial(_read, given)}
    results, timing = run(
        _model(given), operator, parts, epochs=given.fine_tune, **where, about=about
    )
    print(_json(results) if given.json else pruning_table(results, timing))
    _note(given, f"written: {given.out / 'report.html'}")
    return 0


def _show(given: argparse.Namespace) -> int:
    from xai_edit.edit_files import told
    from xai_edit.edits.edit import ModelEdit

    edit = ModelEdit.load(given.edit)
    print(_json(told(edit)) if given.json else edit.summary())
    return 0


def _apply(given: argparse.Namespace) -> int:
    from xai_edit.edit_files import require_new, write_edited
    from xai_edit.edits.edit import ModelEdit

    require_new(given.out)
    edit = ModelEdit.load(given.edit)
    write_edited(_model(given), edit, given.out, undo=given.command == "undo")
    _note(given, f"written: {given.out}")
    return 0


def _spurious(given: argparse.Namespace, whole: Images) -> list[int]:
    from xai_edit.spurious import read_spurious

    folder = Path(given.data) if Path(given.data).is_dir() else Path(given.data).parent
    return read_spurious(given.spurious, whole, folder)


def _marked(given: argparse.Namespace, spurious: list[int]) -> dict[str, Any]:
    having = sum(spurious)
    return {"name": given.spurious, "with": having, "without": len(spurious) - having}


def _images(given: argparse.Namespace, spec: str, part: str | None = None) -> Images:
    found: Any = _data(given, spec, "reading", part).loader.dataset
    return found  # type: ignore[no-any-return]


def _read(
    given: argparse.Namespace, found: Dataset[Any], doing: str, *, shuffled: bool = False
) -> _Batches:
    import torch
    from torch.utils.data import DataLoader

    how: dict[str, Any] = {"batch_size": given.batch_size}
    if shuffled:
        how |= {"shuffle": True, "generator": torch.Generator().manual_seed(SEED)}
    return _Batches(DataLoader(found, **how), doing, given.quiet)


def _about(given: argparse.Namespace) -> dict[str, Any]:
    """Return what made the files of a run."""
    from xai_edit.edits.edit import versions

    return {
        "command": given.line,
        "versions": versions(),
        "model": {"name": given.model, "weights": given.weights, "classes": given.outputs},
        "preprocessing": asdict(_preprocessing(given)),
    }


DRAWN = 4  # images with their relevance maps


def _draw(
    given: argparse.Namespace,
    found: Comparison,
    model: nn.Module,
    data: Data,
    scorers: dict[str, Scorer],
) -> None:
    from xai_edit.attribution.targets import targets_of
    from xai_edit.data import Batch, peek
    from xai_edit.files import write_atomically
    from xai_edit.report.comparison import deletion_curves, map_grid, rank_matrices, relevance_maps

    pictures = {"rank-correlation.png": rank_matrices(found)}
    if any(found.deletion.values()):
        pictures["deletion.png"] = deletion_curves(found.deletion)
    if any(hasattr(scorer, "heatmap") for scorer in scorers.values()):
        batch = peek(data, given.device)[0]
        labels = None if batch.labels is None else batch.labels[:DRAWN]
        batch = Batch(batch.inputs[:DRAWN], labels)
        targets = targets_of(batch, given.target)
        maps = relevance_maps(model, batch.inputs, scorers, targets=targets)
        low, high = _preprocessing(given).bounds
        images = (batch.inputs.cpu() - low) / (high - low)
        pictures["relevance-maps.png"] = map_grid(images, maps)
    for name, picture in pictures.items():
        write_atomically(given.out / name, picture)


@dataclass(frozen=True)
class _Batches:
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


def _data(given: argparse.Namespace, spec: str, doing: str, split: str | None = None) -> _Batches:
    from xai_edit.loading import load_data

    preprocessing = _preprocessing(given)
    where: dict[str, Any] = {"root": given.data_root, "split": split or given.split}
    how: dict[str, Any] = {"limit": given.limit, "batch_size": given.batch_size}
    loader = load_data(spec, **where, preprocessing=preprocessing, **how)
    _note(given, f"data: {spec}, {loader.dataset}; as inputs {preprocessing}")
    return _Batches(loader, doing, given.quiet)


def _preprocessing(given: argparse.Namespace) -> Preprocessing:
    from xai_edit.loading import preprocessing_of

    asked = {name: getattr(given, name) for name in ("resize", "mean", "std")}
    return preprocessing_of(given.model, given.weights, shape=given.input_size, **asked)


def _require_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device: {name!r} cannot be used: {problem}") from None


def _model(given: argparse.Namespace) -> nn.Module:
    import torch

    from xai_edit.loading import load_model

    _require_device(given.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = load_model(given.model, weights=given.weights, classes=given.outputs)
    if given.weights is None:
        _note(given, f"model: {given.model} as it is made: no --weights given")
    return model.to(given.device)


OTHERS = ("random", "weight-magnitude", "taylor", "activation")


def _known(name: str) -> None:
    from xai_edit.attribution.rules import PRESETS

    if name not in (*PRESETS, *OTHERS):
        raise ValueError(f"scorer: {name!r} given; it is one of {', '.join((*PRESETS, *OTHERS))}")


def _lrp(name: str, given: argparse.Namespace, model: nn.Module, data: Data) -> LRP:
    """Return LRP with a preset, which may need the bounds of its inputs or patterns."""
    import inspect

    from xai_edit.attribution.patterns import fit_patterns
    from xai_edit.attribution.rules import PRESETS
    from xai_edit.attribution.scorers import LRP

    parameters: dict[str, Any] = {}
    needed = inspect.signature(PRESETS[name]).parameters if name in PRESETS else ()
    if "low" in needed:
        parameters["low"], parameters["high"] = _preprocessing(given).bounds
    if "patterns" in needed:
        parameters["patterns"] = fit_patterns(model, data)
    return LRP(name, **parameters)


def _scorer(name: str, given: argparse.Namespace, model: nn.Module, data: Data) -> Scorer:
    from xai_edit.attribution.criteria import Activation, Random, Taylor, WeightMagnitude

    others: tuple[Callable[[], Scorer], ...] = (Random, WeightMagnitude, Taylor, Activation)
    made = dict(zip(OTHERS, others, strict=True))
    return made[name]() if name in made else _lrp(name, given, model, data)


def _json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False)


def _note(given: argparse.Namespace, text: str) -> None:
    if not given.quiet:
        print(text, file=sys.stderr)


def _reproduce(given: argparse.Namespace) -> int:
    import torch

    from xai_edit.reproduce.catalogue import CATALOGUE
    from xai_edit.reproduce.experiments import Options
    from xai_edit.reproduce.tables import text

    if given.list:
        for name, entry in CATALOGUE.items():
            print(f"{name:<14} {entry.told}")
        return 0
    if given.name not in CATALOGUE:
        raise ValueError(f"name: {given.name!r} given; it is one of {', '.join(CATALOGUE)}")
    root = given.data_root or os.environ.get("XAI_EDIT_DATA")
    if root is None:
        raise ValueError("data-root: none given, and XAI_EDIT_DATA is not set")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _require_device(device)
    chosen = {
        name: getattr(given, name)
        for name in (
            "network",
            "weights",
            "epochs",
            "limit",
            "side",
            "classes",
            "seeds",
            "strengths",
        )
    }
    options = Options(
        Path(root),
        given.out or Path(given.name),
        **chosen,
        methods=None if given.methods is None else tuple(given.methods),
        device=device,
        quiet=given.quiet,
        command=given.line,
    )
    entry = CATALOGUE[given.name]
    results = entry.run(options)
    if not given.quiet:
        print(text(entry.tables(results)))
    _note(given, f"written: {options.out / 'results.json'}")
    return 0


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "check": _check,
    "score": _score,
    "unlearn": _unlearn,
    "neutralize": _neutralize,
    "prune": _prune,
    "show": _show,
    "apply": _apply,
    "undo": _apply,
    "reproduce": _reproduce,
    "report": _report,
}
