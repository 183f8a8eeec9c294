"""The axis of a layer's units, followed through the operations of a forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from xai_edit.core.checks import require, whole_number
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import CONVOLUTIONS, layer_module
from xai_edit.core.trace import Trace, trace

_DECIDED: ContextVar[Mapping[str, int]] = ContextVar("unit axes", default=MappingProxyType({}))


@contextmanager
def decided_axes(axes: Mapping[str, int]) -> Iterator[None]:
    """Fix the axes of some layers for all calls of `unit_axes` inside this context."""
    token = _DECIDED.set({**_DECIDED.get(), **axes})
    try:
        yield
    finally:
        _DECIDED.reset(token)


def unit_axes(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[str],
    given: int | Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return which axis of each layer's values holds its units.

    The second of a convolution, a batch norm or an instance norm, the last of a linear layer. Of
    other layers it is followed, in a traced forward pass of one sample, from the convolution or
    linear operations before and after, through elementwise operations, norms, pools, permutations,
    and reshapes that leave it whole.

    Parameters
    ----------
    model : nn.Module
        Left exactly as it was.
    inputs : Tensor, shape (samples, ...)
    layers : sequence of str
        Checked names, with or without ``:input``.
    given : int or mapping from layer names to int, optional
        The axis where it is known, for all layers or for some; negative ones count from the last.

    Raises
    ------
    ValueError
        If the axis cannot be followed, several axes hold units, a layer takes no part in the
        forward pass or gives no tensor, or ``given`` is out of range.

    Examples
    --------
    >>> from xai_edit.core.axes import unit_axes
    >>> unit_axes(model, images[:1], ["conv", "pool", "fc1"])
    {'conv': 1, 'pool': 1, 'fc1': -1}
    """
    decided = {name: axis for name, axis in _DECIDED.get().items() if name in layers}
    axes = known_axes(model, layers, decided if given is None else given)
    unknown = [name for name in layers if name not in axes]
    if unknown:
        found = trace(model, inputs, axes=Axes())
        axes |= {name: _followed(found, name, type(layer_module(model, name))) for name in unknown}
    return {name: axes[name] for name in layers}


