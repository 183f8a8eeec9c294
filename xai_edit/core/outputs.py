"""The logits in what a model returns, or the tensor that a function of the target reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xai_edit.core.checks import in_range, whole_number
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.final_operation import (
    EXCLUSIVE,
    before_final,
    final_name,
    following,
    made_of_final,
)
from xai_edit.core.inputs import Inputs

Outputs: TypeAlias = str | Callable[[Any], Tensor] | None
"""How to take the logits from what a model returns: the name of an attribute or key, or a function
of it. None takes a tensor itself, ``.logits``, ``["logits"]``, or the first tensor of a tuple."""

OUT_OF_REACH = 100  # times the usual logit, beyond which one is not of the others' size

_CHOSEN: ContextVar[Outputs] = ContextVar("outputs", default=None)
_LABEL: ContextVar[int | None] = ContextVar("label", default=None)


@contextmanager
def outputs_as(outputs: Outputs) -> Iterator[None]:
    """Take the logits by ``outputs`` in all calls of models inside this context.

    Raises
    ------
    TypeError
        If ``outputs`` is neither a name nor a function.

    Examples
    --------
    >>> class Named(nn.Sequential):
    ...     def forward(self, images):
    ...         return {"features": images, "scores": super().forward(images)}
    >>> with xe.outputs_as("scores"):
    ...     xe.evaluate_groups(Named(model), data).of(0)
    1.0
    """
    if outputs is not None and not isinstance(outputs, str) and not callable(outputs):
        raise TypeError(
            f"outputs: {outputs!r} given; it is the name of an attribute or key of what the model "
            "returns, such as 'logits', or a function of it"
        )
    token = _CHOSEN.set(_CHOSEN.get() if outputs is None else outputs)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def outputs_chosen() -> Outputs:
    """Return what `outputs_as` says in this context."""
    return _CHOSEN.get()


@contextmanager
def one_label(label: int) -> Iterator[None]:
    """Take a multi-label model as a model of one logit, that of a label, inside this context.

    A multi-label model decides about each label on its own, at logit 0. Inside, labels of shape
    (samples, labels), 0 and 1, are those of the one label; class 1 has it and class 0 has not, as
    of every model with one output. An edit of class 1 makes the model stop giving the label.

    Raises
    ------
    ValueError
        If ``label`` is no whole number from 0; inside, if the model has no such output, or ends in
        a softmax, whose classes exclude each other.

    Examples
    --------
    >>> every = nn.functional.one_hot(labels, 3)
    >>> with xe.one_label(1):
    ...     scores = xe.score_units(model, [(images, every)], xe.LRP("epsilon"), target=1)
    >>> scores.top("fc1", count=1)
    tensor([1])
    """
    token = _LABEL.set(whole_number(label, "label"))
    try:
        yield
    finally:
        _LABEL.reset(token)


def label_chosen() -> int | None:
    """Return the label of `one_label` in this context."""
    return _LABEL.get()


def label_origin() -> dict[str, int]:
    """Return what the origin of scores and edits says about `one_label`."""
    label = _LABEL.get()
    return {} if label is None else {"label": label}


def of_label(labels: Tensor, where: str) -> Tensor:
    """Return the labels of one column, (samples,): the only one or that of `one_label`, if any.

    Of several labels, (samples, labels), else all. ValueError, with ``where``, for one that is not
    0 or 1.
    """
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"{where} has labels of shape {tuple(labels.shape)} that are not 0 and 1; give one "
            "class a sample, or 0 and 1 for each label of a multi-label model"
        )
    label = 0 if labels.shape[1] == 1 else _LABEL.get()
    if label is None:
        return labels
    in_range([label], labels.shape[1], "one_label")
    return labels[:, label]


def tensor_of(output: Any) -> Any:
    """Return the tensor in a model's output, or the output itself if there is none."""
    chosen = _CHOSEN.get()
    if callable(chosen):
        with following(output) as mode:
            found = chosen(output)
        mode.mark(found)
        return found
    if chosen is not None:
        return _named(output, chosen)
    if isinstance(output, Tensor):
        return output
    logits = _named(output, "logits")
    if isinstance(logits, Tensor):
        return logits
    parts = output if isinstance(output, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), output)


