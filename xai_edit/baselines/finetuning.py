"""Class unlearning by training: from scratch, on random labels, against the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from xai_edit.baselines.samples import (
    Remaining,
    among,
    class_samples,
    forgotten,
    labelled,
    shuffled,
)
from xai_edit.baselines.training import Unlearned, built, fine_tuned, seeded, unlearned
from xai_edit.checks import readable_again
from xai_edit.data import Batch, Data, model_device
from xai_edit.guard import require_finite
from xai_edit.resources import measured


def retrain(
    build: Callable[[], nn.Module],
    data: Data,
    *,
    forget: int | Sequence[int],
    train: Callable[[nn.Module, Iterable[Any]], object],
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Train a new network on everything but the class: what all other methods are held against.

    Parameters
    ----------
    build : callable
        Gives an untrained network.
    data : iterable or Dataset
        Labelled batches, see `xai_edit.data.batches`, that can be read several times. Batches keep
        their order and lose the samples of the class; those left without any are dropped. A
        ``Dataset`` is shuffled anew for each pass and read ``batch_size`` samples at a time.
    forget : int or sequence of int
        The class or classes.
    train : callable
        Trains the network in place on an iterable of ``(inputs, labels)`` or ``(inputs, labels,
        groups)`` batches on its device, which it may read again for each epoch. If it returns a
        network, that one is kept.
    batch_size : int
        For a ``Dataset``.
    seed : int
        Set before ``build``; the caller's random state comes back afterwards.

    Raises
    ------
    ValueError
        If the data has no labels, no sample of a class of ``forget`` or no others.
    TypeError
        If the data can be read only once.
    NonFiniteError
        If the trained weights are not finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        readable_again(data, "training")
        if not callable(train):
            raise TypeError(f"train: {train!r} given; give a function of a network and its batches")
        model = built(build)
        classes, outputs, _ = forgotten(model, data, forget)
        device = model_device(model)
        remaining = Remaining(data, classes, outputs=outputs, device=device, batch_size=batch_size)
        removed, kept = remaining.count()
        returned = train(model, remaining)
        model = returned if isinstance(returned, nn.Module) else model
        require_finite(model)
    origin = {"forget": classes, "samples": kept, "removed": removed, "seed": seed}
    return unlearned(model, "retrain", cost, origin)


def random_labels(
    model: nn.Module,
    data: Data,
    *,
    forget: int | Sequence[int],
    epochs: int = 1,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Fine-tune on all of the data, the class's samples under random other labels.

    Graves et al. 2021, *Amnesiac machine learning*, where the procedure is called unlearning. A
    label is drawn once a sample, uniformly from the classes that stay. `fine_tuned` says how the
    training goes; batch norms follow the batches.

    Parameters
    ----------
    model : nn.Module
        A classifier; only read.
    data : iterable or Dataset
        Labelled batches, of training data in the paper, that can be read several times. Batches
        are taken as they come, so shuffle them in the loader; a ``Dataset`` is shuffled here. The
        class's samples are read once and held on the CPU.
    forget : int or sequence of int
        The class or classes.
    epochs, learning_rate, seed
        As usual; the same seed gives the same bits.
    batch_size : int
        For a ``Dataset``.

    Raises
    ------
    ValueError
        If a class is out of range or has no samples, no class or no other sample is left, or the
        data has no labels.
    TypeError
        If the data can be read only once.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        readable_again(data, "training")
        chosen = class_samples(model, data, forget)
        if chosen.others == 0:
            raise ValueError("data: only samples of the classes to forget; others are needed too")
        generator = torch.Generator().manual_seed(seed)
        stay = torch.tensor([c for c in range(chosen.outputs) if c not in chosen.classes])
        labels = stay[torch.randint(len(stay), (len(chosen),), generator=generator)]

        def relabelled(_: int) -> Iterator[Batch]:
            """Yield the data, the class's samples replaced in turn by those with new labels."""
            start = 0
            for batch in labelled(shuffled(data, batch_size), chosen.outputs):
                at = among(batch.labels, chosen.classes)
                rows = torch.arange(start, start + int(at.sum())) % len(chosen)
                start += len(rows)
                inputs, given = batch.inputs.clone(), batch.labels.clone()
                inputs[at] = chosen.inputs[rows]
                given[at] = labels[rows]
                yield Batch(inputs, given)

        made, steps = fine_tuned(
            model,
            relabelled,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            statistics=True,
        )
    origin = {
        "forget": chosen.classes,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "seed": seed,
        "samples": len(chosen) + chosen.others,
        "relabelled": len(chosen),
        "steps": steps,
    }
    return unlearned(made, "random_labels", cost, origin)


def negative_gradient(
    model: nn.Module,
    data: Data,
    *,
    forget: int | Sequence[int],
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Ascend the loss of the class's samples.

    Golatkar et al. 2020, *Eternal sunshine of the spotless net*, name it NegGrad. Only the
    class's samples are used here. The loss has no upper bound: it takes off after some steps and
    then ruins the model, so it is the number of steps times the rate that has to be found. The
    default rate is for some thousand samples of the class; with fewer, take a larger one.
    `fine_tuned` says how the training goes.

    Parameters
    ----------
    model : nn.Module
        A classifier; only read.
    data : iterable or Dataset
        Labelled batches; samples of other classes are passed over. The class's are held on the CPU.
    forget : int or sequence of int
        The class or classes.
    epochs, learning_rate, batch_size, seed
        As usual; the same seed gives the same bits.

    Raises
    ------
    ValueError
        If a class is out of range or has no samples, or the data has no labels.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, forget)
        made, steps = fine_tuned(
            model,
            chosen.epochs(chosen.labels, batch_size=batch_size, seed=seed),
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            ascend=True,
        )
    origin = {
        "forget": chosen.classes,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "samples": len(chosen),
        "steps": steps,
    }
    return unlearned(made, "negative_gradient", cost, origin)
