"""The command ``xai-edit``."""

# What takes long to import is imported where it is used, so that --help comes at once.
from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xai_edit.cli_inputs import (
    SEED,
    batches_of,
    count_marked,
    data_of,
    images_of,
    lrp_of,
    model_of,
    note,
    preprocessing_given,
    require_device,
    require_known,
    run_of,
    scorer_of,
    spurious_of,
)
from xai_edit.cli_options import parser

if TYPE_CHECKING:
    from torch import nn

    from xai_edit.attribution.scorers import Scorer
    from xai_edit.data import Data
    from xai_edit.evaluation.comparison import Comparison


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

    require_known(given.composite)
    data = None if given.data is None else data_of(given, given.data, "reading")
    model = model_of(given)
    if data is not None:
        inputs = peek(data, given.device)[0].inputs
    else:
        shape = given.input_size or preprocessing_of(given.model, given.weights).shape
        generator = torch.Generator().manual_seed(SEED)
        inputs = torch.randn(2, *shape, generator=generator).to(given.device)
        note(given, f"data: none given; 2 inputs of random numbers, {'×'.join(map(str, shape))}")
    composite = lrp_of(given.composite, given, model, [inputs])
    check = check_model(model, inputs, composite, layers=given.layers)
    print(_json(check.to_dict()) if given.json else check)
    return 0 if check.ok else 1


def _score(given: argparse.Namespace) -> int:
    from xai_edit.attribution.units import score_units, share_of
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
        require_known(name)
    data = data_of(given, given.data, "scoring")
    curves: dict[str, Any] = {}
    if given.held_out:
        curves = {"deletion": SHARES, "held_out": data_of(given, given.held_out, "deletion curves")}
    model = model_of(given)
    scorers = {name: scorer_of(name, given, model, data) for name in names}
    how = {"layers": given.layers, "target": given.target, "aggregate": given.aggregate}
    results: dict[str, Any] = {
        "run": "compare" if given.compare else "score",
        **run_of(given),
        "data": {"name": given.data, "found": str(data), "held_out": given.held_out},
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
        note(given, f"written: {file}")
    return 0


def _unlearn(given: argparse.Namespace) -> int:
    from dataclasses import replace

    from xai_edit.edits.path import PathPerturbation
    from xai_edit.report.terminal import unlearning_table
    from xai_edit.unlearn import classes_named, run, split

    require_known(given.composite)
    how = {name: getattr(given, name) for name in ("share", "rank", "k", "scope", "bound")}
    operator = PathPerturbation(given.layers, **how)
    (given.out / "edits").mkdir(parents=True, exist_ok=True)  # fails now, not after the long part

    whole, read = images_of(given, given.data), partial(batches_of, given)
    parts = split(whole, classes_named(given.forget, whole.classes), given.samples)
    train = None if given.train_data is None else images_of(given, given.train_data, "train")
    model = model_of(given)
    scorer = scorer_of(given.composite, given, model, read(parts.own, "fitting patterns"))
    about = {
        **run_of(given),
        "data": {"name": given.data, "found": str(whole), "train": given.train_data},
    }
    where: dict[str, Any] = {"train": train, "out": given.out, "read": read}
    operator = replace(operator, scorer=scorer)
    results, timing = run(model, operator, parts, **where, about=about)
    print(_json(results) if given.json else unlearning_table(results, timing))
    note(given, f"written: {given.out / 'report.html'}")
    return 0


def _neutralize(given: argparse.Namespace) -> int:
    from xai_edit.edits.fictitious import FictitiousClass
    from xai_edit.neutralize import run, split
    from xai_edit.report.terminal import neutralizing_table
    from xai_edit.unlearn import classes_named

    operator = FictitiousClass(select=given.select, rate=given.rate)
    (given.out / "edits").mkdir(parents=True, exist_ok=True)  # fails now, not after the long part
    whole = images_of(given, given.data)
    spurious = spurious_of(given, whole)
    target = None if given.target is None else classes_named(given.target, whole.classes)
    parts = split(whole, spurious)
    about = {
        **run_of(given),
        "data": {"name": given.data, "found": str(whole)},
        "spurious": count_marked(given, spurious),
    }
    where: dict[str, Any] = {"out": given.out, "read": partial(batches_of, given)}
    results, timing = run(model_of(given), operator, parts, target=target, **where, about=about)
    print(_json(results) if given.json else neutralizing_table(results, timing))
    note(given, f"written: {given.out / 'report.html'}")
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
    whole = images_of(given, given.data)
    spurious = None if given.spurious is None else spurious_of(given, whole)
    parts = split(whole, spurious)
    about = {
        **run_of(given),
        "data": {"name": given.data, "found": str(whole)},
        "spurious": None if spurious is None else count_marked(given, spurious),
    }
    where: dict[str, Any] = {"out": given.out, "read": partial(batches_of, given)}
    results, timing = run(
        model_of(given), operator, parts, epochs=given.fine_tune, **where, about=about
    )
    print(_json(results) if given.json else pruning_table(results, timing))
    note(given, f"written: {given.out / 'report.html'}")
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
    write_edited(model_of(given), edit, given.out, undo=given.command == "undo")
    note(given, f"written: {given.out}")
    return 0


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
        low, high = preprocessing_given(given).bounds
        images = (batch.inputs.cpu() - low) / (high - low)
        pictures["relevance-maps.png"] = map_grid(images, maps)
    for name, picture in pictures.items():
        write_atomically(given.out / name, picture)


def _json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False)


def _reproduce(given: argparse.Namespace) -> int:
    import torch

    from xai_edit.reproduce.catalogue import CATALOGUE
    from xai_edit.reproduce.experiments import Options
    from xai_edit.reproduce.tables import text

    if given.list:
        for name, entry in CATALOGUE.items():
            print(f"{name:<14} {entry.title}")
        return 0
    if given.name not in CATALOGUE:
        raise ValueError(f"name: {given.name!r} given; it is one of {', '.join(CATALOGUE)}")
    root = given.data_root or os.environ.get("XAI_EDIT_DATA")
    if root is None:
        raise ValueError("data-root: none given, and XAI_EDIT_DATA is not set")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
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
        print(text(entry.tables(entry.summary(results))))
    note(given, f"written: {options.out / 'results.json'}")
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
