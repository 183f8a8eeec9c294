"""A data set of the user's own, from a function named on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from xai_edit.command.load import IMAGENET, TORCHVISION, Images, imported, spread
from xai_edit.core.checks import whole_number
from xai_edit.core.data import batches, peek

COMMANDS = ("check", "score", "discover")
"""Commands that take such data. The others show images and read labels of each class."""


@dataclass(frozen=True, eq=False)
class OwnData(Images):
    """Some ``rows`` of a data set whose items, also mappings, go to the model as they are."""

    def __getitem__(self, index: int) -> Any:
        return self.source[self.rows[index]]

    @property
    def labelled(self) -> bool:
        """Whether the first sample has a label."""
        return peek([default_collate([self[0]])])[0].labels is not None

    @property
    def labels(self) -> list[int]:
        """The class of each sample."""
        return torch.cat(
            [batch.labels for batch in batches(self) if batch.labels is not None]
        ).tolist()

    def __str__(self) -> str:
        return f"{len(self)} of {len(self.source)} samples"


def is_own(spec: str | None) -> bool:
    """Return whether a specification of data names a function, ``package.module:function``."""
    return spec is not None and ":" in spec.removeprefix(TORCHVISION) and not Path(spec).exists()


def load_own(spec: str, command: str, *, limit: int | None = None) -> OwnData:
    """Return the data set that a function gives, at most ``limit`` samples, spread evenly.

    ValueError or TypeError if it gives something else, or the command shows images.
    """
    if command not in COMMANDS:
        raise ValueError(
            f"data: {spec}: {command} shows images; give a folder or a CSV file of them, or plan "
            "in Python, where operators take any data"
        )
    source = imported(spec, "data", {})
    numbered = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if not numbered or isinstance(source, Mapping):  # a batch, say
        raise TypeError(
            f"data: {spec} gives {type(source).__name__}; it returns a list or Dataset of samples, "
            "such as (inputs, label) or mappings"
        )
    if not len(source):
        raise ValueError(f"data: {spec}: no samples")
    size = len(source) if limit is None else min(len(source), whole_number(limit, "limit", least=1))
    return OwnData(source, spread(len(source), size), IMAGENET, {})
