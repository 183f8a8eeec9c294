"""The samples of a data set by number, read several times and compared each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from xai_edit.concepts.positions import hashed
from xai_edit.core.checks import readable_again
from xai_edit.core.data import DATASET_BATCH_SIZE, Batch, Data, batches
from xai_edit.datasets.image_set import ImageSet


class Samples:
    """The samples of ``data`` by their number in its order.

    ValueError where a later pass gives other inputs than the first, as a shuffled loader does.
    """

    def __init__(self, data: Data, device: torch.device) -> None:
        readable_again(data, "discover")
        self.data, self.device = data, device
        self.contents = np.empty(0, np.uint64)  # a hash of each sample, from the first pass

    def first_pass(self) -> Iterator[Batch]:
        """Yield all batches and remember their content."""
        contents = []
        for batch in batches(self.data, self.device):
            contents.append(hashed(batch.inputs))
            yield batch
        self.contents = np.concatenate(contents)

    def read(self, rows: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the samples of some numbers, int64 and ascending, with their numbers.

        A `Dataset` and an `ImageSet` are read only there, other data from the beginning.
        """
        start, wanted = 0, torch.zeros(len(self.contents), dtype=torch.bool)
        wanted[rows] = True
        if not len(rows):
            return
        for batch in batches(self._some(rows), self.device):
            numbers = torch.arange(start, min(start + len(batch), self._length(rows)))
            start += len(batch)
            if self._by_number:
                numbers, keep = rows[numbers], torch.ones(len(batch), dtype=torch.bool)
            else:
                keep = wanted[numbers] if len(numbers) == len(batch) else torch.zeros(0).bool()
            if len(keep) != len(batch) or (hashed(batch.inputs) != self.contents[numbers]).any():
                raise ValueError(
                    "data: gives other samples when it is read again; turn off shuffling and "
                    "random augmentation"
                )
            if keep.any():
                yield numbers[keep], batch[keep.to(self.device)]

    @property
    def _by_number(self) -> bool:
        mapped = isinstance(self.data, Dataset) and not isinstance(self.data, IterableDataset)
        return mapped or isinstance(self.data, ImageSet)

    def _length(self, rows: Tensor) -> int:
        return len(rows) if self._by_number else len(self.contents)

    def _some(self, rows: Tensor) -> Any:
        if isinstance(self.data, ImageSet):
            return self.data[rows]
        if isinstance(self.data, Dataset) and self._by_number:
            return DataLoader(Subset(self.data, rows.tolist()), batch_size=DATASET_BATCH_SIZE)
        return self.data
