"""Layers by name, their units, and the tensors that pass through them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from xai_edit.core.checks import require_type
from xai_edit.core.errors import UnknownLayerError, out_of_memory
from xai_edit.core.final_operation import following, is_compiled, mark_unfollowed
from xai_edit.core.inputs import Inputs, called, described, input_tensors
from xai_edit.core.outputs import logits_of
from xai_edit.core.precision import why_no_copy

INPUT_SUFFIX = ":input"
"""``"fc:input"`` names the inputs of layer ``fc``, where ``"fc"`` names its outputs."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED = (nn.Linear, *CONVOLUTIONS)


def resolve_layers(model: nn.Module, layers: Sequence[str] | str | None) -> list[str]:
    """Return checked layer names; None means all convolution and linear layers, in module order.

    Raises
    ------
    UnknownLayerError, ValueError
        If a name is not one of the model's modules, no layer is left, or one is named twice.
    """
    modules = dict(model.named_modules())
    weighted = [name for name, module in modules.items() if isinstance(module, WEIGHTED)]
    if layers is None:
        names = weighted
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        given = "the model has none" if layers is None else "an empty list was given"
        raise ValueError(f"layers: no convolution or linear layer to score; {given}")
    for name in names:
        require_type(name, str, "layers", "they are names of the model's modules")
        module = name.removesuffix(INPUT_SUFFIX)
        if module not in modules or (module == "" and "" not in weighted):
            raise UnknownLayerError.of(name, weighted, "convolution and linear layers")
    if len(set(names)) < len(names):
        raise ValueError(f"layers: {names} names a layer twice")
    return names


def layer_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a checked layer name, with or without ``:input``."""
    return model.get_submodule(name.removesuffix(INPUT_SUFFIX))


def sum_positions(values: Tensor, axis: int) -> Tensor:
    """Sum values of shape (samples, ...) over all positions of a unit, to (samples, units).

    ``axis`` is that of the units, see `xai_edit.core.axes.unit_axes`.
    """
    units = unit_axis_of(values, axis)
    positions = [at for at in range(1, values.ndim) if at != units]
    return values.sum(dim=positions) if positions else values


def unit_axis_of(values: Tensor, axis: int) -> int:
    """Return ``axis`` counted from the first; raise ValueError if it cannot hold the units."""
    if not -values.ndim < axis < values.ndim or axis == 0:
        raise ValueError(
            f"unit_axis: {axis} given; a layer's values of shape {tuple(values.shape)} have their "
            "samples on axis 0 and units on another of their axes"
        )
    return axis % values.ndim


def first_tensor(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Return what a module is called with first, by position or by name."""
    return next(iter((*inputs, *named.values())), None)


