"""The relevance rule of norms: each is a linear map once its deviation is a constant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xai_edit.core.trace import operation_name
from xai_edit.lrp.propagation import Arguments, Named, Operator, proportional


def norm_rule(function: Operator, args: Arguments, named: Named, stabilizer: Operator) -> Tensor:
    """Share R as through a linear map with a constant deviation (Ali et al. 2022, Eq. 13).

    If R were passed on, the quotient in the rule before would overflow where the input is small and
    its distance from the mean is not.
    """
    name = operation_name(function)
    x, *others = args
    if name in ("batch_norm", "instance_norm") and inspect.isbuiltin(function):
        weight, bias, *statistics = others  # torch's own order
        others = [*statistics[:2], weight, bias, *statistics[2:]]
    with_constant_deviation = NORMS[name]
    return proportional(lambda x: with_constant_deviation(x, *others, **named), stabilizer, 1, x)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    normed: Tensor = _LayerNorm.apply(x, shape, weight, bias, eps)
    return normed


class _LayerNorm(torch.autograd.Function):
    """PyTorch's kernel, which is one operation instead of eight, with a constant deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
        output, _, over_deviation = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.weight, ctx.over_deviation, ctx.dims = weight, over_deviation, range(-len(shape), 0)
        return output

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = gradient[0] if ctx.weight is None else gradient[0] * ctx.weight
        centred = scaled - scaled.mean([*ctx.dims], keepdim=True)
        return centred * ctx.over_deviation, None, None, None, None


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    groups = x.reshape(len(x), num_groups, -1)
    return _affine(_normed(groups, (2,), eps).reshape(x.shape), weight, bias)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
    over: Sequence[int] = (0,),
) -> Tensor:
    if training or running_mean is None or running_var is None:
        normed = _normed(x, [*over, *range(2, x.ndim)], eps)
    else:
        mean, deviation = _per_channel(x, running_mean), _per_channel(x, running_var + eps).sqrt()
        normed = (x - mean) / deviation
    return _affine(normed, weight, bias)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    statistics = running_mean, running_var
    return _batch_norm(x, *statistics, weight, bias, use_input_stats, momentum, eps, over=())


NORMS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
}
"""Norms with a constant deviation, by the names of their operations."""


def _normed(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """Return (x − mean) / deviation over some axes, the deviation a constant."""
    centred = x - x.mean([*dims], keepdim=True)
    return centred / (centred.detach().square().mean([*dims], keepdim=True) + eps).sqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * _per_channel(x, weight)
    return x if bias is None else x + _per_channel(x, bias)


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))
