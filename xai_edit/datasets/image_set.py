"""Labelled images that are read, normalised and given a shortcut batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transform

from xai_edit.core.checks import whole_number
from xai_edit.core.counting import count_by_group
from xai_edit.datasets.image_files import read_image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images; every iteration gives the same normalised batches in the same order.

    Attributes
    ----------
    source : Tensor, uint8, shape (samples, channels, height, width), or sequence of str
        The images, or their files.
    labels : Tensor, int64, shape (samples,)
    mean, std : tuple of float
        Of each channel, for values in [0, 1].
    side : int
        Images of another size are resized to squares of so many pixels.
    batch_size : int
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

    Examples
    --------
    >>> from xai_edit.datasets.image_set import ImageSet
    >>> pixels = (255 * images).byte()
    >>> given = ImageSet(pixels, labels, (0.5,) * 3, (0.5,) * 3, side=4, batch_size=80)
    >>> [batch.shape for batch, _ in given]
    [torch.Size([80, 3, 4, 4]), torch.Size([80, 3, 4, 4]), torch.Size([80, 3, 4, 4])]
    >>> len(given[given.labels == 1]), given.first(2).labels
    (80, tensor([0, 1, 2, 0, 1, 2]))
    """

    source: Tensor | Sequence[str]
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int
    batch_size: int = 256
    attribute: Tensor | None = None
    planted: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
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
        return map(self.batch, torch.arange(len(self)).split(self.batch_size))

    def batch(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return normalised images with their labels and, if there is one, their attribute."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = self.pixels(rows)
        attribute = None if self.attribute is None else self.attribute[rows]
        if self.planted is not None and attribute is not None:
            pixels = self.planted(pixels, attribute)
        inputs = (pixels.float() / 255 - mean) / std
        return (inputs, self.labels[rows], *(() if attribute is None else (attribute,)))

    def pixels(self, rows: Tensor) -> Tensor:
        """Return images as they were read, uint8, shape (rows, channels, side, side)."""
        if isinstance(self.source, Tensor):
            pixels = self.source[rows]
            if pixels.shape[-1] != self.side:
                pixels = transform.resize(pixels, [self.side, self.side], antialias=True)
            return pixels
        return torch.stack([_opened(self.source[row], self.side) for row in rows.tolist()])

    def counts(self) -> Tensor:
        """Return the number of images by class and attribute, int64."""
        classes = int(self.labels.max()) + 1
        return count_by_group(self.labels, self.labels, classes, self.attribute)[1]

    def first(self, count: int, start: int = 0) -> ImageSet:
        """Return ``count`` images of each class, those after its first ``start``.

        Where the images have an attribute, of each (class, attribute) group.
        """
        parts = [self.labels] if self.attribute is None else [self.labels, self.attribute]
        group = torch.stack(parts, 1).unique(dim=0, return_inverse=True)[1]
        order = group.argsort(stable=True)
        sizes = group.bincount()
        at = torch.arange(len(self)) - (sizes.cumsum(0) - sizes)[group[order]]  # in its group
        return self[order[(start <= at) & (at < start + count)].sort().values]

    def regrouped(self, classes: Callable[[Tensor], Tensor]) -> ImageSet:
        """Return the images with new labels; the labels before become the attribute.

        ``lambda digit: digit % 2`` makes classes of even and odd digits whose groups are the ten
        digits. ValueError if ``classes(labels)`` are no whole numbers from 0, shape (samples,), or
        a shortcut is planted according to the attribute.
        """
        if self.planted is not None:
            raise ValueError("classes: the images have a shortcut; regroup them, then plant it")
        labels = check_numbered(classes(self.labels), len(self), "classes")
        return replace(self, labels=labels, attribute=self.labels)


@dataclass
class Epochs:
    """``(input, label)`` batches to train on; each iteration is the next epoch, in its own order.

    Attributes
    ----------
    images : ImageSet
    seed : int
        Of the order in epoch 0; every later epoch adds 1.
    batch_size : int
    flip : bool
        Whether every other image, by chance, is mirrored.
    shift : int
        By how many pixels at most images are moved, at random; the edges are filled by reflection.
    epoch : int
        Of the next iteration.

    Examples
    --------
    >>> from xai_edit.datasets.image_set import Epochs, ImageSet
    >>> pixels = (255 * images).byte()
    >>> given = ImageSet(pixels, labels, (0.5,) * 3, (0.5,) * 3, side=4)
    >>> epochs = Epochs(given, seed=0, batch_size=100, flip=True)
    >>> [len(batch) for batch, _ in epochs], epochs.epoch
    ([100, 100, 40], 1)
    """

    images: ImageSet
    seed: int
    batch_size: int
    flip: bool = False
    shift: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        whole_number(self.shift, "shift", most=self.images.side - 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.images), generator=generator)
        for rows in order.split(self.batch_size):
            inputs, labels, *_ = self.images.batch(rows)
            if self.flip:
                mirrored = torch.rand(len(rows), generator=generator) < 0.5
                inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
            if self.shift:
                inputs = _shifted(inputs, self.shift, generator)
            yield inputs, labels


def _shifted(inputs: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return each image moved by a random number of rows and columns."""
    samples, channels, height, width = inputs.shape
    wide = nn.functional.pad(inputs, (shift,) * 4, mode="reflect")
    top, left = torch.randint(2 * shift + 1, (2, samples), generator=generator)
    each, channel = torch.arange(samples)[:, None, None, None], torch.arange(channels)
    moved: Tensor = wide[(each, channel[:, None, None], *windows(top, left, height, width))]
    return moved


def windows(top: Tensor, left: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of a window in each image, to index (samples, …, H, W)."""
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    return rows, (left[:, None] + torch.arange(width))[:, None, None, :]


def _opened(file: str, side: int) -> Tensor:
    image = transform.to_image(read_image(file))
    square: Tensor = transform.center_crop(transform.resize(image, [side], antialias=True), [side])
    return square


def check_numbered(values: Tensor, samples: int, name: str) -> Tensor:
    """Return values as int64; raise ValueError if they are not one number from 0 a sample."""
    shape = tuple(values.shape)
    if shape != (samples,) or values.is_floating_point() or (samples and values.min() < 0):
        raise ValueError(
            f"{name}: {values.dtype} of shape {shape} given; it is one whole number from 0 for "
            f"each of {samples} images"
        )
    return values.long()
