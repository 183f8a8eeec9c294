"""Class unlearning by training: from scratch, on other labels, against the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.comparisons.class_samples import (
    ClassSamples,
    Remaining,
    among,
    class_samples,
    forgotten,
    labelled,
    shuffled,
)
from xai_edit.core.checks import positive, readable_again, require, require_type, whole_number
from xai_edit.core.data import Batch, Data, model_device
from xai_edit.core.guard import copied, preserved
from xai_edit.core.layers import predict
from xai_edit.core.training import fine_tuned, seeded
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.head import find_head


def retrain(
    model: nn.Module,
    data: Data,
    *,
    target: int | Sequence[int],
    build: Callable[[], nn.Module],
    train: Callable[[nn.Module, Iterable[Any]], object],
    batch_size: int = 64,
    seed: int = 0,
) -> ModelEdit:
    """Train a new network on everything but the class: the reference for all other methods.

    Parameters
    ----------
    model : nn.Module
        A classifier; only read.
    data : iterable or Dataset
        Labelled batches that can be read several times; see `xai_edit.core.data.batches`. Batches
        keep their order and lose the samples of the class; empty ones are dropped. A
        ``Dataset`` is shuffled anew for each pass and read ``batch_size`` samples at a time.
    target : int or sequence of int
        The class or classes.
    build : callable
        Gives an untrained network with the parameters of ``model``.
    train : callable
        Trains the network in place on an iterable of ``(inputs, labels)`` or ``(inputs, labels,
        groups)`` batches on its device, which it may read again for each epoch. If it returns a
        network, that one is kept.
    batch_size : int
        For a ``Dataset``.
    seed : int
        Set before ``build``; the caller's random state comes back afterwards.

    Returns
    -------
    ModelEdit
        From ``model`` to the new network, buffers included.

    Raises
    ------
    TypeError
        If ``build`` or ``train`` is not such a function, or the data can be read only once.
    ValueError
        If the data has no labels, no sample of a class of ``target`` or no others, or the network
        has other parameters than the model.
    NonFiniteError
        If the trained weights are not finite.
    """
    readable_again(data, "training")
    for name, function in (("build", build), ("train", train)):
        if isinstance(function, nn.Module) or not callable(function):
            raise TypeError(f"{name}: {type(function).__name__} given; give a function")
    with seeded(seed), torch.inference_mode(False):
        network = build()
        require_type(network, nn.Module, "build", "it returns a network")
        classes, outputs, _ = forgotten(model, data, target)
        device = model_device(network)
        remaining = Remaining(data, classes, outputs=outputs, device=device, batch_size=batch_size)
        removed, kept = remaining.count()
        returned = train(network, remaining)
        network = returned if isinstance(returned, nn.Module) else network
        origin = {"samples": kept, "removed": removed, "seed": seed}
        return _edit(model, network, "retrain", classes, origin)


def random_labels(
    model: nn.Module,
    data: Data,
    *,
    target: int | Sequence[int],
    epochs: int = 1,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> ModelEdit:
    """Fine-tune on all of the data, the class's samples under random other labels.

    Graves et al. 2021, *Amnesiac machine learning*, where the procedure is called unlearning. A
    label is drawn once a sample, uniformly from the classes that stay. The training is that of
    `xai_edit.core.training.fine_tuned`; batch norms follow the batches.

    Parameters
    ----------
    model : nn.Module
        A classifier; only read.
    data : iterable or Dataset
        Labelled batches, of training data in the paper, that can be read several times. Batches
        are taken as they come, so shuffle them in the loader; a ``Dataset`` is shuffled here. The
        class's samples are read once and held on the CPU.
    target : int or sequence of int
        The class or classes.
    epochs, learning_rate, seed
        The same seed gives the same bits.
    batch_size : int
        For a ``Dataset``.

    Raises
    ------
    TypeError
        If the data can be read only once.
    ValueError
        If a class is out of range or has no samples, no class or no other sample is left, or the
        data has no labels.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    readable_again(data, "training")
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
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
                inputs, new = batch.inputs.clone(), batch.labels.clone()
                inputs[at] = chosen.inputs[rows]
                new[at] = labels[rows]
                yield Batch(inputs, new)

        settings: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        made, steps = fine_tuned(model, relabelled, statistics=True, **settings)
        settings |= {"samples": len(chosen) + chosen.others, "relabelled": len(chosen)}
        return _edit(model, made, "random_labels", chosen.classes, settings | {"steps": steps})


