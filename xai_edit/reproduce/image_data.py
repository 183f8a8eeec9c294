"""Readers of the papers' images: MNIST, CIFAR-10, CIFAR-100 and folders in ImageNet's layout."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from xai_edit.datasets.image_set import IMAGENET_MEAN, IMAGENET_STD, ImageSet


def mnist(folder: str | Path, split: str) -> ImageSet:
    """Read MNIST: 60,000 ("train") or 10,000 ("test") grey images of 28×28.

    The folder has ``mnist/*.gz``, the idx files as published, or torchvision's ``MNIST/raw``.
    FileNotFoundError if neither is there; ValueError if a file is damaged, or images and labels
    differ in number.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    files = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    found = []
    for file, header in zip(files, (16, 8), strict=True):
        places = [Path(folder, "mnist", f"{file}.gz"), Path(folder, "MNIST", "raw", file)]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"data-root: {folder} has neither mnist/{file}.gz nor torchvision's MNIST/raw/"
                f"{file}; torchvision.datasets.MNIST({str(folder)!r}, download=True) gets it"
            )
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            found.append(np.frombuffer(raw, np.uint8, offset=header))
        except (EOFError, OSError, ValueError, zlib.error) as problem:
            raise ValueError(f"data-root: {path} is cut short or damaged ({problem})") from None
    if len(found[0]) != 28 * 28 * len(found[1]):
        raise ValueError(f"data-root: {folder} has not one label for each {split} image of MNIST")
    images = torch.tensor(found[0]).reshape(-1, 1, 28, 28)
    return ImageSet(images, torch.tensor(found[1]).long(), (0.1307,), (0.3081,), 28)


def cifar10(folder: str | Path, split: str, side: int = 32) -> ImageSet:
    """Read CIFAR-10: colour images of 32×32, resized to ``side``.

    The folder has torchvision's ``cifar-10-batches-py``, or ``cifar10/train_10k.npz`` (1,000 images
    a class) and ``cifar10/test_10k.npz``, which hold differences of neighbouring pixels.
    """
    file = Path(folder, "cifar10", f"{split}_10k.npz")
    if file.is_file():
        archive = np.load(file)
        planes = archive["residual"]  # red − green, green, blue − green; differences of both axes
        planes = planes.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
        planes[[0, 2]] += planes[1]
        images = torch.from_numpy(planes).movedim(0, 1).contiguous()
        labels = torch.from_numpy(archive["labels"]).long()
        return ImageSet(images, labels, IMAGENET_MEAN, IMAGENET_STD, side)
    return _of_torchvision(datasets.CIFAR10, folder, split, side)


def cifar100(folder: str | Path, split: str, side: int = 32) -> ImageSet:
    """Read CIFAR-100: colour images of 32×32, resized to ``side``.

    The folder has torchvision's ``cifar-100-python``, or ``cifar100/train`` and ``cifar100/test``
    with a folder of images a class. The images are read at once.
    """
    place = Path(folder, "cifar100", split)
    if not place.is_dir():
        return _of_torchvision(datasets.CIFAR100, folder, split, side)
    source = datasets.ImageFolder(place)
    images = torch.stack([torch.from_numpy(np.array(image)) for image, _ in source])
    labels = torch.tensor(source.targets)
    return ImageSet(images.movedim(3, 1).contiguous(), labels, IMAGENET_MEAN, IMAGENET_STD, side)


def _of_torchvision(kind: type, folder: str | Path, split: str, side: int) -> ImageSet:
    try:
        source = kind(folder, train=split == "train")
    except RuntimeError as problem:
        raise FileNotFoundError(
            f"data-root: {folder} has no {kind.__name__} of torchvision ({problem}); "
            f"torchvision.datasets.{kind.__name__}({str(folder)!r}, download=True) gets it"
        ) from None
    images = torch.from_numpy(source.data).movedim(3, 1).contiguous()
    return ImageSet(images, torch.tensor(source.targets), IMAGENET_MEAN, IMAGENET_STD, side)


def imagenet(folder: str | Path, split: str, side: int = 224) -> ImageSet:
    """Read a folder in the layout of ImageNet: ``train`` and ``val`` with a folder a class.

    Classes are numbered in the alphabetical order of their folders, as by torchvision. Images are
    opened batch by batch. FileNotFoundError if there is no such folder; ValueError if the other
    split is there and has other classes.
    """
    places = {"train": Path(folder, "train"), "test": Path(folder, "val")}
    place = places[split]
    if not place.is_dir():
        raise FileNotFoundError(f"data-root: {place} is missing; it has a folder of images a class")
    there = [place for place in places.values() if place.is_dir()]
    first, *more = ({*datasets.folder.find_classes(place)[0]} for place in there)
    if more and first != more[0]:
        raise ValueError(
            f"data-root: {folder} has {min(first ^ more[0])!r} in one of train and val alone; both "
            "need the same folders, or their numbers would differ"
        )
    source = datasets.ImageFolder(place)
    files, labels = zip(*source.samples, strict=True)
    return ImageSet(files, torch.tensor(labels), IMAGENET_MEAN, IMAGENET_STD, side, batch_size=32)
