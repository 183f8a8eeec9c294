"""The logits before a model's final softmax or sigmoid, followed through a forward pass."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FINAL = frozenset(["softmax", "log_softmax", "sigmoid", "expit", "softplus", "logsigmoid"])
"""Operations before whose last call the logits are taken, with the order of classes kept."""
EXCLUSIVE = ("softmax", "log_softmax")
_PROBABILITIES = (*EXCLUSIVE, "sigmoid", "expit")
_MOVED = """
    view reshape flatten squeeze unsqueeze permute transpose movedim contiguous clone detach to
    float double getitem select
"""
_CHANGING_SHAPE = frozenset(_MOVED.split())
_PASSED = frozenset(["clamp", "log", "dropout"])
"""Operations that may follow it and keep the order of classes."""
_CONSTANT = frozenset(["ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "tensor"])
_SEEN_FIRST = FINAL | _CONSTANT  # before anything is followed
KEPT = 4  # calls that may be the last: a model may return several outputs


@dataclass(eq=False)
class _Call:
    """A call whose output may be the model's, and what goes in (with its version)."""

    name: str
    output: Tensor
    before: Tensor
    version: int


_FOLLOWING: ContextVar[_Following | None] = ContextVar("following", default=None)
_NOTED: ContextVar[dict[str, None] | None] = ContextVar("noted", default=None)


