"""Relevance rules of single operations, and the backward passes that carry them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from xai_edit.attribution.fast import is_gate, mark_gate
from xai_edit.attribution.trace import operation_name

Arguments: TypeAlias = tuple[Any, ...]
Named: TypeAlias = dict[str, Any]
Operator: TypeAlias = Callable[..., Tensor]
Rule: TypeAlias = Callable[[Operator, Arguments, Named, Operator], Tensor]

ACTIVATIONS = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "rms_norm",
        "group_norm",
        "normalize",
        "neg",
        "negative",
    ]
)
GATES = ("sigmoid", "hardsigmoid")


def in_graph(value: Any) -> bool:
    """Tell whether a value depends on the data."""
    # A parameter is a constant, also where it has a gradient, outside of xai_edit.LRP.
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def is_in_place(function: Operator, args: Arguments, named: Named) -> bool:
    """Tell whether a call overwrites its first argument."""
    name = function.__name__
    dunder = name.startswith("__")
    if named.get("inplace") or (name.endswith("_") and not dunder) or name.startswith("__i"):
        return True
    return operation_name(function) in ACTIVATIONS and any(value is True for value in args[1:])


def _plain(function: Operator, args: Arguments, named: Named) -> Tensor:
    """Run an operation without a graph, and on a copy if it is in place."""
    local = [value.detach() if isinstance(value, Tensor) else value for value in args]
    if is_in_place(function, args, named):
        local[0] = local[0].clone()
    output: Tensor = function(*local, **named)
    return output.detach()


def pass_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """R passes to the operand that depends on the data."""
    x = next(value for value in args if in_graph(value))
    passed: Tensor = _Pass.apply(x, _plain(function, args, named))
    if operation_name(function) in GATES:
        mark_gate(passed)
    return passed


def norm_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """R goes to the inputs of a linear operation in proportion to their size."""
    x, *others = args
    shared: Tensor = _Norm.apply(x, lambda local: function(local, *others, **named), stabilizer)
    return shared


def layer_norm_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """R goes through the norm as through a linear map, its deviation a constant.

    Ali et al. 2022. Passing R on as it is would leave relevance where the input is small and its
    distance from the mean is not, and the rule before would divide the one by the other.
    """
    given = inspect.signature(function).bind(*args, **named).arguments
    shape = given["normalized_shape"]
    dims = tuple(range(-1 if isinstance(shape, int) else -len(shape), 0))
    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)

    def with_constant_deviation(x: Tensor) -> Tensor:
        centred = x - x.mean(dims, keepdim=True)
        deviation = (centred.detach().square().mean(dims, keepdim=True) + eps).sqrt()
        scaled = centred / deviation if weight is None else centred / deviation * weight
        shifted: Tensor = scaled if bias is None else scaled + bias
        return shifted

    shared: Tensor = _Norm.apply(args[0], with_constant_deviation, stabilizer)
    return shared


def multilinear_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """R goes to the factors by halves, within a factor in proportion (AttnLRP)."""
    places = [place for place, value in enumerate(args) if in_graph(value)]

    def of_factors(*factors: Tensor) -> Tensor:
        given = list(args)
        for place, factor in zip(places, factors, strict=True):
            given[place] = factor
        return function(*given, **named)

    made: Tensor = _Multilinear.apply(of_factors, stabilizer, *(args[place] for place in places))
    return made


def einsum_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """As `multilinear_rule`, with the operands as a list or one by one."""
    if len(args) == 2 and not isinstance(args[1], Tensor):
        args = (args[0], *args[1])
    return multilinear_rule(function, args, named, stabilizer)


def softmax_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """R is x ⊙ (R − s Σ R), the gradient of the softmax (AttnLRP)."""
    dim = named.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        raise ValueError("model: a softmax is called without dim; say which axis it sums over")
    shares: Tensor = _Softmax.apply(args[0], dim)
    return shares


def sum_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """R goes to the summands in proportion; a constant keeps its part, as a layer's bias does."""
    a, b = args[:2]
    if any(not isinstance(value, Tensor) and value == 0 for value in (a, b)):  # as `sum` begins
        return pass_rule(function, args, named, stabilizer)
    factor = named.get("alpha", 1) * (-1 if operation_name(function) == "sub" else 1)
    total: Tensor
    if in_graph(a) and in_graph(b):
        total = _Sum.apply(a, _scaled(b, factor), stabilizer)
    elif in_graph(a):
        total = _Norm.apply(a, lambda x: x + factor * b, stabilizer)
    else:
        total = _Norm.apply(b, lambda x: a + factor * x, stabilizer)
    return total


def _scaled(x: Tensor, factor: float) -> Tensor:
    scaled: Tensor = x if factor == 1 else _Pass.apply(x, factor * x.detach())
    return scaled


def product_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """R goes to the signal, not to what gates, scales or divides it; to equals by halves."""
    a, b = args[:2]
    if not (in_graph(a) and in_graph(b)):
        return pass_rule(function, args, named, stabilizer)
    output = _plain(function, args, named)
    gates = is_gate(a), is_gate(b)
    if operation_name(function) == "div":
        gates = False, True
    if gates[0] == gates[1] and a.numel() == b.numel():
        halved: Tensor = _Halves.apply(a, b, output)
        return halved
    if gates == (True, False) or (gates[0] == gates[1] and b.numel() > a.numel()):
        a, b = b, a
    passed: Tensor = _Gated.apply(a, b, output)
    return passed


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        ctx.shape = x.shape
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None]:
        return relevance[0].sum_to_size(ctx.shape), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signal: Tensor, gate: Tensor, output: Tensor) -> Tensor:
        ctx.shapes = signal.shape, gate.shape
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, Tensor, None]:
        signal, gate = ctx.shapes
        # Zeros, not nothing: the layers of the gate have a relevance, and it is zero.
        return relevance[0].sum_to_size(signal), relevance[0].new_zeros(gate), None


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, output: Tensor) -> Tensor:
        ctx.shapes = a.shape, b.shape
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, Tensor, None]:
        half = relevance[0] / 2
        to_a, to_b = (half.sum_to_size(shape) for shape in ctx.shapes)
        return to_a, to_b, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Operator, stabilizer: Operator) -> Tensor:
        ctx.function, ctx.stabilizer = function, stabilizer
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        (share,) = torch.autograd.grad(output, x, relevance[0] / ctx.stabilizer(output.detach()))
        return x.detach() * share, None, None


class _Multilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Operator, stabilizer: Operator, *factors: Tensor) -> Tensor:
        ctx.function, ctx.stabilizer = function, stabilizer
        ctx.save_for_backward(*factors)
        return function(*factors)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        factors = [factor.detach().requires_grad_() for factor in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*factors)
        ratio = relevance[0] / (len(factors) * ctx.stabilizer(output.detach()))
        shares = torch.autograd.grad(output, factors, ratio)
        return (
            None,
            None,
            *(factor.detach() * share for factor, share in zip(factors, shares, strict=True)),
        )


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        output = torch.softmax(x, dim)
        ctx.dim = dim
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None]:
        x, output = ctx.saved_tensors
        (flow,) = relevance
        return x * (flow - output * flow.sum(ctx.dim, keepdim=True)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, stabilizer: Operator) -> Tensor:
        ctx.stabilizer = stabilizer
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        # The sum again, which takes less memory than keeping it.
        ratio = relevance[0] / ctx.stabilizer(a + b)
        return (ratio * a).sum_to_size(a.shape), (ratio * b).sum_to_size(b.shape), None
