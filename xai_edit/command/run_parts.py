"""Labelled images with an attribute, divided at random into parts that share none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from xai_edit.command.load import Images
from xai_edit.core.data import Data, batches

SEED = 0  # of the parts


@dataclass(frozen=True, eq=False)
class Marked(Dataset[Any]):
    """Labelled images with a third element each: 1 with the attribute, 0 without."""

    images: Images
    attribute: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return *self.images[index], self.attribute[index]

    def only(self, chosen: Sequence[int]) -> Marked:
        """Return some of the images, by their indices among these."""
        return Marked(self.images.only(chosen), [self.attribute[index] for index in chosen])

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Class and attribute of each image."""
        return [*zip(class_labels(self.images), self.attribute, strict=True)]


def class_labels(images: Images) -> list[int]:
    """Return the label of each image; raise ValueError where one has none."""
    labels = [label for label in images.labels if label is not None]
    if len(labels) < len(images):
        raise ValueError("data: has no labels; give class folders or a CSV file of path,label")
    return labels


@dataclass(frozen=True, eq=False)
class Parts:
    """Images divided into parts of which no two share one, each with images of every group.

    Attributes
    ----------
    planning, validation : Marked
        What edits are planned from; the second is empty where no edit needs it.
    held_out : Marked
        Half of each (class, attribute) group, for the figures.
    """

    planning: Marked
    validation: Marked
    held_out: Marked


def split(
    images: Images, attribute: Sequence[int] | None, *, validation: bool, seed: int = SEED
) -> Parts:
    """Divide labelled images at random, each group by itself.

    ``attribute`` is 1 or 0 for each image, or None if unknown: then groups are classes. With
    ``validation`` what is not held out is divided into planning and validation images.

    Raises
    ------
    ValueError
        If labels are missing, or a group has too few images.
    """
    whole = Marked(images, [0] * len(images) if attribute is None else attribute)
    random = np.random.default_rng(seed)
    fewest, uses = (3, "planning, validation") if validation else (2, "planning")
    planning: list[int] = []
    validating: list[int] = []
    held_out: list[int] = []
    for (label, has), own in sorted(indices_by(whole.groups).items()):
        if len(own) < fewest:
            which = "" if attribute is None else f" {'with' if has else 'without'} the feature"
            raise ValueError(
                f"data: class {label} has {len(own)} images{which}; give {fewest} or more, for "
                f"{uses} and figures, or none"
            )
        drawn = random.permutation(own).tolist()
        half = len(drawn) // 2
        end = half + (len(drawn) - half) // 2 if validation else len(drawn)
        held_out += drawn[:half]
        planning += drawn[half:end]
        validating += drawn[end:]
    return Parts(*(whole.only(sorted(part)) for part in (planning, validating, held_out)))


def indices_by(kinds: Sequence[Any]) -> dict[Any, list[int]]:
    """Return the indices of each kind, in the order in which kinds first occur."""
    found: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return found


def watched(data: Data, watch: Callable[[Tensor], None]) -> Iterator[Any]:
    """Yield the batches and pass the inputs of each to ``watch``."""
    for batch in batches(data):
        watch(batch.inputs)
        yield batch.inputs, batch.labels, batch.groups
