"""Training data by position, so that samples can be drawn, repeated and counted by group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from xai_edit.attribution.layers import predict
from xai_edit.baselines.samples import Labelled, labelled
from xai_edit.data import DATASET_BATCH_SIZE, Data, model_device, peek, together
from xai_edit.guard import preserved, require_finite


@dataclass(frozen=True, eq=False)
class Indexed:
    """Labelled samples that can be read in any order, any number of times.

    Attributes
    ----------
    samples : Dataset
        The user's own, or the batches joined in memory.
    outputs : int
        Classes of the model.
    labels : Tensor, int64, shape (samples,)
    cells : Tensor or None, int64, shape (samples,)
        Position in ``groups`` of each sample's group; None where the data has no third element.
    groups : list of (int, int)
        The (class, attribute) pairs that have samples, in order.
    """

    samples: Dataset[Any]
    outputs: int
    labels: Tensor
    cells: Tensor | None
    groups: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions: Tensor, batch_size: int) -> Iterator[Labelled]:
        """Yield batches of the samples at ``positions`` (int64), ``groups`` being their cells."""
        parts = positions.split(batch_size)
        raw: Any
        if isinstance(self.samples, TensorDataset):
            raw = (self.samples[rows] for rows in parts)
        else:
            raw = DataLoader(Subset(self.samples, positions.tolist()), batch_size=batch_size)
        for rows, batch in zip(parts, labelled(raw, self.outputs), strict=True):
            cells = None if self.cells is None else self.cells[rows]
            yield Labelled(batch.inputs, batch.labels, cells)

    def require_cells(self) -> Tensor:
        """Return the cells; ValueError where there are none."""
        if self.cells is None:
            raise ValueError(
                "data: has no third element, and the groups need the spurious feature of each "
                "sample; give (input, label, attribute) batches"
            )
        return self.cells


def indexed(model: nn.Module, data: Data) -> Indexed:
    """Read the data once and number its samples and their groups.

    Parameters
    ----------
    model : nn.Module
        A classifier; tells how many classes there are. Left exactly as it was.
    data : iterable or Dataset
        Labelled batches, which are joined in memory, on the CPU; or a ``Dataset``, whose samples
        stay where they are.

    Raises
    ------
    ValueError
        If the data has no labels, one is out of range, some batches have a third element and some
        do not, or it is a ``Dataset`` without an order.
    """
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"data: a {type(data).__name__} gives its samples in one order only; give batches or "
            "a Dataset with a length"
        )
    require_finite(model)
    first, whole = peek(data, model_device(model))
    with preserved(model), torch.no_grad():
        outputs = predict(model, first.inputs[:1]).shape[1]
    stays = data if isinstance(data, Dataset) else None
    inputs, labels, attributes = [], [], []
    for batch in labelled(whole, outputs):
        if stays is None:
            inputs.append(batch.inputs)
        labels.append(batch.labels)
        attributes.append(batch.groups)
    y, attribute = torch.cat(labels), together(attributes, "groups")
    samples = stays if stays is not None else TensorDataset(torch.cat(inputs), y)
    if attribute is None:
        return Indexed(samples, outputs, y, None, [])
    pairs, cells = torch.stack([y, attribute], 1).unique(dim=0, return_inverse=True)
    return Indexed(samples, outputs, y, cells, [(pair[0], pair[1]) for pair in pairs.tolist()])


def right(model: nn.Module, samples: Indexed) -> Tensor:
    """Tell which samples a model gets right, bool, shape (samples,); it is left as it was."""
    device, everything = model_device(model), torch.arange(len(samples))
    with preserved(model), torch.no_grad():
        predicted = [
            predict(model, batch.inputs.to(device)).argmax(1).cpu()
            for batch in samples.read(everything, DATASET_BATCH_SIZE)
        ]
    return torch.cat(predicted) == samples.labels


def worst_group(model: nn.Module, samples: Indexed) -> float:
    """Return the lowest accuracy of all groups that have samples."""
    cells = samples.require_cells()
    hits = torch.bincount(cells, weights=right(model, samples).double())
    return float((hits / torch.bincount(cells)).min())
