"""A shortcut planted in real data: a watermark that goes with one class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BATCH_SIZE = 256
MARK = 6  # pixels a side
PLACES = 4  # along each axis


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
    Training images carry it as the shares say; validation and test images appear both without and
    with it, so that all 20 (class, watermark) groups have samples.

    Parameters
    ----------
    size : int
        Side of the upsampled images.
    marked : int
        The class that goes with the watermark.
    share, other_share : float
        Share of training images with the watermark, of that class and of each other.
    opacity : float
        Of the watermark over the image.
    background : float
        Grey level that black becomes; white stays.
    train, validation : int
        Images per class; the rest is for testing.
    """

    size: int = 24
    marked: int = 3
    share: float = 0.97
    other_share: float = 0.0
    opacity: float = 0.82
    background: float = 0.4
    train: int = 90
    validation: int = 40

    def split(self, seed: int) -> tuple[Samples, Samples, Samples]:
        """Return training, validation and test samples; the seed draws the split and the places."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.nn.functional.interpolate(
            torch.from_numpy(raw.images[:, None] / 16.0).float(),
            size=(self.size, self.size),
            mode="bilinear",
            align_corners=False,
        )
        images = self.background + (1 - self.background) * images
        labels = torch.from_numpy(raw.target)
        generator = torch.Generator().manual_seed(seed)
        parts: list[list[Tensor]] = [[], [], []]
        for label in labels.unique():
            rows = torch.nonzero(labels == label).flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            sizes = [self.train, self.validation, len(rows) - self.train - self.validation]
            for part, chosen in zip(parts, rows.split(sizes), strict=True):
                part.append(chosen)
        train, validation, test = (torch.cat(part) for part in parts)
        shares = torch.where(labels[train] == self.marked, self.share, self.other_share)
        marked = torch.rand(len(train), generator=generator) < shares
        return (
            self._planted(images[train], labels[train], marked, generator),
            self._both(images[validation], labels[validation], generator),
            self._both(images[test], labels[test], generator),
        )

    def _both(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Samples:
        marked = torch.arange(2).repeat_interleave(len(images)) == 1
        return self._planted(images.repeat(2, 1, 1, 1), labels.repeat(2), marked, generator)

    def _planted(
        self, images: Tensor, labels: Tensor, marked: Tensor, generator: torch.Generator
    ) -> Samples:
        """Blend the mark into some images, at one of sixteen places near the corner."""
        mark = checkerboard(MARK)
        offsets = torch.randint(0, PLACES, (len(images), 2), generator=generator)
        at = torch.arange(MARK)
        rows = (offsets[:, :1] + at)[:, :, None]  # (samples, MARK, 1)
        columns = (offsets[:, 1:] + at)[:, None, :]
        number = torch.arange(len(images))[:, None, None]
        planted = images.clone()
        below = images[number, 0, rows, columns]
        blended = (1 - self.opacity) * below + self.opacity * mark
        planted[number, 0, rows, columns] = blended
        chosen = torch.where(marked[:, None, None, None], planted, images)
        return Samples(chosen, labels, marked.long())


def checkerboard(side: int) -> Tensor:
    """Return a checkerboard of zeros and ones, shape (side, side)."""
    at = torch.arange(side)
    return ((at[:, None] + at) % 2).float()
