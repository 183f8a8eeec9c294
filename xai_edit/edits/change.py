"""``Change``: new values for some entries of one tensor of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xai_edit.errors import EditMismatchError

PARTS = ("index", "old", "new")  # of a change in a file


@dataclass(frozen=True, eq=False)
class Change:
    """New values for some entries of one parameter or buffer.

    Attributes
    ----------
    shape : tuple of int
        Shape of the tensor.
    index : Tensor, int64, shape (entries,)
        Flat positions in row-major order, ascending.
    old, new : Tensor, the tensor's dtype, shape (entries,)
        The values before and after.
    """

    shape: tuple[int, ...]
    index: Tensor
    old: Tensor
    new: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def position(self, at: int) -> list[int]:
        """Return where in the tensor an entry is, by axis."""
        return [int(axis) for axis in torch.unravel_index(self.index[at], self.shape)]

    def put(self, parameter: Tensor, values: Tensor) -> None:
        """Write the old or the new values into the tensor."""
        # By row and column: right in any memory layout, and deterministic.
        index = torch.unravel_index(self.index.to(parameter.device), self.shape)
        with torch.no_grad():
            parameter[index] = values.to(parameter.device) if self.shape else values[0]

    def joined(self, name: str, other: Change) -> Change:
        """Return both changes of the tensor of this name as one.

        Raises
        ------
        EditMismatchError
            If they give an entry different values, or are of different tensors.
        """
        if self.shape != other.shape or self.old.dtype != other.old.dtype:
            raise EditMismatchError(f"the edits were made for different models: see {name!r}")
        unique, place = torch.cat([self.index, other.index]).unique(return_inverse=True)
        old, new = (self.old.new_empty(len(unique)) for _ in range(2))
        old[place], new[place] = torch.cat([self.old, other.old]), torch.cat([self.new, other.new])
        for change in (self, other):
            at = torch.searchsorted(unique, change.index)
            clash = ~(same_bits(old[at], change.old) & same_bits(new[at], change.new))
            if clash.any():
                first = change.position(int(torch.nonzero(clash)[0]))
                raise EditMismatchError(
                    f"the edits clash in {int(clash.sum())} entries of {name!r}, first at {first}; "
                    "apply one, then plan the other"
                )
        return Change(self.shape, unique, old, new)


def read_change(path: str | Path, tensors: Mapping[str, Tensor], name: str, shape: Any) -> Change:
    """Return the change of one tensor, or raise ValueError where a file has none that is one."""
    parts = [tensors[at] for part in PARTS if (at := f"{name}/{part}") in tensors]
    axes = isinstance(shape, list) and all(type(axis) is int and axis > 0 for axis in shape)
    if axes and len(parts) == len(PARTS):
        index, old, new = parts
        entries = math.prod(shape)
        if (
            entries <= torch.iinfo(torch.int64).max
            and index.dtype in (torch.int32, torch.int64)
            and index.ndim == 1
            and index.shape == old.shape == new.shape
            and old.dtype == new.dtype
            and len(index)
            and index[0] >= 0
            and index[-1] < entries
            and (index[1:] > index[:-1]).all()
        ):
            return Change(tuple(shape), index.long(), old, new)
    raise ValueError(f"{path}: what it holds for {name!r} is no change of a tensor of {shape}")


def same_bits(left: Tensor, right: Tensor) -> Tensor:
    """Compare entry by entry, telling -0.0 from 0.0; shape (entries,)."""
    size = left.element_size()
    rows = [tensor.contiguous().view(torch.uint8).view(-1, size) for tensor in (left, right)]
    return (rows[0] == rows[1]).all(1)
