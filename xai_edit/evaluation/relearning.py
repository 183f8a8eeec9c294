"""Relearning curves: the accuracy of a copy while it is fine-tuned for a few steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor, nn

from xai_edit.core.checks import require, require_type, whole_number
from xai_edit.core.data import Data, model_device
from xai_edit.core.guard import copied
from xai_edit.core.inputs import Inputs, inputs_from
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


def checked_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """Return the steps as plain numbers, or raise ValueError."""
    require_type(steps, Iterable, "relearn", "give numbers of steps, ascending")
    listed = tuple(whole_number(step, "relearn") for step in steps)
    rising = all(left < right for left, right in pairwise(listed))
    require(rising, "relearn", listed, "give steps from 0 on, ascending")
    return listed


def relearning_curves(
    models: Mapping[str, nn.Module],
    heads: Mapping[str, Head],
    train: Mapping[str, Tensor],
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
    by the networks' names; ``train`` has ``inputs:`` by name and ``labels``, on the CPU. ``test``
    is read once for each step that is measured. The seed is that of the order of the batches.
    """
    copies = {name: copied(model) for name, model in models.items()}
    optimizers = {}
    for name, copy in copies.items():
        for parameter in copy.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # also frozen ones
        optimizers[name] = torch.optim.SGD(copy.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    order = _batches(train["labels"], target, seed)
    named = {k.partition(":")[2]: one for k, one in train.items() if k.startswith("inputs:")}
    inputs = inputs_from(named)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in copies}
    for step in range(max(steps, default=0) + 1):
        if step == 1:
            for name, copy in copies.items():
                if name in heads:
                    _reset_rows(copy, heads[name], target)
        with naming(f"relearning, step {step} (relearn=() leaves it out)"):
            if step:
                rows = next(order)
                for name, copy in copies.items():
                    _learn(copy, optimizers[name], inputs[rows], train["labels"][rows])
            if step in steps:
                counts: dict[str, Tensor] = {}
                for _ in read(copies, {}, test, "test", counts) if step else ():
                    pass
                for name, reached in points.items():
                    now = split_accuracy(counts[name], target, "test") if step else start[name]
                    reached.append((now.forgotten, now.rest))
    return {
        name: Relearning(steps, *zip(*reached, strict=True)) for name, reached in points.items()
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


def _learn(
    copy: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs, labels: Tensor
) -> None:
    inputs, labels = inputs.to(model_device(copy)), labels.to(model_device(copy))
    with torch.enable_grad():
        loss = nn.functional.nll_loss(log_probabilities(predict(copy, inputs)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(copy.parameters(), LONGEST)
    optimizer.step()


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
