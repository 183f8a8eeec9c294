"""A recorder of one forward pass: modules, operations, and the tensors between them."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from xai_edit.core.final_operation import detached, final_name
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    TRANSPOSED,
    WEIGHTED,
    differentiable,
    embeddings_in_graph,
    first_tensor,
    run,
)
from xai_edit.core.outputs import tensor_of
from xai_edit.core.precision import HALF

LINEAR = frozenset(["linear", *(f"conv{of}{n}d" for of in ("", "_transpose") for n in (1, 2, 3))])
"""Names of the operations that linear and convolution layers run."""


def operation_name(function: Callable[..., Any]) -> str:
    """Return what an operation is called in all its forms: ``add`` for ``+``, ``+=``, ``add_``."""
    name: str = getattr(function, "__name__", type(function).__name__).strip("_")
    if name == "get":  # an attribute, such as x.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return _ALIASES.get(name, name)


_ALIASES = {
    **{f"{form}{name}": name for form in ("i", "r") for name in ("add", "mul")},
    **{"isub": "sub", "subtract": "sub", "multiply": "mul", "ipow": "pow", "clip": "clamp"},
    "absolute": "abs",
    **dict.fromkeys(("truediv", "itruediv", "idiv", "divide", "true_divide"), "div"),
    "rdiv": "rtruediv",
}


def source_line() -> str:
    """Return the file and line of the model's source that runs the current operation."""
    ours = (f"{torch.__path__[0]}{os.sep}", str(Path(__file__).parents[1]))  # not torchvision
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@dataclass(frozen=True)
class Operation:
    """An operation through which the output depends on the data.

    ``module`` is the path of the innermost module that runs it, ``inside`` those of all modules
    around it, outermost first; ``joins`` says whether several of its inputs depend on the data;
    ``line`` is where the model's source runs it.
    """

    name: str
    module: str
    inside: tuple[str, ...]
    joins: bool = False
    line: str = ""


@dataclass
class Trace:
    """One forward pass of one sample.

    Attributes
    ----------
    calls : Counter
        How often each module was called, by path.
    order : list of str
        Convolution and linear layers in the order of their calls.
    operations : list of Operation
    entered, left : dict
        The number of operations before a module was first entered, and left.
    fed : set of str
        Modules whose input depends on the data; a table of position biases has others.
    unused : set of str
        Modules whose output depends on the data, but does not reach the model's output.
    bottlenecks : set of str
        Modules through whose output every path from the data to the model's output leads.
    weighted : dict
        How many calls of convolution and linear layers were over when a module was first left.
    values : dict of Value or str
        The output of each layer in its first call, by its name (`INPUT_SUFFIX` for inputs); the
        name of its type where it is no tensor.
    sample, output : Tensor, object
        The model's input and output for one sample.
    norms : dict
        Layer → the batch norm that alone reads its output.
    final : Operation or None
        The softmax, sigmoid or softplus that the model ends in; ``operations`` end before it.
    halved : str or None
        A module in which something is computed in half precision.
    axes : xai_edit.core.axes.Axes, optional
        The axes of all tensors, where they are followed.
    """

    calls: Counter[str] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    entered: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    fed: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    bottlenecks: set[str] = field(default_factory=set)
    weighted: dict[str, int] = field(default_factory=dict)
    values: dict[str, Value | str] = field(default_factory=dict)
    sample: Any = None
    output: Any = None
    norms: dict[str, str] = field(default_factory=dict)
    final: Operation | None = None
    halved: str | None = None
    axes: Any = None

    def leave_out_final(self, name: str | None) -> None:
        """Take the final operation of a name, and what follows it, off the operations."""
        at = [i for i, one in enumerate(self.operations) if one.name == name]
        if at:
            self.final = self.operations[at[-1]]
            del self.operations[at[-1] :]

    def after(self, layers: Sequence[str]) -> list[Operation]:
        """Return the operations after the earliest of some layers, or all without layers."""
        starts = []
        for name in layers:
            over = self.entered if name.endswith(INPUT_SUFFIX) else self.left
            starts.append(over.get(name.removesuffix(INPUT_SUFFIX), len(self.operations)))
        return self.operations[min(starts, default=0) :]

    def readers(self, layer: str) -> list[str]:
        """Return the modules that get a layer's output as it is, in the order of their calls."""
        made = self.values.get(layer)
        if not isinstance(made, Value):
            return []
        return [
            name.removesuffix(INPUT_SUFFIX)
            for name, value in self.values.items()
            if name.endswith(INPUT_SUFFIX)
            and isinstance(value, Value)
            and value.number == made.number
        ]


