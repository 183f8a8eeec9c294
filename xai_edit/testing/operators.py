"""``check_operator``: what every operator promises, checked by planning with it."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.edits.edit import ModelEdit
from xai_edit.errors import EditFileError, EditMismatchError
from xai_edit.testing.example import Example, small_example
from xai_edit.testing.untouched import Fuse, bits, lived_in, times, watched

Plan: TypeAlias = Callable[[nn.Module, Any], ModelEdit]
BATCH = 40
TARGET = 1
"""The class that a plan is asked for where it has to be told one."""


def check_operator(
    operator: Any,
    plan: Plan | None = None,
    *,
    example: Callable[[torch.dtype], Example] = small_example,
) -> None:
    """Check that an operator keeps its promises; it takes about as long as some twelve plans.

    - Planning leaves the model, the data and the random generators of the process as they were:
      hooks, parameters, buffers, gradients, ``requires_grad``, training modes, attributes. So it
      does where reading the data or a forward pass of the model raises.
    - The same model and data give the same edit, bit for bit; hooks, gradients of an earlier step,
      frozen parameters and training mode, with dropout, make no difference.
    - The edit changes on the model what it says and nothing else, and undoing it restores every
      bit. It refuses the model where it is applied already, one whose weights differ by the last
      bit, and one of another kind.
    - A saved edit is loaded as it was. Its origin is JSON and names the operator.

    Parameters
    ----------
    operator : object
        What to check.
    plan : callable, optional
        Plans with it: ``plan(model, data)`` gives a `ModelEdit`. When left out,
        ``operator.plan(model, data)``, with ``target=1`` where it has to be given a target.
    example : callable
        Gives the model and data, for operators that need others than `small_example` gives. Data
        is a list of batches ``(inputs, labels, groups)``.

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


class _Batches:
    """Batches that can be read again and again, and light a fuse at each."""

    def __init__(self, batches: list[tuple[Tensor, ...]], fuse: Fuse) -> None:
        self.batches, self.fuse = batches, fuse

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.batches:
            self.fuse()
            yield batch


