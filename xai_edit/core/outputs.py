"""What a model returns, as one tensor: its logits, or whatever a function of the target reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xai_edit.core.errors import NonFiniteError
from xai_edit.core.final_operation import before_final, following
from xai_edit.core.inputs import Inputs

Outputs: TypeAlias = str | Callable[[Any], Tensor] | None
"""How to take the logits from what a model returns: the name of an attribute or key, or a function
of it. None takes a tensor itself, ``.logits``, ``["logits"]``, or the first tensor of a tuple."""

_CHOSEN: ContextVar[Outputs] = ContextVar("outputs", default=None)


@contextmanager
def outputs_as(outputs: Outputs) -> Iterator[None]:
    """Take the logits by ``outputs`` in all calls of models inside this context.

    Raises
    ------
    TypeError
        If ``outputs`` is neither a name nor a function.
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
    found = before_final(tensor_of(output))
    if not isinstance(found, Tensor) or found.shape[:1] != (len(inputs),):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"model: its output is {what} for {len(inputs)} inputs; a classifier gives one row of "
            "logits a sample, shape (samples, classes); outputs= says where they are"
        )
    if not torch.isfinite(found).all():
        raise NonFiniteError("model: its logits are NaN or infinite")
    return found


def as_logits(outputs: Tensor) -> Tensor:
    """Return a model's outputs as logits, shape (samples, classes).

    A single logit z is that of class 1; that of class 0 is 0, so that the softmax of both is the
    sigmoid of z.
    """
    if outputs.ndim == 1 or outputs.shape[1:] == (1,):
        z = outputs.reshape(-1, 1)
        both = torch.cat([torch.zeros_like(z), z], 1)
        both._xai_edit_one_logit = True  # type: ignore[attr-defined]
        return both
    if outputs.ndim != 2:
        raise ValueError(
            f"model: its output is {tuple(outputs.shape)}; a classifier gives one row of logits a "
            "sample, shape (samples, classes); for others target= is a function of the outputs"
        )
    return outputs


def logits_of(output: Any, inputs: Inputs) -> Tensor:
    """Return the logits in what a model returned, by `outputs_of` and `as_logits`."""
    return as_logits(outputs_of(output, inputs))
