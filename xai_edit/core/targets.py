"""Which output is explained: a class, the label, the prediction, or a function of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from xai_edit.core.checks import distinct, finite, in_range, whole_number
from xai_edit.core.data import Batch

Target: TypeAlias = int | Literal["label", "predicted"] | Callable[[Tensor], Tensor]
"""A class number, ``"label"``, ``"predicted"``, or a function of a batch's logits, (samples,
classes). The function returns either a class for each sample (int64), such as the runner-up, or
the number that is explained (floating, (samples,)), such as the difference of two logits."""

Targets: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""A batch's target classes, or a function of its logits as above."""


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
    return (
        getattr(target, "__qualname__", type(target).__qualname__) if callable(target) else target
    )


def targets_of(batch: Batch, target: Target) -> Targets:
    """Return the targets of one batch; what depends on the logits is left to `classes_of`.

    Raises
    ------
    ValueError
        If labels are asked for and missing.
    """
    if callable(target):
        return target
    if target == "predicted":
        return _predicted
    if target == "label":
        if batch.labels is None:
            raise ValueError(
                "target: 'label' given, but the data has no labels; give a class or 'predicted'"
            )
        return batch.labels
    return torch.full((len(batch),), int(target), device=batch.inputs.device)


def _predicted(logits: Tensor) -> Tensor:
    return logits.argmax(1)


def classes_of(targets: Targets, logits: Tensor) -> Tensor:
    """Return the class explained for each sample, int64, shape (samples,).

    Raises
    ------
    ValueError
        If there is not one class a sample, or one is not the model's.
    """
    given = targets
    if callable(targets):
        given = targets(logits.detach())
    if (
        not isinstance(given, Tensor)
        or given.dtype != torch.int64
        or given.shape != logits.shape[:1]
    ):
        raise ValueError(
            f"target: {_described(given)} for {len(logits)} samples; this scorer needs one class a "
            "sample, int64"
        )
    classes = given.to(logits.device)
    in_range(classes, logits.shape[1], "target")
    return classes


def weights_of(targets: Targets, logits: Tensor) -> Tensor:
    """Return the gradient of the explained number with respect to the logits.

    For a class it is 1 at the class and 0 elsewhere.

    Returns
    -------
    Tensor, shape (samples, classes)

    Raises
    ------
    ValueError
        If the targets do not fit the logits.
    """
    if callable(targets):
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            value = targets(z)
            if isinstance(value, Tensor) and value.is_floating_point():
                return _gradient(value, z)
        targets = value
    classes = classes_of(targets, logits)
    return torch.nn.functional.one_hot(classes, logits.shape[1]).to(logits)


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


def whole_list(given: int | Sequence[int], name: str) -> list[int]:
    """Return one class number or several as a list of int."""
    single = not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0
    listed: Iterable[Any] = [given] if single else given  # type: ignore[assignment]
    return [whole_number(one, name, least=None) for one in listed]


def class_list(target: int | Sequence[int], classes: int) -> list[int]:
    """Return one class or several different ones as a list, checked against a model's classes.

    Raises
    ------
    ValueError
        If none is given, one is named twice, is not a number or is out of range.
    """
    listed = whole_list(target, "target")
    in_range(listed, classes, "target")
    return distinct(listed, "target", "give one class or several different ones")


check_classes = in_range
