"""The state that a scorer or an operator must leave: of the model, the data and the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.core.layers import layer_module
from xai_edit.testing.example import Example

# Attributes of a module that are compared by themselves; the last stays when a hook is removed.
COMPARED = ("training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook")
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Fuse:
    """A function that counts its calls and raises at one of them; a deep copy of it is itself."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.blown = at, 0, False

    def __call__(self, *_: object) -> None:
        """Count one more call; as a hook it changes nothing."""
        self.count += 1
        if self.count == self.at:
            self.blown = True
            raise RuntimeError("raised by a check of xai_edit.testing")

    def __deepcopy__(self, _: object) -> Fuse:
        return self


def times(count: int) -> list[int]:
    """Return at which of several calls to raise: the first two, one in the middle, the last."""
    return sorted({1, 2, count // 2 + 1, count} & set(range(1, count + 1)))


def lived_in(example: Example, fuse: Fuse, *, training: bool = False) -> nn.Module:
    """Return a copy of the example's model with hooks, gradients and a frozen parameter.

    The fuse is called in each forward pass, before the last of the example's layers.
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
    """Return a function that returns the first thing that has changed since, or None.

    Without ``generators`` the global random generators may change: a first call may import
    packages that draw numbers.
    """
    data = list(data)
    before = _facts(model, data, generators)

    def changed() -> str | None:
        after = _facts(model, data, generators)
        for what in [*after, *before]:
            if what not in after:
                return f"takes away {what}"
            if what not in before:
                return f"leaves behind {what}"
            if before[what] != after[what]:
                return f"changes {what}"
        return None

    return changed


@dataclass
class Promises:
    """The promises of what is checked, under the name that begins each message."""

    who: str

    def require(self, kept: bool, sentence: str) -> None:
        """Raise AssertionError with the sentence unless a promise is kept."""
        if not kept:
            raise AssertionError(f"{self.who}: {sentence}")

    def require_none(self, what: str | None, doing: str = "", when: str = "") -> None:
        """Raise AssertionError where something has changed, as `watched` names it."""
        self.require(what is None, f"{doing} {what} {when}".strip())


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, in which -0.0 is not 0.0 and a NaN equals itself."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class _Same:
    """Equal where the object is the same one; holds it, so that its identity stays its own."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _facts(model: nn.Module, data: list[Tensor], generators: bool) -> dict[str, Any]:
    """Return what is compared, by its name in a sentence."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules():
        layer = f"layer {name!r}" if name else "the model"
        facts[f"the module {name!r}"] = _Same(module), type(module)
        facts[f"the training mode of {layer}"] = module.training
        for attribute, value in vars(module).items():
            if "hooks" in attribute and isinstance(value, Mapping):
                facts[f"the {attribute.strip('_').replace('_', ' ')} of {layer}"] = _content(value)
            elif attribute not in COMPARED:
                facts[f"the attribute {attribute!r} of {layer}"] = _content(value)
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for key, tensor in named(remove_duplicate=False):
            name = f"{kind} {key!r}"
            form = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device
            facts[name] = _Same(tensor), form
            facts[f"the values of {name}"] = bits(tensor)
            facts[f"requires_grad of {name}"] = tensor.requires_grad
            facts[f"the gradient of {name}"] = _content(tensor.grad)
            facts[f"the hooks of {name}"] = [
                [
                    (number, _Same(hook))
                    for number, hook in (getattr(tensor, of, None) or {}).items()
                ]
                for of in TENSOR_HOOKS
            ]
    for at, tensor in enumerate(data):
        content = bits(tensor), tensor.shape, tensor.requires_grad
        facts[f"the data it was given (tensor {at})"] = content
    for name, value in vars(nn.modules.module).items():
        if name.startswith("_global") and isinstance(value, Mapping):
            facts[f"the {name.strip('_').replace('_', ' ')} of all modules"] = _content(value)
    facts["whether gradients are computed"] = torch.is_grad_enabled()
    facts["the default dtype"] = torch.get_default_dtype()
    facts["the number of threads"] = torch.get_num_threads()
    if generators:
        facts["PyTorch's global random generator"] = bits(torch.get_rng_state())
        facts["Python's global random generator"] = random.getstate()
        state = np.random.get_state(legacy=False)  # noqa: NPY002  # the global one is meant
        facts["NumPy's global random generator"] = repr(state)
    return facts


def _content(value: object) -> Any:
    """Return what shows whether an attribute is still the same, one level deep."""
    if isinstance(value, (int, float, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, Tensor):
        return _Same(value), bits(value)
    if isinstance(value, Mapping):
        return _Same(value), [(key, _Same(one)) for key, one in value.items()]
    if isinstance(value, (list, set, tuple)):
        return _Same(value), [_Same(one) for one in value]
    return _Same(value)