@dataclass(frozen=True)
class Value:
    """The number of a tensor with its content, its shape and, if followed, its axes' numbers."""

    number: int
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()


def trace(model: nn.Module, inputs: Inputs, *, axes: Any = None) -> Trace:
    """Record a forward pass of a batch's first sample; the model is left exactly as it was.

    ``axes`` (`xai_edit.core.axes.Axes`) also follows the axes of all tensors.

    Raises
    ------
    ValueError
        If the model does not take such inputs.
    """
    found = Trace(axes=axes)
    recorder = _Recorder(found)
    full_precision = torch.autocast(inputs.device.type, enabled=False)
    with torch.inference_mode(False), full_precision, preserved(model), torch.enable_grad():
        model.requires_grad_(False)  # so that a graph means dependence on the data
        embeddings_in_graph(model)
        for name, module in model.named_modules():
            recorder.watch(name, module)
        sample = differentiable(inputs[:1])
        with recorder:
            output = run(model, sample)
    found.sample, found.output = sample.detach(), tree_map_only(Tensor, detached, output)
    found.leave_out_final(final_name(tensor_of(output)))
    reached = {*_backwards(tree_leaves(output))}
    on_all_paths = _on_all_paths(_backwards([tensor_of(output)]))
    for name, nodes in recorder.nodes.items():
        if reached and nodes and not reached.intersection(nodes):
            found.unused.add(name)
        if on_all_paths.intersection(nodes):
            found.bottlenecks.add(name)
    found.norms = recorder.norms()
    return found


