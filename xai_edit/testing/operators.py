"""``check_operator``: plans with an operator and raises where it breaks a promise."""

from __future__ import annotations

import inspect
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.errors import EditFileError, EditMismatchError
from xai_edit.edits.model_edit import PARTS, ModelEdit, tensors_of
from xai_edit.testing.example import Example, small_example
from xai_edit.testing.untouched import (
    Fuse,
    attempted,
    bits,
    lived_in,
    naming,
    require,
    shows_errors,
    unchanged,
)

Plan: TypeAlias = Callable[[nn.Module, Any], ModelEdit]
BATCH = 40
TARGET = 1  # the class that an edit is planned for where an operator needs one


def check_operator(
    operator: Any,
    plan: Plan | None = None,
    *,
    example: Callable[[torch.dtype], Example] = small_example,
) -> None:
    """Check that an operator keeps its promises; it takes about as long as some twelve plans.

    - Planning leaves the model, the data and the random generators of the process as they were,
      also where reading the data or a forward pass of the model raises.
    - The same model and data give the same edit, bit for bit; hooks, gradients of an earlier step,
      frozen parameters and training mode, with dropout, make no difference.
    - The edit changes on the model what it says and nothing else, and undoing it restores every
      bit. It refuses the model where it is applied already, one whose weights differ by the last
      bit, and one of another kind.
    - A saved edit is loaded as it was. Its origin is JSON and names the operator.

    Parameters
    ----------
    operator : object
    plan : callable, optional
        Returns a `ModelEdit` for a model and data, a list of batches ``(inputs, labels, groups)``.
        Default: ``operator.plan``, with ``target=1`` where it requires a target.
    example : callable
        Returns the model and data, for operators that need others than those of `small_example`.

    Raises
    ------
    AssertionError
        If a promise is broken; the message is one sentence that names the layer or parameter.
    TypeError
        If the operator has no ``plan`` and none is given.

    Examples
    --------
    >>> xe.testing.check_operator(xe.SingleWeight())
    """
    if plan is None:
        plan = getattr(operator, "plan", None)
        if not callable(plan):
            raise TypeError(
                f"operator: {operator!r} has no method plan; give plan=, a function of a model and "
                "data"
            )
        target = inspect.signature(plan).parameters.get("target")
        if target is not None and target.default is target.empty:
            plan = partial(plan, target=TARGET)
    with naming(getattr(operator, "__qualname__", type(operator).__qualname__)):
        shown = example(torch.float32)
        edit = _repeated(plan, shown)
        _leaves_no_trace(plan, shown)
        for keeps in (_changes_what_it_says, _refuses_other_models, _survives_a_file):
            keeps(edit, shown)


def _planned(plan: Plan, model: nn.Module, data: Any) -> ModelEdit:
    edit = plan(model, data)
    require(isinstance(edit, ModelEdit), f"plans a {type(edit).__name__}, not a ModelEdit")
    return edit


def _repeated(plan: Plan, example: Example) -> ModelEdit:
    """Return the edit that an operator plans, the same each time."""
    with unchanged(model := deepcopy(example.model), words="planning {}", generators=False):
        first = _planned(plan, model, example.batches(BATCH))
    used = "a model in training mode, with hooks, gradients and a frozen parameter, gives other"
    for model, sentence in (
        (deepcopy(example.model), "planning again with the same model and data gives other"),
        (lived_in(example, Fuse(), training=True), used),
    ):
        _require_same(first, _planned(plan, model, example.batches(BATCH)), sentence)
    require(
        bool(first.changes),
        "plans an edit without changes, of which nothing can be checked; give a plan or an "
        "example that it has something to do on",
    )
    return first


def _require_same(mine: ModelEdit, other: ModelEdit, sentence: str) -> None:
    names, others = [*mine.changes], [*other.changes]
    require(names == others, f"{sentence} names: {names} and {others}")
    for name, change in mine.changes.items():
        theirs = other.changes[name]
        require(change.shape == theirs.shape, f"{sentence} shapes: {name!r}")
        for part in PARTS:
            left, right = getattr(change, part), getattr(theirs, part)
            alike = left.dtype == right.dtype and bits(left) == bits(right)
            require(alike, f"{sentence} values: {part} of {name!r}")
    require(mine.origin == other.origin, f"{sentence} origins: {mine.origin} and {other.origin}")


