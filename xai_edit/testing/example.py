"""A small trained network and data, on which scorers and operators are checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xai_edit.core.training import seeded
from xai_edit.datasets.small_network import train

CLASSES = 4
SAMPLES = 96
STEPS = 60


@dataclass(frozen=True, eq=False)
class Example:
    """A classifier and data to check on.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode. The checks work on copies of it.
    inputs : Tensor, shape (samples, ...)
        Four samples or more.
    labels : Tensor, int64, shape (samples,)
    layers : sequence of str
        Layers to score, in the order in which they run.
    groups : Tensor, int64, shape (samples,), optional
        1 where a sample has a spurious feature; the third element of an operator's batches.

    Examples
    --------
    >>> example = xe.testing.Example(model, images, labels, ["conv", "fc1"], attribute.long())
    >>> [batch[0].shape for batch in example.batches(size=120)]
    [torch.Size([120, 3, 4, 4]), torch.Size([120, 3, 4, 4])]
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    layers: Sequence[str]
    groups: Tensor | None = None

    def batches(self, size: int) -> list[tuple[Tensor, ...]]:
        """Return a copy of the data as batches of at most this many samples."""
        parts = [self.inputs, self.labels] + ([] if self.groups is None else [self.groups])
        return list(zip(*(part.clone().split(size) for part in parts), strict=True))


class Network(nn.Module):
    """Few layers that hold much: a batch norm, in-place ReLUs, pooling and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.fc1 = nn.Linear(32, 12)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (samples, classes)."""
        x = self.pool1(self.relu1(self.norm(self.conv1(x))))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.head(self.relu3(self.fc1(self.dropout(x.flatten(1)))))
        return logits


def small_example(dtype: torch.dtype = torch.float32) -> Example:
    """Return a network of the layers conv1, conv2, fc1 and head, and 96 images of four classes.

    An image, (1, 8, 8), is noise with a bright square in the quarter of its class. Half of each
    class have a mark in the corner, the spurious feature. The first call trains the network, in
    less than a second, on images of which all of class 0 have the mark and no others.

    Examples
    --------
    >>> example = xe.testing.small_example()
    >>> example.layers, example.inputs.shape
    (('conv1', 'conv2', 'fc1', 'head'), torch.Size([96, 1, 8, 8]))
    """
    own = deepcopy(_trained())
    return replace(own, model=own.model.to(dtype), inputs=own.inputs.to(dtype))


@functools.cache
def _trained() -> Example:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % CLASSES
    shortcut = _images(labels, (labels == 0).long(), generator)
    with seeded(0), torch.inference_mode(False), torch.enable_grad():
        how = {"epochs": STEPS, "seed": 0, "batch_size": SAMPLES}
        model = train(Network(), shortcut, labels, learning_rate=1e-2, **how)
    marked = torch.arange(SAMPLES) // CLASSES % 2
    images, layers = _images(labels, marked, generator), ("conv1", "conv2", "fc1", "head")
    return Example(model, images, labels, layers, marked)


def _images(labels: Tensor, marked: Tensor, generator: torch.Generator) -> Tensor:
    images = torch.rand(len(labels), 1, 8, 8, generator=generator)
    for image, label, mark in zip(images, labels.tolist(), marked.tolist(), strict=True):
        row, column = 4 * (label // 2) + 1, 4 * (label % 2) + 1
        image[0, row : row + 2, column : column + 2] += 0.4 if label == 0 else 0.8
        image[0, 7, 7] += 5.0 * mark
    return images
