"""CSV files: images with their labels, one of which may be chosen."""

from __future__ import annotations

import csv
from pathlib import Path

Rows = list[tuple[int, list[str]]]


def csv_rows(file: Path, name: str) -> Rows:
    """Return the number and the cells of each line that is not empty of the file of an argument."""
    try:
        text = file.read_text(encoding="utf-8-sig").splitlines()
        return [(line, row) for line, row in enumerate(csv.reader(text), start=1) if row]
    except (OSError, ValueError, csv.Error) as problem:
        kind = type(problem).__name__
        message = f"{name}: {file} cannot be read as a CSV file ({kind}: {problem})"
        raise ValueError(message) from problem


def label_number(text: str, data: str | None) -> int:
    """Return the number of a label, which the header of a CSV file of data may name."""
    table = data is not None and Path(data).is_file()
    names = _header(csv_rows(Path(str(data)), "data")) if table else []
    if text in names:
        return names.index(text)
    if not is_number(text):
        known = f" or a name in the first line of {data}: {', '.join(names[:10])}" if names else ""
        raise ValueError(f"label: {text!r} given; give a number from 0{known}")
    return int(text)


def is_number(text: str) -> bool:
    """Return whether a text is the number of a class, which a tensor can hold."""
    return text.isdecimal() and int(text) < 2**63


def image_table(
    file: Path, chosen: int | None
) -> tuple[list[tuple[str, int | None]], dict[int, str]]:
    """Return the path and the label of each image of a CSV file, and the names of the classes.

    Of several labels 0 and 1 it is that of the number ``chosen``; class 1 has it and 0 has not.
    """
    rows = csv_rows(file, "data")
    names = _header(rows)
    columns = len(rows[0][1]) - 1 if rows else 0
    several = columns > 1
    if several and chosen is None:
        raise ValueError(
            f"data: {file} has {columns} labels an image; choose one of them by --label"
        )
    if several and chosen is not None and chosen >= columns:
        raise ValueError(f"label: {chosen} given; {file} has labels 0 to {columns - 1}")
    samples: list[tuple[str, int | None]] = []
    for line, (name, *cells) in rows:
        where, path = f"data: {file}, line {line}", file.parent / name
        if len(cells) != columns:
            raise ValueError(f"{where}: give path,label in every line, or path in every line")
        label = cells[chosen or 0 if several else 0].strip() if cells else None
        if label is not None and not is_number(label):
            raise ValueError(f"{where}: label {label!r} is not a class number")
        if label not in (None, "0", "1") and chosen is not None:
            raise ValueError(f"{where}: label {label!r} given; give 0 or 1 for each label")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: {path}: no such file")
        samples.append((str(path), None if label is None else int(label)))
    if chosen is None:
        return samples, {}
    called = names[chosen] if several and names else f"label {chosen}"
    return samples, {0: f"no {called}", 1: called}


def _header(rows: Rows) -> list[str]:
    """Take the first row off if it holds names, and return those of the labels."""
    named = bool(rows) and rows[0][1][0].lower() == "path"
    return [name.strip() for name in rows.pop(0)[1][1:]] if named else []
