"""The samples of the classes to forget, and the data without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from xai_edit.core.checks import with_labels
from xai_edit.core.data import Batch, Data, batches, model_device, peek
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, joined
from xai_edit.core.layers import predict
from xai_edit.core.outputs import label_chosen
from xai_edit.core.targets import classes_to_remove


@dataclass(frozen=True, eq=False)
class ClassSamples:
    """All samples of the classes to forget, on the CPU."""

    classes: list[int]
    outputs: int  # the number of the model's classes
    inputs: Inputs
    labels: Tensor  # int64, shape (samples,)
    others: int  # samples of other classes in the data

    def __len__(self) -> int:
        return len(self.labels)


def class_samples(model: nn.Module, data: Data, target: int | Sequence[int]) -> ClassSamples:
    """Collect the samples of the classes to forget in one pass over the data."""
    classes, outputs, data = classes_to_forget(model, data, target)
    inputs, labels, others = [], [], 0
    for batch, batch_labels in labelled(data, outputs):
        chosen = among(batch_labels, classes)
        inputs.append(batch.inputs[chosen])
        labels.append(batch_labels[chosen])
        others += int((~chosen).sum())
    all_labels = torch.cat(labels)
    require_present(classes, all_labels)
    return ClassSamples(classes, outputs, joined(inputs), all_labels, others)


def classes_to_forget(
    model: nn.Module, data: Data, target: int | Sequence[int]
) -> tuple[list[int], int, Data]:
    """Return the classes as a list, the number of the model's classes, and the unread data.

    ValueError if a class is out of range or named twice, or none would be left, and inside
    `xai_edit.one_label`: the loss of one label does not hold the others.
    """
    if (label := label_chosen()) is not None:
        raise ValueError(
            f"one_label: label {label} chosen, and methods that train or weigh all weights by the "
            "loss of one label spoil the others; use LogitMask, SingleWeight or PathPerturbation"
        )
    first, whole = peek(data, model_device(model))
    with preserved(model), torch.no_grad():
        outputs = predict(model, first.inputs[:1]).shape[1]
    classes = classes_to_remove(target, outputs)
    return classes, outputs, whole if isinstance(data, Iterator) else data


def labelled(
    data: Data, outputs: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches and their labels; ValueError without labels or where one is out of range."""
    for batch in batches(data, device):
        yield batch, with_labels(batch.labels, outputs)


def among(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return which labels are one of ``classes``, bool, shape (samples,)."""
    return torch.isin(labels, torch.tensor(classes, device=labels.device))


def require_present(classes: Sequence[int], labels: Tensor) -> None:
    """Raise ValueError naming the classes that have no sample."""
    absent = sorted(set(classes) - set(labels.unique().tolist()))
    if absent:
        raise ValueError(f"target: the data has no sample of class {', '.join(map(str, absent))}")


def shuffled(data: Data, batch_size: int) -> Data:
    """Return a loader that shuffles a ``Dataset``; batches are returned as they are."""
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=batch_size, shuffle=True)
    return data


@dataclass(frozen=True)
class Remaining:
    """The data without the samples of some classes; batches without others are left out."""

    data: Data
    classes: list[int]
    outputs: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield ``(inputs, labels)`` or ``(inputs, labels, groups)``."""
        for batch, labels in labelled(self.data, self.outputs, self.device):
            kept = batch[~among(labels, self.classes)]
            if len(kept):
                parts = (kept.inputs, kept.labels, kept.groups)
                yield tuple(part for part in parts if part is not None)
