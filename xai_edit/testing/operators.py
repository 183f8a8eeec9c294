"""``check_operator``: plans with an operator and raises where it breaks a promise."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.core.errors import EditFileError, EditMismatchError
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.testing.example import Example, small_example
from xai_edit.testing.untouched import Fuse, Promises, bits, lived_in, times

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
    """
    who = getattr(operator, "__qualname__", type(operator).__qualname__)
    check = _Check(who, _plan_of(operator) if plan is None else plan, example(torch.float32))
    edit = check.repeats_itself()
    check.leaves_no_trace()
    check.changes_what_it_says(edit)
    check.refuses_other_models(edit)
    check.survives_a_file(edit)


def _plan_of(operator: Any) -> Plan:
    plan = getattr(operator, "plan", None)
    if not callable(plan):
        raise TypeError(
            f"operator: {operator!r} has no method plan; give plan=, a function of a model and data"
        )
    target = inspect.signature(plan).parameters.get("target")
    required = target is not None and target.default is inspect.Parameter.empty
    return partial(plan, target=TARGET) if required else plan


@dataclass
class _Batches:
    """Batches that can be read again and again, and call a fuse at each."""

    batches: list[tuple[Tensor, ...]]
    fuse: Fuse

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.batches:
            self.fuse()
            yield batch


@dataclass
class _Check(Promises):
    plan: Plan
    example: Example

    def planned(self, model: nn.Module, data: Any = None) -> ModelEdit:
        edit = self.plan(model, self.example.batches(BATCH) if data is None else data)
        self.require(isinstance(edit, ModelEdit), f"plans a {type(edit).__name__}, not a ModelEdit")
        return edit

    def repeats_itself(self) -> ModelEdit:
        check = self.unchanged(model := deepcopy(self.example.model), generators=False)
        first = self.planned(model)
        check("planning")
        again = self.planned(deepcopy(self.example.model))
        self.same(first, again, "planning again with the same model and data gives other")
        used = self.planned(lived_in(self.example, Fuse(), training=True))
        what = "a model in training mode, with hooks, gradients and a frozen parameter, gives other"
        self.same(first, used, what)
        self.require(
            bool(first.changes),
            "plans an edit without changes, of which nothing can be checked; give a plan or an "
            "example that it has something to do on",
        )
        return first

    def same(self, mine: ModelEdit, other: ModelEdit, sentence: str) -> None:
        names, others = [*mine.changes], [*other.changes]
        self.require(names == others, f"{sentence} names: {names} and {others}")
        for name, change in mine.changes.items():
            theirs = other.changes[name]
            self.require(change.shape == theirs.shape, f"{sentence} shapes: {name!r}")
            for part in ("index", "old", "new"):
                left, right = getattr(change, part), getattr(theirs, part)
                alike = left.dtype == right.dtype and bits(left) == bits(right)
                self.require(alike, f"{sentence} values: {part} of {name!r}")
        what = f"{sentence} origins: {mine.origin} and {other.origin}"
        self.require(mine.origin == other.origin, what)

    def leaves_no_trace(self) -> None:
        passes, reads = Fuse(), Fuse()
        self.untouched("", passes, reads)
        for at in times(reads.count):
            when = f"when reading batch number {at} of the data raises"
            self.untouched(when, Fuse(), Fuse(at))
        for at in times(passes.count):
            when = f"when the model raises in its forward pass number {at}"
            self.untouched(when, Fuse(at), Fuse())

    def untouched(self, when: str, passes: Fuse, reads: Fuse) -> None:
        """Plan on a model with hooks and gradients, and raise where that leaves a trace."""
        model = lived_in(self.example, passes, training=True)
        batches = self.example.batches(BATCH)
        check = self.unchanged(model, [part for batch in batches for part in batch])
        hidden = False
        try:
            self.planned(model, _Batches(batches, reads))
            hidden = passes.blown or reads.blown
        except Exception:
            if not (passes.blown or reads.blown):
                raise
        check("planning", when)
        self.require(not hidden, f"plans an edit {when}, and hides the error")

    def changes_what_it_says(self, edit: ModelEdit) -> None:
        check = self.unchanged(model := lived_in(self.example, Fuse()))
        expected = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        for name, change in edit.changes.items():
            known = name in expected and tuple(expected[name].shape) == tuple(change.shape)
            self.require(known, f"the edit changes {name!r}, which the model does not have so")
            rising = bool((change.index[1:] > change.index[:-1]).all())
            what = f"the edit names entries of {name!r} twice or not in their order"
            self.require(rising, what)
            expected[name].view(-1)[change.index] = change.new.to(expected[name])
        with self.naming("the edit does not fit the model it was planned on", EditMismatchError):
            edit.apply(model)
        for name, tensor in _tensors(model).items():
            what = f"applying the edit gives {name!r} other values than it says"
            self.require(bits(tensor) == bits(expected[name]), what)
        self.refused(edit.apply, model, "a model that holds it already")
        with self.naming("the edit cannot be undone", EditMismatchError):
            edit.undo(model)
        check("applying and undoing the edit")
        self.refused(edit.undo, model, "to be undone on a model that does not hold it")

    def refuses_other_models(self, edit: ModelEdit) -> None:
        for name, change in edit.changes.items():
            other = deepcopy(self.example.model)
            with torch.no_grad():
                values = _tensors(other)[name].view(-1)
                first = values[change.index[0]]
                first.copy_(first.nextafter(torch.full_like(first, torch.inf)))
            self.refused(edit.apply, other, f"a model whose {name!r} differs in one bit")
        self.refused(edit.apply, nn.Identity(), "a model without the parameters that it changes")

    def refused(self, act: Callable[[nn.Module], object], model: nn.Module, what: str) -> None:
        check, found = self.unchanged(model), ""
        try:
            act(model)
        except EditMismatchError:
            return check(f"the edit refuses {what}, but")
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            found = f" with EditMismatchError, but raises {error}"
        raise AssertionError(f"{self.who}: the edit does not refuse {what}{found}")

    def survives_a_file(self, edit: ModelEdit) -> None:
        named = isinstance(edit.origin.get("operator"), str)
        self.require(named, "the edit's origin does not name its operator")
        with self.naming("the edit's origin is not JSON", TypeError, ValueError):
            read = json.loads(json.dumps(edit.origin, allow_nan=False))
        for key, value in edit.origin.items():
            found = read.get(key)
            what = f"{key!r} comes back as {found!r}, it was {value!r}"
            self.require(found == value, f"the edit's origin is not JSON: {what}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "edit.safetensors")
            with self.naming("the edit cannot be saved and loaded", EditFileError):
                edit.save(path)
                loaded = ModelEdit.load(path)
            self.same(edit, loaded, "saving and loading the edit gives other")

    @contextmanager
    def naming(self, sentence: str, *errors: type[Exception]) -> Iterator[None]:
        """Turn errors into the promise that they break."""
        try:
            yield
        except errors as problem:
            raise AssertionError(f"{self.who}: {sentence}: {problem}") from problem


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}
