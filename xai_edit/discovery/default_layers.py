"""The layers at which a feature is looked for: outputs that everything later depends on."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from xai_edit.core.axes import axes_by_layer
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, input_tensors
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    WEIGHTED,
    differentiable,
    embeddings_in_graph,
    run,
    unit_axis_of,
)
from xai_edit.last_layer.find_head import find_head


class _Output(NamedTuple):
    name: str
    node: Any  # of the autograd graph
    positions: int
    stage: int  # weighted layers that ran before


def default_layers(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return a layer of the first third, one in the middle, the last, and the head's input.

    Candidates are modules through whose output every path from the input to the model's output
    leads, such as residual and transformer blocks, with several positions: of those between two
    convolution or linear layers the last with the most positions, so one behind the activation.
    The head's input is left out where the head is not an affine map. ValueError if there is none.
    """
    stages: dict[int, _Output] = {}
    for one in _bottlenecks(model, inputs[:1]):
        before = stages.get(one.stage)
        if one.stage and (before is None or one.positions >= before.positions):
            stages[one.stage] = one
    found = [stages[stage].name for stage in sorted(stages)]
    chosen = []
    if found:
        count = len(found)
        chosen = [found[max(0, math.floor(count / 3) - 1)], found[count // 2], found[-1]]
    try:
        head = find_head(model, inputs[:2])
        if head.module(model) is not None:
            chosen.append(f"{head.layer}{INPUT_SUFFIX}")
    except ValueError:
        pass  # LRP and ablation work without it
    if not chosen:
        raise ValueError(
            "layers: the model has no layer that everything later depends on; name some layers"
        )
    return [*dict.fromkeys(chosen)]


def _bottlenecks(model: nn.Module, sample: Inputs) -> list[_Output]:
    """Return the modules that are called once and through whose output all paths lead."""
    outputs: list[_Output] = []
    calls: Counter[str] = Counter()
    stage = 0
    axes = axes_by_layer(model, sample)
    with torch.inference_mode(False), preserved(model), torch.enable_grad():
        model.requires_grad_(False)
        embeddings_in_graph(model)

        def watch(name: str, module: nn.Module) -> None:
            def leave(_: nn.Module, __: Any, output: Any) -> None:
                nonlocal stage
                stage += isinstance(module, WEIGHTED)
                calls[name] += 1
                axis = axes.get(name)
                if isinstance(output, Tensor) and output.requires_grad and isinstance(axis, int):
                    channels = output.shape[unit_axis_of(output, axis)]
                    positions = output[0].numel() // channels
                    outputs.append(_Output(name, output.grad_fn, positions, stage))

            module.register_forward_hook(leave)

        for name, module in model.named_modules():
            if name:
                watch(name, module)
        copy = differentiable(sample)
        end = next(one for one in tree_leaves(run(model, copy)) if isinstance(one, Tensor))
        dominators = _dominators(end, copy)
    modules = dict(model.named_modules())
    kept: dict[Any, _Output] = {}
    for one in outputs:
        if one.positions > 1 and calls[one.name] == 1 and one.node in dominators:
            before = kept.get(one.node)  # of modules with the same output the innermost with parts
            if before is None or not [*modules[before.name].children()]:
                kept[one.node] = one
    return [*kept.values()]


def _dominators(end: Tensor, inputs: Inputs) -> set[Any]:
    """Return the nodes of the graph through which every path from the inputs to the end leads."""
    graph: Any = nx.DiGraph()
    source = object()
    ahead: list[Any] = [end.grad_fn]
    leaves = {id(one) for one in input_tensors(inputs).values()}
    seen = {end.grad_fn}
    while ahead:
        node = ahead.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            graph.add_edge(node, following)
            if following not in seen:
                seen.add(following)
                ahead.append(following)
        variable = getattr(node, "variable", None)
        if variable is not None and (id(variable) in leaves or not node.next_functions):
            graph.add_edge(node, source)
    if source not in graph:
        return set()
    above = nx.immediate_dominators(graph, end.grad_fn)
    found: set[Any] = set()
    at: Any = source
    while at is not None and at != end.grad_fn:
        at = above.get(at)
        found.add(at)
    return found
