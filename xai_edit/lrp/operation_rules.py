"""Relevance rules of single operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.trace import operation_name, source_line
from xai_edit.lrp.norm_rules import NORMS, norm_rule
from xai_edit.lrp.propagation import (
    Arguments,
    Named,
    Operator,
    Rule,
    in_graph,
    of_data,
    proportional,
    softmax,
    split,
    without_relevance,
)
from xai_edit.lrp.relevance_at_layers import is_gate, mark_gate

_ACTIVATIONS = """
    relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish softplus hardswish hardsigmoid
    sigmoid tanh rms_norm normalize local_response_norm neg negative erf
"""
ACTIVATIONS = frozenset(_ACTIVATIONS.split())
GATES = ("sigmoid", "hardsigmoid")
_ELEMENTWISE = """
    pow rpow square sqrt abs clamp clamp_min clamp_max exp exp2 expm1 log log1p log2 log10
    log_sigmoid logit rsqrt reciprocal sin cos tan atan asinh sinh erfc sign round trunc prelu rrelu
    softsign tanhshrink hardshrink softshrink threshold nan_to_num
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Functions of one number that pass relevance on if they are zero at zero."""
_ONLY_IN_GATES = "var std norm vector_norm linalg_norm linalg_vector_norm prod rtruediv"
ONLY_IN_GATES = frozenset(_ONLY_IN_GATES.split())
"""Operations without a rule, which may stand where no relevance goes: in gates and deviations."""


def is_in_place(function: Operator, args: Arguments, named: Named) -> bool:
    """Return whether a call overwrites its first argument."""
    name = getattr(function, "__name__", "")
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
    """Pass R to the operand that depends on the data."""
    x = next(value for value in args if in_graph(value))
    passed = split(_plain(function, args, named), (1,), x)
    if operation_name(function) in GATES:
        mark_gate(passed)
    return passed


def average_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Share R among the inputs in proportion (``Norm``): of a linear operation or a power mean."""
    x, *others = args
    return proportional(lambda x: function(x, *others, **named), stabilizer, 1, x)


def sampling_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """Share R among the values that are interpolated; refuse it where the places depend on data."""
    places = named.get("grid", args[1] if len(args) > 1 else None)
    rule = gate_rule if in_graph(places) else average_rule
    return rule(function, args, named, stabilizer)


def multilinear_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """Share R among the factors equally, within a factor in proportion (AttnLRP, Eq. 15)."""
    product, factors = of_data(partial(function, **named), args)
    return proportional(product, stabilizer, len(factors), *factors)


def einsum_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Apply `multilinear_rule` to operands that come as a list or one by one."""
    if len(args) == 2 and not isinstance(args[1], Tensor):
        args = (args[0], *args[1])
    return multilinear_rule(function, args, named, stabilizer)


def elementwise_rule(
    function: Operator, args: Arguments, named: Named, stabilizer: Operator
) -> Tensor:
    """Pass R on through a function that is zero at zero; refuse it for others, as `gate_rule`."""
    x, *others = args
    if not in_graph(x) or any(map(in_graph, (*others, *named.values()))):  # as an exponent
        return gate_rule(function, args, named, stabilizer)
    at_zero = function(torch.zeros_like(x), *others, **named)
    return (gate_rule if at_zero.any() else pass_rule)(function, args, named, stabilizer)


def gate_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Mark a gate, and refuse relevance: a gate or a deviation gets none."""
    x = next(value for value in (*args, *named.values()) if in_graph(value))
    output = _plain(function, args, named)
    made = without_relevance(output, x, f"{operation_name(function)!r} ({source_line()})")
    mark_gate(made)
    return made


def moments_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Any:
    """Share R among the inputs of the mean; refuse it at the variance or deviation beside it."""
    x, *others = args
    spread = getattr(torch, operation_name(function).removesuffix("_mean"))
    mean = proportional(lambda x: function(x, *others, **named)[1], stabilizer, 1, x)
    return gate_rule(spread, args, named, stabilizer), mean


def softmax_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Return x ⊙ (R − s Σ R), from the gradient of the softmax s (AttnLRP, Eq. 13)."""
    dim = named.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        raise ValueError("model: a softmax is called without dim; say which axis it sums over")
    return softmax(args[0], dim)


def sum_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Share R among the summands in proportion; a constant keeps its part, like a bias."""
    a, b = args[1::-1] if operation_name(function) == "rsub" else args[:2]
    if any(not isinstance(value, Tensor) and value == 0 for value in (a, b)):  # as `sum` begins
        return pass_rule(function, args, named, stabilizer)
    factor = named.get("alpha", 1) * (-1 if operation_name(function) in ("sub", "rsub") else 1)

    def added(a: Any, b: Any) -> Any:
        return a + b if factor == 1 else a + factor * b

    function, summands = of_data(added, (a, b))
    return proportional(function, stabilizer, 1, *summands)


def product_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Pass R to the signal and none to a gate or divisor; half to each factor of equal shape."""
    a, b = args[:2]
    if not in_graph(a) and operation_name(function) == "div":
        return gate_rule(function, args, named, stabilizer)  # a constant over the data
    if not (in_graph(a) and in_graph(b)):
        return pass_rule(function, args, named, stabilizer)
    output = _plain(function, args, named)
    gates = is_gate(a), is_gate(b)
    if operation_name(function) == "div":
        gates = False, True
    if gates[0] == gates[1] and a.numel() == b.numel():
        shares = (0.5, 0.5)
    elif gates == (True, False) or (gates[0] == gates[1] and b.numel() > a.numel()):
        shares = (0, 1)
    else:
        shares = (1, 0)
    return split(output, shares, a, b)


_MULTILINEAR = """
    matmul rmatmul linalg_matmul bmm mm mv dot inner outer tensordot linalg_vecdot cross
    linalg_cross bilinear linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d
"""
_AVERAGES = """
    mean sum nanmean nansum sum_to_size avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d lp_pool1d lp_pool2d lp_pool3d interpolate cumsum fold
    diff trapezoid trapz quantile
"""
AVERAGES = frozenset(_AVERAGES.split())
ELEMENTARY: dict[str, Rule] = {
    **dict.fromkeys(ACTIVATIONS, pass_rule),
    **dict.fromkeys(AVERAGES, average_rule),
    **dict.fromkeys(("add", "sub", "rsub"), sum_rule),
    **dict.fromkeys(("mul", "div"), product_rule),
    **dict.fromkeys(_MULTILINEAR.split(), multilinear_rule),
    **dict.fromkeys(NORMS, norm_rule),
    **dict.fromkeys(ELEMENTWISE, elementwise_rule),
    **dict.fromkeys(ONLY_IN_GATES, gate_rule),
    **dict.fromkeys(("grid_sample", "grid_sampler"), sampling_rule),
    **dict.fromkeys(("var_mean", "std_mean"), moments_rule),
    "einsum": einsum_rule,
    "softmax": softmax_rule,
}
"""Relevance rules by `operation_name`."""