def _named(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None)


def outputs_of(output: Any, inputs: Inputs) -> Tensor:
    """Return the finite tensor in a model's output that has one entry a sample.

    Of a model that ends in a softmax, sigmoid or softplus it is what goes into that.
    """
    tensor = tensor_of(output)
    if _LABEL.get() is not None and (final := final_name(tensor)) in EXCLUSIVE:
        raise ValueError(
            f"model: it ends in a {final}, whose classes exclude each other; one_label is for "
            "models that decide about each label on its own"
        )
    found = before_final(tensor)
    if not isinstance(found, Tensor) or found.shape[:1] != (len(inputs),):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"model: its output is {what} for {len(inputs)} inputs; a classifier gives one row of "
            "logits a sample, shape (samples, classes); outputs= says where they are"
        )
    if not torch.isfinite(found).all():
        raise NonFiniteError("model: its logits are NaN or infinite")
    return found


def one_logit(outputs: Tensor) -> int | None:
    """Return the column of the only logit z, of one output or of `one_label`; None of classes."""
    if outputs.ndim == 1 or outputs.shape[1:] == (1,):
        return 0
    label = _LABEL.get()
    if label is not None and outputs.ndim == 2:
        in_range([label], outputs.shape[1], "one_label")
    return label


def as_logits(outputs: Tensor) -> Tensor:
    """Return a model's outputs as logits, shape (samples, classes).

    A single logit z is that of class 1; that of class 0 is 0, so that the softmax of both is the
    sigmoid of z.

    Raises
    ------
    ValueError
        If there is not one row of logits a sample, or the only output is computed from a final
        softmax or sigmoid.
    """
    column = one_logit(outputs)
    if outputs.ndim > 2:
        raise ValueError(
            f"model: its output is {tuple(outputs.shape)}; a classifier gives one row of logits a "
            "sample, shape (samples, classes); others can be scored and pruned, with target= a "
            "function of the outputs"
        )
    if column is None:
        return outputs
    refuse_probabilities(outputs)
    z = outputs.reshape(len(outputs), -1)[:, column : column + 1]
    return torch.cat([torch.zeros_like(z), z], 1)


def refuse_probabilities(outputs: Tensor) -> None:
    """Raise ValueError where outputs are computed from those of a final softmax or sigmoid."""
    if (found := made_of_final(outputs)) is not None:
        raise ValueError(
            f"model: its output is computed from a {found}, so that it is no logit; give the model "
            f"without it, or by outputs= what goes into the {found}"
        )


def evidence(outputs: Tensor) -> Tensor:
    """Return what is explained of each class, shape (samples, classes): logits; −z, z of one."""
    logits = as_logits(outputs)
    return logits if one_logit(outputs) is None else torch.cat([-logits[:, 1:], logits[:, 1:]], 1)


def logits_of(output: Any, inputs: Inputs) -> Tensor:
    """Return the logits in what a model returned, by `outputs_of` and `as_logits`."""
    return as_logits(outputs_of(output, inputs))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error of logits as a share of the largest; infinite for another shape.

    Shape (samples, ...). A class with logits of more than 100 times the median size, such as a
    masked one at −10⁴, is compared with its own: it must not hide errors of the others.
    """
    if found.shape != expected.shape:
        return math.inf
    error, size = (
        one.detach().double().abs().reshape(len(one), -1).amax(0)
        for one in (found - expected, expected)
    )
    known = size[size > 0]
    if len(known):
        size = size.clamp(min=float(known[known <= OUT_OF_REACH * known.median()].max()))
    return float(torch.where(error == 0, error, error / size).max())
