"""Entries of a model's tensors that share memory, so that an edit of one would change others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from xai_edit.core.errors import EditMismatchError


def placement(tensor: Tensor) -> tuple[object, ...]:
    """Return what is equal for two tensors that are the same entries in the same order."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def require_own_memory(tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    """Raise EditMismatchError where an entry to be changed is another entry of the model too.

    ``changed`` has flat indices by name. Tensors of one placement, such as tied weights, may share
    their memory: an edit of one is the same edit of the other.
    """
    for name in changed:
        if _repeats(tensors[name]):
            raise EditMismatchError(
                f"several entries of {name!r} share memory, as it is an expanded tensor of strides "
                f"{tensors[name].stride()}; make it one of its own by .clone()"
            )
    for pair in _overlapping(tensors):
        for name, other in (pair, pair[::-1]):
            if name in changed and _meet(tensors[name], changed[name], tensors[other]):
                raise EditMismatchError(
                    f"entries of {name!r} share memory with {other!r}, which would change too; "
                    "give each its own by .clone()"
                )


def _repeats(tensor: Tensor) -> bool:
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return len(_addresses(tensor).unique()) < tensor.numel()
        reach += stride * (size - 1)
    return False


def _overlapping(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield two names for each two tensors of other placement whose ranges of memory overlap."""
    spans = {}
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.numel():
            last = sum(
                stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True)
            )
            start = tensor.data_ptr()
            spans[name] = (start, start + (last + 1) * tensor.element_size())
    open_ones: list[str] = []
    for name in sorted(spans, key=lambda name: spans[name]):
        open_ones = [one for one in open_ones if spans[one][1] > spans[name][0]]
        own = placement(tensors[name])
        yield from ((one, name) for one in open_ones if placement(tensors[one]) != own)
        open_ones.append(name)


def _meet(tensor: Tensor, index: Tensor, other: Tensor) -> bool:
    if tensor.device != other.device:
        return False
    own = _addresses(tensor)[index.cpu()]
    return tensor.dtype != other.dtype or bool(torch.isin(own, _addresses(other)).any())


def _addresses(tensor: Tensor) -> Tensor:
    """Return the addresses of a tensor's entries in row-major order."""
    at = torch.tensor(tensor.data_ptr())
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        at = at[..., None] + torch.arange(size) * stride * tensor.element_size()
    return at.flatten()
