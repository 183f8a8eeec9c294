"""Relearning curves: how fast a class comes back in a few steps of fine-tuning on a copy."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

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

STEPS = (0, 1, 2, 5, 10, 20)
OWN, REST = 8, 24
"""Samples of a batch: of the forgotten classes, and of all others."""
LEARNING_RATE, MOMENTUM = 0.01, 0.9
LONGEST = 5.0
"""Norm that a step's gradient is cut to."""


@dataclass(frozen=True)
class Relearning:
    """Accuracy on test samples while a copy of the network is fine-tuned on training samples.

    Attributes
    ----------
    steps : tuple of int
        Optimiser steps done; at 0 the network as it is.
    forgotten, rest : tuple of float
        A_t and A_g after so many steps.
    """

    steps: tuple[int, ...]
    forgotten: tuple[float, ...]
    rest: tuple[float, ...]


def lessons_kept(classes: int, target: Sequence[int]) -> list[int]:
    """Return how many training samples of each class to keep: those of twenty batches in all.

    One of each class at least.
    """
    own = max(1, STEPS[-1] * OWN // len(target))
    rest = max(1, STEPS[-1] * REST // max(1, classes - len(target)))
    return [own if one in target else rest for one in range(classes)]


def checked_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """Return the steps to measure at as plain numbers, or raise ValueError."""
    try:
        listed = tuple(operator.index(step) for step in steps)
    except TypeError:
        raise ValueError(f"relearn: {steps!r} given; give whole numbers of steps") from None
    if any(left >= right for left, right in pairwise((-1, *listed))):
        raise ValueError(f"relearn: {listed} given; give steps from 0 on, ascending")
    return listed


def relearning_curves(
    models: Mapping[str, nn.Module],
    heads: Mapping[str, str],
    train: Mapping[str, Tensor],
    test: Data,
    *,
    steps: tuple[int, ...],
    start: Mapping[str, SplitAccuracy],
    target: Sequence[int],
    seed: int,
) -> dict[str, Relearning]:
    """Fine-tune a copy of each network on the same batches and measure it on the way.

    Cross-entropy, SGD with a learning rate of 0.01, momentum 0.9 and the norm of the gradient cut
    to 5 (tried on a ResNet-20: without the cut the other classes are lost; with Adam either they
    are, or nothing comes back); all weights, batch-norm statistics and dropout as for prediction.
    A batch has 8 samples of the forgotten classes and 24 of the others: among many classes a batch
    as it comes would have none of them.

    Before the first step the rows of the forgotten classes in the last linear layer become the
    mean of the other rows, which takes no knowledge. Otherwise a single huge weight, or a masked
    logit, would pass for forgetting although nothing is easier to take back.

    Parameters
    ----------
    models : mapping
        Name → network; only copied.
    heads : mapping
        Name → last linear layer, for those that have one; the others keep their output rows.
    train : mapping
        ``inputs`` and ``labels``, on the CPU.
    test : iterable or Dataset
        Read once for each step that is measured, for all networks together.
    steps : tuple of int
        See `checked_steps`.
    start : mapping
        Name → accuracy at step 0, which is known.
    target : sequence of int
        The forgotten classes.
    seed : int
        Of the order of the batches.

    Raises
    ------
    NonFiniteError
        If a copy diverges.
    """
    copies = {name: copied(model) for name, model in models.items()}
    for parameter in [one for copy in copies.values() for one in copy.parameters()]:
        parameter.requires_grad_(parameter.is_floating_point())  # a frozen one would learn too
    optimizers = {
        name: torch.optim.SGD(copy.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        for name, copy in copies.items()
    }
    order = _batches(train["labels"], target, seed)
    points: dict[str, list[SplitAccuracy]] = {name: [] for name in copies}
    for step in range(max(steps, default=0) + 1):
        if step == 1:
            for name, copy in copies.items():
                _open(copy, heads.get(name), target)
        with naming(f"relearning, step {step} (relearn=() leaves it out)"):
            if step:
                rows = next(order)
                for name, copy in copies.items():
                    _learn(copy, optimizers[name], train["inputs"][rows], train["labels"][rows])
            if step in steps:
                now = _measure(copies, test, target) if step else start
                for name, found in points.items():
                    found.append(now[name])
    return {
        name: Relearning(
            steps,
            tuple(point.forgotten for point in found),
            tuple(point.rest for point in found),
        )
        for name, found in points.items()
    }


def _open(copy: nn.Module, head: str | None, target: Sequence[int]) -> None:
    """Give the forgotten classes the mean row of the others, in the last linear layer."""
    if head is None:
        return
    layer = copy.get_submodule(head)
    mine = torch.zeros(len(layer.weight), dtype=torch.bool)  # type: ignore[arg-type]
    mine[list(target)] = True
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter[mine] = parameter[~mine].mean(0)


def _learn(
    copy: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor
) -> None:
    device = model_device(copy)
    with torch.enable_grad():
        output = predict(copy, inputs.to(device))
        loss = nn.functional.nll_loss(log_probabilities(output), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(copy.parameters(), LONGEST)
    optimizer.step()


def _measure(
    copies: Mapping[str, nn.Module], test: Data, target: Sequence[int]
) -> dict[str, SplitAccuracy]:
    counts: dict[str, Tensor] = {}
    with torch.no_grad():
        for seen in read(copies, {}, test, "test"):
            seen.add_to(counts)
    return {name: split_accuracy(counts[name], target, "test") for name in copies}


def _batches(labels: Tensor, target: Sequence[int], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mine = torch.isin(labels, torch.tensor(list(target)))
    own, rest = (_shuffled(side.nonzero()[:, 0], generator) for side in (mine, ~mine))
    while True:
        yield torch.tensor([*islice(own, OWN), *islice(rest, REST)])


def _shuffled(rows: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Yield the rows over and over, each time in another order."""
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].tolist()
