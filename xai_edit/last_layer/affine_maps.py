"""A forward pass followed for the affine maps W x + b of stored parameters in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from xai_edit.core.trace import operation_name, source_line
from xai_edit.edits.model_edit import tensors_of
from xai_edit.lrp.operation_rules import is_in_place

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
SAME = frozenset(
    [
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("contiguous", "clone", "detach", "alias", "positive", "requires_grad", "data"),
        *("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"),
    ]
)
FLIPS = ("T", "t", "mT", "transpose", "permute", "swapaxes", "swapdims", "adjoint", "H")
SIZED = ("view", "reshape", "expand")
MEANS = frozenset(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)) | {"mean"}
# Operations that act on the inputs of the map as on its outputs, if the axis of the units is kept.
MOVES = MEANS | {
    *(*FLIPS, *SIZED, "flatten", "squeeze", "unsqueeze", "getitem", "movedim", "select", "narrow"),
    *("index_select", "sum", "unflatten"),
}
KEY, PARTS = "_xai_edit_affine", "_xai_edit_stacked"  # attributes of tensors


@dataclass(frozen=True, eq=False)
class Factor:
    """A stored tensor as an operation uses it.

    ``name`` is that of a parameter or buffer. With ``gain`` the tensor is g v / ‖v‖ of v, ``name``,
    and g, ``gain``, the norm over all axes but ``dim``; with ``module`` it is the output of a
    parametrization of that name. ``flipped`` is for the transposed tensor, ``scale`` a constant.
    """

    name: str
    gain: str | None = None
    dim: int = 0
    module: str | None = None
    flipped: bool = False
    scale: float = 1.0

    @property
    def kind(self) -> tuple[object, ...]:
        """What makes two factors the same, apart from their scale."""
        return self.name, self.gain, self.dim, self.module, self.flipped


@dataclass(frozen=True, eq=False)
class Term:
    """A product W x: inputs x (without their history), and the factor W where it is stored.

    ``through`` is y where x itself is an affine map of y, as in a low-rank adapter.
    """

    x: Tensor
    weight: Factor | None
    used: Tensor
    through: Tensor | None = None

    def adapts(self, other: Term) -> bool:
        """Return whether this is an adapter: a product of a product of another term's x."""
        y, x = self.through, other.x
        return y is not None and y.shape == x.shape and y.data_ptr() == x.data_ptr()


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A tensor that is a sum of products and biases, and what was done to it since.

    ``axis`` holds the classes, ``of`` is their number; ``module`` ran it. ``broken`` says what made
    it another tensor. ``slack`` is the size of what a mean was taken of, and ``eps`` the precision
    of the product.
    """

    terms: tuple[Term, ...]
    biases: tuple[Factor | None, ...]
    axis: int
    of: int
    module: str
    eps: float
    slack: float = 0.0
    broken: str = ""
    adapter: Term | None = None

    def each(self, function: Callable[[Tensor], Tensor], **changed: Any) -> AffineMap:
        """Return the map with a function applied to all its inputs x."""
        terms = tuple(replace(term, x=function(term.x)) for term in self.terms)
        return replace(self, terms=terms, **changed)

    def scaled(self, by: float, x: Tensor | float) -> AffineMap:
        """Return the map times a constant."""
        biases = tuple(one and replace(one, scale=one.scale * by) for one in self.biases)
        return self.each(lambda one: one * x, biases=biases, slack=self.slack * abs(by))

    def plus(self, other: AffineMap) -> AffineMap:
        """Return the sum of two maps; the inputs of one weight used twice are added."""
        terms = [*self.terms]
        for term in other.terms:
            for at, own in enumerate(terms):
                if own.weight and term.weight and own.weight.kind == term.weight.kind:
                    terms[at] = replace(own, x=own.x + term.x)
                    break
            else:
                terms.append(term)
        biases = self.biases + other.biases
        pairs = [(one, two) for one in self.terms for two in other.terms]
        adapters = [one for a, b in pairs for one, two in ((a, b), (b, a)) if one.adapts(two)]
        adapter = next(iter(adapters), self.adapter or other.adapter)
        slack, eps = self.slack + other.slack, max(self.eps, other.eps)
        changed = {"biases": biases, "slack": slack, "eps": eps, "adapter": adapter}
        return replace(self, terms=tuple(terms), **changed)  # type: ignore[arg-type]


class _Call(NamedTuple):
    """An operation with its arguments and output."""

    name: str
    func: Any
    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor


class AffineMaps(TorchFunctionMode):
    """Follows a model's operations; `of` returns the map that a tensor is. Use inside the guard."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(one): name for name, one in reversed(tensors_of(model).items())}
        self.module = ""
        self.last: AffineMap | None = None
        self.inputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of maps
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            if isinstance(module, ParametrizationList):
                module.register_forward_hook(
                    lambda _, __, output, name=name: self._parametrized(name, output)
                )

    def of(self, value: Any) -> AffineMap | None:
        """Return the affine map that gave a tensor, or what became of it."""
        found = getattr(value, KEY, None)
        return found if isinstance(found, AffineMap) else None

    def factor(self, value: Any) -> Factor | None:
        """Return the stored tensor that a tensor is."""
        if (name := self.names.get(id(value))) is not None:
            return Factor(name)
        found = getattr(value, KEY, None)
        return found if isinstance(found, Factor) else None

    def _enter(self, name: str) -> None:
        self.module = name

    def _parametrized(self, name: str, output: Tensor) -> None:
        if self.factor(output) is None:
            setattr(output, KEY, Factor(name, module=name))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        name = operation_name(func)
        if args and (name == "setitem" or is_in_place(func, args, named)):
            self._keep_inputs(args[0])
        output = func(*args, **named)
        if name == "setitem":
            broken = self._broken(self.of(args[0]), "setitem")
            if broken is not None:
                setattr(args[0], KEY, broken)
            return None
        if isinstance(output, tuple) and args and (whole := self.of(args[0])) is not None:
            for part in output:  # such as a maximum and its position
                if isinstance(part, Tensor):
                    setattr(part, KEY, self._broken(whole, name))
        if isinstance(output, Tensor) and id(output) not in self.names:
            found = self._followed(_Call(name, func, args, named, output))
            if found is not None:
                setattr(output, KEY, found)
                if isinstance(found, AffineMap):
                    self.inputs.update({term.x: None for term in found.terms})
            elif hasattr(output, KEY):  # an in-place operation
                delattr(output, KEY)
        return output

    def _keep_inputs(self, target: Any) -> None:
        """Copy the inputs of maps that an operation in place is about to overwrite."""
        if isinstance(target, Tensor):
            for x in [*self.inputs]:
                if x.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
                    x.data = x.clone()

    def _followed(self, call: _Call) -> AffineMap | Factor | None:
        name, _, args, named, output = call
        values = [*args, *named.values()]
        if name == "linear" or name in CONVOLUTIONS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | named
            x, w, b = given["input"], given["weight"], given.get("bias")
            return self._product(x, w, b, output, 1 if name in CONVOLUTIONS else -1)
        if name in ("matmul", "mm") and len(values) == 2 and values[1].ndim == 2:
            return self._product(values[0], values[1], None, output, -1, flip=True)
        if name == "addmm" and len(values) == 3:
            return self._product(values[1], values[2], values[0], output, -1, flip=True)
        if name == "weight_norm":  # args are v, g and the axis
            v, g = self.factor(args[0]), self.factor(args[1])
            return v and g and Factor(v.name, gain=g.name, dim=args[2] if len(args) > 2 else 0)
        if name == "stack":
            self._stacked(args, named, output)
        parts: list[AffineMap] | None = getattr(values[0], PARTS, None) if values else None
        if parts and name in ("mean", "sum") and values[1:] in ([0], [(0,)], [[0]]):
            total = parts[0]
            for part in parts[1:]:
                total = total.plus(part)
            return total if name == "sum" else total.scaled(1 / len(parts), 1 / len(parts))
        maps = [(value, found) for value in values if (found := self.of(value)) is not None]
        if maps:
            value, found = next((one for one in maps if not one[1].broken), maps[-1])
            return self._moved(call, value, found)
        if values and (factor := self.factor(values[0])) is not None:
            return _factor_moved(name, factor, values, output)
        return None

    def _stacked(self, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Remember the maps that were stacked on a new first axis, as for a mean of heads."""
        parts = [self.of(value) for value in args[0]] if args else []
        alike = {(one.of, one.broken) if one else None for one in parts}
        dim = args[1] if len(args) > 1 else named.get("dim", 0)
        if dim == 0 and len(alike) == 1 and parts[0] and not parts[0].broken:
            setattr(output, PARTS, parts)

    def _product(
        self, x: Tensor, w: Tensor, b: Any, output: Tensor, axis: int, *, flip: bool = False
    ) -> AffineMap | None:
        """Return the map of a linear layer, or of a convolution whose kernel is one position."""
        weight = self.factor(w)
        if flip and weight is not None:
            weight = replace(weight, flipped=not weight.flipped)
        used = w.detach().mT if flip else w.detach()
        before = self.of(x)
        through = None if before is None or before.broken else before.terms[0].x
        x = x.detach()  # a tensor without the history that is kept as an attribute
        if axis == 1:
            if x.ndim != w.ndim:
                return None
            if any(length > 1 for length in w.shape[2:]):
                if w.shape[1:] != x.shape[1:] or output[0, 0].numel() > 1:
                    return None
                x = x.flatten(1).reshape(len(x), -1, *[1] * (w.ndim - 2))
        if weight is not None and weight.scale != 1:
            x, weight = x * weight.scale, replace(weight, scale=1.0)
        biases = () if b is None else (self.factor(b),)
        eps = max(torch.finfo(one.dtype).eps for one in (x, w, output))
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        eps = max(eps, 2**-10) if x.is_cuda and tf32 and x.dtype == torch.float32 else eps
        terms = (Term(x, weight, used, through),)
        self.last = AffineMap(terms, biases, axis, output.shape[axis], self.module, eps)
        return self.last

    def _broken(self, found: AffineMap | None, name: str) -> AffineMap | None:
        if found is None or found.broken:
            return found
        line = source_line()
        return replace(found, broken=name + (f" ({line})" if line else ""))

    def _moved(self, call: _Call, z: Tensor, found: AffineMap) -> AffineMap | None:
        """Return the map after an operation on the tensor z."""
        name, _, args, named, output = call
        if found.broken or (name in SAME and output.shape == z.shape):
            return found
        n = found.terms[0].x.shape[0]
        rows = z.numel() == n * found.of  # no positions are left
        if rows and name in MOVES and output.numel() == z.numel() and output.shape[0] == n:
            return found.each(lambda x: x.reshape(n, -1), axis=1 if output.ndim > 1 else -1)
        if name in MOVES and args and args[0] is z:
            return self._replayed(call, found) or self._broken(found, name)
        others = [one for one in (*args, *named.values()) if one is not z]
        if name == "neg":
            return found.scaled(-1.0, -1.0)
        if len(args) == 2 and not named and len(others) == 1:
            ordered = args[0] is z or name in ("add", "mul")
            combined = _combined(self, name, found, others[0], z) if ordered else None
            if combined is None and (other := self.of(others[0])) is not None and other.broken:
                by = other.broken.partition(" (")[0]  # its line is this one's, or near it
                name += f" of the output of {other.module!r} after {by}"
            return combined or self._broken(found, name)
        return self._broken(found, name)

    def _replayed(self, call: _Call, found: AffineMap) -> AffineMap | None:
        """Return the map whose inputs went through the operation that its outputs went through."""
        name, func, args, named, output = call
        z = args[0]

        def again(x: Tensor) -> Tensor:
            rest = args[1:]
            if name in SIZED:
                sizes = rest[0] if isinstance(rest[0], (tuple, list)) else rest
                width = x.shape[found.axis]
                rest = tuple(  # the first axis has the samples, perhaps as many as classes
                    width if at and one == found.of else one for at, one in enumerate(sizes)
                )
            moved: Tensor = func(x, *rest, **named)
            return moved

        slack = float(z.detach().abs().amax()) if name in MEANS else found.slack
        try:
            probe = again(torch.zeros_like(found.terms[0].x))
            axis = found.axis
            if probe.ndim != z.ndim:  # the units' is that whose length differs from the output's
                pairs = enumerate(zip(probe.shape, output.shape, strict=True))
                axis = next((at for at, (one, other) in pairs if one != other), -1)
            if output.shape[axis] != found.of:
                return None
            return found.each(again, axis=axis, slack=slack)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None


def _combined(
    maps: AffineMaps, name: str, found: AffineMap, other: Any, z: Tensor
) -> AffineMap | None:
    """Return the map after a product with a constant, or plus a bias or another map."""
    number = other if isinstance(other, (int, float)) else None
    if name in ("mul", "div"):
        if isinstance(other, Tensor) and maps.of(other) is not None:
            return None
        if isinstance(other, Tensor) and other.numel() == 1:
            number = float(other)
        if number is not None:
            by = number if name == "mul" else 1 / number
            return found.scaled(by, by)
        other = other.detach()
        if other.ndim == z.ndim and other.shape[found.axis] == 1:  # a factor of each position
            return found.each(lambda x: x * other if name == "mul" else x / other)
    elif name in ("add", "sub"):
        sign = 1.0 if name == "add" else -1.0
        if (second := maps.of(other)) is not None:
            fits = not second.broken and second.of == found.of
            return found.plus(second.scaled(sign, sign)) if fits else None
        if number == 0:
            return found
        bias = maps.factor(other)
        if bias is not None and other.numel() == found.of and bias.gain == bias.module is None:
            return replace(found, biases=(*found.biases, replace(bias, scale=sign * bias.scale)))
    return None


def _factor_moved(name: str, factor: Factor, values: list[Any], output: Tensor) -> Factor | None:
    """Return what a stored tensor is after an operation."""
    shape = values[0].shape
    if name in SAME:
        return factor
    if name in ("mul", "div") and len(values) == 2:
        by = values[1]
        if isinstance(by, Tensor) and by.numel() == 1 and output.shape == shape:
            by = float(by)
        if isinstance(by, (int, float)):
            return replace(factor, scale=factor.scale * (by if name == "mul" else 1 / by))
    if name in FLIPS and len(shape) == 2 and output.shape == shape[::-1]:
        moved = output.stride() != values[0].stride()
        return replace(factor, flipped=not factor.flipped) if moved else factor
    if name in MOVES and output.numel() == values[0].numel() and output.shape[:1] == shape[:1]:
        return factor
    return None