def with_first(
    value: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's arguments, by position and by name, with the first one replaced."""
    if inputs:
        return (value, *inputs[1:]), {**named}
    return inputs, {**named, **dict.fromkeys([*named][:1], value)}


def require_one_tensor(name: str, value: Any, seen: Container[str]) -> None:
    """Raise ValueError where a layer's value is no tensor, or the layer is called again."""
    if name in seen:
        raise ValueError(
            f"layer {name!r} is called more than once in a forward pass, so a score of its "
            "units would mix the calls; use one module for each call, and no checkpointing, which "
            "calls it again for the gradient"
        )
    if not isinstance(value, Tensor):
        raise ValueError(
            f"layer {name!r} passes on a {type(value).__name__}, not one tensor; "
            "name a layer inside it"
        )


@dataclass
class Tap:
    """The tensors of the tapped layers in one forward pass, by layer name.

    ``values`` are detached copies, as an in-place activation may follow; ``edges`` are where the
    gradient (under a composite: the relevance) of each layer arrives.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    edges: dict[str, GradientEdge] = field(default_factory=dict)

    def require(self, layers: Sequence[str]) -> None:
        """Raise ValueError naming the first layer that took no part in the forward pass."""
        for name in layers:
            if name not in self.values:
                raise ValueError(f"layer {name!r} takes no part in the model's forward pass")

    def record(self, name: str, tensor: Any) -> None:
        """Keep one layer's tensor."""
        require_one_tensor(name, tensor, self.values)
        self.values[name] = tensor.detach().clone()
        if tensor.requires_grad:
            self.edges[name] = get_gradient_edge(tensor)


def hooked(model: nn.Module, layer: str, change: Callable[[Any], Any]) -> RemovableHandle:
    """Call a function with a layer's values in each forward pass, until the handle is removed.

    What it returns is passed on in their place; None leaves them as they are.
    """
    module = layer_module(model, layer)
    if not layer.endswith(INPUT_SUFFIX):
        return module.register_forward_hook(lambda _, __, output: change(output))

    def at_input(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        changed = change(first_tensor(inputs, named))
        return None if changed is None else with_first(changed, inputs, named)

    return module.register_forward_pre_hook(at_input, with_kwargs=True)


@contextmanager
def tapped(model: nn.Module, layers: Sequence[str]) -> Iterator[Tap]:
    """Record the tensors of ``layers`` during a forward pass inside this context.

    Enter it before a composite registers its hooks, which may replace an input.
    """
    tap = Tap()
    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(hooked(model, name, partial(tap.record, name)))
        yield tap


def values_of(model: nn.Module, layers: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
    """Return the values of some layers for a batch, from a forward pass without gradients."""
    with torch.no_grad(), tapped(model, layers) as tap:
        run(model, inputs)
    tap.require(layers)
    return tap.values


def values_at(model: nn.Module, layer: str, inputs: Inputs) -> Tensor:
    """Return `values_of` one layer."""
    return values_of(model, [layer], inputs)[layer]


@contextmanager
def replaced(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass on ``change(values)`` in place of a layer's values in this context.

    In a new tensor with the memory layout of the values, as a ``view`` may follow.
    """
    with hooked(model, layer, lambda values: torch.empty_like(values).copy_(change(values))):
        yield


def gradients_at(
    tap: Tap, layers: Sequence[str], outputs: Tensor, grad_outputs: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of ``outputs`` at each layer; the backward pass stops at the earliest."""
    tap.require(layers)
    for name in layers:
        if name not in tap.edges:
            raise ValueError(
                f"layer {name!r} passes no gradient on; is it run under torch.no_grad(), "
                "torch.inference_mode() or checkpointing (switch it off), or is nothing before it "
                "differentiable?"
            )
    gradients = torch.autograd.grad(
        outputs, [tap.edges[name] for name in layers], grad_outputs=grad_outputs, allow_unused=True
    )
    for name, gradient in zip(layers, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"layer {name!r} has no influence on the model's output")
    return dict(zip(layers, gradients, strict=True))


def embeddings_in_graph(model: nn.Module) -> None:
    """Register hooks that let gradients start at embeddings; the guard removes them."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.register_forward_hook(
                lambda _, __, output: output.detach().requires_grad_().clone()
            )


def differentiable(inputs: Inputs) -> Inputs:
    """Return a copy that gradients reach; token numbers and masks stay as they are."""
    copy = inputs.detach().clone()
    for name, values in input_tensors(copy).items():
        values.requires_grad_(values.is_floating_point() and not name.endswith("mask"))
    return copy


class _StartsAtFloats(TorchFunctionMode):
    """Lets gradients start where whole numbers, such as pixels of images, become floating."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.whole = {  # it holds the tensors, so that an id stays theirs
            id(values): values
            for name, values in input_tensors(inputs).items()
            if not values.is_floating_point() and not name.endswith("mask")
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(id(one) in self.whole for one in tree_leaves((args, kwargs))):
            for made in tree_leaves(output):
                if not isinstance(made, Tensor) or made.dtype == torch.bool:
                    continue
                if not made.is_floating_point():
                    self.whole[id(made)] = made
                elif made.is_leaf:
                    made.requires_grad_()
        return output


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Return the model's output; raise ValueError with the model's own error if it fails.

    It may be of the inputs' shape, or a fault of the model; that of a full memory is left as it is.
    """
    try:
        copy = inputs.clone()  # a model may overwrite its input, but not the user's data
        floats = _StartsAtFloats(copy)
        with floats if floats.whole and torch.is_grad_enabled() else nullcontext():
            if is_compiled(model):
                return called(model, copy)
            with following() as mode:
                output = called(model, copy)
        mode.mark(output)
        mark_unfollowed(model, output)
        return output
    except (RuntimeError, AssertionError, TypeError) as problem:  # torchvision's ViT asserts
        if out_of_memory(problem):
            raise
        raise ValueError(
            f"model: it fails on inputs of {described(inputs)} ({type(problem).__name__}: "
            f"{problem}); are they those that it takes?{why_no_copy(model)}"
        ) from problem


def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the logits of a batch, checked as by `run` and `xai_edit.core.outputs.logits_of`."""
    return logits_of(run(model, inputs), inputs)
