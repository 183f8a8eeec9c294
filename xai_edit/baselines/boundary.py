"""Class unlearning by moving decision boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import predict
from xai_edit.baselines.samples import ClassSamples, class_samples
from xai_edit.baselines.training import Unlearned, as_before, fine_tuned, seeded, unlearned
from xai_edit.data import Data, model_device
from xai_edit.edits.head import find_head
from xai_edit.guard import copied, preserved
from xai_edit.resources import measured


def boundary_shrink(
    model: nn.Module,
    data: Data,
    *,
    forget: int | Sequence[int],
    epsilon: float = 0.1,
    clip: tuple[float, float] | None = None,
    epochs: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Fine-tune on the class's samples, each under the class that is nearest to it.

    Chen et al. 2023, *Boundary unlearning* (CVPR), boundary shrink. `nearest_classes` finds the
    labels, `fine_tuned` says how the training goes. The paper fine-tunes on these samples alone.

    Parameters
    ----------
    model : nn.Module
        A classifier; only read.
    data : iterable or Dataset
        Labelled batches; samples of other classes are passed over. The class's are held on the CPU.
    forget : int or sequence of int
        The class or classes.
    epsilon, clip
        See `nearest_classes`.
    epochs, learning_rate, batch_size, seed
        The same seed gives the same bits. The defaults are those in use for classes of 5,000
        samples; what counts is the number of steps times the rate, so with fewer samples take a
        larger rate.

    Raises
    ------
    ValueError
        If a class is out of range or has no samples, or the data has no labels.
    TypeError
        If the inputs are not floating, such as token numbers.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, forget)
        nearest = nearest_classes(model, chosen, epsilon=epsilon, clip=clip, batch_size=batch_size)
        made, steps = fine_tuned(
            model,
            chosen.epochs(nearest, batch_size=batch_size, seed=seed),
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
        )
    counts = torch.bincount(nearest, minlength=chosen.outputs)
    origin = {
        "forget": chosen.classes,
        "epsilon": epsilon,
        "clip": None if clip is None else list(clip),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "samples": len(chosen),
        "nearest": {str(c): int(n) for c, n in enumerate(counts) if n},
        "steps": steps,
    }
    return unlearned(made, "boundary_shrink", cost, origin)


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
    if not epsilon > 0:
        raise ValueError(f"epsilon: {epsilon} given; the step is positive")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} given; it is at least 1")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip: {clip} given; the lower end comes first, as in (0, 1)")
    if not samples.inputs.is_floating_point():
        raise TypeError(
            f"data: inputs are {samples.inputs.dtype}; the nearest class is found by a step along "
            "the gradient, which needs floating inputs"
        )
    device, labels = model_device(model), []
    with preserved(model), torch.enable_grad():
        for inputs, given in zip(
            samples.inputs.split(batch_size), samples.labels.split(batch_size), strict=True
        ):
            x = inputs.to(device).requires_grad_()
            loss = nn.functional.cross_entropy(predict(model, x), given.to(device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                beside = x + epsilon * gradient.sign()
                beside = beside if clip is None else beside.clamp(*clip)
                logits = predict(model, beside)
                logits[:, samples.classes] = -torch.inf
            labels.append(logits.argmax(1).cpu())
    return torch.cat(labels)


def boundary_expanding(
    model: nn.Module,
    data: Data,
    *,
    forget: int | Sequence[int],
    epochs: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
) -> Unlearned:
    """Fine-tune on the class's samples under a shadow class, then cut the shadow class off.

    Chen et al. 2023, *Boundary unlearning* (CVPR), boundary expanding. The last layer gets one
    more row, drawn as PyTorch draws a new linear layer; after the training the row is removed, so
    that the model has its classes again. `fine_tuned` says how the training goes.

    Parameters
    ----------
    model : nn.Module
        A classifier that ends in a linear layer; only read.
    data : iterable or Dataset
        Labelled batches; samples of other classes are passed over. The class's are held on the CPU.
    forget : int or sequence of int
        The class or classes; all share one shadow class.
    epochs, learning_rate, batch_size, seed
        The same seed gives the same bits. The defaults are those in use for classes of 5,000
        samples; what counts is the number of steps times the rate, so with fewer samples take a
        larger rate.

    Raises
    ------
    ValueError
        If a class is out of range or has no samples, the data has no labels, or the model does not
        end in a linear layer.
    NonFiniteError
        If the loss or a weight is no longer finite.
    """
    with measured() as cost, seeded(seed), torch.inference_mode(False):
        chosen = class_samples(model, data, forget)
        name, _ = find_head(model, chosen.inputs[:1].to(model_device(model)))
        wide = copied(model)
        _widen(_linear(wide, name), seed)
        shadow = torch.full((len(chosen),), chosen.outputs)
        made, steps = fine_tuned(
            wide,
            chosen.epochs(shadow, batch_size=batch_size, seed=seed),
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
        )
        _narrow(_linear(made, name))
        as_before(made, model)
    origin = {
        "forget": chosen.classes,
        "layer": name,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "samples": len(chosen),
        "steps": steps,
    }
    return unlearned(made, "boundary_expanding", cost, origin)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)  # find_head watches no others
    return module


def _widen(head: nn.Linear, seed: int) -> None:
    """Add a row to a linear layer, in place."""
    with seeded(seed):
        new = nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        head.weight = nn.Parameter(torch.cat([head.weight, new.weight]))
        if head.bias is not None:
            head.bias = nn.Parameter(torch.cat([head.bias, new.bias]))
    head.out_features += 1


def _narrow(head: nn.Linear) -> None:
    """Remove the last row of a linear layer, in place."""
    head.weight = nn.Parameter(head.weight.detach()[:-1].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[:-1].clone())
    head.out_features -= 1
