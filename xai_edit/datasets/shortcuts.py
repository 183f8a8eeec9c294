"""Shortcuts planted in any set of images: a mark or a colour that agrees with the label.

Images are changed batch by batch, as they are read, so that a set is never held a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from xai_edit.core.checks import fraction, whole_number
from xai_edit.datasets.image_set import ImageSet, check_numbered, windows


class Planted(Protocol):
    """What can be planted: `Mark`, `Colours`, or a class of a user's own.

    Examples
    --------
    >>> class Inverted:
    ...     values = 2
    ...     def __call__(self, pixels, attribute):
    ...         return torch.where(attribute.bool()[:, None, None, None], 255 - pixels, pixels)
    >>> shortcut = xe.datasets.Shortcut(Inverted(), strength=0.9)
    >>> black = torch.zeros(2, 1, 1, 2, dtype=torch.uint8)
    >>> shortcut.planted(black, attribute=torch.tensor([0, 1])).flatten(1)
    tensor([[  0,   0],
            [255, 255]], dtype=torch.uint8)
    """

    @property
    def values(self) -> int:
        """Number of values of the attribute."""

    def __call__(self, pixels: Tensor, attribute: Tensor) -> Tensor:
        """Return images that show the attribute; the pixels given are not changed.

        Pixels are uint8, shape (samples, channels, height, width), and the attribute is int64,
        shape (samples,), from 0 to ``values`` − 1.
        """


@dataclass(frozen=True, eq=False)
class Mark:
    """A picture that is blended into the images whose attribute is 1.

    Parameters
    ----------
    picture : str, Path or Tensor
        A file, or uint8, shape (4, height, width): red, green, blue and opacity. Grey images get
        its brightness.
    size : (int, int), optional
        Height and width in pixels that it is resized to.
    place : (int, int) or None
        Row and column of its upper left corner in the image. None: a place that follows from the
        image's pixels, so that an image has it at the same place each time.
    opacity : float
        In (0, 1], times the picture's own.

    Raises
    ------
    ValueError, FileNotFoundError
        If there is no such picture, a number is out of range, or it does not fit into the images
        in which it is planted.

    Examples
    --------
    >>> white = torch.full((4, 1, 1), 255, dtype=torch.uint8)
    >>> mark = xe.datasets.Mark(white, size=(2, 2), place=(0, 1))
    >>> black = torch.zeros(2, 3, 3, 3, dtype=torch.uint8)
    >>> mark(black, attribute=torch.tensor([0, 1]))[1, 0]
    tensor([[  0, 255, 255],
            [  0, 255, 255],
            [  0,   0,   0]], dtype=torch.uint8)
    """

    picture: str | Path | Tensor
    size: tuple[int, int] | None = None
    place: tuple[int, int] | None = (0, 0)
    opacity: float = 1.0

    def __post_init__(self) -> None:
        fraction(self.opacity, "opacity")
        for value in self.place or ():
            whole_number(value, "place")
        for value in self.size or ():
            whole_number(value, "size", least=1)
        _ = self._layers  # a file that is no picture is refused now

    @property
    def values(self) -> int:
        """Two: without and with the mark."""
        return 2

    @cached_property
    def _layers(self) -> tuple[Tensor, Tensor]:
        """Colour times opacity, shape (3, height, width), in 0…255, and opacity, in 0…1."""
        picture = self.picture if isinstance(self.picture, Tensor) else _opened(Path(self.picture))
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 4:
            raise ValueError(
                f"picture: {picture.dtype} of shape {tuple(picture.shape)} given; it is uint8 of "
                "shape (4, height, width): red, green, blue, opacity"
            )
        opacity = self.opacity * picture[3:].float() / 255
        # Multiplied before it is resized: what is transparent has no colour to lend.
        layers = torch.cat([picture[:3] * opacity, opacity])
        if self.size is not None:
            layers = transform.resize(layers, list(self.size), antialias=True)
        return layers[:3], layers[3:]

    def __call__(self, pixels: Tensor, attribute: Tensor) -> Tensor:
        """Return the images with the mark where the attribute is 1; see `Planted`."""
        colour, opacity = self._layers
        if pixels.shape[1] == 1:
            colour = transform.rgb_to_grayscale(colour)
        height, width = colour.shape[1:]
        room = torch.tensor(pixels.shape[2:]) - torch.tensor([height, width])
        if bool((room < torch.tensor(self.place or (0, 0))).any()):
            raise ValueError(
                f"place: a mark of {height}×{width} at {self.place} leaves images of "
                f"{pixels.shape[2]}×{pixels.shape[3]}; give another place or size"
            )
        planted = pixels.clone()
        rows = (attribute == 1).nonzero()[:, 0]
        channels = torch.arange(len(pixels[0]))[:, None, None]
        window = windows(*self._corners(pixels[rows], room), height, width)
        at = (rows[:, None, None, None], channels, *window)
        planted[at] = ((1 - opacity) * planted[at] + colour).round().clamp(0, 255).byte()
        return planted

    def _corners(self, pixels: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and column of the mark in each image."""
        if self.place is not None:
            return tuple(torch.full((len(pixels),), at) for at in self.place)  # type: ignore[return-value]
        seen = pixels.flatten(1).long().sum(1)
        height, width = (room + 1).tolist()
        return seen % height, seen // height % width


