"""The training loop of the comparison methods, on a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xai_edit.core.checks import finite, positive, whole_number, with_labels
from xai_edit.core.data import Batch, model_device
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.guard import copied, require_finite
from xai_edit.core.layers import predict
from xai_edit.core.wrapped import run_eagerly

MOMENTUM = 0.9


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Set PyTorch's seed inside this context, and restore the random state after it."""
    on_gpu = device is not None and device.type == "cuda"
    gpus = [device if on_gpu else "cuda"] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a labelled batch; of several labels the binary one."""
    if batch.labels is not None and batch.labels.ndim > 1:
        labels = batch.labels.to(logits)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return nn.functional.cross_entropy(logits, with_labels(batch.labels).to(logits.device))


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
    """Train a copy of a model; the model is only read.

    Stochastic gradient descent with momentum 0.9 on all parameters, also the frozen ones, with
    dropout. Batch norms (any norm with running statistics) are in evaluation mode unless
    ``statistics`` is set: scale and shift are trained, but the samples of one class alone would
    spoil the statistics. Trained on are the logits, see `xai_edit.core.outputs.logits_of`: of a
    final softmax or sigmoid what goes in, of several outputs, such as GoogLeNet's, the first.

    Parameters
    ----------
    model : nn.Module
        A classifier that gives logits.
    epoch_batches : callable
        Returns the labelled batches of an epoch by its number.
    epochs, learning_rate
        Positive.
    seed : int
        Of dropout and of loaders that shuffle.
    ascend : bool
        Maximise the loss.
    statistics : bool
        Batch norms are in training mode, except in a batch of one sample.
    weight_decay : float
        L2 penalty, as in `torch.optim.SGD`.
    loss : callable
        Returns the loss of a batch's logits and the batch.
    after_epoch : callable, optional
        Called with the copy after each epoch; it leaves the copy as it is.

    Returns
    -------
    nn.Module
        The copy, with training modes and ``requires_grad`` as in the model.
    int
        Steps taken.

    Raises
    ------
    ValueError, NonFiniteError
        If an argument is out of range, there is no sample, or the model, the loss or a trained
        weight is not finite.
    """
    epochs = whole_number(epochs, "epochs", least=1)
    learning_rate = positive(learning_rate, "learning_rate")
    require_finite(model)
    trained, device, steps = copied(model), model_device(model), 0
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    run_eagerly(trained)
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
                try:
                    value = loss(predict(trained, batch.inputs.to(device)), batch)
                    finite(value, "loss")
                except NonFiniteError:
                    raise _diverged(steps, learning_rate) from None
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
    for mine, theirs in zip(trained.modules(), model.modules(), strict=True):
        mine.training = theirs.training
    for parameter, original in zip(trained.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return trained, steps


def _diverged(steps: int, learning_rate: float) -> NonFiniteError:
    return NonFiniteError(
        f"the loss or a weight is NaN or infinite after {steps} steps at learning rate "
        f"{learning_rate}; choose a smaller rate or fewer epochs"
    )
