"""Argument checks that raise one clear error: the argument, the value given, what would work."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from itertools import pairwise
from typing import Any, SupportsFloat, TypeVar

import torch
from torch import Tensor

from xai_edit.core.errors import NonFiniteError

T = TypeVar("T")


def require(condition: bool, name: str, given: object, works: str) -> None:
    """Raise ``ValueError("name: given given; works")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name}: {given!r} given; {works}")


def require_type(value: object, kind: type | tuple[type, ...], name: str, works: str) -> None:
    """Raise TypeError unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {type(value).__name__} given; {works}")


def one_of(value: T, options: Collection[T], name: str) -> T:
    """Return ``value`` if it is one of ``options``."""
    listed = ", ".join(map(repr, options))
    require(value in options, name, value, f"it is one of {listed}")
    return value


def whole_number(value: Any, name: str, *, least: int | None = 0, most: int | None = None) -> int:
    """Return a whole number of Python, NumPy or torch as an int; booleans are refused."""
    limits = "" if least is None else f" from {least}"
    limits += "" if most is None else f" to {most}"
    boolean = isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool
    try:
        number = None if boolean else operator.index(value)
    except TypeError:
        number = None
    too_low = number is not None and least is not None and number < least
    if number is None or too_low or (most is not None and number > most):
        raise ValueError(f"{name}: {value!r} given; it is a whole number{limits}")
    return number


def real_number(value: Any) -> float:
    """Return a number as a float, and NaN for anything else, also for booleans."""
    is_number = isinstance(value, SupportsFloat) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def fraction(value: Any, name: str, *, zero: bool = False, one: bool = True) -> float:
    """Return a number between 0 and 1; ``zero`` and ``one`` say whether the ends are allowed."""
    number = real_number(value)
    if not (0 < number < 1 or (zero and number == 0) or (one and number == 1)):
        percent = "; is it in percent?" if number > 1 else ""
        limits = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name}: {value!r} given; it is a fraction in {limits}{percent}")
    return number


def positive(value: Any, name: str, *, zero: bool = False) -> float:
    """Return a finite number above 0, or of at least 0 where ``zero`` is allowed."""
    number = real_number(value)
    works = f"it is a finite number {'of at least' if zero else 'above'} 0"
    require(0 < number < math.inf or (zero and number == 0), name, value, works)
    return number


def distinct(values: Iterable[T], name: str, works: str) -> list[T]:
    """Return one or more different values as a list."""
    listed = list(values)
    require(0 < len(listed) == len(set(listed)), name, listed, works)
    return listed


def ascending(
    values: Any, name: str, number: Callable[[Any, str], T], works: str, *, least: int = 0
) -> tuple[T, ...]:
    """Return at least ``least`` numbers that ``number`` checked, each above the one before."""
    require_type(values, Iterable, name, works)
    listed: tuple[Any, ...] = tuple(number(value, name) for value in values)
    rising = all(left < right for left, right in pairwise(listed))
    require(rising and len(listed) >= least, name, listed, works)
    return listed


def whole_numbers(values: Any, name: str, works: str) -> list[int]:
    """Return one whole number or several different ones as a list of int."""
    single = not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    listed = [values] if single else values
    return distinct([whole_number(one, name, least=None) for one in listed], name, works)


def as_whole(values: Tensor, message: str) -> Tensor:
    """Return values as int64; ValueError for a fraction, a NaN or a number beyond int64."""
    if values.is_floating_point():
        whole = (values == values.round()) & (values.double().abs() < 2**63)
        if not whole.all():
            raise ValueError(message)
    return values.long()


def same_length(values: Sized, samples: int, name: str) -> None:
    """Raise ValueError unless there is one value a sample."""
    if len(values) != samples:
        raise ValueError(f"{name}: {len(values)} values for {samples} samples; give one a sample")


def finite(values: Tensor, name: str) -> Tensor:
    """Return ``values`` if none is NaN or infinite; raise NonFiniteError otherwise."""
    # The extremes are NaN if any value is; a mask of all values would take memory.
    if values.numel() and not all(map(math.isfinite, values.detach().aminmax())):
        raise NonFiniteError(f"{name}: NaN or infinite values")
    return values


def with_labels(labels: Tensor | None, classes: int | None = None) -> Tensor:
    """Return labels, one class a sample; ValueError without, or for others than so many classes."""
    if labels is None:
        raise ValueError("data: has no labels; give (input, label) batches")
    one_class_a_sample(labels)
    if classes is not None:
        in_range(labels, classes, "labels")
    return labels


def one_class_a_sample(labels: Tensor | None) -> None:
    """Raise ValueError for labels of a multi-label model."""
    if labels is not None and labels.ndim > 1:
        raise ValueError(
            f"labels: {labels.shape[1]} labels a sample given; take one label at a time, inside "
            "xai_edit.one_label(number), where class 1 has the label and class 0 has not; of "
            "one-hot labels give their argmax(1)"
        )


def readable_again(data: object, reader: str, name: str = "data") -> None:
    """Raise TypeError where ``data`` is an iterator, and ``reader`` reads it more than once."""
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name}: a {type(data).__name__} can be read only once, and {reader} reads it several "
            "times; give a list of batches, a DataLoader or a Dataset"
        )


def in_range(classes: Tensor | Sequence[int], count: int, name: str) -> None:
    """Raise ValueError if one of ``classes`` is not a class of a model with ``count`` outputs."""
    known = classes.unique().tolist() if isinstance(classes, Tensor) else sorted({*classes})
    wrong = [one for one in known if not 0 <= one < count]
    if wrong:
        raise ValueError(
            f"{name}: class {wrong[0]} is out of range; the model has {count} classes, "
            f"0 to {count - 1}"
        )
