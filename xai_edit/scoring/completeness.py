"""Whether attributions of Captum add up to f(x) − f(baseline), the output's difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.guard import preserved

BOUND = 0.01  # of |f(x) − f(baseline)|, by which DeepLift may differ


def difference(
    explained: nn.Module, tensors: Sequence[Tensor], baselines: Any, given: Mapping[str, Tensor]
) -> Tensor:
    """Return f(x) − f(baseline) of each sample, the mean over several baselines, shape (samples,).

    ``tensors`` are a model's inputs, the explained ones first, and ``baselines`` those of Captum:
    None for zeros, a number, a tensor with one sample or as many as the inputs, or a function.
    """
    x, *rest = tensors
    n = len(x)

    def f(first: Tensor) -> Tensor:
        out: Tensor = explained(first, *rest)
        if "target" in given:
            return out.gather(1, given["target"][:, None])[:, 0]
        return out.reshape(n, -1).sum(1)

    with preserved(explained), torch.no_grad():
        base = baseline_of(baselines, x)
        if len(base) == n:
            return f(x) - f(base)
        means = torch.stack([f(one[None].expand_as(x)) for one in base]).mean(0)
        return f(x) - means


def baseline_of(baselines: Any, x: Tensor) -> Tensor:
    """Return Captum's ``baselines`` as a tensor with one or more samples."""
    if callable(baselines):
        baselines = baselines()
    if isinstance(baselines, tuple):
        baselines = baselines[0]
    if isinstance(baselines, Tensor):
        return baselines.to(x)
    return torch.full_like(x[:1], 0 if baselines is None else baselines)


def relative_error(sums: Tensor, expected: Tensor) -> float:
    """Return Σ |sum of attributions − expected| / Σ |expected| over the samples."""
    total = expected.double().abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return float((sums.double() - expected.double()).abs().sum() / total)


def error_at_inputs(
    method: Callable[..., Any],
    explained: nn.Module,
    tensors: Sequence[Tensor],
    given: Mapping[str, Tensor],
    *,
    baselines: Any = None,
    **arguments: Any,
) -> float:
    """Return by how much attributions of the inputs differ from f(x) − f(baseline), relatively.

    ``method`` is an attribution class of Captum, such as ``captum.attr.DeepLift``.
    """
    x, *rest = tensors
    base = baseline_of(baselines, x)
    base = base if len(base) == len(x) else base[:1].expand_as(x)
    if rest:
        arguments["additional_forward_args"] = tuple(rest)
    with preserved(explained), torch.enable_grad():
        without_in_place(explained)
        copy = x.detach().clone().requires_grad_()
        values = method(explained).attribute(copy, baselines=base, **given, **arguments)
    sums = values.detach().flatten(1).sum(1)
    return relative_error(sums, difference(explained, tensors, base, given))


def without_in_place(model: nn.Module) -> None:
    """Make activations keep their inputs, which Captum's hooks hold; the guard restores them."""
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
