"""Float32 copies of half-precision models, in which the quotients of a rule do not overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from xai_edit.core.guard import copied

HALF = (torch.float16, torch.bfloat16)


def half_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the first half-precision dtype among a model's parameters, None without one."""
    return next((one.dtype for one in model.parameters() if one.dtype in HALF), None)


def precision_origin(model: nn.Module) -> dict[str, str]:
    """Return what an origin says of a half-precision model; nothing of others."""
    half = half_dtype(model)
    return {} if half is None else {"precision": f"float32 copy of a {half} model"}


def in_float32(model: nn.Module) -> nn.Module:
    """Return a float32 copy of a half-precision model, which takes its inputs; else the model.

    It computes what ``copy.deepcopy(model).float()`` computes of float32 inputs. ValueError if the
    model cannot be copied.
    """
    if half_dtype(model) is None:
        return model
    copy = copied(model)
    for tensor in (*copy.parameters(), *copy.buffers()):
        tensor.data = widened(tensor.data)
    copy.register_forward_pre_hook(_cast, with_kwargs=True)
    return copy


def widened(values: Tensor) -> Tensor:
    """Return half-precision values in float32, and others as they are."""
    return values.float() if values.dtype in HALF else values


def why_no_copy(model: nn.Module) -> str:
    """Return what to add to the error of a forward pass of `in_float32`'s copy; else nothing."""
    if _cast not in model._forward_pre_hooks.values():
        return ""
    return (
        "; its half-precision parameters are float32 in the copy that LRP scores, so let its "
        "forward cast to the dtype of a weight, not to a fixed one"
    )


def _cast(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return tree_map_only(Tensor, widened, (inputs, named))
