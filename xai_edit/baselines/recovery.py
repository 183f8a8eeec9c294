"""Fine-tuning after a step of pruning, and whether it would bring a shortcut back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from xai_edit.baselines.training import fine_tuned
from xai_edit.checks import readable_again
from xai_edit.data import Batch, Data, batches, model_device

# How much more often one class may have the feature than another.
LEANING = 0.1


@dataclass(frozen=True)
class FineTuning:
    """Train a pruned network by stochastic gradient descent, as each step of pruning may ask.

    Momentum is 0.9; batch norms follow the batches, as in training. Where the data tell the
    spurious feature (their third element) and it goes with a class, a warning says that training
    on them brings the shortcut back, whatever was pruned.

    Parameters
    ----------
    data : iterable or Dataset
        Labelled batches, with or without the spurious feature, that can be read several times. A
        ``Dataset`` is shuffled and read ``batch_size`` samples at a time.
    epochs : int
        Of each call.
    learning_rate : float
    weight_decay : float
        L2 penalty, as in `torch.optim.SGD`.
    batch_size : int
        For a ``Dataset``.
    seed : int
        Of dropout and of the order of a ``Dataset``.

    Raises
    ------
    TypeError
        If the data can be read only once.
    ValueError
        When called, if the data has no labels.
    """

    data: Data
    epochs: int = 1
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        readable_again(self.data, "fine-tuning")

    def __repr__(self) -> str:
        told = ("epochs", "learning_rate", "weight_decay", "batch_size", "seed")
        return f"FineTuning({', '.join(f'{name}={getattr(self, name)}' for name in told)})"

    def __call__(self, network: nn.Module) -> None:
        """Train the network in place; it stays in its mode."""
        device = model_device(network)
        counts = torch.zeros(2, 0)

        def epoch(number: int) -> Iterator[Batch]:
            nonlocal counts
            data = self.data
            if isinstance(data, Dataset):
                generator = torch.Generator().manual_seed(self.seed + number)
                data = DataLoader(data, self.batch_size, shuffle=True, generator=generator)
            for batch in batches(data, device):
                if batch.labels is None:
                    raise ValueError("data: has no labels; give (input, label) batches")
                if number == 0 and batch.groups is not None:
                    counts = _counted(counts, batch.labels, batch.groups > 0)
                yield batch

        trained, _ = fine_tuned(
            network,
            epoch,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            seed=self.seed,
            statistics=True,
            weight_decay=self.weight_decay,
        )
        network.load_state_dict(trained.state_dict())
        _warn_of_a_shortcut(counts)


def _counted(counts: Tensor, labels: Tensor, has: Tensor) -> Tensor:
    """Add samples by class: all of them, and those that have the feature, shape (2, classes)."""
    size = max(counts.shape[1], int(labels.max()) + 1)
    more = [labels.bincount(minlength=size), labels[has].bincount(minlength=size)]
    return nn.functional.pad(counts, (0, size - counts.shape[1])) + torch.stack(more).cpu()


def _warn_of_a_shortcut(counts: Tensor) -> None:
    present = counts[0].nonzero().flatten() if counts.numel() else torch.zeros(0)
    if len(present) < 2:
        return
    shares = counts[1, present] / counts[0, present]
    if shares.max() - shares.min() > LEANING:
        most, least = (int(present[at]) for at in (shares.argmax(), shares.argmin()))
        warnings.warn(
            f"data: {shares.max():.0%} of class {most} have the spurious feature and "
            f"{shares.min():.0%} of class {least}; fine-tuning on them brings the shortcut back. "
            "Take samples without it, or give every class the same share",
            stacklevel=3,
        )
