"""What may not change while a scorer or an operator works: the model, the data, the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import layer_module
from xai_edit.testing.example import Example

# Attributes of a module that are looked at otherwise; the last stays when a hook is removed.
LOOKED_AT = ("training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook")
PLAIN = (int, float, str, bytes, type(None))


class Fuse:
    """Counts what happens and raises once, at the time given; a deep copy of it is itself."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.blown = at, 0, False

    def __call__(self, *_: object) -> None:
        """Count one more; as a hook it changes nothing."""
        self.count += 1
        if self.count == self.at:
            self.blown = True
            raise RuntimeError("raised by a check of xai_edit.testing")

    def __deepcopy__(self, _: object) -> Fuse:
        return self


def times(count: int) -> list[int]:
    """Return at which of several times to raise: the first two, one in the middle, the last."""
    return sorted({1, 2, count // 2 + 1, count} & set(range(1, count + 1)))


def lived_in(example: Example, fuse: Fuse, *, training: bool = False) -> nn.Module:
    """Return a copy of the example's model as users have them.

    It has hooks of its user's, gradients of an earlier step and a frozen parameter.

    Parameters
    ----------
    example : Example
        What to copy the model of.
    fuse : Fuse
        Called in each forward pass, before the last of the example's layers.
    training : bool
        In training mode.
    """
    model = deepcopy(example.model).train(training)
    last = layer_module(model, example.layers[-1])
    last.register_forward_pre_hook(fuse)
    last.register_forward_hook(lambda *_: None)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    return model


def watched(
    model: nn.Module, data: Iterable[Tensor] = (), *, generators: bool = True
) -> Callable[[], str | None]:
    """Return a function that tells the first thing that has changed since, or None.

    Parameters
    ----------
    model : nn.Module
    data : iterable of Tensor
    generators : bool
        Whether to watch the global random generators. What is called for the first time may import
        packages, and some of them draw numbers while they are imported.
    """
    data = list(data)
    kept: list[object] = []  # an id is only good while its object lives

    def facts() -> dict[str, Any]:
        found = {**_of_the_model(model, kept), **_of_the_data(data), **_of_the_process(kept)}
        return {**found, **_generators()} if generators else found

    before = facts()

    def changed() -> str | None:
        after = facts()
        for what in [*after, *before]:
            if what not in after:
                return f"takes away {what}"
            if what not in before:
                return f"leaves behind {what}"
            if before[what] != after[what]:
                return f"changes {what}"
        return None

    return changed


def _identity(kept: list[object]) -> Callable[[object], int]:
    def same(value: object) -> int:
        kept.append(value)
        return id(value)

    return same


def _of_the_model(model: nn.Module, kept: list[object]) -> dict[str, Any]:
    """Return what is so now, by what it is called in a sentence."""
    facts: dict[str, Any] = {}
    same = _identity(kept)
    for name, module in model.named_modules():
        layer = f"layer {name!r}" if name else "the model"
        facts[f"the module {name!r}"] = same(module), type(module)
        facts[f"the training mode of {layer}"] = module.training
        for attribute, value in vars(module).items():
            if "hooks" in attribute and isinstance(value, Mapping):
                kind = attribute.strip("_").replace("_", " ")
                facts[f"the {kind} of {layer}"] = (
                    same(value),
                    [(key, same(hook)) for key, hook in value.items()],
                )
            elif attribute not in LOOKED_AT:
                facts[f"the attribute {attribute!r} of {layer}"] = _content(value, same)
    tensors = {
        **{f"parameter {name!r}": p for name, p in model.named_parameters(remove_duplicate=False)},
        **{f"buffer {name!r}": b for name, b in model.named_buffers(remove_duplicate=False)},
    }
    for name, tensor in tensors.items():
        facts[name] = same(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device
        facts[f"the values of {name}"] = bits(tensor)
        facts[f"requires_grad of {name}"] = tensor.requires_grad
        gradient = tensor.grad
        facts[f"the gradient of {name}"] = gradient is None or (same(gradient), bits(gradient))
        facts[f"the hooks of {name}"] = [
            [(key, same(hook)) for key, hook in (getattr(tensor, hooks, None) or {}).items()]
            for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ]
    for name, value in model.state_dict().items():
        facts[f"{name!r} in the state_dict"] = bits(value) if isinstance(value, Tensor) else value
    return facts


def _of_the_data(data: list[Tensor]) -> dict[str, Any]:
    return {
        f"the data it was given (tensor {place})": (
            bits(tensor),
            tensor.shape,
            tensor.requires_grad,
        )
        for place, tensor in enumerate(data)
    }


def _content(value: object, same: Callable[[object], int]) -> Any:
    """Return what tells whether an attribute is still the same, one level deep."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return same(value), bits(value)
    if isinstance(value, Mapping):
        return same(value), [(key, same(one)) for key, one in value.items()]
    if isinstance(value, (list, set, tuple)):
        return same(value), [same(one) for one in value]
    return same(value)


def _of_the_process(kept: list[object]) -> dict[str, Any]:
    same = _identity(kept)
    shared = {  # hooks that every module runs
        f"the {name.strip('_').replace('_', ' ')} of all modules": [
            (key, same(hook)) for key, hook in hooks.items()
        ]
        for name, hooks in vars(nn.modules.module).items()
        if name.startswith("_global") and isinstance(hooks, Mapping)
    }
    return {
        **shared,
        "whether gradients are computed": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
    }


def _generators() -> dict[str, Any]:
    return {
        "PyTorch's global random generator": bits(torch.get_rng_state()),
        "Python's global random generator": random.getstate(),
        "NumPy's global random generator": repr(
            np.random.get_state(legacy=False)  # noqa: NPY002  # that is the one
        ),
    }


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, in which -0.0 is not 0.0 and a NaN equals itself."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
