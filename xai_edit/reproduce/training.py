"""Training of the papers' networks with AdamW, and their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from xai_edit.core.data import model_device
from xai_edit.core.files import write_atomically
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict

Recording = Callable[[nn.Module, Tensor], AbstractContextManager[None]]


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int,
    steps: int,
    learning_rate: float = 5e-3,
    weight_decay: float = 1e-4,
    recording: Recording | None = None,
) -> nn.Module:
    """Train with AdamW and a one-cycle schedule.

    ``batches`` are ``(inputs, labels)``, with or without an attribute, read once an epoch, at most
    ``steps`` an epoch, which sets the length of the schedule; ``learning_rate`` is its highest.
    ``recording(model, labels)`` gives a context for each step, such as
    `xai_edit.comparisons.AmnesiacLog.recording`. The model is changed in place and returned in
    evaluation mode.
    """
    device = model_device(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    total = epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total)
    model.train()
    for _ in range(epochs):
        for inputs, labels, *_ in batches:
            with nullcontext() if recording is None else recording(model, labels):
                logits = model(inputs.to(device))
                loss = nn.functional.cross_entropy(logits, labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def trained_once(
    file: Path, model: nn.Module, train: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Return the model with the weights in the file; where there is none, train and write it."""
    if not file.is_file():
        write_atomically(file, save(train(model).state_dict()))
    model.load_state_dict(load_file(file))
    return model.eval()


def logits_of(model: nn.Module, images: Iterable[tuple[Tensor, ...]]) -> Tensor:
    """Return the logits of batches of images on the CPU, shape (samples, classes)."""
    device = model_device(model)
    with preserved(model), torch.no_grad():
        return torch.cat([predict(model, inputs.to(device)).cpu() for inputs, *_ in images])
