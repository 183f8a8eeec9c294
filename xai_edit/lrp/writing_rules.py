"""Relevance rules of operations that write or add values at given positions, such as scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.trace import operation_name, source_line
from xai_edit.lrp.operation_rules import is_in_place
from xai_edit.lrp.propagation import (
    Arguments,
    Named,
    Operator,
    Rule,
    in_graph,
    of_data,
    proportional,
    without_relevance,
)

_OVERWRITING = ("scatter", "index_copy", "index_put", "put", "setitem")


def writing_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Move R to the values written, or share it among the values added, in proportion.

    An operation that adds, averages or takes an extreme is homogeneous: twice the values give twice
    the output. One that is not, such as a product, is refused, and so is ``scatter`` with
    ``reduce``, for which PyTorch has no derivative.
    """
    given: dict[Any, Any] = {**dict(enumerate(args)), **named}
    places = [
        at for at, one in given.items() if isinstance(one, Tensor) and one.is_floating_point()
    ]
    values = [given[at] for at in places]

    def written(*values: Tensor) -> Tensor:
        filled = given | dict(zip(places, values, strict=True))
        first, *others = (filled.pop(at) for at in range(len(args)))
        if is_in_place(function, args, named):
            first = first.clone()
        return function(first, *others, **filled)

    if _overwrites(function, args, named):
        return moved(written, values)
    constants = [one.detach() for one in values]
    once, twice = written(*constants), written(*(2 * one for one in constants))
    if operation_name(function) == "scatter" or not torch.allclose(twice, 2 * once, rtol=1e-4):
        how = named.get("reduce", args[4] if len(args) > 4 else None)
        name = f"{operation_name(function)!r} with reduce={how!r} ({source_line()})"
        return without_relevance(once, next(filter(in_graph, values)), name)
    added, summands = of_data(written, tuple(values))
    return proportional(added, stabilizer, 1, *summands)


def _overwrites(function: Operator, args: Arguments, named: Named) -> bool:
    """Return whether written values replace others."""
    name = operation_name(function)
    adds = named.get("accumulate", name in ("index_put", "put") and args[3:] == (True,))
    return name in _OVERWRITING and not adds and named.get("reduce") is None


def moved(write: Callable[..., Tensor], values: list[Tensor]) -> Tensor:
    """Return ``write(*values)``, each output in the graph of the one value that it is.

    Of values written to one place, autograd takes each for the output; here only the last is. The
    place of each is found by writing numbers instead of values.
    """
    if len(values) == 1:
        return write(*values)
    ends = torch.tensor([one.numel() for one in values]).cumsum(0).tolist()
    numbers = [
        torch.arange(end - one.numel(), end, dtype=torch.float64, device=one.device).view_as(one)
        for one, end in zip(values, ends, strict=True)
    ]
    return torch.cat([one.reshape(-1) for one in values])[write(*numbers).long()]


def assigned(target: Tensor, index: Any, value: Any) -> Tensor:
    """Return what ``target[index] = value`` makes of the target."""

    def write(target: Tensor, value: Any) -> Tensor:
        written = target.clone()
        written[index] = value
        return written

    places = index if isinstance(index, tuple) else (index,)
    repeats = any(isinstance(one, list) or _are_numbers(one) for one in places)
    if repeats and isinstance(value, Tensor) and value.is_floating_point():
        return moved(write, [target, value.to(target.dtype)])
    return write(target, value)


def _are_numbers(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype != torch.bool and index.ndim > 0


WRITING: dict[str, Rule] = dict.fromkeys(
    (*_OVERWRITING, "scatter_add", "scatter_reduce", "index_add", "index_reduce"), writing_rule
)
"""Rules by `xai_edit.core.trace.operation_name`."""
