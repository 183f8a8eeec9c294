"""The trace of a model's forward pass, kept until the model changes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xai_edit.core.inputs import Inputs, form_of
from xai_edit.core.outputs import outputs_chosen, outputs_of
from xai_edit.core.trace import Trace, trace

DEPTH = 3  # of nested collections among a module's attributes that are compared by value
SIMPLE = (bool, int, float, complex, str, bytes, type(None))


@dataclass
class Analysis:
    """A forward pass of one sample, and the canonical forms that gave the same logits."""

    trace: Trace
    verified: set[Hashable] = field(default_factory=set)


# Per model its state and the analyses made in this state, by the shape and dtype of the inputs.
_KEPT: WeakKeyDictionary[nn.Module, tuple[Hashable, dict[Hashable, Analysis]]] = WeakKeyDictionary()


def analysed(model: nn.Module, inputs: Inputs) -> Analysis:
    """Return the analysis of a model, made anew if the model or the inputs' shape changed.

    Nothing is stored on the model, and nothing outlives it. Errors as of `trace`.
    """
    state = state_of(model)
    before, analyses = _KEPT.get(model, (None, {}))
    if before != state:
        analyses = {}
        _KEPT[model] = state, analyses
    kind = form_of(inputs), outputs_chosen()
    if kind not in analyses:
        analyses[kind] = Analysis(trace(model, inputs))
    return analyses[kind]


def last_weighted(model: nn.Module, inputs: Inputs) -> str | None:
    """Return the name of the linear or convolution layer that runs last, and so is the output."""
    found = analysed(model, inputs).trace
    outputs_of(found.output, found.sample)  # raises unless there is one entry a sample
    return next(reversed(found.order), None)


def following_batch_norms(
    model: nn.Module, inputs: Inputs, layers: Sequence[str]
) -> dict[str, str]:
    """Return, for the layers whose output goes straight into an affine batch norm, its name."""
    found = analysed(model, inputs).trace
    modules = dict(model.named_modules())
    return {
        layer: name
        for layer in layers
        for name in found.readers(layer)
        if isinstance(modules[name], nn.modules.batchnorm._BatchNorm) and modules[name].affine
    }


def state_of(model: nn.Module) -> Hashable:
    """Return a value that differs once a model may compute something else.

    It covers modules, their types, attributes, hooks and modes; and parameters and buffers: which
    tensors, their storage, their version and, as writing to ``tensor.data`` leaves the version as
    it is, their sum.
    """
    modules = tuple(
        (name, id(module), type(module), _value(vars(module), DEPTH))
        for name, module in model.named_modules()
    )
    sums = tuple(
        tensor.detach().sum().item()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point()
    )
    return modules, sums


def _value(attribute: Any, depth: int) -> Hashable:
    """Return what an attribute is compared by: its value if that is simple, else its identity."""
    if isinstance(attribute, SIMPLE):
        return attribute
    if isinstance(attribute, Tensor):
        version = 0 if attribute.is_inference() else attribute._version
        storage = attribute.data_ptr() if attribute.layout == torch.strided else None
        return id(attribute), storage, version
    if depth and isinstance(attribute, dict):
        return tuple((key, _value(value, depth - 1)) for key, value in attribute.items())
    if depth and isinstance(attribute, (list, tuple, set, frozenset)):
        return tuple(_value(value, depth - 1) for value in attribute)
    return id(attribute)
