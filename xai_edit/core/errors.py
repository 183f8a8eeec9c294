"""The few errors of our own; each is also the built-in error a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def out_of_memory(problem: BaseException) -> bool:
    """Return whether an exception says that memory is full, on a GPU or the CPU.

    Examples
    --------
    >>> from xai_edit.core.errors import out_of_memory
    >>> out_of_memory(MemoryError()), out_of_memory(ValueError("size"))
    (True, False)
    """
    kind, text = type(problem).__name__, str(problem)
    allocating = "memory" in text and ("allocat" in text or "out of" in text)
    return isinstance(problem, MemoryError) or kind == "OutOfMemoryError" or allocating


class UnknownLayerError(ValueError, KeyError):
    """A layer name that the model, or a set of scores, does not have.

    A ``ValueError`` for a name that is an argument, a ``KeyError`` for ``scores[name]``.

    Examples
    --------
    >>> xe.score_units(model, data, xe.Activation(), layers=["fc3"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    xai_edit.core.errors.UnknownLayerError: layer 'fc3' not found; did you mean 'fc2'? ...
    """

    # KeyError would print the message in quotation marks.
    __str__ = Exception.__str__

    @classmethod
    def of(cls, name: str, known: Iterable[str], kind: str) -> UnknownLayerError:
        """Name the layer, the closest known one and the known ones of this ``kind``."""
        known = list(known)
        close = difflib.get_close_matches(name.partition(":")[0], known, n=1, cutoff=0.5)
        guess = f"; did you mean {close[0]!r}?" if close else ";"
        listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        return cls(f"layer {name!r} not found{guess} {kind}: {listed or 'none'}")


class NonFiniteError(ValueError):
    """A NaN or an infinity where a finite number is needed.

    Examples
    --------
    >>> xe.evaluate_groups(model, [(images / 0, labels)])
    Traceback (most recent call last):
        ...
    xai_edit.core.errors.NonFiniteError: data: batch 0 has inputs that are NaN or infinite
    """


class NoEditError(ValueError):
    """No edit does what is asked: the feature moves no class, or no share reaches the bound.

    Examples
    --------
    >>> unrelated = torch.arange(240) // 12 % 2
    >>> xe.FictitiousClass().plan(model, data, attribute=unrelated)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    xai_edit.core.errors.NoEditError: attribute: no class is moved; ...
    """


class EditMismatchError(ValueError):
    """An edit that does not fit the model it is applied to or undone on.

    Examples
    --------
    >>> edit = xe.LogitMask().plan(model, data, target=1)
    >>> edit.undo(model)
    Traceback (most recent call last):
        ...
    xai_edit.core.errors.EditMismatchError: the model does not hold this edit: see 'fc2.bias'
    """


class EditFileError(ValueError):
    """A file that is not a whole, unchanged edit.

    Examples
    --------
    >>> xe.score_units(model, data, xe.Activation()).save("scores.safetensors")
    >>> xe.ModelEdit.load("scores.safetensors")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    xai_edit.core.errors.EditFileError: scores.safetensors: ...
    """
