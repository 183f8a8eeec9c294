"""The backward passes that carry the relevance of single operations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from zennit.core import Stabilizer

from xai_edit.lrp.relevance_at_layers import RULED

Arguments: TypeAlias = tuple[Any, ...]
Named: TypeAlias = dict[str, Any]
Operator: TypeAlias = Callable[..., Tensor]
Rule: TypeAlias = Callable[[Operator, Arguments, Named, Operator], Tensor]


def in_graph(value: Any) -> bool:
    """Return whether a value depends on the data; parameters are constants."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def of_data(function: Operator, args: Arguments) -> tuple[Operator, list[Tensor]]:
    """Return a function of those arguments alone that depend on the data, and these arguments."""
    varies = [in_graph(value) for value in args]
    constants = [None if one_varies else one for one, one_varies in zip(args, varies, strict=True)]

    def of_operands(*operands: Tensor) -> Tensor:
        rest = iter(operands)
        pairs = zip(constants, varies, strict=True)
        return function(*(next(rest) if one_varies else one for one, one_varies in pairs))

    return of_operands, [*compress(args, varies)]


def adds_a_constant(stabilizer: Any) -> bool:
    """Return whether a stabiliser adds ±ε, as Zennit's does by default."""
    plain = type(stabilizer) is Stabilizer
    return plain and not stabilizer.clip and not stabilizer.norm_scale


def quotient(relevance: Tensor, z: Tensor, stabilizer: Any, *, positive: bool = False) -> Tensor:
    """Return R / z with a stabilised denominator; ``positive`` says that no z is negative."""
    if not adds_a_constant(stabilizer):
        divided: Tensor = relevance / stabilizer(z)
        return divided
    epsilon = z.new_tensor(stabilizer.epsilon)
    if positive:
        denominator = z + epsilon
    else:  # `torch.where` and Zennit's sign take several times as long; z + 0 makes −0 positive
        denominator = z + 0.0
        torch.copysign(epsilon, denominator, out=denominator).add_(z)
    return torch.div(relevance, denominator, out=denominator)


class _Split(torch.autograd.Function):
    """An output whose relevance goes to each operand by a constant share."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, shares: tuple[float, ...], *operands: Tensor) -> Tensor:
        ctx.shares, ctx.shapes = shares, [operand.shape for operand in operands]
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        # Zeros instead of None: the layers of a gate have a relevance of zero.
        parts = [
            relevance[0].new_zeros(shape)
            if share == 0
            else (relevance[0] if share == 1 else share * relevance[0]).sum_to_size(shape)
            for share, shape in zip(ctx.shares, ctx.shapes, strict=True)
        ]
        return (None, None, *parts)


class _Proportional(torch.autograd.Function):
    """z = f(x₁, x₂, …), with relevance xᵢ ⊙ (∂z/∂xᵢ)ᵀ (R / n z)."""

    @staticmethod
    def forward(
        ctx: Any, function: Operator, stabilizer: Operator, n: int, *operands: Tensor
    ) -> Tensor:
        ctx.function, ctx.stabilizer, ctx.n, ctx.again = function, stabilizer, n, RULED.again
        ctx.save_for_backward(*operands)  # the backward pass raises if one was overwritten
        local, z = _with_graph(function, operands)
        ctx.graph = local, z, z._version
        return z.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        local, z, version = ctx.graph or ([], None, None)
        if not ctx.again:
            ctx.graph = None  # frees the tensors as the pass goes on
        if z is None or z._version != version:  # a second pass, or a ReLU in place
            local, z = _with_graph(ctx.function, operands)
        ratio = quotient(relevance[0], z.detach(), ctx.stabilizer)
        if ctx.n > 1:
            ratio.div_(ctx.n)
        contexts = torch.autograd.grad(z, local, ratio, retain_graph=ctx.again)
        parts = [x * c for x, c in zip(operands, contexts, strict=True)]
        return (None, None, None, *parts)


def _with_graph(function: Operator, operands: Arguments) -> tuple[list[Tensor], Tensor]:
    """Return copies of the operands and a function of them, connected by a graph of their own."""
    local = [operand.detach().requires_grad_() for operand in operands]
    with torch.enable_grad():
        return local, function(*local)


class _Recomputed(torch.autograd.Function):
    """f(x₁, x₂, …), whose operations run by their rules only when relevance comes back to it.

    So none of the values inside it is kept until then.
    """

    @staticmethod
    def forward(ctx: Any, function: Operator, ruled: Operator, *operands: Tensor) -> Tensor:
        ctx.ruled = ruled
        ctx.save_for_backward(*operands)
        return function(*operands)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        local, output = _with_graph(ctx.ruled, ctx.saved_tensors)
        return (None, None, *torch.autograd.grad(output, local, relevance))


class _Softmax(torch.autograd.Function):
    """s = softmax(x), with relevance x ⊙ (R − s Σ R)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        output = torch.softmax(x, dim)
        ctx.dim = dim
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None]:
        x, s = ctx.saved_tensors
        (R,) = relevance
        shares = s * R.sum(ctx.dim, keepdim=True)
        torch.sub(R, shares, out=shares).mul_(x)
        return shares.masked_fill_(s == 0, 0), None  # x may be -inf where it is masked


class _WithoutRelevance(torch.autograd.Function):
    """An output that no relevance may reach."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, name: str) -> Tensor:
        ctx.name, ctx.like = name, torch.empty_like(x, device="meta")
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[None, Tensor, None]:
        if relevance[0].any():
            raise ValueError(
                f"model: it runs {ctx.name}, for which there is no relevance rule, and not only in "
                "a gate or a norm's deviation, which get no relevance; use xai_edit.CaptumLayer"
            )
        return None, torch.zeros_like(ctx.like, device=relevance[0].device), None


split: Operator = _Split.apply
without_relevance: Operator = _WithoutRelevance.apply
proportional: Operator = _Proportional.apply
recomputed: Operator = _Recomputed.apply
softmax: Operator = _Softmax.apply
