"""The hidden linear layer whose outputs are the inputs of the last layer, by autograd's graph."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    differentiable,
    embeddings_in_graph,
    first_tensor,
    run,
)

# Autograd nodes of operations with one output for each input unit, at the same position. Norms are
# among them, although a layer norm divides by the deviation of all units.
ONE_BY_ONE = {
    *("ReLU", "Relu", "LeakyRelu", "PreluKernel", "Elu", "Celu", "Gelu", "Silu", "Mish", "Tanh"),
    *("Sigmoid", "LogSigmoid", "Hardsigmoid", "Hardswish", "Hardtanh", "Softplus", "Threshold"),
    *("Hardshrink", "Softshrink", "Clamp", "ClampMin", "ClampMax", "Abs", "Exp", "Log", "Pow"),
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Sqrt", "Square", "Erf", "Where", "NativeDropout"),
    *("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeLayerNorm", "ToCopy", "Clone"),
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias"),
    "BackwardHookFunction",  # of a user's backward hook on a module
}


def feeding_layer(model: nn.Module, head: str, width: int, inputs: Inputs) -> str:
    """Return the linear layer whose outputs the head takes one by one, else the head's inputs.

    Follows the input of the last linear layer, ``head``, of ``width`` units, back through
    activations, dropout, norms and changes of shape, on every branch, for one of the ``inputs``.
    ValueError if a linear layer as wide as the head reaches it together with other tensors, or
    through an operation that may mix its units.
    """
    made: dict[Any, str] = {}  # node of the graph → the layer whose output it is
    wide: list[str] = []
    head_inputs: list[Tensor] = []

    def cut(name: str, output: Tensor) -> Tensor | None:
        """Start a new graph at a layer that could feed the head."""
        if output.shape != (1, width):
            return None
        output = output.detach().requires_grad_().clone()
        if output.grad_fn is not None:
            made[output.grad_fn] = name
        wide.append(name)
        return output

    with torch.inference_mode(False), preserved(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # so that the graph holds only operations on the data
        embeddings_in_graph(model)
        for name, module in model.named_modules():
            if name == head:
                module.register_forward_pre_hook(
                    lambda _, args, named: head_inputs.append(first_tensor(args, named)),
                    with_kwargs=True,
                )
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(lambda _, __, output, name=name: cut(name, output))
        run(model, differentiable(inputs[:1]))

    last = head_inputs[-1].grad_fn
    ends = _ends(last, made)
    names = sorted({made[end] for end in ends if end is not None})
    if len(names) == 1 and None not in ends:
        return names[0]
    if last is None:
        names = wide
    elif not names and (source := _only_source(last, made)):
        names = [source]
    if names:
        raise ValueError(
            f"layer: the inputs of the last layer {head!r} are not one by one the outputs of a "
            f"single linear layer ({names} reach it in part or mixed); name one, such as "
            f"{head + INPUT_SUFFIX!r}"
        )
    return head + INPUT_SUFFIX


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _ends(last: Any, made: dict[Any, str]) -> set[Any]:
    """Follow each branch while units keep their places; return the ends, None if no layer's."""
    ends: set[Any] = set()
    todo, seen = [last], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in made:
            ends.add(node)
        elif node is not None and re.sub(r"Backward\d*$", "", node.name()) in ONE_BY_ONE:
            todo += _parents(node) or [None]
        else:
            ends.add(None)
    return ends


def _only_source(node: Any, made: dict[Any, str]) -> str | None:
    """Return the layer from which a chain of any operations leads to the node, if there is one."""
    while node is not None and node not in made:
        node = parents[0] if len(parents := _parents(node)) == 1 else None
    return made.get(node)