def _leaves_no_trace(plan: Plan, example: Example) -> None:
    def attempt(when: str, fuse: Fuse, *, reading: bool) -> Exception | None:
        """Plan on a model with hooks and gradients; the fuse is in its passes or in the data."""
        passes, reads = (Fuse(), fuse) if reading else (fuse, Fuse())
        model, batches = lived_in(example, passes, training=True), example.batches(BATCH)
        act = partial(_planned, plan, model, _Batches(batches, reads))
        raised = attempted(act, model, itertools.chain(*batches), f"planning {{}} {when}")
        if raised is not None and not fuse.blown:
            raise raised
        return raised

    by_data, by_model = (partial(attempt, reading=reading) for reading in (True, False))
    shows_errors(by_data, "plans an edit", "reading batch number {} of the data raises")
    shows_errors(by_model, "plans an edit", "the model raises in its forward pass number {}")


class _Batches:
    """Batches that can be read again and again, and call a fuse at each."""

    def __init__(self, batches: list[tuple[Tensor, ...]], fuse: Fuse) -> None:
        self.batches, self.fuse = batches, fuse

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.batches:
            self.fuse()
            yield batch


def _changes_what_it_says(edit: ModelEdit, example: Example) -> None:
    model = lived_in(example, Fuse())
    expected = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    for name, change in edit.changes.items():
        known = name in expected and tuple(expected[name].shape) == tuple(change.shape)
        require(known, f"the edit changes {name!r}, which the model does not have so")
        rising = bool((change.index[1:] > change.index[:-1]).all())
        require(rising, f"the edit names entries of {name!r} twice or not in their order")
        expected[name].view(-1)[change.index] = change.new.to(expected[name])
    with unchanged(model, words="applying and undoing the edit {}"):
        with naming("the edit does not fit the model it was planned on", EditMismatchError):
            edit.apply(model)
        for name, tensor in tensors_of(model).items():
            what = f"applying the edit gives {name!r} other values than it says"
            require(bits(tensor) == bits(expected[name]), what)
        _require_refused(edit.apply, model, "a model that holds it already")
        with naming("the edit cannot be undone", EditMismatchError):
            edit.undo(model)
    _require_refused(edit.undo, model, "to be undone on a model that does not hold it")


def _refuses_other_models(edit: ModelEdit, example: Example) -> None:
    for name, change in edit.changes.items():
        other = deepcopy(example.model)
        with torch.no_grad():
            values = tensors_of(other)[name].view(-1)
            first = values[change.index[0]]
            first.copy_(first.nextafter(torch.full_like(first, torch.inf)))
        _require_refused(edit.apply, other, f"a model whose {name!r} differs in one bit")
    _require_refused(edit.apply, nn.Identity(), "a model without the parameters that it changes")


def _require_refused(act: Callable[[nn.Module], object], model: nn.Module, what: str) -> None:
    with unchanged(model, words=f"the edit refuses {what}, but {{}}"):
        try:
            act(model)
        except EditMismatchError:
            return
        except Exception as problem:
            what += f" with EditMismatchError, but raises {type(problem).__name__}: {problem}"
        raise AssertionError(f"the edit does not refuse {what}")


def _survives_a_file(edit: ModelEdit, example: Example) -> None:
    named = isinstance(edit.origin.get("operator"), str)
    require(named, "the edit's origin does not name its operator")
    with naming("the edit's origin is not JSON", AssertionError, TypeError, ValueError):
        read = json.loads(json.dumps(edit.origin, allow_nan=False))
        for key, value in edit.origin.items():
            found = read.get(key)
            require(found == value, f"{key!r} comes back as {found!r}, it was {value!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "edit.safetensors")
        with naming("the edit cannot be saved and loaded", EditFileError):
            edit.save(path)
            loaded = ModelEdit.load(path)
    _require_same(edit, loaded, "saving and loading the edit gives other")
