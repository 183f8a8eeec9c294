"""Readers of images with a spurious attribute: the published folders, and digit parity.

Each reads ``split``, "train", "val" or "test", of a folder as images of ``side`` pixels. That all
files are there is checked at once (FileNotFoundError), and so are the rows of tables (ValueError);
an image is opened with its batch, those of a tar file at once.
"""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.v2.functional import pil_to_tensor

from xai_edit.core.checks import one_of
from xai_edit.datasets.image_set import IMAGENET_MEAN, IMAGENET_STD, ImageSet
from xai_edit.reproduce.image_data import mnist

SPLITS = ("train", "val", "test")
# What the files may say, in the order of the numbers it becomes.
SPLIT, YES, SIGN = ("0", "1", "2"), ("0", "1"), ("-1", "1")
WATERBIRDS = "waterbird_complete95_forest2water2"
METASHIFT = ("metashifts/MetaDatasetCatDog", "Domain-Generalization-Cat-Dog")
# Attribute of each folder: 0 indoors, 1 outdoors. Others beside them are of other experiments.
METASHIFT_FOLDERS = {
    "train": {"cat(sofa)": 0, "cat(bed)": 0, "dog(bench)": 1, "dog(bike)": 1},
    "test": {"cat(shelf)": 0, "dog(shelf)": 0},
}
METASHIFT_TEST = 0.85  # share of the images on shelves; the others are for validation


def waterbirds(folder: str | Path, split: str, side: int = 224) -> ImageSet:
    """Read Waterbirds (Sagawa et al. 2020): land birds (0) and water birds (1).

    The attribute is the background, land (0) or water (1). It agrees with the label in 95 % of the
    training images. The folder has the published ``waterbird_complete95_forest2water2``, or
    ``waterbirds`` with its ``metadata.csv`` and all images in one tar file, which are read at once.
    """
    number = _split_number(split)
    packed = Path(folder, "waterbirds", "metadata.csv")
    if packed.is_file():
        columns = {"img_filename": None, "y": YES, "place": YES, "split": SPLIT}
        mine = [row[:3] for row in _rows(packed, columns) if row[3] == number]
        return _packed(mine, (side, side), split, packed)
    table = Path(folder, WATERBIRDS, "metadata.csv")
    _require(table, f"https://nlp.stanford.edu/data/dro/{WATERBIRDS}.tar.gz has it")
    rows = _rows(table, {"img_filename": None, "y": YES, "place": YES, "split": SPLIT})
    found = [(table.parent / name, *groups) for name, *groups, part in rows if part == number]
    return _images(found, side, split, table)


def celeba(folder: str | Path, split: str, side: int = 224) -> ImageSet:
    """Read CelebA (Liu et al. 2015) as hair colour: not blond (0) or blond (1).

    The attribute is the published label "Male", no (0) or yes (1). The folder has ``celeba`` as
    torchvision keeps it (``list_attr_celeba.txt``, ``list_eval_partition.txt`` and the images in
    ``img_align_celeba``) or as Kaggle does: both lists as CSV files, and one folder
    ``img_align_celeba`` in another. Images are squares from the middle. Or ``celeba`` has
    ``celeba.csv`` and a part of the images in one tar file, which are read at once, whole; those
    outside the natural sample are further blond men, and used for testing.
    """
    number = _split_number(split)
    place = Path(folder, "celeba")
    packed = place / "celeba.csv"
    if packed.is_file():
        names = {
            "file": None,
            "Blond_Hair": YES,
            "Male": YES,
            "split": SPLIT,
            "natural_sample": YES,
        }
        more = split == "test"  # where blond men are few
        whole = _rows(packed, names)
        mine = [row[:3] for row in whole if (row[3] == number if row[4] else more)]
        return _packed(mine, None, split, packed)
    kind = ".csv" if (place / "list_attr_celeba.csv").is_file() else ".txt"
    attributes, partition = place / f"list_attr_celeba{kind}", place / f"list_eval_partition{kind}"
    images = place / "img_align_celeba"
    remedy = f"torchvision.datasets.CelebA({str(folder)!r}, download=True) gets it, and Kaggle's "
    remedy += "jessicali9530/celeba-dataset has it, with .csv for .txt"
    for needed in (attributes, partition, images):
        _require(needed, remedy)
    parts = dict(_rows(partition, {"image_id": None, "partition": SPLIT}))
    images = images / images.name if (images / images.name).is_dir() else images
    rows = [*_rows(attributes, {"image_id": None, "Blond_Hair": SIGN, "Male": SIGN})]
    if differing := {name for name, *_ in rows} ^ parts.keys():
        raise ValueError(
            f"data-root: {attributes} and {partition} are not of the same images "
            f"({len(differing)} are in one only, such as {min(differing)}); get both anew"
        )
    found = [(images / name, *groups) for name, *groups in rows if parts[name] == number]
    return _images(found, side, split, partition)