@dataclass
class _Check:
    who: str
    plan: Plan
    example: Example

    def broken(self, sentence: str) -> AssertionError:
        return AssertionError(f"{self.who}: {sentence}")

    def planned(self, model: nn.Module, data: Any = None) -> ModelEdit:
        edit = self.plan(model, self.example.batches(BATCH) if data is None else data)
        if not isinstance(edit, ModelEdit):
            raise self.broken(f"plans a {type(edit).__name__}, not a ModelEdit")
        return edit

    def leaves_no_trace(self) -> None:
        passes, reads = Fuse(), Fuse()
        self._untouched("", passes, reads)
        for at in times(reads.count):
            fuse = Fuse(at)
            self._untouched(f"when reading batch number {at} of the data raises", Fuse(), fuse)
        for at in times(passes.count):
            fuse = Fuse(at)
            self._untouched(f"when the model raises in its forward pass number {at}", fuse, Fuse())

    def _untouched(self, when: str, passes: Fuse, reads: Fuse) -> None:
        """Plan on a model as users have them, and raise where that leaves a trace."""
        model = lived_in(self.example, passes, training=True)
        batches = [tuple(part.clone() for part in batch) for batch in self.example.batches(BATCH)]
        changed = watched(model, [part for batch in batches for part in batch])
        hidden = False
        try:
            self.planned(model, _Batches(batches, reads))
            hidden = passes.blown or reads.blown
        except Exception:
            if not (passes.blown or reads.blown):
                raise
        if (what := changed()) is not None:
            raise self.broken(f"planning {what} {when}".strip())
        if hidden:
            raise self.broken(f"plans an edit {when}, and hides the error")

    def repeats_itself(self) -> ModelEdit:
        changed = watched(model := deepcopy(self.example.model), generators=False)
        first = self.planned(model)
        if (what := changed()) is not None:
            raise self.broken(f"planning {what}")
        second = self.planned(deepcopy(self.example.model))
        self._same(first, second, "planning again with the same model and data gives other")
        used = self.planned(lived_in(self.example, Fuse(), training=True))
        self._same(
            first,
            used,
            "a model in training mode, with hooks, gradients and a frozen parameter, gives other",
        )
        if not first.changes:
            raise self.broken(
                "plans an edit without changes, of which nothing can be checked; give a plan or an "
                "example that it has something to do on"
            )
        return first

    def _same(self, mine: ModelEdit, other: ModelEdit, sentence: str) -> None:
        if [*mine.changes] != [*other.changes]:
            raise self.broken(f"{sentence} names: {[*mine.changes]} and {[*other.changes]}")
        for name, change in mine.changes.items():
            theirs = other.changes[name]
            for part in ("index", "old", "new"):
                left, right = (getattr(one, part) for one in (change, theirs))
                if left.dtype != right.dtype or bits(left) != bits(right):
                    raise self.broken(f"{sentence} values: {part} of {name!r}")
            if change.shape != theirs.shape:
                raise self.broken(f"{sentence} shapes: {name!r}")
        if mine.origin != other.origin:
            keys = [key for key in mine.origin if mine.origin[key] != other.origin.get(key)]
            raise self.broken(f"{sentence} origins: see {keys or [*other.origin]}")

    def changes_what_it_says(self, edit: ModelEdit) -> None:
        model = lived_in(self.example, Fuse())
        changed = watched(model)
        expected = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        for name, change in edit.changes.items():
            if name not in expected or tuple(expected[name].shape) != tuple(change.shape):
                raise self.broken(f"the edit changes {name!r}, which the model does not have so")
            if not (change.index[1:] > change.index[:-1]).all():
                raise self.broken(f"the edit names entries of {name!r} twice or not in their order")
            flat = expected[name].flatten()
            flat[change.index] = change.new.to(flat)
            expected[name] = flat.view(change.shape)
        self._try(edit.apply, model, "the edit does not fit the model it was planned on")
        for name, tensor in _tensors(model).items():
            if bits(tensor) != bits(expected[name]):
                raise self.broken(f"applying the edit gives {name!r} other values than it says")
        self._refused(edit.apply, model, "a model that holds it already")
        self._try(edit.undo, model, "the edit cannot be undone")
        if (what := changed()) is not None:
            raise self.broken(f"applying and undoing the edit {what}")
        self._refused(edit.undo, model, "to be undone on a model that does not hold it")

    def refuses_other_models(self, edit: ModelEdit) -> None:
        for name, change in edit.changes.items():
            other = deepcopy(self.example.model)
            with torch.no_grad():
                tensor = _tensors(other)[name]
                at = torch.unravel_index(change.index[:1].to(tensor.device), change.shape)
                tensor[at] = torch.nextafter(tensor[at], torch.full_like(tensor[at], torch.inf))
            self._refused(edit.apply, other, f"a model whose {name!r} differs in one bit")
        self._refused(edit.apply, nn.Identity(), "a model without the parameters that it changes")

    def _try(self, act: Callable[[nn.Module], object], model: nn.Module, sentence: str) -> None:
        try:
            act(model)
        except EditMismatchError as problem:
            raise self.broken(f"{sentence}: {problem}") from problem

    def _refused(self, act: Callable[[nn.Module], object], model: nn.Module, what: str) -> None:
        changed = watched(model)
        sentence = f"the edit does not refuse {what}"
        try:
            act(model)
        except EditMismatchError:
            if (trace := changed()) is not None:
                raise self.broken(f"the edit refuses {what}, but {trace}") from None
        except Exception as problem:
            raise self.broken(
                f"{sentence} with EditMismatchError, but raises {type(problem).__name__}: {problem}"
            ) from problem
        else:
            raise self.broken(sentence)

    def survives_a_file(self, edit: ModelEdit) -> None:
        origin = edit.origin
        if not isinstance(origin.get("operator"), str):
            raise self.broken("the edit's origin does not name its operator")
        try:
            read = json.loads(json.dumps(origin, allow_nan=False))
        except (TypeError, ValueError) as problem:
            raise self.broken(f"the edit's origin is not JSON: {problem}") from problem
        for key, value in origin.items():
            if read.get(key) != value:
                raise self.broken(
                    f"the edit's origin is not JSON: {key!r} comes back as {read.get(key)!r}, it "
                    f"was {value!r}"
                )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "edit.safetensors")
            try:
                edit.save(path)
                loaded = ModelEdit.load(path)
            except EditFileError as problem:
                raise self.broken(f"the edit cannot be saved and loaded: {problem}") from problem
            self._same(edit, loaded, "saving and loading the edit gives other")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}
