"""Groups without images made by a mark planted into images that lack it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import functional as F

from xai_edit.command.load import Images
from xai_edit.command.run_parts import Parts
from xai_edit.datasets.image_files import read_image
from xai_edit.datasets.shortcuts import Mark

SEVERAL = 4  # planted images that are to differ


@dataclass(frozen=True, eq=False)
class WithPlanted:
    """The samples of a source of `Images`, and after them each of them again with a mark.

    ``targets`` are the labels of all, so that they are known without reading an image.
    """

    source: Any
    mark: Mark
    targets: Sequence[int]

    def __len__(self) -> int:
        return 2 * len(self.source)

    def __getitem__(self, row: int) -> Any:
        image, label = self.source[row % len(self.source)]
        if row < len(self.source):
            return image, label
        image = read_image(image) if isinstance(image, str) else image.convert("RGB")
        pixels = F.pil_to_tensor(image)[None]
        try:
            marked = self.mark(pixels, torch.tensor([1]))[0]
        except ValueError as problem:  # its words are about arguments of Mark
            raise ValueError(
                f"plant: {self.mark.picture} is larger than an image of {image.width}×"
                f"{image.height}; give a picture that fits, transparent where there is no mark"
            ) from problem
        return F.to_pil_image(marked), label


def with_planted(parts: Parts, picture: Path) -> tuple[Parts, dict[str, Any]]:
    """Return the parts with the groups that a mark completes, and which groups those are.

    A class without images with the feature gets a copy of each of its images with the mark, at the
    upper left corner of the image, in the part that has the image itself. ValueError if no class
    lacks such images, or the mark does not change an input.
    """
    try:
        mark = Mark(picture)
    except (ValueError, OSError) as problem:
        raise ValueError(f"plant: {str(problem).removeprefix('picture: ')}") from problem
    groups = {group for part in parts for group in part.groups}
    made = sorted(label for label, has in groups if not has and (label, 1) not in groups)
    if not made:
        raise ValueError(f"plant: {picture} given, and every class has images with the feature")
    first = parts.planning
    labels = replace(first, rows=range(len(first.source))).labels
    source = WithPlanted(first.source, mark, [*labels, *labels])
    completed = Parts(*(_completed(part, source, made) for part in parts))
    _check_visible(completed.held_out, picture)
    images = sum(len(new) - len(old) for new, old in zip(completed, parts, strict=True))
    listed = [{"class": label, "attribute": 1} for label in made]
    return completed, {"name": str(picture), "images": images, "groups": listed}


def _completed(part: Images, source: WithPlanted, classes: Sequence[int]) -> Images:
    copied = [
        row + len(source.source)
        for row, label in zip(part.rows, part.labels, strict=True)
        if label in classes
    ]
    marks = {**(part.marks or {}), **dict.fromkeys(copied, 1)}
    return replace(part, source=source, rows=[*part.rows, *copied], marks=marks)


def _check_visible(part: Images, picture: Path) -> None:
    """Raise ValueError if the first planted images of a part are inputs as before, or all alike."""
    size = len(part.source.source)
    planted = [row for row in part.rows if row >= size]
    row = planted[0]
    pair = replace(part, rows=[row - size, row])
    inputs = [replace(part, rows=[row])[0][0] for row in planted[:SEVERAL]]
    if len(inputs) > 1 and all(torch.equal(inputs[0], one) for one in inputs[1:]):
        raise ValueError(
            f"plant: {picture} covers all of the images; give a picture of the feature alone, "
            "transparent around it"
        )
    if torch.equal(pair[0][0], pair[1][0]):
        raise ValueError(
            f"plant: {picture} does not change the inputs: it is transparent, or lies outside what "
            "is cut out of the images"
        )
