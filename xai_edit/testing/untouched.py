"""The state that a scorer or an operator must leave: of the model, the data and the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xai_edit.core.layers import layer_module
from xai_edit.testing.example import Example

# Attributes of a module that are compared elsewhere; the last stays when a hook is removed.
COMPARED = ("training", "_parameters", "_buffers", "_modules", "_is_full_backward_hook")
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Fuse:
    """A hook that counts its calls and raises at one of them; a deep copy of it is itself."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.blown = at, 0, False

    def __call__(self, *_: object) -> None:
        """Count a call; as a hook it changes nothing."""
        self.count += 1
        if self.count == self.at:
            self.blown = True
            raise RuntimeError("raised by a check of xai_edit.testing")

    def __deepcopy__(self, _: object) -> Fuse:
        return self


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


@contextmanager
def naming(who: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors, by default AssertionError, into an AssertionError that begins with ``who``."""
    errors = errors or (AssertionError,)
    try:
        yield
    except errors as problem:
        raise AssertionError(f"{who}: {problem}") from problem


def require(kept: bool, sentence: str) -> None:
    """Raise AssertionError with the sentence unless a promise is kept."""
    if not kept:
        raise AssertionError(sentence)


@contextmanager
def unchanged(
    model: nn.Module, data: Iterable[Tensor] = (), words: str = "{}", *, generators: bool = True
) -> Iterator[None]:
    """Raise AssertionError with the first thing that the block has changed.

    ``words`` stand around it. Without ``generators`` the global random generators may change: a
    first call may import packages that draw numbers.
    """
    data = list(data)
    before = _state(model, data, generators)
    yield
    after = _state(model, data, generators)
    for what in [*after, *before]:
        verb = "changes" if what in before else "leaves behind"
        verb = verb if what in after else "takes away"
        same = what in before and what in after and before[what] == after[what]
        require(same, words.format(f"{verb} {what}").strip())


def attempted(act: Callable[[], object], *watched: Any) -> Exception | None:
    """Call a function, which leaves `unchanged` what is watched, and return its error."""
    with unchanged(*watched):
        try:
            act()
        except Exception as problem:
            return problem
    return None


def shows_errors(attempt: Callable[[str, Fuse], Exception | None], verb: str, what: str) -> None:
    """Attempt once, then with a fuse that raises at a call: one of the first, a middle, the last.

    ``verb`` and ``what`` are the words of the message where the error of the fuse is hidden.
    """
    attempt("", whole := Fuse())
    for at in sorted({1, 2, whole.count // 2 + 1, whole.count} & {*range(1, whole.count + 1)}):
        when, fuse = f"when {what.format(at)}", Fuse(at)
        hidden = attempt(when, fuse) is None and fuse.blown
        require(not hidden, f"{verb} {when}, and hides the error")


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, in which -0.0 is not 0.0 and a NaN equals itself."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _state(model: nn.Module, data: list[Tensor], generators: bool) -> dict[str, Any]:
    """Return all that is compared, by its name in a sentence."""
    state: dict[str, Any] = {
        "whether gradients are computed": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
    }
    for name, module in model.named_modules():
        layer = f"layer {name!r}" if name else "the model"
        state[f"the module {name!r}"] = _same(module), type(module)
        state[f"the training mode of {layer}"] = module.training
        for attribute, value in vars(module).items():
            if attribute not in COMPARED:
                kind = _words(attribute) if "hooks" in attribute else f"attribute {attribute!r}"
                state[f"the {kind} of {layer}"] = _content(value)
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for key, tensor in named(remove_duplicate=False):
            name = f"{kind} {key!r}"
            layout = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device
            state[name] = _same(tensor), layout
            state[f"the values of {name}"] = bits(tensor)
            state[f"requires_grad of {name}"] = tensor.requires_grad
            state[f"the gradient of {name}"] = _content(tensor.grad)
            hooks = [getattr(tensor, one, None) or {} for one in TENSOR_HOOKS]
            state[f"the hooks of {name}"] = [[*one.items()] for one in hooks]
    for at, tensor in enumerate(data):
        content = bits(tensor), tensor.shape, tensor.requires_grad
        state[f"the data it was given (tensor {at})"] = content
    for name, value in vars(nn.modules.module).items():
        if name.startswith("_global") and isinstance(value, Mapping):
            state[f"the {_words(name)} of all modules"] = _content(value)
    if generators:
        state["PyTorch's global random generator"] = bits(torch.get_rng_state())
        state["Python's global random generator"] = random.getstate()
        numbers = np.random.get_state(legacy=False)  # noqa: NPY002  # the global one is meant
        state["NumPy's global random generator"] = repr(numbers)
    return state


def _words(attribute: str) -> str:
    return attribute.strip("_").replace("_", " ")


def _same(value: object) -> tuple[int, object]:
    """Return a tuple that equals only that of the same object, and keeps the object alive."""
    return id(value), value


def _content(value: object) -> Any:
    """Return what shows whether an attribute is still the same, one level deep."""
    if isinstance(value, (int, float, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, Tensor):
        return _same(value), bits(value)
    if isinstance(value, Mapping):
        return _same(value), [(key, _same(one)) for key, one in value.items()]
    inside = value if isinstance(value, (list, set, tuple)) else ()
    return _same(value), [*map(_same, inside)]
