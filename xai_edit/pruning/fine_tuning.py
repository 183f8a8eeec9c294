"""Fine-tuning after a step of pruning, with a warning if the data would bring a shortcut back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from xai_edit.core.checks import readable_again, with_labels
from xai_edit.core.data import Batch, Data, batches, model_device
from xai_edit.core.training import fine_tuned

LEANING = 0.1  # by which the share of samples with the feature may differ between classes


@dataclass(frozen=True)
class FineTuning:
    """Train a pruned network by stochastic gradient descent with momentum 0.9.

    Batch norms update their statistics. Warns if the third element of the data, the spurious
    feature, is correlated with the classes.

    Parameters
    ----------
    data : iterable or Dataset
        Labelled batches that can be read several times; a ``Dataset`` is shuffled.
    epochs : int
        Of each call.
    learning_rate, weight_decay : float
        As in `torch.optim.SGD`.
    batch_size : int
        For a ``Dataset``.
    seed : int
        Of dropout and of the order of a ``Dataset``.

    Examples
    --------
    >>> tuning = xe.FineTuning(data, epochs=2)
    >>> edit = xe.RelevancePruning(share=0.875).plan(model, data, fine_tune=tuning)
    >>> edit.origin["fine_tune"]
    'FineTuning(epochs=2, learning_rate=0.01, weight_decay=0.0, batch_size=64, seed=0)'
    """

    data: Data = field(repr=False)
    epochs: int = 1
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        readable_again(self.data, "training")

    def __call__(self, network: nn.Module) -> None:
        """Train the network in place; ValueError if the data has no labels."""
        device = model_device(network)
        seen: list[Tensor] = []  # labels, and which samples have the feature

        def epoch(number: int) -> Iterator[Batch]:
            data = self.data
            if isinstance(data, Dataset):
                generator = torch.Generator().manual_seed(self.seed + number)
                data = DataLoader(data, self.batch_size, shuffle=True, generator=generator)
            for batch in batches(data, device):
                several = batch.labels is not None and batch.labels.ndim > 1
                if number == 0 and batch.groups is not None and not several:
                    seen.append(torch.stack([with_labels(batch.labels), batch.groups > 0]).cpu())
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
        if not seen:
            return
        labels, has = torch.cat(seen, 1)
        shares = {int(one): float(has[labels == one].double().mean()) for one in labels.unique()}
        most, least = (end(shares, key=shares.__getitem__) for end in (max, min))
        if shares[most] - shares[least] > LEANING:
            warnings.warn(
                f"data: {shares[most]:.0%} of class {most} have the spurious feature and "
                f"{shares[least]:.0%} of class {least}; fine-tuning on them brings the shortcut "
                "back. Take samples without it, or give every class the same share",
                stacklevel=2,
            )
