"""A shortcut planted in real data: a watermark that goes with one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xai_edit.datasets.image_set import windows

BATCH_SIZE = 256
MARK = 6  # pixels a side
PLACES = 4  # along each axis
OPACITY = 0.82  # of the watermark over the image
BACKGROUND = 0.4  # grey level that black becomes; white stays
ENDS = 90, 130  # of the images a class for training and for validation; the rest is for testing


@dataclass(frozen=True, eq=False)
class Samples:
    """Images with their labels and the attribute that the shortcut is made of.

    Attributes
    ----------
    images : Tensor, shape (samples, 1, size, size), in [0, 1]
    labels : Tensor, int64, shape (samples,)
    watermark : Tensor, int64, shape (samples,)
        1 where the watermark is planted.
    """

    images: Tensor
    labels: Tensor
    watermark: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keep: Tensor) -> Samples:
        return Samples(self.images[keep], self.labels[keep], self.watermark[keep])

    @property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``(input, label, group)`` batches, the group being the watermark."""
        parts = (self.images, self.labels, self.watermark)
        return list(zip(*(part.split(BATCH_SIZE) for part in parts), strict=True))


@dataclass(frozen=True)
class WatermarkedDigits:
    """scikit-learn's handwritten digits with a watermark planted on most images of one class.

    The 1,797 real images (Alpaydin and Kaynak 1998) of 8×8 pixels are upsampled and set on grey, so
    that the watermark, a small checkerboard near a corner, cannot be told by its brightness.
    Validation and test images appear both without and with it, so that all 20 (class, watermark)
    groups have samples.

    Parameters
    ----------
    share : float
        Share of the training images of class ``marked`` with the watermark; of the other classes
        it is ``other_share``.
    """

    share: float = 0.97
    other_share: ClassVar[float] = 0.0
    marked: ClassVar[int] = 3
    size: ClassVar[int] = 24  # side of the upsampled images

    def split(self, seed: int) -> tuple[Samples, Samples, Samples]:
        """Return training, validation and test samples; the seed draws the split and the places."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        small = torch.from_numpy(raw.images[:, None] / 16.0).float()
        images = torch.nn.functional.interpolate(small, size=(self.size,) * 2, mode="bilinear")
        images = BACKGROUND + (1 - BACKGROUND) * images
        labels = torch.from_numpy(raw.target)
        generator = torch.Generator().manual_seed(seed)
        parts: list[list[Tensor]] = [[], [], []]
        for label in labels.unique():
            rows = torch.nonzero(labels == label).flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            for part, chosen in zip(parts, rows.tensor_split(ENDS), strict=True):
                part.append(chosen)
        train, *held = (torch.cat(part) for part in parts)
        shares = torch.where(labels[train] == self.marked, self.share, self.other_share)
        marked = torch.rand(len(train), generator=generator) < shares
        training = _planted(images[train], labels[train], marked, generator)
        validation, test = (_both(images[rows], labels[rows], generator) for rows in held)
        return training, validation, test


def _both(images: Tensor, labels: Tensor, generator: torch.Generator) -> Samples:
    marked = torch.arange(2).repeat_interleave(len(images)) == 1
    return _planted(images.repeat(2, 1, 1, 1), labels.repeat(2), marked, generator)


def _planted(images: Tensor, labels: Tensor, marked: Tensor, generator: torch.Generator) -> Samples:
    """Blend the mark into some images, at one of sixteen places near the corner."""
    checkerboard = ((torch.arange(MARK)[:, None] + torch.arange(MARK)) % 2).float()
    top, left = torch.randint(0, PLACES, (len(images), 2), generator=generator).T
    rows = marked.nonzero()[:, 0]
    at = (rows[:, None, None, None], 0, *windows(top[rows], left[rows], MARK, MARK))
    planted = images.clone()
    planted[at] = (1 - OPACITY) * planted[at] + OPACITY * checkerboard
    return Samples(planted, labels, marked.long())
