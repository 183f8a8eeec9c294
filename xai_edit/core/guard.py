"""Restore a model exactly after a pass, and check that its weights are finite."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.errors import NonFiniteError

# The registries a module keeps beside its plain attributes; copied one level deep.
_REGISTRIES = (dict, set, list)


@contextmanager
def preserved(model: nn.Module, *, weights: bool = False) -> Iterator[nn.Module]:
    """Restore ``model`` exactly on leaving, also after an exception.

    Every module's attributes come back by identity: parameters and buffers (the same objects with
    the same storage), child modules, hooks, the training flag, attributes that shadow a method
    (a canonizer's ``forward``); and every parameter's ``requires_grad`` and ``grad``. Zennit 1.0
    leaves new parameter objects and merged batch-norm weights behind (zennit#237); this is why
    each pass runs in here. Transformer layers take their slow path meanwhile: the fast one calls
    none of the modules inside, so that hooks on them would see nothing.

    Parameters
    ----------
    model : nn.Module
        The user's model. Set to evaluation mode, without gradients, while inside.
    weights : bool
        Also undo what is written into a parameter in place, at the price of a copy of them all:
        for code that is not ours.

    Yields
    ------
    nn.Module
        The same object.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    tensors = [
        (tensor, tensor.data, tensor.requires_grad, tensor.grad)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    kept = (*model.parameters(), *model.buffers()) if weights else tuple(model.buffers())
    values = [(tensor, tensor.detach().clone()) for tensor in kept]
    try:
        model.eval()
        for tensor, *_ in tensors:
            tensor.grad = None  # a backward pass would add to the user's own
        with _every_module_called():
            yield model
    finally:
        for module, attributes in modules:
            _restore(module, attributes)
        for tensor, storage, requires_grad, grad in tensors:
            tensor.data = storage
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class _FastPath:
    """How many guards hold PyTorch's fast path for transformer layers off, in all threads."""

    lock = threading.Lock()
    holders = 0
    before = True


@contextmanager
def _every_module_called() -> Iterator[None]:
    """Have transformer layers call the modules inside them."""
    fast_path = torch.backends.mha
    with _FastPath.lock:
        if not _FastPath.holders:
            _FastPath.before = fast_path.get_fastpath_enabled()
            fast_path.set_fastpath_enabled(False)
        _FastPath.holders += 1
    try:
        yield
    finally:
        with _FastPath.lock:
            _FastPath.holders -= 1
            if not _FastPath.holders:
                fast_path.set_fastpath_enabled(_FastPath.before)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Restore one module's attributes on leaving.

    A rule of Zennit 1.0 registers the weights that it finds as new parameters. Weights that a batch
    norm was merged into are no parameters; they have to be there for the next batch.
    """
    attributes = _attributes(module)
    try:
        yield
    finally:
        _restore(module, attributes)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, (value.copy() if value else ()) if isinstance(value, _REGISTRIES) else None)
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in attributes]:
        del now[name]
    for name, (value, content) in attributes.items():
        now[name] = value
        if content is None:
            continue
        # The registry object itself stays, since handles of the user's hooks refer to it.
        value.clear()
        if isinstance(value, list):
            value.extend(content)
        else:
            value.update(content)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, or say in a ValueError that the model cannot be copied."""
    try:
        return deepcopy(model)
    except (RuntimeError, TypeError) as problem:
        raise ValueError(
            f"model: it cannot be copied ({problem}), and this works on a copy; take off what "
            "computes its weights, such as weight_norm"
        ) from problem


def require_finite(model: nn.Module) -> None:
    """Raise `NonFiniteError` naming the first parameter or buffer with a NaN or an infinity."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        # The extremes are NaN if any value is; a mask would take as much memory as the weights.
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not all(math.isfinite(extreme) for extreme in tensor.detach().aminmax())
        ):
            raise NonFiniteError(f"model: {name!r} holds NaN or infinite values")
