"""A random sample of bounded size of each class, from a stream of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xai_edit.core.inputs import Inputs, joined


class ClassSample:
    """A random sample of each class, of bounded size, from a stream (reservoir sampling).

    Every sample draws a key; at most ``limits`` of each class stay, those of lowest key. The choice
    does not depend on the batches.
    """

    def __init__(self, limits: Sequence[int], seed: int | Sequence[int]) -> None:
        self._limits = torch.tensor(limits)
        self._bounds = torch.full((len(limits),), torch.inf, dtype=torch.float64)
        self._random = np.random.default_rng(seed)
        self._chunks: list[dict[str, Any]] = []  # the sample, then what came since

    def add(self, labels: Tensor, columns: Mapping[str, Inputs]) -> None:
        """Add one batch; every column has one row a label, and ``labels`` is on the CPU."""
        keys = torch.from_numpy(self._random.random(len(labels)))
        rows = (keys < self._bounds[labels]).nonzero()[:, 0]
        chunk: dict[str, Any] = {"": keys[rows], "labels": labels[rows]}
        for name, column in columns.items():
            chunk[name] = column[rows.to(column.device)].cpu()  # indexing copies: no batch lives on
        self._chunks.append(chunk)
        if sum(len(one[""]) for one in self._chunks[1:]) > int(self._limits.sum()):
            self._compact()

    def rows(self) -> dict[str, Any]:
        """Return the columns of the sample and ``labels``, in random order within each class."""
        self._compact()
        return {name: column for name, column in self._chunks[0].items() if name}

    def _compact(self) -> None:
        whole: dict[str, Any] = {
            name: joined([chunk[name] for chunk in self._chunks]) for name in self._chunks[0]
        }
        order = torch.from_numpy(np.lexsort((whole[""].numpy(), whole["labels"].numpy())))
        labels = whole["labels"][order]
        counts = torch.bincount(labels, minlength=len(self._limits))
        rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]  # within its class
        kept = order[rank < self._limits[labels]]
        self._chunks = [{name: column[kept] for name, column in whole.items()}]
        last = (rank == self._limits[labels] - 1).nonzero()[:, 0]
        self._bounds[labels[last]] = whole[""][order[last]]
