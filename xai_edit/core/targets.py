"""Which output is explained: a class, the label, the prediction, or a function of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from xai_edit.core.checks import finite, in_range, whole_number, whole_numbers, with_labels
from xai_edit.core.data import Batch
from xai_edit.core.outputs import as_logits, one_logit, refuse_probabilities

Target: TypeAlias = int | Literal["label", "predicted"] | Callable[[Tensor], Tensor]
"""A class number, ``"label"``, ``"predicted"``, or a function of a batch's outputs, of a classifier
the logits, (samples, classes). The function returns either a class for each sample (int64), such as
the runner-up, or the number that is explained (floating, (samples,)), such as the difference of two
logits. Of a model with one output z, or of `xai_edit.one_label`, class 1 is explained by z and
class 0 by −z; of a multi-label model a number is the label whose logit is explained."""

Targets: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""A batch's target classes, or a function of its outputs as above."""


def checked_target(target: Any) -> Target:
    """Return a target as a plain int, one of the two words or a function, or raise ValueError."""
    if isinstance(target, str) and target in ("label", "predicted"):
        return target  # type: ignore[return-value]
    if callable(target) and not isinstance(target, type):
        return target  # type: ignore[no-any-return]
    try:
        return whole_number(target, "target", least=None)
    except ValueError:
        raise ValueError(
            f"target: {target!r} given; it is a class number, 'label', 'predicted' or a function "
            "of the logits"
        ) from None


def describe_target(target: Target) -> int | str:
    """Return a name for a target that is the same in every process."""
    if not callable(target):
        return target
    name: str = getattr(target, "__qualname__", type(target).__qualname__)
    return name


def targets_of(batch: Batch, target: Target) -> Targets:
    """Return the targets of one batch; what depends on the logits is left to `classes_of`."""
    if callable(target):
        return target
    if target == "predicted":
        return predicted
    if target == "label":
        if batch.labels is None:
            raise ValueError(
                "target: 'label' given, but the data has no labels; give a class or 'predicted'"
            )
        return with_labels(batch.labels)
    number = whole_number(target, "target", least=None, most=2**63 - 1)
    return torch.full((len(batch),), number, device=batch.inputs.device)


def predicted(outputs: Tensor) -> Tensor:
    """Return the class with the largest logit, for each sample."""
    return as_logits(outputs).argmax(1)


def classes_of(targets: Targets, outputs: Tensor) -> Tensor:
    """Return the class explained for each sample, int64, shape (samples,).

    ``outputs`` are the model's, as `xai_edit.core.outputs.outputs_of` returns them.

    Raises
    ------
    ValueError
        If there is not one class a sample, or one is not the model's.
    """
    classes = targets(outputs.detach()) if callable(targets) else targets
    is_tensor = isinstance(classes, Tensor)
    if not is_tensor or classes.dtype != torch.int64 or classes.shape != outputs.shape[:1]:
        raise ValueError(
            f"target: {_described(classes)} for {len(outputs)} samples; this scorer needs one "
            "class a sample, int64"
        )
    in_range(classes, as_logits(outputs).shape[1], "target")
    return classes.to(outputs.device)


def weights_of(targets: Targets, outputs: Tensor) -> Tensor:
    """Return the gradient of the explained number with respect to the model's outputs.

    In the shape of the outputs; for a class 1 there and 0 elsewhere, and of a single logit −1 for
    class 0.

    Raises
    ------
    ValueError
        If the targets do not fit the outputs, or a class is explained by probabilities.
    """
    if callable(targets):
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            value = targets(z)
            if isinstance(value, Tensor) and value.is_floating_point():
                return _gradient(value, z)
        targets = value
    classes = classes_of(targets, outputs)
    refuse_probabilities(outputs)
    if (column := one_logit(outputs)) is None:
        return torch.nn.functional.one_hot(classes, outputs.shape[1]).to(outputs)
    weights = torch.zeros_like(outputs)
    weights.view(len(outputs), -1)[:, column] = (2 * classes - 1).to(outputs)
    return weights


def _gradient(value: Tensor, z: Tensor) -> Tensor:
    if value.shape != z.shape[:1] or not value.requires_grad:
        raise ValueError(
            f"target: the function of the logits gave {_described(value)} for {len(z)} samples; it "
            "gives one number a sample, computed from the logits it is called with, or one class"
        )
    (weights,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    if weights is None:
        raise ValueError(
            "target: the function of the logits gave one number a sample that does not depend on "
            "them; it has to be computed from the logits that the function is called with"
        )
    return finite(weights, "target: the gradient of its function")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype},"
    return type(value).__name__


def class_list(target: int | Sequence[int], classes: int) -> list[int]:
    """Return one class or several different ones as a list, checked against a model's classes."""
    listed = whole_numbers(target, "target", "give one class or several different ones")
    in_range(listed, classes, "target")
    return listed


def classes_to_remove(target: int | Sequence[int], classes: int) -> list[int]:
    """Return a `class_list` that leaves one class or more, or raise ValueError."""
    listed = class_list(target, classes)
    if len(listed) == classes:
        raise ValueError(f"target: all {classes} classes of the model given; one has to stay")
    return listed
