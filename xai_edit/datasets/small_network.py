"""The small network of the demo."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

TRAINED = Path(__file__).with_name("small_network.safetensors")
TRAINED_SEED = 0
MARKED = TRAINED.with_name("small_network_marks.json")
"""Verdicts on that network's findings, set by their pictures as a person would; by number."""


def small_cnn(
    size: int,
    *,
    colours: int = 1,
    channels: Sequence[int] = (16, 32, 32),
    hidden: int = 256,
    classes: int = 10,
) -> nn.Module:
    """Return an untrained network for square images with sides of ``size`` pixels.

    ``channels`` are the filters of the convolutions (3×3, only the first one padded), which are
    followed by pooling except for the last. The hidden linear layer is ``fc1``, with dropout before
    and after it, the head ``fc2``; ``colours`` are the channels of the images.
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
    layers["dropout1"] = nn.Dropout(0.3)
    layers["fc1"] = nn.Linear(width * side * side, hidden)
    layers["relu_fc1"] = nn.ReLU()
    layers["dropout2"] = nn.Dropout(0.3)
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

    The model is changed in place and returned in evaluation mode. Images have the shape (samples,
    ...), labels are int64, shape (samples,).
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


def load_trained(model: nn.Module) -> nn.Module:
    """Load the weights in the package into ``small_cnn(24)``: the demo's network of seed 0.

    The same training gives other weights on another processor, and so other figures of the demo.
    These were made on an AMD EPYC by::

        # OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 python
        training, _, _ = WatermarkedDigits().split(0)
        torch.manual_seed(0)
        model = train(small_cnn(24), training.images, training.labels, epochs=20, seed=0)
        write_safetensors(TRAINED, model.state_dict(), "xai_edit.demo", "")

    The model is changed in place and returned in evaluation mode.
    """
    model.load_state_dict(load_file(TRAINED))
    return model.eval()


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms on one thread and keep the global random state.

    The network is so small that a second thread makes it slower, and sums then do not depend on
    the number of cores.
    """
    was, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), threadpool_limits(1):
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was)
            torch.set_num_threads(threads)
