"""The data sets of the papers: MNIST, CIFAR-10, CIFAR-100 and folders in the layout of ImageNet."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms.v2 import functional as transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, normalised batch by batch; iterate over it as often as you like.

    Attributes
    ----------
    source : Tensor, uint8, shape (samples, channels, height, width), or sequence of str
        The images, or their files.
    labels : Tensor, int64, shape (samples,)
    mean, std : tuple of float
        Of each channel, for values in [0, 1].
    side : int
        Images are resized to squares of so many pixels where they are none.
    batch_size : int
    seed : int or None
        Of the order, another one in each pass; None for the order as it is.
    flip : bool
        Whether every other image, by chance, is mirrored; with a seed.
    shift : int
        By how many pixels at most images are moved, at random; what is then missing at their edges
        is reflected. With a seed.
    attribute : Tensor or None, int64, shape (samples,)
        A property of each image, numbered from 0, such as its background. Batches are then
        ``(input, label, attribute)``, else ``(input, label)``.
    planted : callable or None
        Puts a shortcut into the images of a batch as they are read: see `Shortcut`.

    Raises
    ------
    ValueError
        If the attribute is no vector of whole numbers from 0, one an image, or is missing where
        something is planted.
    """

    source: Tensor | Sequence[str]
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int
    batch_size: int = 256
    seed: int | None = None
    flip: bool = False
    shift: int = 0
    attribute: Tensor | None = None
    planted: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.flip or self.shift) and self.seed is None:
            raise ValueError(f"{'flip' if self.flip else 'shift'}: needs a seed")
        if not 0 <= self.shift < self.side:
            raise ValueError(f"shift: {self.shift} given; images have {self.side} pixels a side")
        if self.attribute is not None:
            attribute = check_numbered(self.attribute, len(self), "attribute")
            object.__setattr__(self, "attribute", attribute)
        elif self.planted is not None:
            raise ValueError("planted: given without an attribute that says what in which image")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> ImageSet:
        """Return the images that a mask or indices, shape (samples,), name."""
        rows = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        if isinstance(self.source, Tensor):
            source: Tensor | Sequence[str] = self.source[rows]
        else:
            source = [self.source[row] for row in rows.tolist()]
        attribute = None if self.attribute is None else self.attribute[rows]
        return replace(self, source=source, labels=self.labels[rows], attribute=attribute)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.arange(len(self))
        generator = torch.Generator()
        if self.seed is not None:
            generator.manual_seed(self.seed)
            object.__setattr__(self, "seed", self.seed + 1)
            order = torch.randperm(len(self), generator=generator)
        for rows in order.split(self.batch_size):
            inputs = self._inputs(rows)
            if self.flip:
                mirrored = torch.rand(len(rows), generator=generator) < 0.5
                inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
            if self.shift:
                inputs = _shifted(inputs, self.shift, generator)
            group = () if self.attribute is None else (self.attribute[rows],)
            yield inputs, self.labels[rows], *group

    def shuffled(
        self, seed: int, batch_size: int, *, flip: bool = False, shift: int = 0
    ) -> ImageSet:
        """Return the set in a random order that changes from pass to pass, mirrored and moved."""
        return replace(self, seed=seed, batch_size=batch_size, flip=flip, shift=shift)

    def first(self, count: int, start: int = 0) -> ImageSet:
        """Return ``count`` images of each class, those after its first ``start``.

        Where the images have an attribute, of each (class, attribute) group.
        """
        group = self.labels.unique(return_inverse=True)[1]
        if self.attribute is not None:
            among = self.attribute.unique(return_inverse=True)[1]
            group = (group * len(self) + among).unique(return_inverse=True)[1]
        order = group.argsort(stable=True)
        sizes = group.bincount()
        at = torch.arange(len(self)) - (sizes.cumsum(0) - sizes)[group[order]]  # in its group
        return self[order[(start <= at) & (at < start + count)].sort().values]

    def regrouped(self, classes: Callable[[Tensor], Tensor]) -> ImageSet:
        """Return the images with new labels that a function makes of their own.

        The own labels become the attribute: ``lambda digit: digit % 2`` makes classes of even and
        odd digits whose groups are the ten digits.

        Parameters
        ----------
        classes : callable
            Of the labels, int64, shape (samples,).

        Raises
        ------
        ValueError
            If it does not give whole numbers from 0 in this shape, or the attribute is of a
            shortcut, which a new one would change.
        """
        if self.planted is not None:
            raise ValueError("classes: the images have a shortcut; regroup them, then plant it")
        labels = check_numbered(classes(self.labels), len(self), "classes")
        return replace(self, labels=labels, attribute=self.labels)

    def pixels(self, rows: Tensor) -> Tensor:
        """Return images as they were read, uint8, shape (rows, channels, side, side)."""
        if isinstance(self.source, Tensor):
            pixels = self.source[rows]
            if pixels.shape[-1] != self.side:
                pixels = transform.resize(pixels, [self.side, self.side], antialias=True)
            return pixels
        return torch.stack([_opened(self.source[row], self.side) for row in rows.tolist()])

    def _inputs(self, rows: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = self.pixels(rows)
        if self.planted is not None and self.attribute is not None:
            pixels = self.planted(pixels, self.attribute[rows])
        return (pixels.float() / 255 - mean) / std


def _shifted(inputs: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return each image moved by its own number of rows and columns."""
    samples, channels, height, width = inputs.shape
    wide = nn.functional.pad(inputs, (shift,) * 4, mode="reflect")
    top, left = torch.randint(2 * shift + 1, (2, samples), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    each, channel = torch.arange(samples)[:, None, None, None], torch.arange(channels)
    moved: Tensor = wide[each, channel[None, :, None, None], rows, columns]
    return moved


def _opened(file: str, side: int) -> Tensor:
    image = transform.to_image(datasets.folder.pil_loader(file))
    square: Tensor = transform.center_crop(transform.resize(image, [side], antialias=True), [side])
    return square


def check_numbered(values: Tensor, samples: int, name: str) -> Tensor:
    """Return values as int64; raise ValueError if they are not one number from 0 a sample."""
    shape = tuple(values.shape)
    if shape != (samples,) or values.is_floating_point() or (samples and values.min() < 0):
        raise ValueError(
            f"{name}: values of shape {shape} and {values.dtype} for {samples} images; give a "
            "whole number from 0 for each"
        )
    return values.long()


def mnist(folder: str | Path, split: str) -> ImageSet:
    """Read MNIST: 60,000 ("train") or 10,000 ("test") grey images of 28×28.

    Parameters
    ----------
    folder : str or Path
        With ``mnist/*.gz``, the idx files as published, or torchvision's ``MNIST/raw``.
    split : {"train", "test"}

    Raises
    ------
    FileNotFoundError
        If neither is there.
    ValueError
        If a file is damaged, or images and labels differ in number.
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
    """Read CIFAR-10: colour images of 32×32.

    Parameters
    ----------
    folder : str or Path
        With torchvision's ``cifar-10-batches-py``, or with ``cifar10/train_10k.npz`` (1,000 images
        a class) and ``cifar10/test_10k.npz``, which hold differences of neighbouring pixels.
    split : {"train", "test"}
    side : int
        Size of the inputs.
    """
    file = Path(folder, "cifar10", f"{split}_10k.npz")
    if file.is_file():
        archive = np.load(file)
        planes = archive[
            "residual"
        ]  # red − green, green, blue − green; differences along both axes
        planes = planes.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
        planes[[0, 2]] += planes[1]
        images = torch.from_numpy(planes).movedim(0, 1).contiguous()
        labels = torch.from_numpy(archive["labels"]).long()
        return ImageSet(images, labels, IMAGENET_MEAN, IMAGENET_STD, side)
    return _of_torchvision(datasets.CIFAR10, folder, split, side)


def cifar100(folder: str | Path, split: str, side: int = 32) -> ImageSet:
    """Read CIFAR-100 from torchvision's ``cifar-100-python``; see `cifar10`."""
    return _of_torchvision(datasets.CIFAR100, folder, split, side)


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
    opened batch by batch.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If the other split is there and has other classes: a number would not mean the same in both.
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
