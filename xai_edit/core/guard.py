"""Restore a model exactly after a pass, and check that its weights are finite."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from xai_edit.core.checks import finite
from xai_edit.core.errors import out_of_memory
from xai_edit.core.wrapped import run_eagerly

_REGISTRIES = (dict, set, list)  # attributes of a module whose content is restored too


@contextmanager
def preserved(model: nn.Module, *, weights: bool = False) -> Iterator[nn.Module]:
    """Restore ``model`` exactly on leaving, also after an exception.

    Every module's attributes are restored by identity: parameters and buffers (the same objects
    with the same storage), child modules, hooks, the training flag, attributes that shadow a method
    (a canonizer's ``forward``); and every parameter's ``requires_grad`` and ``grad``. Zennit 1.0
    leaves new parameter objects and merged batch-norm weights behind (zennit#237). Transformer
    layers take their slow path meanwhile, as the fast one does not call the modules inside, and
    compiled modules run as they are written.

    Inside, the model is in evaluation mode and without gradients. With ``weights``, also what is
    written into a parameter in place is undone, at the price of a copy of them all. ValueError as
    by `require_values`.
    """
    require_values(model)
    before = Snapshot(model)
    kept = (*model.parameters(), *model.buffers()) if weights else tuple(model.buffers())
    values = [(tensor, tensor.detach().clone()) for tensor in kept]
    try:
        model.eval()
        run_eagerly(model)
        for tensor, *_ in before.tensors:
            tensor.grad = None  # a backward pass would add to the user's own
        with _every_module_called():
            yield model
    finally:
        before.restore()
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class Snapshot:
    """A model's attributes, and the storage of its tensors, to return to; no values are copied."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, _attributes(module)) for module in model.modules()]
        self.tensors = [
            (tensor, tensor.data, tensor.requires_grad, tensor.grad)
            for tensor in (*model.parameters(), *model.buffers())
        ]

    def restore(self) -> None:
        """Return to the state of the snapshot."""
        for module, attributes in self.modules:
            _restore(module, attributes)
        for tensor, storage, requires_grad, grad in self.tensors:
            tensor.data = storage
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad


class _FastPath:
    """The number of guards, in all threads, that switch PyTorch's fast path off."""

    lock = threading.Lock()
    holders = 0
    before = True


@contextmanager
def _every_module_called() -> Iterator[None]:
    """Make transformer layers call the modules inside them."""
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

    A rule of Zennit 1.0 registers the weights as new parameters; weights that a batch norm was
    merged into are no parameters, and the next batch needs them.
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
        # The same registry object, since handles of the user's hooks refer to it.
        value.clear()
        if isinstance(value, list):
            value.extend(content)
        else:
            value.update(content)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, or say in a ValueError that the model cannot be copied or run."""
    require_values(model)
    try:
        return deepcopy(model)
    except (RuntimeError, TypeError) as problem:
        if out_of_memory(problem):
            raise
        raise ValueError(
            f"model: it cannot be copied ({problem}), and this works on a copy; take off what "
            "computes its weights, such as weight_norm"
        ) from problem


def require_values(model: nn.Module) -> None:
    """Raise ValueError for a model that no pass can be made with, naming the module or the tensor.

    It is spread over devices by a device map, whose hooks (Hugging Face's accelerate) move weights
    during a forward pass, so that neither a rule nor an edit finds them in their place; or a tensor
    is without values, of eight bits, or made under inference mode.
    """
    remedy = (
        "load it whole on one device: from_pretrained(...) without device_map, then .to(device)"
    )
    for name, module in model.named_modules():
        places = {str(one) for one in (vars(module).get("hf_device_map") or {}).values()}
        if len(places) > 1 or "disk" in places:
            where = f"module {name!r}" if name else "it"
            raise ValueError(
                f"model: {where} is spread over {sorted(places)} by a device map (hf_device_map); "
                f"{remedy}"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            trouble = f"is on the meta device, without values, as offloaded weights are; {remedy}"
        elif tensor.is_floating_point() and tensor.element_size() < 2:
            trouble = f"is {tensor.dtype}, in which PyTorch cannot calculate; convert by .float()"
        elif tensor.is_inference() and not torch.is_inference_mode_enabled():
            trouble = "was made under torch.inference_mode(); make the model outside of it"
        else:
            continue
        raise ValueError(f"model: {name!r} {trouble}")


def require_finite(model: nn.Module) -> None:
    """Raise `NonFiniteError` naming the first parameter or buffer with a NaN or an infinity.

    ValueError as by `require_values`.
    """
    require_values(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            finite(tensor, f"model: {name!r}")
