"""Held-out images that are copies, or near copies, of images that an edit is planned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from xai_edit.command.load import Images, Preprocessing
from xai_edit.core.inputs import Inputs, one_tensor
from xai_edit.evaluation.outputs import digests
from xai_edit.report.table import counted, named

SIDE = 8  # of the grey thumbnails
STEP = 0.02  # of grey, 0 to 1: a smaller difference of two cells is none
CLIPPED = 0.1  # so that the edges of a mark do not outweigh the picture
SIMILAR = 0.7  # cosine from which two pictures are compared cell by cell
AGREEING = 0.5  # of the differences; a mark changes some
FEWEST = 16  # differences that a picture needs to be recognised by


class Copies:
    """Compares pictures batch by batch as they are read; 0.5 KB for each that is known.

    A picture is known by the differences between neighbouring cells of an 8 × 8 grey thumbnail, of
    which a planted mark changes a few and a flat background has none.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._contents: dict[bytes, int] = {}
        self._known: list[Tensor] = []
        self._pairs: dict[str, list[tuple[int, int]]] = {"copies": [], "near copies": []}
        self._seen = 0

    def know(self, inputs: Inputs) -> None:
        """Add a batch that an edit is planned from."""
        start = sum(map(len, self._known))
        for at, digest in enumerate(digests(inputs), start):
            self._contents.setdefault(digest, at)
        self._known.append(self._differences(inputs))

    def add(self, inputs: Inputs) -> None:
        """Compare a batch of held-out images."""
        known = torch.cat(self._known)
        self._known = [known]
        alike = near_copies(known, self._differences(inputs))
        for at, digest in enumerate(digests(inputs)):
            if digest in self._contents:
                self._pairs["copies"].append((self._contents[digest], self._seen + at))
            elif at in alike:
                self._pairs["near copies"].append((alike[at], self._seen + at))
        self._seen += len(inputs)

    def found(self, known: Sequence[Images], held_out: Images) -> str | None:
        """Return a warning of near copies, or None; raise ValueError where there are copies.

        ``known`` and ``held_out`` are the images in the order in which they were read.
        """
        names = [name for images in known for name in names_of(images)]
        for kind, pairs in self._pairs.items():
            if not pairs:
                continue
            others = names_of(held_out)
            many = counted(len(pairs), "held-out image")
            listed = named([f"{others[other]} and {names[own]}" for own, other in pairs])
            if kind == "copies":
                raise ValueError(
                    f"data: {many} would also be planned from, as there are copies ({listed}); "
                    "keep one of each, or the figures flatter"
                )
            return (
                f"{many} of {len(held_out)} may repeat images that the edit is planned from, such "
                f"as one picture with and without a mark ({listed}); look at them, and where they "
                "do, keep one of each, or the figures flatter"
            )
        return None

    def _differences(self, inputs: Inputs) -> Tensor:
        pixels = self.preprocessing.pixels(one_tensor(inputs, "a picture"))
        cells = adaptive_avg_pool2d(pixels.mean(1, keepdim=True), SIDE)[:, 0]
        return torch.cat([cells.diff(dim=axis).flatten(1) for axis in (1, 2)], 1)


def near_copies(known: Tensor, seen: Tensor) -> dict[int, int]:
    """Return, for each seen picture that is a near copy, the first known one that it is of.

    Both are differences between cells, shape (pictures, differences).
    """
    directions = [normalize(one.clamp(-CLIPPED, CLIPPED), dim=1) for one in (seen, known)]
    found: dict[int, int] = {}
    for pairs in (directions[0] @ directions[1].T > SIMILAR).nonzero().split(2**16):
        one, other = seen[pairs[:, 0]], known[pairs[:, 1]]
        differs = (one.abs() > STEP) | (other.abs() > STEP)
        agreeing = ((one - other).abs() < STEP) & differs
        differences = differs.sum(1)
        alike = (differences >= FEWEST) & (agreeing.sum(1) > AGREEING * differences)
        rows, first = np.unique(pairs[alike, 0], return_index=True)
        found = dict(zip(rows.tolist(), pairs[alike, 1][first].tolist(), strict=True)) | found
    return found


def names_of(images: Images) -> list[str]:
    """Return the paths of images, or their numbers in a data set without paths."""
    if isinstance(images.source, list):
        return [str(images.source[row][0]) for row in images.rows]
    return [f"number {row}" for row in images.rows]


def files_of(images: Images) -> set[Path]:
    """Return the files of images, none in a data set without paths."""
    listed = isinstance(images.source, list)
    return {Path(name).resolve() for name in names_of(images)} if listed else set()
