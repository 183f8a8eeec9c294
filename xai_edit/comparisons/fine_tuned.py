"""Class unlearning by training: retraining, random labels, negative gradient, boundaries."""

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
    classes_to_forget,
    labelled,
    require_present,
    shuffled,
)
from xai_edit.core.checks import positive, readable_again, require, require_type, whole_number
from xai_edit.core.data import Batch, Data, model_device
from xai_edit.core.guard import copied, preserved
from xai_edit.core.inputs import joined
from xai_edit.core.layers import predict
from xai_edit.core.training import fine_tuned, seeded
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.head import find_head

ONLY_TARGET = "data: only samples of the classes to forget; give samples of other classes too"


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
    """Train a new network without the class: the reference for all other methods.

    Errors are those of `random_labels`; ValueError also if the network has other parameters.

    Parameters
    ----------
    model : nn.Module
        Only read. The edit leads from it to the new network, buffers included.
    data : iterable or Dataset
        Labelled batches that can be read several times. Batches keep their order and lose the
        samples of the class. A ``Dataset`` is shuffled in each pass and read ``batch_size`` samples
        at a time.
    build : callable
        Returns an untrained network with the parameters of ``model``.
    train : callable
        Trains the network in place on an iterable of ``(inputs, labels)`` or ``(inputs, labels,
        groups)`` batches on its device, which it may read once an epoch. If it returns a network,
        that one is used.
    seed : int
        Set before ``build``; the caller's random state is restored afterwards.

    Examples
    --------
    >>> from copy import deepcopy
    >>> def train(network, batches):
    ...     print({label for _, labels in batches for label in labels.tolist()})
    >>> how = {"build": lambda: deepcopy(model), "train": train}
    >>> edit = xe.comparisons.retrain(model, data, target=1, **how)
    {0, 2}
    >>> edit.origin["samples"], edit.origin["removed"]
    (160, 80)
    """
    readable_again(data, "training")
    for name, function in (("build", build), ("train", train)):
        if isinstance(function, nn.Module) or not callable(function):
            raise TypeError(f"{name}: {type(function).__name__} given; give a function")
    with seeded(seed), torch.inference_mode(False):
        network = build()
        require_type(network, nn.Module, "build", "it returns a network")
        classes, outputs, _ = classes_to_forget(model, data, target)
        batches = shuffled(data, batch_size)
        labels = torch.cat([batch_labels for _, batch_labels in labelled(batches, outputs)])
        require_present(classes, labels)
        removed = int(among(labels, classes).sum())
        if removed == len(labels):
            raise ValueError(ONLY_TARGET)
        returned = train(network, Remaining(batches, classes, outputs, model_device(network)))
        network = returned if isinstance(returned, nn.Module) else network
        counts = {"samples": len(labels) - removed, "removed": removed, "seed": seed}
        return ModelEdit.to_copy(
            model, network, {"operator": "retrain", "target": classes, **counts}
        )


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
    """Fine-tune on all of the data, with random other labels for the class's samples.

    Graves et al. 2021, *Amnesiac machine learning*, where the procedure is called unlearning. A
    label is drawn once a sample, uniformly from the classes that stay. The training is that of
    `xai_edit.core.training.fine_tuned`, with ``statistics=True``.

    ``data`` has labelled batches, of training data in the paper, that can be read several times.
    Shuffle them in the loader; a ``Dataset`` is shuffled here and read ``batch_size`` samples at a
    time. The class's samples are held on the CPU. The same ``seed`` gives the same bits.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        If the data can be read only once; if it has no labels, a class is out of range or has no
        samples, or no other is left; if the loss or a weight is no longer finite.

    Examples
    --------
    >>> edit = xe.comparisons.random_labels(model, data, target=1, epochs=2)
    >>> edit.origin["relabelled"], edit.origin["steps"]
    (80, 2)
    """
    readable_again(data, "training")
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        if chosen.others == 0:
            raise ValueError(ONLY_TARGET)
        generator = torch.Generator().manual_seed(seed)
        stay = torch.tensor([c for c in range(chosen.outputs) if c not in chosen.classes])
        labels = stay[torch.randint(len(stay), (len(chosen),), generator=generator)]

        def relabelled(_: int) -> Iterator[Batch]:
            """Yield the data with the class's samples replaced in turn by the relabelled ones."""
            start = 0
            for batch, old in labelled(shuffled(data, batch_size), chosen.outputs):
                at = among(old, chosen.classes)
                rows = torch.arange(start, start + int(at.sum())) % len(chosen)
                start += len(rows)
                order = torch.where(at, at.cumsum(0) - 1 + len(batch), torch.arange(len(batch)))
                inputs = joined([batch.inputs, chosen.inputs[rows]])[order]
                yield Batch(inputs, torch.cat([old, labels[rows]])[order])

        options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        edited, steps = fine_tuned(model, relabelled, statistics=True, **options)
        origin = {"operator": "random_labels", "target": chosen.classes, **options}
        origin |= {"samples": len(chosen) + chosen.others, "relabelled": len(chosen)}
        return ModelEdit.to_copy(model, edited, origin | {"steps": steps})


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

    NegGrad of Golatkar et al. 2020, *Eternal sunshine of the spotless net*, on the class's samples
    alone. The loss has no upper bound and ruins the model after some steps, so the number of steps
    times the rate has to be tuned. The default rate is for some thousand samples of the class; with
    fewer, take a larger one. Parameters and errors are those of `random_labels`, but the data is
    read only once, and samples of other classes are ignored.

    Examples
    --------
    >>> edit = xe.comparisons.negative_gradient(model, data, target=1, learning_rate=0.1)
    >>> edit.origin["samples"], edit.origin["steps"]
    (80, 2)
    """
    options = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        training = "negative_gradient", chosen, chosen.labels, seed, options
        return ModelEdit.to_copy(model, *_on_class(model, *training, ascend=True))


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
    """Fine-tune on the class's samples, each labelled as its nearest other class.

    Boundary shrink of Chen et al. 2023, *Boundary unlearning* (CVPR). `nearest_classes` finds the
    labels, with ``epsilon`` and ``clip``. The defaults are for classes of 5,000 samples; with
    fewer, take a larger rate. Other parameters and errors are those of `negative_gradient`.

    Examples
    --------
    >>> edit = xe.comparisons.boundary_shrink(model, data, target=1, epochs=1)
    >>> edit.origin["samples"], edit.origin["steps"]
    (80, 2)
    """
    options = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        nearest = nearest_classes(model, chosen, epsilon=epsilon, clip=clip, batch_size=batch_size)
        edited, origin = _on_class(model, "boundary_shrink", chosen, nearest, seed, options)
        origin |= {"epsilon": epsilon, "clip": clip and list(clip)}
        counts = torch.bincount(nearest, minlength=chosen.outputs)
        origin["nearest"] = {str(c): int(n) for c, n in enumerate(counts) if n}
        return ModelEdit.to_copy(model, edited, origin)


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
    """Fine-tune on the class's samples labelled as a shadow class, then remove the shadow class.

    Boundary expanding of Chen et al. 2023, *Boundary unlearning* (CVPR). The last layer, which has
    to be linear, gets one more row, initialised as in a new linear layer, for all classes to forget
    together; after the training the row is removed. Parameters and errors as `boundary_shrink`.

    Examples
    --------
    >>> edit = xe.comparisons.boundary_expanding(model, data, target=1, epochs=1)
    >>> edit.origin["layer"], edit.origin["samples"], edit.origin["steps"]
    ('fc2', 80, 2)
    """
    options = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    with seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, target)
        found = find_head(model, chosen.inputs[:1].to(model_device(model)))
        name, head = found.layer, found.module(model)
        if found.one_output:
            raise ValueError(
                "model: has one output, and a shadow class needs a row beside those of the classes;"
                " use boundary_shrink"
            )
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"model: its head {name!r} is not one linear layer, to which a row could be added"
            )
        with seeded(seed):
            row = nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
        wide = copied(model)
        wide_head = wide.get_submodule(name)
        for (key, old), new in zip([*head.named_parameters()], row.parameters(), strict=True):
            setattr(wide_head, key, nn.Parameter(torch.cat([old.detach(), new.detach()])))
        shadow = torch.full((len(chosen),), chosen.outputs)
        edited, origin = _on_class(wide, "boundary_expanding", chosen, shadow, seed, options)
        edited_head = edited.get_submodule(name)
        for key, trained in [*edited_head.named_parameters()]:
            setattr(edited_head, key, nn.Parameter(trained.detach()[:-1].clone()))
        return ModelEdit.to_copy(model, edited, origin | {"layer": name})


def nearest_classes(
    model: nn.Module,
    samples: ClassSamples,
    *,
    epsilon: float,
    clip: tuple[float, float] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Return the class across the nearest boundary, by one step of the fast gradient sign method.

    x' = x + ε · sign(∇ₓ L(x, y)); of the classes that stay, the one of highest logit at x'; int64,
    shape (samples,). ``epsilon`` is ε, in units of the inputs (the paper's images are in [0, 1]),
    ``clip`` the range of x', such as (0, 1).
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
                moved = x + epsilon * gradient.sign()
                moved = moved if clip is None else moved.clamp(*clip)
                logits = predict(model, moved)
                logits[:, samples.classes] = -torch.inf
            nearest.append(logits.argmax(1).cpu())
    return torch.cat(nearest)


def _on_class(
    model: nn.Module,
    method: str,
    chosen: ClassSamples,
    labels: Tensor,
    seed: int,
    options: dict[str, Any],
    *,
    ascend: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a copy on the class's samples alone, with ``labels``; return it and its origin."""
    settings, generator = {**options, "seed": seed}, torch.Generator().manual_seed(seed)
    batch_size = whole_number(settings.pop("batch_size"), "batch_size", least=1)

    def epoch(_: int) -> Iterator[Batch]:
        for rows in torch.randperm(len(chosen), generator=generator).split(batch_size):
            yield Batch(chosen.inputs[rows], labels[rows])

    edited, steps = fine_tuned(model, epoch, ascend=ascend, **settings)
    origin = {"operator": method, "target": chosen.classes, **options, "seed": seed}
    return edited, {**origin, "samples": len(chosen), "steps": steps}
