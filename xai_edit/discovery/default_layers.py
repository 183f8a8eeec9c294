"""The layers at which a feature is looked for: outputs that everything later depends on."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from xai_edit.core.analysis import analysed
from xai_edit.core.axes import axes_by_layer
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import INPUT_SUFFIX
from xai_edit.core.trace import Value
from xai_edit.last_layer.find_head import find_head


class _Output(NamedTuple):
    name: str
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
    found = analysed(model, sample).trace
    axes, modules = axes_by_layer(model, sample), dict(model.named_modules())
    kept: dict[int, _Output] = {}
    for name, value in found.values.items():
        axis = axes.get(name)
        if name not in found.bottlenecks or found.calls[name] > 1:
            continue
        if not isinstance(value, Value) or not isinstance(axis, int):
            continue
        positions = math.prod(value.shape[1:]) // value.shape[axis]
        if positions > 1:
            before = kept.get(value.number)  # of modules with the same output the innermost
            if before is None or not [*modules[before.name].children()]:  # with parts
                kept[value.number] = _Output(name, positions, found.weighted[name])
    return [*kept.values()]
