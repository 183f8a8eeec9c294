"""Fine-tuning a copy of a model: what the methods that train have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import run
from xai_edit.data import Batch, model_device
from xai_edit.edits.edit import versions
from xai_edit.errors import NonFiniteError
from xai_edit.guard import copied, require_finite
from xai_edit.resources import Cost

MOMENTUM = 0.9


@dataclass(frozen=True, eq=False)
class Trained:
    """What training gave.

    Attributes
    ----------
    model : nn.Module
        The network; after a training from scratch in evaluation mode.
    method : str
        Name of the function that made it.
    cost : Cost
        Seconds and peak memory.
    origin : dict
        Arguments, samples and steps as JSON values.
    """

    model: nn.Module
    method: str
    cost: Cost
    origin: dict[str, Any]


class Unlearned(Trained):
    """A changed copy of a model, which is itself as it was; on its device and in its mode."""


def told(method: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a network: the method's name, what it says, the versions."""
    return {"operator": method, **origin, "versions": versions()}


def unlearned(model: nn.Module, method: str, cost: Cost, origin: Mapping[str, Any]) -> Unlearned:
    """Return the result, with the method's name and the versions in its origin."""
    return Unlearned(model, method, cost, told(method, origin))


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that a user's function makes; TypeError if it makes none."""
    if isinstance(build, nn.Module) or not callable(build):
        raise TypeError(
            f"build: {type(build).__name__} given; give a function that makes a network"
        )
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: it gave {type(model).__name__}, not a network")
    return model


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Set PyTorch's seed for the length of a block; the random state comes back after it."""
    on_gpu = device is not None and device.type == "cuda"
    gpus = [device if on_gpu else "cuda"] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a labelled batch."""
    assert batch.labels is not None  # checked where the samples are gathered
    return nn.functional.cross_entropy(logits, batch.labels.to(logits.device))


def fine_tuned(
    model: nn.Module,
    epoch_batches: Callable[[int], Iterable[Batch]],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    ascend: bool = False,
    statistics: bool = False,
    weight_decay: float = 0.0,
    loss: Callable[[Tensor, Batch], Tensor] = cross_entropy,
    after_epoch: Callable[[nn.Module], object] | None = None,
) -> tuple[nn.Module, int]:
    """Train a copy of a model, by cross-entropy if nothing else is said; the model is only read.

    Stochastic gradient descent with momentum 0.9 on all parameters, also those that are frozen in
    the model. Dropout is active. Batch norms (any norm with running statistics) are in evaluation
    mode unless ``statistics`` is set: their scale and shift are trained, but they keep their
    statistics, which the samples of one class alone would ruin for all others.

    Parameters
    ----------
    model : nn.Module
        A classifier that gives logits.
    epoch_batches : callable
        Gives the labelled batches of an epoch by its number.
    epochs : int
        At least 1.
    learning_rate : float
        Positive.
    seed : int
        Of dropout and of loaders that shuffle.
    ascend : bool
        Climb the loss instead.
    statistics : bool
        Batch norms are in training mode and follow the batches, as they did when the model was
        trained; except in a batch of one sample, which has no statistics.
    weight_decay : float
        L2 penalty, as in `torch.optim.SGD`.
    loss : callable
        Gives the number to descend from a batch's logits and the batch.
    after_epoch : callable, optional
        Called with the copy after each epoch; it leaves the copy as it is.

    Returns
    -------
    nn.Module
        The copy, in the mode of the model.
    int
        Steps taken.

    Raises
    ------
    ValueError
        If ``epochs`` or ``learning_rate`` is out of range, or there is no sample.
    NonFiniteError
        If the model, the loss or a trained weight is not finite.
    """
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs: {epochs}, learning_rate: {learning_rate} given; training takes at least one "
            "epoch and a positive rate"
        )
    require_finite(model)
    trained, device, steps = copied(model), model_device(model), 0
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    trained.train()
    norms = [m for m in trained.modules() if getattr(m, "running_mean", None) is not None]
    optimizer = torch.optim.SGD(
        trained.parameters(),
        lr=learning_rate,
        momentum=MOMENTUM,
        weight_decay=weight_decay,
        maximize=ascend,
    )
    with seeded(seed, device), torch.enable_grad():
        for epoch in range(epochs):
            for batch in epoch_batches(epoch):
                for norm in norms:
                    norm.train(statistics and len(batch) > 1)
                logits = run(trained, batch.inputs.to(device))
                value = loss(logits, batch)
                if not torch.isfinite(value):
                    raise _diverged(steps, learning_rate)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                steps += 1
            if after_epoch is not None:
                after_epoch(trained)
    if steps == 0:
        raise ValueError("data: no samples to train on; are all of the classes to forget?")
    optimizer.zero_grad(set_to_none=True)
    try:
        require_finite(trained)
    except NonFiniteError:
        raise _diverged(steps, learning_rate) from None
    as_before(trained, model)
    return trained, steps


def as_before(trained: nn.Module, model: nn.Module) -> None:
    """Give a trained copy the flags of the model: which parts train, which parameters do."""
    for mine, theirs in zip(trained.modules(), model.modules(), strict=True):
        mine.training = theirs.training
    for parameter, original in zip(trained.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)


def _diverged(steps: int, learning_rate: float) -> NonFiniteError:
    return NonFiniteError(
        f"the loss or a weight is NaN or infinite after {steps} steps at learning rate "
        f"{learning_rate}; choose a smaller rate or fewer epochs"
    )
