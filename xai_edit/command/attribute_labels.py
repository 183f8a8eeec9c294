"""Which images of a data set have an attribute, from a CSV file or a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchvision.datasets.folder import is_image_file

from xai_edit.command.load import Images, csv_rows
from xai_edit.command.run_parts import indices_by

# From the name of an image to its rows in the source; a row given twice has two.
_Rows = Mapping[str, Sequence[int]]


def read_attribute(spec: str | Path, images: Images, folder: str | Path) -> list[int]:
    """Return whether each image has the attribute, 1 or 0, in the order of ``images``.

    Parameters
    ----------
    spec : str or Path
        A CSV file of ``path,0`` and ``path,1`` lines, with or without a header, one for each
        image; paths are relative to ``folder`` or to the file, and of a torchvision data set the
        numbers of its images, from 0, stand for them. Or a folder with the images that have the
        attribute, or copies of them, at the same relative paths as in ``folder`` or, where their
        names are unique, anywhere.
    images : Images
    folder : str or Path
        Of the images.

    Raises
    ------
    ValueError, OSError
        If there is no such file or folder, an image is unknown, or one is missing, given twice
        with different values, or all are of one kind.
    """
    spec, folder = Path(spec), Path(folder)
    listed = isinstance(images.source, list)
    if spec.is_dir():
        if not listed:
            raise ValueError(
                f"attribute: {spec} is a folder, and the data set has no paths; give a CSV file "
                "of number,0 or number,1 lines"
            )
        having = _from_folder(spec, images, folder)
        found = [int(row in having) for row in images.rows]
    elif spec.is_file():
        values = _from_table(spec, images, [folder, spec.parent] if listed else [])
        missing = [row for row in images.rows if row not in values]
        if missing:
            first = images.source[missing[0]][0] if listed else missing[0]
            raise ValueError(
                f"attribute: {spec} has no line for {len(missing)} of {len(images)} images, the "
                f"first {first}; give path,0 or path,1 for each"
            )
        found = [values[row] for row in images.rows]
    else:
        raise FileNotFoundError(
            f"attribute: {spec}: no such file or folder; give a CSV file of path,0 and path,1 "
            "lines or a folder of the images that have the attribute"
        )
    if len(set(found)) < 2:
        raise ValueError(
            f"attribute: by {spec}, {sum(found)} of {len(found)} images have it; images with and "
            "without it are needed"
        )
    return found


def _from_table(file: Path, images: Images, folders: Sequence[Path]) -> dict[int, int]:
    """Return the values of a CSV file by rows of the source."""
    if folders:
        known: _Rows = indices_by([os.path.realpath(path) for path, _ in images.source])
    else:
        known = {str(row): [row] for row in range(len(images.source))}
    values: dict[int, int] = {}
    for at, (line, cells) in enumerate(csv_rows(file, "attribute")):
        where = f"attribute: {file}, line {line}"
        names = [os.path.realpath(folder / cells[0]) for folder in folders] or [cells[0].strip()]
        rows = next((known[name] for name in names if name in known), None)
        value = cells[1].strip() if len(cells) == 2 else None
        if value not in ("0", "1"):
            if at == 0 and rows is None and len(cells) == 2:
                continue  # a header
            raise ValueError(f"{where}: {','.join(cells)!r} given; give path,0 or path,1")
        if rows is None:
            raise ValueError(f"{where}: {cells[0]!r} is not an image of the data")
        for row in rows:
            if values.setdefault(row, int(value)) != int(value):
                raise ValueError(f"{where}: {cells[0]!r} had the other value before")
    return values


def _from_folder(folder: Path, images: Images, home: Path) -> set[int]:
    """Return the rows of the source whose images are in a folder."""
    paths = [path for path, _ in images.source]
    known: _Rows = indices_by([*map(os.path.realpath, paths)])
    by_name: _Rows = indices_by([*map(os.path.basename, paths)])
    having: set[int] = set()
    for file in sorted(folder.rglob("*")):
        if file.name.startswith(".") or not is_image_file(file.name):
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
