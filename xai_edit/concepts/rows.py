"""Rows of a tensor that come part by part, kept in memory or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from xai_edit.files import naming


class Rows(Protocol):
    """What keeps rows."""

    def append(self, rows: Tensor) -> None:
        """Keep rows behind the others, shape (rows, ...)."""
        ...

    def joined(self) -> Tensor:
        """Return all rows as one tensor on the CPU."""
        ...


class RowList:
    """Rows in memory."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        """Keep a copy on the CPU."""
        self.parts.append(rows.cpu())

    def joined(self) -> Tensor:
        """Return all rows."""
        return torch.cat(self.parts)


class RowFile:
    """Rows in a file, which is memory-mapped in the end.

    Parameters
    ----------
    path : Path
        A file that does not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind: tuple[torch.Size, torch.dtype] | None = None

    def append(self, rows: Tensor) -> None:
        """Write rows at the end of the file; OSError where they find no room."""
        kind = rows.shape[1:], rows.dtype
        if self.kind not in (None, kind):
            raise ValueError(f"layer: its vectors are {kind} in one batch and {self.kind} before")
        self.kind = kind
        with naming(self.path), self.path.open("ab") as file:
            rows.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(file)

    def joined(self) -> Tensor:
        """Return all rows, memory-mapped; the file may be removed and they stay."""
        assert self.kind is not None  # nothing was appended
        shape, dtype = self.kind
        size = self.path.stat().st_size // dtype.itemsize
        mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=dtype)
        return mapped.view(-1, *shape)