@dataclass(frozen=True)
class Colours:
    """Colours of grey images: the attribute is the number of the colour.

    Parameters
    ----------
    colours : sequence of (int, int, int)
        Red, green and blue, in 0…255, that white becomes; black stays.

    Raises
    ------
    ValueError
        If there are fewer than two, one is no colour, or the images are not grey.

    Examples
    --------
    >>> colours = xe.datasets.Colours([(255, 0, 0), (0, 255, 0)])
    >>> white = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
    >>> colours(white, torch.tensor([0, 1]))[:, :, 0, 0]
    tensor([[255,   0,   0],
            [  0, 255,   0]], dtype=torch.uint8)
    """

    colours: Sequence[tuple[int, int, int]]

    def __post_init__(self) -> None:
        known = all(len(each) == 3 and 0 <= min(each) <= max(each) <= 255 for each in self.colours)
        if len(self.colours) < 2 or not known:
            raise ValueError(
                f"colours: {self.colours} given; give two or more of (red, green, blue), in 0…255"
            )

    @property
    def values(self) -> int:
        """The number of colours."""
        return len(self.colours)

    def __call__(self, pixels: Tensor, attribute: Tensor) -> Tensor:
        """Return the images in colour, with three channels; see `Planted`."""
        if pixels.shape[1] != 1:
            raise ValueError(f"images: {pixels.shape[1]} channels; only grey ones get a colour")
        colour = torch.tensor(self.colours)[attribute][:, :, None, None]
        return (pixels * (colour / 255)).round().byte()


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A mark or a colour planted in images, and how often it agrees with their label.

    Parameters
    ----------
    planted : Planted
        `Mark` or `Colours`: what each value of the attribute looks like.
    strength : float
        ρ in [0, 1]: the share of the training images of each class whose attribute agrees with
        their label; 1 divided by the number of values is no correlation.
    goes_with : callable, optional
        The agreeing attribute of labels, both int64, shape (samples,), such as
        ``lambda label: label == 3`` for a mark on class 3 alone. The label itself when left out.

    Raises
    ------
    ValueError
        If nothing of two or more values is planted, or the strength is out of range.

    Examples
    --------
    >>> from xai_edit.datasets.image_set import ImageSet
    >>> pixels = torch.full((40, 1, 4, 4), 255, dtype=torch.uint8)
    >>> grey = ImageSet(pixels, torch.arange(40) % 2, mean=(0.5,), std=(0.5,), side=4)
    >>> colours = xe.datasets.Colours([(255, 0, 0), (0, 255, 0)])
    >>> xe.datasets.Shortcut(colours, strength=0.9).train(grey, seed=0).counts()
    tensor([[18,  2],
            [ 2, 18]])
    """

    planted: Planted
    strength: float
    goes_with: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.planted) or getattr(self.planted, "values", 0) < 2:
            raise ValueError(
                f"planted: {self.planted!r} given; give Mark(…), Colours(…), or a callable with "
                "two or more `values`"
            )
        fraction(self.strength, "strength", zero=True)

    def train(self, images: ImageSet, seed: int) -> ImageSet:
        """Return the images with the shortcut, which goes with the label.

        In each class ``strength`` of the images, rounded to whole ones, have the agreeing
        attribute, and the others have each other attribute equally often, but for one image. The
        seed draws which images agree. An attribute of the images gives way to the shortcut's.

        Raises
        ------
        ValueError
            If the shortcut does not fit the images, there is one already, or their labels have no
            attribute.
        """
        agreeing = self._agreeing(images)
        generator = torch.Generator().manual_seed(seed)
        attribute = agreeing.clone()
        for rows in _classes(images, generator):
            others = rows[round(self.strength * len(rows)) :]
            step = 1 + torch.arange(len(others)) % (self.planted.values - 1)
            attribute[others] = (agreeing[others] + step) % self.planted.values
        return self._with(images, attribute)

    def balanced(self, images: ImageSet, seed: int) -> ImageSet:
        """Return each image once with every attribute, so that all groups are of one size.

        The seed draws which images stay of a class that has more of them than the smallest. Errors
        are those of `train`.
        """
        self._agreeing(images)
        classes = _classes(images, torch.Generator().manual_seed(seed))
        least = min(len(rows) for rows in classes)
        rows = torch.cat([rows[:least] for rows in classes]).sort().values
        attribute = torch.arange(self.planted.values).repeat(len(rows))
        return self._with(images[rows.repeat_interleave(self.planted.values)], attribute)

    def _agreeing(self, images: ImageSet) -> Tensor:
        """Return the attribute that agrees with each label, all of it checked."""
        if not len(images):
            raise ValueError("images: none given")
        if images.planted is not None:
            raise ValueError("images: have a shortcut already; give them as they were read")
        given = images.labels if self.goes_with is None else self.goes_with(images.labels)
        agreeing = check_numbered(given, len(images), "goes_with")
        if (most := int(agreeing.max())) >= self.planted.values:
            raise ValueError(
                f"goes_with: attribute {most} for a label, and what is planted has "
                f"{self.planted.values}, numbered from 0; give goes_with, or regroup the labels"
            )
        return agreeing

    def _with(self, images: ImageSet, attribute: Tensor) -> ImageSet:
        one = self.planted(images.pixels(torch.tensor([0])), attribute[:1])  # refused now or never
        again = one.shape[1] // len(images.mean)  # the same numbers for each channel of a colour
        mean, std = images.mean * again, images.std * again
        return replace(images, attribute=attribute, planted=self.planted, mean=mean, std=std)


def _classes(images: ImageSet, generator: torch.Generator) -> list[Tensor]:
    """Return the rows of each class in a random order."""
    classes = [(images.labels == label).nonzero()[:, 0] for label in images.labels.unique()]
    return [rows[torch.randperm(len(rows), generator=generator)] for rows in classes]


def _opened(file: Path) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"picture: {file}: no such file")
    try:
        with Image.open(file) as picture:
            return transform.pil_to_tensor(picture.convert("RGBA"))  # type: ignore[no-any-return]
    except (UnidentifiedImageError, OSError) as problem:
        raise ValueError(f"picture: {file} cannot be read as a picture ({problem})") from None