def known_axes(
    model: nn.Module, layers: Sequence[str], given: int | Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the axes of `unit_axes` that need no forward pass."""
    named = given if isinstance(given, Mapping) else dict.fromkeys(layers, given)
    unknown = [name for name in named if name not in layers]
    require(not unknown, "unit_axis", unknown, f"it names some of the layers {[*layers]}")
    axes = {}
    for name in layers:
        module, axis = layer_module(model, name), named.get(name)
        if axis is not None:
            axes[name] = whole_number(axis, "unit_axis", least=None)
            require(axis != 0, "unit_axis", axis, "axis 0 holds the samples")
        elif isinstance(module, (*CONVOLUTIONS, nn.modules.batchnorm._NormBase)):
            axes[name] = 1
        elif isinstance(module, nn.Linear):
            axes[name] = -1
    return axes


def axes_by_layer(model: nn.Module, inputs: Inputs) -> dict[str, int | str]:
    """Return, for each layer that the data pass through, its unit axis or why it has none."""
    found = trace(model, inputs, axes=Axes())
    axes: dict[str, int | str] = {}
    for name, module in model.named_modules():
        if not name or name not in found.fed or isinstance(found.values.get(name), str):
            continue
        try:
            known = known_axes(model, [name])
            axes[name] = known[name] if known else _followed(found, name, type(module))
        except ValueError as problem:
            axes[name] = str(problem)
    return axes


def _followed(found: Trace, name: str, kind: type[nn.Module]) -> int:
    """Return the axis of a layer's units in a traced forward pass."""
    if name not in found.values:
        raise ValueError(f"layer {name!r} takes no part in the model's forward pass")
    value = found.values[name]
    if isinstance(value, str):
        raise ValueError(
            f"layer {name!r} passes on a {value}, not one tensor; name a layer inside it"
        )
    if len(value.shape) == 2:
        return 1
    units: list[int] = found.axes.units(value.axes)
    if len(units) == 1 and units[0] > 0:
        return units[0]
    why = "no convolution or linear layer gives or reads one of its axes as it is"
    if len(units) > 1:
        why = f"axes {units} all hold the units of a convolution or linear layer"
    elif units:
        why = "they lie on the axis of the samples"
    raise ValueError(
        f"layer {name!r} ({kind.__name__}): the axis of its units cannot be followed in its values "
        f"of shape {value.shape} for one sample: {why}; give unit_axis="
    )


_LAST = frozenset(["linear", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu"])
"""Operations of layers whose units are on the last axis."""
_SECOND = frozenset(f"conv{of}{n}d" for of in ("", "_transpose") for n in (1, 2, 3))
"""Operations of layers whose units are on the second axis."""

_ALIGNED_NAMES = """
    batch_norm instance_norm group_norm layer_norm rms_norm local_response_norm normalize softmax
    log_softmax softmin dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout cat concat concatenate pad constant_pad_nd roll flip cumsum cumprod glu
    contiguous clone detach requires_grad to float double half bfloat16 type type_as relu6 hardtanh
    selu celu prelu rrelu threshold logsigmoid softsign tanhshrink hardshrink softshrink
    avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d max_pool1d max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d
    boolean_dispatch interpolate upsample setitem index_fill index_add index_copy masked_scatter
    scatter scatter_add
"""
_ALIGNED = frozenset(_ALIGNED_NAMES.split())
"""Operations that keep the order of the axes, whatever their sizes."""
_BY_ARGUMENTS_NAMES = """
    permute transpose swapaxes swapdims movedim moveaxis t T mT H mH adjoint unsqueeze mean sum
    amax amin max min std var std_mean var_mean norm logsumexp prod median nanmean nansum
"""
_BY_ARGUMENTS = frozenset(_BY_ARGUMENTS_NAMES.split())
"""Operations whose arguments alone say which axis goes where."""
_BY_SIZES_NAMES = """
    view reshape view_as reshape_as flatten unflatten ravel squeeze expand expand_as broadcast_to
    getitem narrow select chunk split tensor_split unbind index_select repeat tile pixel_shuffle
    pixel_unshuffle channel_shuffle stack take_along_dim gather diagonal rot90
"""
_BY_SIZES = frozenset(_BY_SIZES_NAMES.split())
"""Operations that move values, depending on the sizes."""
_PRIMES = (2, 3, 5, 7, 11, 13, 17)


class Axes:
    """The numbered axes of all tensors of a forward pass, those with the same content joined.

    A convolution or linear operation marks the axis of its inputs' units and that of its outputs';
    no axis is followed through it.
    """

    def __init__(self) -> None:
        self._joined: list[int] = []  # for each axis one that it is joined with, or itself
        self._units: list[int] = []
        self._of: dict[int, tuple[tuple[int, ...], Tensor]] = {}  # the tensor keeps its id valid

    def of(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the numbers of a tensor's axes."""
        numbers, _ = self._of.get(id(tensor), ((), tensor))
        return numbers if len(numbers) == tensor.ndim else self._anew(tensor)

    def units(self, numbers: Sequence[int]) -> list[int]:
        """Return which of a tensor's axes hold units."""
        roots = {self._root(number) for number in self._units}
        return [at for at, number in enumerate(numbers) if self._root(number) in roots]

    def follow(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        given: Sequence[tuple[Tensor, tuple[int, ...], torch.Size]],
        output: Any,
    ) -> None:
        """Join the axes of an operation's inputs with those of its outputs.

        ``given`` are the tensors among the arguments, each with its axes and its shape before the
        operation, whose ``name`` is that of `xai_edit.core.trace.operation_name`.
        """
        made = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        if name == "setitem":
            made = [given[0][0]]
        if not given or not made:
            return
        (x, axes, shape), *others = given
        if name in _LAST:
            inputs = [x, others[0][0]] if name == "bilinear" else [x]
            self._units += [self.of(value)[-1] for value in (*inputs, made[0])]
        elif name in _SECOND:
            before_positions = -1 - int(name[-2])
            self._units += [axes[before_positions], self.of(made[0])[before_positions]]
        elif name == "embedding":
            self._units.append(self.of(made[0])[-1])
        elif name == "multi_head_attention_forward":
            self._units += [axes[-1], self.of(made[0])[-1]]
        elif name in ("matmul", "mm", "bmm", "addmm") and others:
            (_, left, _), (factor, right, _) = given[-2:]
            now = self.of(made[0])
            if not factor.requires_grad and len(right) == 2:  # a linear layer
                self._units += [left[-1], now[-1]]
            elif len(left) == len(right):
                self._join_all((*left[:-1], right[-1]), now)
        elif name == "scaled_dot_product_attention":
            values = others[1][1]
            self._join_all((*axes[:-1], values[-1]), self.of(made[0]))
        elif is_elementwise(name) or (name in ("max", "min") and others):
            for value in made:
                for _, numbers, sizes in given:
                    self._join_equal(numbers, sizes, value)
        elif name in _ALIGNED:
            for value in made:
                for _, numbers, _ in given:
                    self._join_all(numbers, self.of(value))
        elif name in _BY_ARGUMENTS or name in _BY_SIZES:
            moves = _moves_of(name, function, arguments, x, shape)
            for value, pairs in zip(made, moves, strict=False):
                now = self._anew(value)
                for numbers in (axes, *(one[1] for one in others if name == "stack")):
                    for before, after in pairs:
                        self._join(numbers[before], now[after])

    def _anew(self, tensor: Tensor) -> tuple[int, ...]:
        start = len(self._joined)
        numbers = tuple(range(start, start + tensor.ndim))
        self._joined += numbers
        self._of[id(tensor)] = numbers, tensor
        return numbers

    def _root(self, number: int) -> int:
        while self._joined[number] != number:
            self._joined[number] = number = self._joined[self._joined[number]]
        return number

    def _join(self, one: int, other: int) -> None:
        self._joined[self._root(one)] = self._root(other)

    def _join_all(self, before: Sequence[int], after: Sequence[int]) -> None:
        if len(before) == len(after):
            for one, other in zip(before, after, strict=True):
                self._join(one, other)

    def _join_equal(self, numbers: Sequence[int], sizes: torch.Size, made: Tensor) -> None:
        """Join axes of the same size, counted from the last, as in broadcasting."""
        now = self.of(made)
        for at in range(1, min(len(numbers), len(now)) + 1):
            if sizes[-at] == made.shape[-at]:
                self._join(numbers[-at], now[-at])


@functools.cache
def is_elementwise(name: str) -> bool:
    """Return whether PyTorch has an elementwise operation of this name."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if packet is not None else ()
    return any(torch.Tag.pointwise in getattr(packet, one).tags for one in overloads)


def _moves_of(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    x: Tensor,
    shape: torch.Size,
) -> list[list[tuple[int, int]]]:
    """Return, for each output of an operation, which axis of ``x`` goes where.

    The operation runs again, on a tensor whose sizes are all different or, where the result depends
    on the sizes, on the positions of the values.
    """
    by_sizes = name in _BY_SIZES
    if len(shape) > len(_PRIMES) or not math.prod(shape):
        return []
    if by_sizes:
        probe = torch.arange(math.prod(shape), device=x.device).view(shape)
    else:
        probe = torch.zeros(_PRIMES[: len(shape)], device=x.device)

    def replaced(value: Any) -> Any:
        alike = name == "stack" and isinstance(value, Tensor)
        return probe if value is x or alike else value

    try:
        result = function(*tree_map(replaced, arguments[0]), **tree_map(replaced, arguments[1]))
    except (RuntimeError, TypeError, IndexError):
        return []
    made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
    if by_sizes:
        return [_unmixed(value, shape) for value in made]
    return [
        [(_PRIMES.index(size), at) for at, size in enumerate(value.shape) if size in _PRIMES]
        for value in made
    ]


def _unmixed(positions: Tensor, shape: torch.Size) -> list[tuple[int, int]]:
    """Return the pairs (axis before, axis after) that are not mixed with other axes."""
    if not positions.numel() or positions.dtype != torch.int64:
        return []
    along: list[list[int]] = []  # for each axis, the former axes that vary along it
    for axis in range(positions.ndim):
        line = positions[tuple(slice(None) if at == axis else 0 for at in range(positions.ndim))]
        before = torch.unravel_index(line.cpu(), shape)
        along.append([at for at, index in enumerate(before) if (index != index[0]).any()])
    varying = [at for former in along for at in former]
    return [
        (former[0], axis)
        for axis, former in enumerate(along)
        if len(former) == 1 and varying.count(former[0]) == 1
    ]
