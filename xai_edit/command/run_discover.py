"""The command ``xai-edit discover``: what classes depend on, found without labels, on a page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xai_edit.command.inputs import preprocessing_given
from xai_edit.command.load import Images
from xai_edit.command.own_data import OwnData, is_own
from xai_edit.command.run import Run
from xai_edit.command.run_parts import classes_named
from xai_edit.core.checks import one_of
from xai_edit.core.cost import measured
from xai_edit.core.files import write_safetensors
from xai_edit.discovery.discover import discover
from xai_edit.discovery.findings import Findings, sentence
from xai_edit.discovery.marks import Marks
from xai_edit.discovery.proposals import METHODS
from xai_edit.discovery.shown import pictures
from xai_edit.pages.discover import FINDINGS, PICTURES, class_called
from xai_edit.pages.page import write_run

KIND = "xai_edit.pictures"


def command(options: argparse.Namespace) -> int:
    """Run ``xai-edit discover``."""
    one_of(options.images, ("predicted", "all"), "images")
    one_of(options.method, METHODS, "method")
    marks = None if options.marks is None else Marks.load(options.marks)
    run = Run(options)
    names = run.images.classes
    target = None if options.target is None else classes_named(options.target, names)
    if run.images.labelled:
        run.check_labels()
    with measured() as searching:
        found = discover(
            run.model,
            run.images,
            target,
            options.layers,
            images=options.images,
            method=options.method,
            seed=options.seed,
            marks=marks,
            progress=not options.quiet,
        )
    found = replace(found, names=_names(run.images, Path(options.data)))
    with measured() as drawing:
        pixels = None if is_own(options.data) else preprocessing_given(options).pixels
        quiet = options.quiet
        drawn = pictures(run.model, run.images, found, pixels=pixels, progress=not quiet)
    found.save(run.out / FINDINGS)
    write_safetensors(run.out / PICTURES, drawn, KIND, "")
    results = {**run.about(), "names": names, **_results(found, names)}
    timing = {"discover": searching.seconds, "pictures": drawing.seconds}
    write_run(run.out, results, timing)
    return run.show(results, _text(found, names), "report.html")


def _names(images: Images, data: Path) -> tuple[str, ...]:
    """Return the file of each image, relative to the data, or its number in a data set."""
    if isinstance(images, OwnData) or not isinstance(images.source, list):
        return tuple(map(str, images.rows))
    folder = data if data.is_dir() else data.parent
    files = [os.path.relpath(images.source[row][0], folder) for row in images.rows]
    return tuple(Path(file).as_posix() for file in files)


def _results(found: Findings, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the findings as JSON values, without the scores of samples."""
    rows = [
        {
            "number": number,
            "class": one.target,
            "layer": one.layer,
            "kind": one.kind,
            "also": [*one.also],
            "directions": one.subspaces.basis.shape[1],
            "pooling": one.pooling,
            "threshold": one.threshold,
            "having": int(one.has.sum()),
            "unsure": int(one.unsure.sum()),
            "sentence": sentence(one, class_called(one.target, names), "other classes"),
            "evidence": one.evidence.to_dict(),
        }
        for number, one in enumerate(found)
    ]
    searched = [
        {"class": one.target, "layer": one.layer, "samples": one.samples}
        | {"strategies": one.strategies, "note": one.note}
        for one in found.searched
    ]
    return {
        "search": {**found.origin, "checksum": found.checksum()},
        "samples": len(found.predicted),
        "standing_out": len(found.standing_out),
        "findings": rows,
        "searched": searched,
    }


def _text(found: Findings, names: Mapping[int, str]) -> str:
    lines = [
        f"{number}: {sentence(one, class_called(one.target, names), 'other classes')}"
        for number, one in enumerate(found)
        if one.evidence.stands_out
    ]
    return "\n".join([str(found), *lines])