def negative_gradient(
    model: nn.Module,
    data: Data,
    *,
    target: int | Sequence[int],
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> ModelEdit:
    """Ascend the loss of the class's samples.

    Golatkar et al. 2020, *Eternal sunshine of the spotless net*, name it NegGrad. Only the
    class's samples are used here. The loss has no upper bound: it takes off after some steps and
    then ruins the model, so it is the number of steps times the rate that has to be found. The
    default rate is for some thousand samples of the class; with fewer, take a larger one.

    Parameters and errors are those of `random_labels`, but that the data is read once and samples
    of other classes are passed over.
    """
    settings: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
    settings |= {"batch_size": batch_size, "seed": seed}
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        made, origin = _on_class(model, chosen, chosen.labels, settings, ascend=True)
        return _edit(model, made, "negative_gradient", chosen.classes, origin)


def boundary_shrink(
    model: nn.Module,
    data: Data,
    *,
    target: int | Sequence[int],
    epsilon: float = 0.1,
    clip: tuple[float, float] | None = None,
    epochs: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
) -> ModelEdit:
    """Fine-tune on the class's samples, each under the class that is nearest to it.

    Chen et al. 2023, *Boundary unlearning* (CVPR), boundary shrink; the paper fine-tunes on these
    samples alone. `nearest_classes` finds the labels, with ``epsilon`` and ``clip``; the inputs
    have to be floating. The defaults are those in use for classes of 5,000 samples. What counts is
    the number of steps times the rate, so with fewer samples take a larger rate.

    Other parameters and errors are those of `negative_gradient`.
    """
    settings: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
    settings |= {"batch_size": batch_size, "seed": seed}
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        nearest = nearest_classes(model, chosen, epsilon=epsilon, clip=clip, batch_size=batch_size)
        made, origin = _on_class(model, chosen, nearest, settings)
        origin |= {"epsilon": epsilon, "clip": None if clip is None else list(clip)}
        counts = torch.bincount(nearest, minlength=chosen.outputs)
        origin["nearest"] = {str(c): int(n) for c, n in enumerate(counts) if n}
        return _edit(model, made, "boundary_shrink", chosen.classes, origin)


def boundary_expanding(
    model: nn.Module,
    data: Data,
    *,
    target: int | Sequence[int],
    epochs: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
) -> ModelEdit:
    """Fine-tune on the class's samples under a shadow class, then cut the shadow class off.

    Chen et al. 2023, *Boundary unlearning* (CVPR), boundary expanding. The last layer, which has
    to be linear, gets one more row, drawn as PyTorch draws a new linear layer; after the training
    the row is removed, so that the model has its classes again. Several classes share it.

    Parameters and errors are those of `boundary_shrink`.
    """
    settings: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
    settings |= {"batch_size": batch_size, "seed": seed}
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        name, _ = find_head(model, chosen.inputs[:1].to(model_device(model)))
        wide = copied(model)
        with seeded(seed):
            _widen(wide.get_submodule(name))
        shadow = torch.full((len(chosen),), chosen.outputs)
        made, origin = _on_class(wide, chosen, shadow, settings)
        _narrow(made.get_submodule(name))
        return _edit(model, made, "boundary_expanding", chosen.classes, origin | {"layer": name})


def nearest_classes(
    model: nn.Module,
    samples: ClassSamples,
    *,
    epsilon: float,
    clip: tuple[float, float] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Find the class across the nearest boundary, by one step of the fast gradient sign method.

    x' = x + ε · sign(∇ₓ L(x, y)); the label is the class other than those to forget with the
    highest logit at x'.

    Parameters
    ----------
    model : nn.Module
        Left exactly as it was.
    samples : ClassSamples
    epsilon : float
        The step ε, in units of the inputs; the paper's networks see images in [0, 1].
    clip : (float, float), optional
        The range that x' is kept in, such as (0, 1).
    batch_size : int
        Samples at a time.

    Returns
    -------
    Tensor, int64, shape (samples,)

    Raises
    ------
    ValueError
        If ``epsilon`` or ``batch_size`` is not positive, or the ends of ``clip`` are not in order.
    TypeError
        If the inputs are not floating.
    """
    epsilon = positive(epsilon, "epsilon")
    batch_size = whole_number(batch_size, "batch_size", least=1)
    ordered = clip is None or clip[0] < clip[1]
    require(ordered, "clip", clip, "the lower end comes first, as in (0, 1)")
    if not samples.inputs.is_floating_point():
        raise TypeError(
            f"data: inputs are {samples.inputs.dtype}; the nearest class is found by a step along "
            "the gradient, which needs floating inputs"
        )
    device, nearest = model_device(model), []
    parts = samples.inputs.split(batch_size), samples.labels.split(batch_size)
    with preserved(model), torch.enable_grad():
        for inputs, labels in zip(*parts, strict=True):
            x = inputs.to(device).requires_grad_()
            logits = predict(model, x)
            loss = nn.functional.cross_entropy(logits, labels.to(device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                beyond = x + epsilon * gradient.sign()
                beyond = beyond if clip is None else beyond.clamp(*clip)
                logits = predict(model, beyond)
                logits[:, samples.classes] = -torch.inf
            nearest.append(logits.argmax(1).cpu())
    return torch.cat(nearest)


def _on_class(
    model: nn.Module,
    chosen: ClassSamples,
    labels: Tensor,
    settings: dict[str, Any],
    *,
    ascend: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a copy on the class's samples alone, under ``labels``; return it and its origin."""
    rest = dict(settings)
    order = {"batch_size": rest.pop("batch_size"), "seed": rest["seed"]}
    made, steps = fine_tuned(model, chosen.epochs(labels, **order), ascend=ascend, **rest)
    return made, {**settings, "samples": len(chosen), "steps": steps}


def _edit(
    model: nn.Module, made: nn.Module, method: str, classes: list[int], origin: dict[str, Any]
) -> ModelEdit:
    return ModelEdit.to_copy(model, made, {"operator": method, "target": classes, **origin})


def _widen(head: nn.Module) -> None:
    """Add a row to a linear layer, in place."""
    assert isinstance(head, nn.Linear)  # find_head watches no others
    new = nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
    for (name, old), row in zip([*head.named_parameters()], new.parameters(), strict=True):
        setattr(head, name, nn.Parameter(torch.cat([old.detach(), row.detach()])))


def _narrow(head: nn.Module) -> None:
    """Remove the last row of a linear layer, in place."""
    for name, wide in [*head.named_parameters()]:
        setattr(head, name, nn.Parameter(wide.detach()[:-1].clone()))