class _Recorder(TorchFunctionMode):
    def __init__(self, found: Trace) -> None:
        super().__init__()
        self.found = found
        self.stack: list[str] = []
        self.kept: list[Any] = []  # an id is only good while its tensor lives
        self.seen: dict[int, Tensor] = {}  # all that came out of an operation
        self.numbers: dict[tuple[int, int], int] = {}
        self.made: dict[int, str] = {}  # number of a linear operation's output → its layer
        self.read: Counter[int] = Counter()  # how many operations read a tensor, by number
        self.nodes: dict[str, list[Any]] = {}
        self.modules: dict[str, nn.Module] = {}

    def followed(self, output: Any) -> Any:
        """Remember the tensors in an operation's output, and return the output."""
        for value in tree_leaves(output):
            if _depends(value):
                self.seen[id(value)] = value
        return output

    def unseen(self, given: Sequence[Any]) -> None:
        """Record what no function mode sees, such as an autograd.Function."""
        for value in given:
            if self.stack and _depends(value) and id(value) not in self.seen:
                if value.grad_fn is not None:  # else the data become floating here
                    self.operation(type(value.grad_fn).__name__)
                self.followed(value)

    def operation(self, name: str, *, joins: bool = False) -> None:
        path = self.stack[-1] if self.stack else ""
        self.found.operations.append(Operation(name, path, tuple(self.stack), joins, source_line()))

    def value(self, name: str, given: Any) -> None:
        """Record a layer's input or output in its first call."""
        if name in self.found.values:
            return
        if not isinstance(given, Tensor):
            self.found.values[name] = type(given).__name__
            return
        axes = () if self.found.axes is None else self.found.axes.of(given)
        self.found.values[name] = Value(self.number(given), tuple(given.shape), axes)

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor with its content."""
        # In-place operations change the version, not the id.
        version = 0 if tensor.is_inference() else tensor._version
        self.kept.append(tensor)
        return self.numbers.setdefault((id(tensor), version), len(self.numbers))

    def norms(self) -> dict[str, str]:
        """Return, for layers whose output a batch norm alone reads, that norm."""
        found, norms = self.found, {}
        for number, layer in self.made.items():
            value = found.values[layer]
            alone = self.read[number] == 1 == found.calls[layer]
            if not (alone and isinstance(value, Value) and value.number == number):
                continue
            for reader in found.readers(layer) if _mergeable(self.modules[layer], value) else ():
                norm = isinstance(self.modules[reader], nn.modules.batchnorm._BatchNorm)
                if norm and found.calls[reader] == 1:
                    norms[layer] = reader
        return norms

    def watch(self, name: str, module: nn.Module) -> None:
        weighted = isinstance(module, WEIGHTED)
        self.modules[name] = module

        def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = tree_leaves((inputs, named))
            self.unseen(given)
            self.stack.append(name)
            self.found.calls[name] += 1
            self.found.entered.setdefault(name, len(self.found.operations))
            if any(_depends(value) for value in given):
                self.found.fed.add(name)
            if weighted:
                self.found.order.append(name)
            self.value(name + INPUT_SUFFIX, first_tensor(inputs, named))

        def leave(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                self.followed(output)
            self.unseen(tree_leaves(output))
            self.stack.pop()
            self.found.left.setdefault(name, len(self.found.operations))
            self.found.weighted.setdefault(name, len(self.found.order))
            self.value(name, output)
            self.nodes.setdefault(name, []).extend(
                value.grad_fn for value in tree_leaves(output) if _depends(value)
            )

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = operation_name(func)
        named = kwargs or {}
        given = tree_leaves((args, named))
        joins = sum(_depends(value) for value in given) > 1
        self.unseen(given)
        tensors = [value for value in given if isinstance(value, Tensor)]
        axes = self.found.axes
        if axes is None:
            output = func(*args, **named)
        else:
            before = [(value, axes.of(value), value.shape) for value in tensors]
            output = func(*args, **named)
            axes.follow(name, func, (args, named), before, output)
        if not self.stack:  # the copy of the input that the model gets
            return self.followed(output)
        written = [one for value in tensors for one in (value, value._base) if _depends(one)]
        self.followed(written)  # the target of an operation in place, and what it is a view of
        if any(_depends(value) and value.dtype in HALF for value in tree_leaves(output)):
            self.found.halved = self.stack[-1]
        if name == "setitem" or any(_depends(value) for value in tree_leaves(output)):
            self.operation(name, joins=joins)
            module = self.modules[self.stack[-1]]
            own = getattr(module, "weight", None) if isinstance(module, WEIGHTED) else None
            if name in LINEAR and any(value is own for value in given):
                self.made[self.number(output)] = self.stack[-1]
            self.read.update(self.number(value) for value in given if _depends(value))
        return self.followed(output)


def _backwards(tensors: Sequence[Any]) -> list[Any]:
    """Return the nodes of autograd's graph behind some tensors, each before those it is made of."""
    ends = [value.grad_fn for value in tensors if _depends(value) and value.grad_fn is not None]
    ordered: list[Any] = []
    seen = set()
    ahead = [(node, False) for node in ends]
    while ahead:
        node, done = ahead.pop()
        if done:
            ordered.append(node)
        elif node not in seen:
            seen.add(node)
            ahead.append((node, True))
            ahead += [(one, False) for one, _ in node.next_functions if one is not None]
    return ordered[::-1]


def _on_all_paths(ordered: Sequence[Any]) -> set[Any]:
    """Return the nodes through which all paths lead, of `_backwards` from one tensor."""
    ends: Counter[Any] = Counter()  # how many edges of the graph end at a node
    for node in ordered:
        ends.update(one for one, _ in node.next_functions if one is not None)
    found, open_edges = set(), 0  # edges from nodes so far to later ones
    for node in ordered:
        open_edges -= ends[node]
        if not open_edges:
            found.add(node)
        open_edges += sum(one is not None for one, _ in node.next_functions) or 1
    return found


def _mergeable(module: nn.Module, output: Value) -> bool:
    """Return whether Zennit could merge a batch norm behind a layer."""
    if isinstance(module, nn.Linear):
        return len(output.shape) == 2  # else its channels are others
    return not (isinstance(module, TRANSPOSED) and module.groups > 1)


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