def metashift(folder: str | Path, split: str, side: int = 224) -> ImageSet:
    """Read the cats (0) and dogs (1) of MetaShift (Liang and Zou 2022).

    The attribute is the background, indoors (0) or outdoors (1). Training images are of cats on
    sofas and beds and of dogs with benches and bikes, so that it is the label; all others are of
    cats and dogs on shelves. Of these 15 % are for validation, the share of Wu et al. (2023), who
    drew them in the order of their disk; here they are drawn in alphabetical order.

    The folder has ``metashifts/MetaDatasetCatDog``, which Wu et al. publish, or
    ``Domain-Generalization-Cat-Dog``, which the script of Liang and Zou writes: in both, folders
    such as ``train/cat/cat(sofa)``.
    """
    _split_number(split)
    places = [Path(folder, name) for name in METASHIFT]
    place = next(filter(Path.is_dir, places), places[0])
    part = "train" if split == "train" else "test"
    found: list[tuple[Any, ...]] = []
    for name, outdoors in METASHIFT_FOLDERS[part].items():
        animal = name.partition("(")[0]
        images = place / part / animal / name
        _require(images, "https://github.com/Wuyxin/DISC says where to get it")
        files = sorted(file for file in images.iterdir() if is_image_file(file.name))
        found += [(file, ("cat", "dog").index(animal), outdoors) for file in files]
    read = _images(found, side, split, place)
    if split == "train":
        return read
    order = torch.randperm(len(read), generator=torch.Generator().manual_seed(0))
    tested = int(METASHIFT_TEST * len(read))
    return read[(order[:tested] if split == "test" else order[tested:]).sort().values]


def parity_mnist(folder: str | Path, split: str) -> ImageSet:
    """Read MNIST as even (0) and odd (1) digits (Mahinpei et al. 2021), the digit as attribute."""
    return mnist(folder, split).regrouped(lambda digit: digit % 2)


def _split_number(split: str) -> int:
    return SPLITS.index(one_of(split, SPLITS, "split"))


def _require(path: Path, remedy: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"data-root: {path} is missing; {remedy}")


def _rows(file: Path, columns: Mapping[str, Sequence[str] | None]) -> Iterator[list[Any]]:
    """Yield the values of some columns of each row, of a CSV file or of CelebA's lists of words.

    What a column may say becomes its number there; where that is None, the value stays text.
    """
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened) if file.suffix == ".csv" else map(str.split, opened)
        lines = enumerate(rows, 1)
        if file.name == "list_eval_partition.txt":  # which has no names of its columns
            header = [*columns]
        elif file.suffix == ".csv":
            header = next(lines, (0, []))[1]
        else:  # a count, then the names of all columns but the first
            header = ["image_id", *next(islice(lines, 1, 2), (0, []))[1]]
        if absent := [name for name in columns if name not in header]:
            raise ValueError(f"data-root: {file} has no column {', '.join(absent)}")
        for line, row in lines:
            if not row:
                continue
            where = f"data-root: {file}, line {line}"
            if len(row) != len(header):
                raise ValueError(f"{where}: {len(row)} values for {len(header)} columns")
            values: list[Any] = []
            for name, known in columns.items():
                value = row[header.index(name)]
                if known is not None and value not in known:
                    raise ValueError(
                        f"{where}: {name} is {value!r}; it is one of {', '.join(known)}"
                    )
                values.append(value if known is None else known.index(value))
            yield values


def _packed(
    rows: Sequence[list[Any]], size: tuple[int, int] | None, split: str, table: Path
) -> ImageSet:
    """Return images of the one tar file beside a table, of the given height and width."""
    if not rows:
        raise ValueError(f"data-root: {table} has no images for the split {split}")
    archives = [*table.parent.glob("*.tar")]
    if len(archives) != 1:
        raise FileNotFoundError(
            f"data-root: {len(archives)} tar files beside {table}; it needs one"
        )
    pixels = []
    with tarfile.open(archives[0]) as files:
        for name, *_ in rows:
            try:
                opened = files.extractfile(name)
            except KeyError:
                opened = None
            if opened is None:
                raise FileNotFoundError(f"data-root: {archives[0]} has no {name}")
            image = Image.open(opened).convert("RGB")
            pixels.append(pil_to_tensor(image if size is None else image.resize(size[::-1])))
    labels, attribute = (torch.tensor([row[at] for row in rows]) for at in (1, 2))
    images = torch.stack(pixels)
    given: dict[str, Any] = {"attribute": attribute, "batch_size": 64}
    return ImageSet(images, labels, IMAGENET_MEAN, IMAGENET_STD, images.shape[-1], **given)


def _images(rows: Sequence[tuple[Any, ...]], side: int, split: str, origin: Path) -> ImageSet:
    """Return the images of files with their labels and attributes."""
    if not rows:
        raise ValueError(f"data-root: {origin} has no images for the split {split}")
    files, labels, attribute = zip(*((str(file), *groups) for file, *groups in rows), strict=True)
    absent = [file for file in files if not os.path.isfile(file)]
    if absent:
        raise FileNotFoundError(
            f"data-root: {absent[0]} is missing, and {len(absent) - 1} more of the {len(files)} "
            f"images that {origin} names; unpack the images there"
        )
    given: dict[str, Any] = {"attribute": torch.tensor(attribute), "batch_size": 32}
    return ImageSet(files, torch.tensor(labels), IMAGENET_MEAN, IMAGENET_STD, side, **given)
