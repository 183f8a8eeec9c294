"""Classes and attributes that options name, and labelled images divided at random into parts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xai_edit.command.load import Images
from xai_edit.command.tables import csv_rows
from xai_edit.core.checks import distinct
from xai_edit.core.data import Data, batches
from xai_edit.core.inputs import Inputs
from xai_edit.datasets.image_files import is_image
from xai_edit.discovery.marks import Marks
from xai_edit.pages.unlearn import class_name
from xai_edit.report.table import counted, named

SEED = 0  # of the parts
ZERO_ONE = ("0", "1")


class Parts(NamedTuple):
    """Parts that share no image, each with images of every group that has enough of them.

    Figures are of ``held_out``. ``validation`` is empty where no edit needs it.
    """

    planning: Images
    validation: Images
    held_out: Images


def split(images: Images, attribute: Sequence[int] | None, *, validation: bool) -> Parts:
    """Divide labelled images at random, each (class, attribute) group by itself.

    Half of each group is held out; with ``validation`` the rest is divided into planning and
    validation images. A group too small for that is held out as a whole; ValueError if no other
    has its class, or its value of the attribute.
    """
    marks = [0] * len(images) if attribute is None else attribute
    whole = replace(images, marks=dict(zip(images.rows, marks, strict=True)))
    random = np.random.default_rng(SEED)
    fewest, uses = (3, "planning, validation") if validation else (2, "planning")
    planning: list[int] = []
    checking: list[int] = []
    held_out: list[int] = []
    groups = indices_by(whole.groups)
    enough = [group for group, own in groups.items() if len(own) >= fewest]
    labels, values = {label for label, _ in enough}, {has for _, has in enough}
    for (label, has), own in sorted(groups.items()):
        if label not in labels or has not in values:  # each needs a group to plan from
            which = "" if attribute is None else f" {'with' if has else 'without'} the feature"
            raise ValueError(
                f"data: class {label} has {len(own)} images{which}; give {fewest} or more, for "
                f"{uses} and figures, or none"
            )
        if len(own) < fewest:
            held_out += own
            continue
        drawn = random.permutation(own).tolist()
        half = len(drawn) // 2
        end = half + (len(drawn) - half) // 2 if validation else len(drawn)
        held_out += drawn[:half]
        planning += drawn[half:end]
        checking += drawn[end:]
    return Parts(*(whole.only(sorted(part)) for part in (planning, checking, held_out)))


def unplanned(parts: Parts) -> str | None:
    """Return a warning that names the groups that are measured alone, None without one."""
    sizes = Counter(parts.held_out.groups)
    for group in parts.planning.groups:
        sizes.pop(group, None)
    results = {"names": {str(label): name for label, name in parts.held_out.classes.items()}}
    groups = [
        f"class {class_name(results, label)}, {'with' if has else 'without'} the feature "
        f"({counted(count, 'image')})"
        for (label, has), count in sorted(sizes.items())
    ]
    return f"not planned from, as they have too few images: {named(groups)}" if groups else None


def indices_by(kinds: Sequence[Any]) -> dict[Any, list[int]]:
    """Return the indices of each kind, in the order in which kinds first occur."""
    indices: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        indices.setdefault(kind, []).append(index)
    return indices


def watched(data: Data, watch: Callable[[Inputs], None]) -> Iterator[Any]:
    """Yield the batches and pass the inputs of each to ``watch``."""
    for batch in batches(data):
        watch(batch.inputs)
        yield batch.inputs, batch.labels, batch.groups


def read_attribute(spec: str | Path, images: Images, folder: str | Path) -> list[int]:
    """Return whether each image has the attribute, 1 or 0, in the order of ``images``.

    ``spec`` is a CSV file of ``path,0`` and ``path,1`` lines, or of ``path,1`` or ``path`` lines
    for those that have it, with paths relative to ``folder`` (that of the images) or to the file;
    numbers from 0 are the paths of a torchvision data set. A
    ``.json`` file of `Marks` has the same names. Or it is a folder with copies of the images that
    have the attribute, at the same relative paths or, where their names are unique, anywhere.
    """
    spec, folder = Path(spec), Path(folder)
    listed = isinstance(images.source, list)
    if not spec.exists():
        raise FileNotFoundError(
            f"attribute: {spec}: no such file or folder; give a CSV file of path,0 and path,1 "
            "lines or a folder of the images that have the attribute"
        )
    if spec.is_file():
        values = _from_table(spec, images, [folder, spec.parent] if listed else [])
        if spec.suffix != ".json" and set(values.values()) == {1}:
            values = {row: values.get(row, 0) for row in images.rows}
    elif listed:
        having = _from_folder(spec, images, folder)
        values = {row: int(row in having) for row in images.rows}
    else:
        raise ValueError(
            f"attribute: {spec} is a folder, and the data set has no paths; give a CSV file "
            "of number,0 or number,1 lines"
        )
    if missing := [row for row in images.rows if row not in values]:
        first = images.source[missing[0]][0] if listed else missing[0]
        raise ValueError(
            f"attribute: {spec} has no line for {len(missing)} of {len(images)} images, the "
            f"first {first}; give path,0 or path,1 for each"
        )
    labels = [values[row] for row in images.rows]
    if len(set(labels)) < 2:
        raise ValueError(
            f"attribute: by {spec}, {sum(labels)} of {len(labels)} images have it; images with "
            "and without it are needed"
        )
    return labels


def marks_in(file: str | Path) -> Marks | None:
    """Return the marks of a ``.json`` file; None of another."""
    return Marks.load(file) if Path(file).suffix == ".json" else None


def _from_table(file: Path, images: Images, folders: Sequence[Path]) -> dict[int, int]:
    """Return the values of a CSV file by rows of the source."""
    if folders:
        known = indices_by([os.path.realpath(path) for path, _ in images.source])
    else:
        known = {str(row): [row] for row in range(len(images.source))}
    values: dict[int, int] = {}
    for at, (line, cells) in enumerate(_lines(file)):
        where = f"attribute: {file}, line {line}"
        names = [os.path.realpath(folder / cells[0]) for folder in folders] or [cells[0].strip()]
        rows = next((known[name] for name in names if name in known), None)
        value = cells[1].strip() if len(cells) == 2 else "1" if len(cells) == 1 else None
        if (
            at == 0
            and rows is None
            and (cells == ["path"] or (cells[1:] and value not in ZERO_ONE))
        ):
            continue  # a header
        if value not in ZERO_ONE:
            raise ValueError(f"{where}: {','.join(cells)!r} given; give path,0 or path,1")
        if rows is None:
            raise ValueError(f"{where}: {cells[0]!r} is not an image of the data")
        for row in rows:
            if values.setdefault(row, int(value)) != int(value):
                raise ValueError(f"{where}: {cells[0]!r} had the other value before")
    return values


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    """Return the number and the cells, a path and 1 or 0, of each line of a CSV file, or of marks.

    ValueError if no finding is marked spurious.
    """
    if (marks := marks_in(file)) is None:
        return csv_rows(file, "attribute")
    if not marks.spurious:
        raise ValueError(f"attribute: {file}: no finding is marked spurious")
    names = marks.names or map(str, range(len(marks)))
    pairs = zip(names, marks.attribute.int().tolist(), strict=True)
    return [(line, [name, str(has)]) for line, (name, has) in enumerate(pairs, start=1)]


def _from_folder(folder: Path, images: Images, home: Path) -> set[int]:
    """Return the rows of the source whose images are in a folder."""
    paths = [path for path, _ in images.source]
    known = indices_by([*map(os.path.realpath, paths)])
    by_name = indices_by([*map(os.path.basename, paths)])
    having: set[int] = set()
    for file in sorted(folder.rglob("*")):
        if not is_image(file.name):
            continue
        names = map(os.path.realpath, (file, home / file.relative_to(folder)))
        rows = next((known[name] for name in names if name in known), by_name.get(file.name, ()))
        if len({paths[row] for row in rows}) != 1:
            several = f"{len(rows)} images of the data have this name; " if rows else ""
            raise ValueError(
                f"attribute: {file}: {several or 'not an image of the data; '}give the files the "
                f"same paths in {folder} as in {home}"
            )
        having.update(rows)
    if not having:
        raise ValueError(f"attribute: {folder}: no images")
    return having


def classes_named(words: Sequence[str], known: Mapping[int, str]) -> list[int]:
    """Return the numbers of different classes that are named by number or by name."""
    numbers = []
    for word in words:
        named = [number for number, name in known.items() if name == word]
        if word.isdecimal():
            named = [int(word)]
        if not named:
            names = f" or names such as {', '.join([*known.values()][:5])}" if known else ""
            raise ValueError(f"target: {word!r} given; give numbers{names}")
        if len(named) > 1:
            raise ValueError(f"target: {word!r} is the name of {listed(named)}; give a number")
        numbers += named
    return distinct(numbers, "target", "give one or several different classes")


def listed(classes: Sequence[int]) -> str:
    """Return the first numbers of classes as a text."""
    return ", ".join(map(str, classes[:10])) + (", …" if len(classes) > 10 else "")
