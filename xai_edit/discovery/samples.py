"""The samples of a data set by number, read several times and compared each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from xai_edit.concepts.positions import hashed
from xai_edit.core.checks import readable_again
from xai_edit.core.data import DATASET_BATCH_SIZE, Batch, Data, batches
from xai_edit.core.inputs import described, form_of
from xai_edit.datasets.image_set import ImageSet

CHANGED = (
    "data: gives other samples when it is read again; turn off shuffling and random augmentation"
)


class Samples:
    """The samples of ``data`` by their number in its order.

    ValueError where a later pass gives other inputs than the first, as a shuffled loader does.
    ``passed`` is called with the number of samples whenever some went through the model.
    """

    def __init__(
        self, data: Data, device: torch.device, passed: Callable[[int], None] = lambda _: None
    ) -> None:
        readable_again(data, "discover")
        self.data, self.device = data, device
        self.passed = passed
        self.contents = np.empty(0, np.uint64)  # a hash of each sample, from the first pass

    def first_pass(self) -> Iterator[Batch]:
        """Yield all batches and remember their content; ValueError for inputs of several sizes."""
        contents, first = [], None
        for batch in batches(self.data, self.device):
            first = batch.inputs if first is None else first
            if form_of(batch.inputs) != form_of(first):
                raise ValueError(
                    f"data: inputs of {described(batch.inputs)} and before of {described(first)}; "
                    "discover compares samples position by position, so give inputs of one size"
                )
            contents.append(hashed(batch.inputs))
            yield batch
            self.passed(len(batch))
        self.contents = np.concatenate(contents)

    def first_copies(self) -> Tensor:
        """Return the number of the first sample with the same content, for each sample."""
        _, first, which = np.unique(self.contents, return_index=True, return_inverse=True)
        return torch.from_numpy(first[which])

    def read(self, rows: Tensor, cost: int = 1) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the samples of some numbers, int64 and ascending, with their numbers.

        ``cost`` is in forward passes.

        A `Dataset`, an `ImageSet` and a `DataLoader` in the order of its data set are read only
        there, other data from the beginning to the last of them.
        """
        if not len(rows):
            return
        some = self._some(rows)
        order = torch.arange(int(rows[-1]) + 1) if some is None else rows
        start = 0
        for batch in batches(self.data if some is None else some, self.device):
            numbers = order[start : start + len(batch)]
            start += len(batch)
            keep = torch.isin(numbers, rows).nonzero()[:, 0]
            if len(keep):
                numbers, batch = numbers[keep], batch[keep.to(self.device)]
                if (hashed(batch.inputs) != self.contents[numbers]).any():
                    raise ValueError(CHANGED)
                yield numbers, batch
                self.passed(cost * len(batch))
            if start >= len(order):
                return
        raise ValueError(CHANGED)

    def _some(self, rows: Tensor) -> Any:
        """Return the data of some samples alone, None where data cannot be read by number."""
        data = self.data
        if isinstance(data, ImageSet):
            return data[rows]
        if isinstance(data, DataLoader) and isinstance(data.sampler, SequentialSampler):
            if data.batch_size is None or isinstance(data.dataset, IterableDataset):
                return None
            return DataLoader(
                Subset(data.dataset, rows.tolist()),
                batch_size=data.batch_size,
                num_workers=data.num_workers,
                collate_fn=data.collate_fn,
            )
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return DataLoader(Subset(data, rows.tolist()), batch_size=DATASET_BATCH_SIZE)
        return None


def known_length(data: Data) -> int | None:
    """Return the number of samples of data that says it, else None."""
    source = data.dataset if isinstance(data, DataLoader) else data
    return (
        len(source)
        if isinstance(source, (Dataset, ImageSet)) and isinstance(source, Sized)
        else None
    )
