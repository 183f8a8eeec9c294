"""The small network of the demo."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def small_cnn(
    size: int,
    *,
    colours: int = 1,
    channels: Sequence[int] = (16, 32, 32),
    hidden: int = 256,
    dropout: float = 0.3,
    classes: int = 10,
) -> nn.Module:
    """Return an untrained network: convolutions, one hidden linear layer, a linear head.

    Parameters
    ----------
    size : int
        Side of the square images.
    colours : int
        Channels of the images.
    channels : sequence of int
        Filters of each convolution (3×3, only the first one padded); every one but the last is
        followed by pooling.
    hidden : int
        Width of the hidden layer ``fc1``.
    dropout : float
        Before and after the hidden layer.
    classes : int
        Outputs of the head ``fc2``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width, side = colours, size
    for number, filters in enumerate(channels, start=1):
        padding = 1 if number == 1 else 0
        layers[f"conv{number}"] = nn.Conv2d(width, filters, 3, padding=padding)
        side += 2 * padding - 2
        layers[f"relu{number}"] = nn.ReLU()
        if number < len(channels):
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            side //= 2
        width = filters
    layers["flatten"] = nn.Flatten()
    layers["dropout1"] = nn.Dropout(dropout)
    layers["fc1"] = nn.Linear(width * side * side, hidden)
    layers["relu_fc1"] = nn.ReLU()
    layers["dropout2"] = nn.Dropout(dropout)
    layers["fc2"] = nn.Linear(hidden, classes)
    return nn.Sequential(layers)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    learning_rate: float = 2e-3,
    batch_size: int = 64,
) -> nn.Module:
    """Train with AdamW and a one-cycle schedule; the same seed gives the same bits.

    Parameters
    ----------
    model : nn.Module
        Changed in place and returned in evaluation mode.
    images : Tensor, shape (samples, ...)
    labels : Tensor, int64, shape (samples,)
    epochs, seed, learning_rate, batch_size
        As usual; the seed orders the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()