class _Following(TorchFunctionMode):
    def __init__(self, known: Any = None) -> None:
        super().__init__()
        self.kept: deque[_Call] = deque(maxlen=KEPT)
        for one in tensors_in(known):
            if (found := _mark(one)) is not None:
                self.keep(found[0], one, found[1])

    def keep(self, name: str, output: Tensor, before: Tensor) -> None:
        self.kept.append(_Call(name, output, before, _version(before)))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if not self.kept and _name(func) not in _SEEN_FIRST:
            return func(*args, **named)
        before = args[0] if args else named.get("input")
        if _name(func) in FINAL and _in_place(func) and isinstance(before, Tensor):
            before = before.clone()  # the operation overwrites it
        output = func(*args, **named)
        self.see(func, (before, *args[1:]), named, output)
        return output

    def see(self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        """Keep an operation's input if it is one of `FINAL`, or only reshapes the output of one."""
        if not isinstance(output, Tensor):
            return
        name, given = _name(func), args[0] if args else None
        if name in _CONSTANT:
            output._xai_edit_constant = True  # type: ignore[attr-defined]
            return
        if (made := name if name in _PROBABILITIES else _made_of((args, named))) is not None:
            output._xai_edit_made_of = made  # type: ignore[attr-defined]
        if name in FINAL and isinstance(given, Tensor):
            self.keep(name, output, given)
            return
        found = next((one for one in self.kept if one.output is given), None)
        follows = name in _CHANGING_SHAPE or name in _PASSED
        if found is not None and follows and not _in_place(func):
            if output is given:  # such as one that is flat already
                return
            before = found.before
            if name in _CHANGING_SHAPE:
                before = func(before, *args[1:], **named)
            one_class = output.ndim < 2 or output.shape[1] == 1
            if not (name in ("getitem", "select") and found.name in EXCLUSIVE and one_class):
                self.keep(found.name, output, before)
        elif any(one.output is output for one in self.kept):  # overwritten
            kept = [one for one in self.kept if one.output is not output]
            self.kept = deque(kept, maxlen=KEPT)

    def mark(self, output: Any) -> None:
        """Store on the tensors of a model's output what they are computed from."""
        tensors = [*tensors_in(output)]
        for one in self.kept:
            if any(one.output is each for each in tensors) and one.version == _version(one.before):
                one.output._xai_edit_before = (one.name, one.before)  # type: ignore[attr-defined]


@contextmanager
def following(known: Any = None) -> Iterator[_Following]:
    """Follow the operations of a forward pass, from the tensors in ``known`` on."""
    mode = _Following(known)
    token = _FOLLOWING.set(mode)
    try:
        with mode:
            yield mode
    finally:
        _FOLLOWING.reset(token)


def run_by_rule(func: Any, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
    """Report an operation that a relevance rule ran, which hides it from the mode around it."""
    if (mode := _FOLLOWING.get()) is not None:
        mode.see(func, args, named, output)


def before_final(output: Any) -> Any:
    """Return what goes into the operation that gave a model's output, or the output itself."""
    if (found := _mark(output)) is None:
        return output
    note_final(found[0])
    return found[1]


def made_of_final(output: Tensor) -> str | None:
    """Return the softmax or sigmoid that an output is computed from, by constants alone."""
    return getattr(output, "_xai_edit_made_of", None)


def _made_of(given: Any) -> str | None:
    """Return the softmax or sigmoid that all tensors among an operation's arguments are made of.

    Tensors of constants do not count.
    """
    name = None
    for one in tensors_in(given):
        if not hasattr(one, "_xai_edit_constant"):
            if (made := made_of_final(one)) is None:
                return None  # at most operations, at their first argument
            name = name or made
    return name


def final_name(output: Any) -> str | None:
    """Return the name of the final softmax, sigmoid or softplus of a model's output."""
    found = _mark(output)
    return None if found is None else found[0]


def detached(output: Tensor) -> Tensor:
    """Return a detached tensor that still knows its final operation."""
    result = output.detach()
    if (found := _mark(output)) is not None:
        result._xai_edit_before = (found[0], found[1].detach())  # type: ignore[attr-defined]
    return result


@contextmanager
def noted_finals() -> Iterator[dict[str, None]]:
    """Collect the names of final operations before which outputs are taken in this context."""
    noted: dict[str, None] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def note_final(name: str) -> None:
    """Add a name to those of `noted_finals`."""
    if (noted := _NOTED.get()) is not None:
        noted[name] = None


def without_final_module(model: nn.Module, path: str, calls: int) -> None:
    """Make the last of a final activation module's calls hand on its input.

    For passes under hooks that wrap what modules return; the guard around it restores the model. A
    final operation that a larger module runs is left to `following`.
    """
    module = model.get_submodule(path)
    if type(module).__module__ != "torch.nn.modules.activation" or [*module.children()]:
        return
    if path and calls == 1 and not module._forward_hooks and not module._forward_pre_hooks:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = nn.Dropout(0.0)  # known to Captum
        return
    done = 0

    def last(_: nn.Module, given: Any, output: Any) -> Any:
        nonlocal done
        done = (done + 1) % calls
        return output if done else given[0]

    module.register_forward_hook(last, prepend=True)


def tensors_in(output: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns: itself, or in collections and attributes."""
    if isinstance(output, Tensor):
        yield output
        return
    parts: Any = ()
    if isinstance(output, (tuple, list)):
        parts = output
    elif isinstance(output, Mapping):
        parts = output.values()
    elif not isinstance(output, nn.Module):
        parts = getattr(output, "__dict__", {}).values()
    for part in parts if depth else ():
        yield from tensors_in(part, depth - 1)


def _mark(output: Any) -> tuple[str, Tensor] | None:
    return getattr(output, "_xai_edit_before", None) if isinstance(output, Tensor) else None


@functools.lru_cache(1024)
def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", "")).strip("_").removeprefix("special_")


def _in_place(func: Callable[..., Any]) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name.endswith("_") and not name.startswith("_")


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def is_compiled(model: nn.Module) -> bool:
    """Return whether a part of a model runs compiled, which no function mode may look into."""
    inner: list[tuple[nn.Module, Any]] = [
        (one, one._orig_mod) for one in model.modules() if hasattr(one, "_orig_mod")
    ]
    # Under the guard it runs the module inside as it is written.
    return any(vars(one).get("forward") != module.__call__ for one, module in inner)


def mark_unfollowed(model: nn.Module, output: Any) -> None:
    """Mark what may be probabilities of a softmax or sigmoid inside TorchScript, by the numbers."""
    scripts = [one for one in model.modules() if isinstance(one, torch.jit.ScriptModule)]
    for each in tensors_in(output) if scripts else ():
        if each.is_floating_point() and bool(((each >= 0) & (each <= 1)).all()):
            graphs = "".join(str(getattr(one, "inlined_graph", "")) for one in scripts)
            if any(f"aten::{name}" in graphs for name in _PROBABILITIES):
                each._xai_edit_made_of = "softmax or sigmoid"  # type: ignore[attr-defined]
