"""Relearning curves: the accuracy of a copy while it is fine-tuned for a few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.data import Data, model_device
from xai_edit.core.guard import copied
from xai_edit.core.layers import predict
from xai_edit.evaluation.outputs import (
    SplitAccuracy,
    log_probabilities,
    naming,
    read,
    split_accuracy,
)
from xai_edit.last_layer.find_head import Head

STEPS = (0, 1, 2, 5, 10, 20)
OWN, REST = 8, 24
"""Samples of a batch: of the forgotten classes, and of all others."""
LEARNING_RATE, MOMENTUM = 0.01, 0.9
LONGEST = 5.0
"""Largest norm of a gradient."""


@dataclass(frozen=True)
class Relearning:
    """Accuracy on test samples, A_t and A_g, after optimiser steps of fine-tuning a copy."""

    steps: tuple[int, ...]
    forgotten: tuple[float, ...]
    rest: tuple[float, ...]


def lessons_kept(classes: int, target: Sequence[int]) -> list[int]:
    """Return how many training samples of each class to keep, for twenty batches in all."""
    own = max(1, STEPS[-1] * OWN // len(target))
    rest = max(1, STEPS[-1] * REST // max(1, classes - len(target)))
    return [own if one in target else rest for one in range(classes)]


def relearning_curves(
    models: Mapping[str, nn.Module],
    heads: Mapping[str, Head],
    train: Mapping[str, Any],
    test: Data,
    *,
    steps: tuple[int, ...],
    start: Mapping[str, SplitAccuracy],
    target: Sequence[int],
    seed: int,
) -> dict[str, Relearning]:
    """Fine-tune a copy of each network on the same batches and measure it after some steps.

    Cross-entropy, SGD with a learning rate of 0.01, momentum 0.9 and the norm of the gradient
    clipped to 5 (on a ResNet-20, without clipping the other classes are lost); all weights, in
    evaluation mode. A batch has 8 samples of the forgotten classes and 24 of the others.
    NonFiniteError if a copy diverges. Call it inside ``no_grad``.

    Before the first step the rows of the forgotten classes in the last linear layer become the mean
    of the other rows, which takes no knowledge. Otherwise a single huge weight, or a masked logit,
    would pass for forgetting although nothing is easier to undo.

    ``heads`` has the heads, where there is one, and ``start`` the accuracy at step 0,
    by the networks' names; ``train`` has ``inputs`` and ``labels``, on the CPU. ``test`` is
    read once for each of the ``steps``, one or more. The seed is that of the order of batches.
    """
    copies = {name: copied(model) for name, model in models.items()}
    optimizers = {}
    for name, copy in copies.items():
        for parameter in copy.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # also frozen ones
        optimizers[name] = torch.optim.SGD(copy.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        if name in heads:
            _reset_rows(copy, heads[name], target)
    reached = {name: [start[name]] if 0 in steps else [] for name in copies}
    lessons = islice(_batches(train["labels"], target, seed), steps[-1])
    for step, rows in enumerate(lessons, start=1):
        with naming(f"relearning, step {step} (relearn=() leaves it out)"):
            for name, copy in copies.items():
                device = model_device(copy)
                x, y = train["inputs"][rows].to(device), train["labels"][rows].to(device)
                with torch.enable_grad():
                    loss = nn.functional.nll_loss(log_probabilities(predict(copy, x)), y)
                    optimizers[name].zero_grad()
                    loss.backward()
                nn.utils.clip_grad_norm_(copy.parameters(), LONGEST)
                optimizers[name].step()
            if step in steps:
                counts: dict[str, Tensor] = {}
                for _ in read(copies, {}, test, "test", counts):
                    pass
                for name, now in counts.items():
                    reached[name].append(split_accuracy(now, target, "test"))
    return {
        name: Relearning(steps, tuple(one.forgotten for one in now), tuple(one.rest for one in now))
        for name, now in reached.items()
    }


def _reset_rows(model: nn.Module, head: Head, target: Sequence[int]) -> None:
    """Set the rows of the forgotten classes in the head to the mean of the others."""
    chosen = torch.zeros(head.classes, dtype=torch.bool)
    chosen[list(target)] = True
    new = {}
    for kind, values in (("weight", head.weight), ("bias", head.bias)):
        if values is not None:
            new[kind] = values.double().clone()
            new[kind][chosen] = new[kind][~chosen].mean(0)
    head.stored.edit(model, {}, **new).apply(model)


def _batches(labels: Tensor, target: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Yield the rows of one batch after the other, in a new order for each pass over a class."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(rows: Tensor) -> Iterator[int]:
        while True:
            yield from rows[torch.randperm(len(rows), generator=generator)].tolist()

    forgotten = torch.isin(labels, torch.tensor(list(target)))
    own, rest = (shuffled(side.nonzero()[:, 0]) for side in (forgotten, ~forgotten))
    while True:
        yield torch.tensor([*islice(own, OWN), *islice(rest, REST)])
