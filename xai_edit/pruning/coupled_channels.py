"""Coupled channels: groups of channels that can only be removed together."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from xai_edit.core.data import model_device
from xai_edit.core.guard import copied
from xai_edit.core.inputs import Inputs, one_tensor
from xai_edit.core.layers import CONVOLUTIONS, TRANSPOSED, WEIGHTED, run

LAYERS = WEIGHTED
Shape = tuple[int, ...]
Channel = tuple[str, int]  # the name of a layer and the number of its channel
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units, each of which is some channels that can only be removed together.

    ``layers`` has by linear or convolution layer the output channels of each unit, int64, shape
    (``units``, channels of a unit), and ``norms`` those of batch and instance norms with a scale
    and shift. ``fixed`` is the reason why the units have to stay, if they do.
    """

    units: int
    layers: dict[str, Tensor]
    norms: dict[str, Tensor]
    fixed: str | None = None


def channel_groups(model: nn.Module, inputs: Inputs) -> list[ChannelGroup]:
    """Return the coupled channels of a network, by Torch-Pruning's dependency graph.

    Fang et al. 2023, *DepGraph: Towards any structural pruning*. Layers whose outputs are added or
    multiplied share their units; a depthwise convolution has those of the layer before it; a unit
    of a grouped convolution has one channel in each of its groups. Each channel of the layers in
    the forward pass is in exactly one group. A copy of the model is traced with the first sample.
    ValueError if the inputs do not fit, or the model cannot be copied or traced.
    """
    with torch.inference_mode(False):
        return groups_of(traced(copied(model), inputs))


@dataclass(frozen=True, eq=False)
class Traced:
    """A model in evaluation mode and its ``torch_pruning.DependencyGraph``."""

    model: nn.Module
    graph: Any
    entry: Any  # the autograd node of the model's input
    shapes: dict[Any, Shape]  # output shape by autograd node


def traced(model: nn.Module, inputs: Inputs) -> Traced:
    """Trace a model as `channel_groups`; it is set to evaluation mode and to require gradients."""
    model.eval()
    one = one_tensor(inputs, "the removal of channels")
    sample = one[:1].detach().to(model_device(model))
    with torch.no_grad():
        run(model, sample)  # so that inputs that do not fit are not taken for a failed trace
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    leaves: list[Tensor] = [one for one in model.parameters() if one.requires_grad]
    entry: list[Any] = []
    outputs: list[Tensor] = []

    def forward(traced_model: nn.Module, values: Tensor) -> Any:
        if values.is_floating_point():
            # As a node of the graph the input shows which channels are added to it.
            leaves.append(values.clone().requires_grad_())
            values = leaves[-1].clone()
            entry.append(values.grad_fn)
        output = traced_model(values)
        outputs.extend(value for value in tree_leaves(output) if isinstance(value, Tensor))
        return output

    import torch_pruning  # only here: slow to import

    graph = torch_pruning.DependencyGraph()
    with _tracing(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers; see `_reasons`
        graph.build_dependency(model, sample.clone(), forward_fn=forward, verbose=False)
        shapes = _shapes(graph, outputs, leaves)
    return Traced(model, graph, entry[0] if entry else None, shapes)


def _shapes(graph: Any, outputs: list[Tensor], leaves: list[Tensor]) -> dict[Any, Shape]:
    """Return the output shape of each operation, which is that of its gradient."""
    shapes: dict[Any, Shape] = {}
    for node in graph.module2node.values():
        operation = node.grad_fn
        if hasattr(operation, "variable"):  # a parameter, whose gradient is not handed on
            shapes[operation] = tuple(operation.variable.shape)

        def note(gradients: Sequence[Tensor | None], operation: Any = operation) -> None:
            if gradients[0] is not None:
                shapes[operation] = tuple(gradients[0].shape)

        operation.register_prehook(note)
    used = [output for output in outputs if output.requires_grad]
    ones = [torch.ones_like(output) for output in used]
    torch.autograd.grad(used, leaves, ones, retain_graph=True, allow_unused=True)
    return shapes


@contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        raise ValueError(
            f"model: Torch-Pruning cannot trace {type(model).__name__} "
            f"({type(problem).__name__}: {problem}), so its channels cannot be removed; networks "
            "of layers, sums, products and concatenations can be traced, such as VGG, ResNet, "
            "DenseNet, MobileNet and EfficientNet; those that shuffle channels cannot"
        ) from problem


def pruning_group(found: Traced, module: nn.Module, channels: Iterable[int]) -> Any:
    """Return Torch-Pruning's group of a layer's output channels and those coupled to them."""
    pruner = found.graph.get_pruner_of_module(module)
    with _tracing(found.model):
        return found.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))


def groups_of(found: Traced) -> list[ChannelGroup]:
    """Return the groups of a traced model; see `channel_groups`."""
    units = DisjointSet()  # of channels of layers
    graph = found.graph
    names = {module: name for name, module in found.model.named_modules()}
    modules = found.model.modules()
    owned = [(module, own) for module in modules for own in module.parameters(recurse=False)]
    times = Counter(parameter for _, parameter in owned)
    shared = {module for module, parameter in owned if times[parameter] > 1}
    fixed: dict[Channel, str] = {}

    def coupled(roots: Iterable[Channel], layer: str, numbers: Iterable[int]) -> list[Channel]:
        channels = [(layer, int(number)) for number in numbers]
        for root, channel in zip(roots, channels, strict=True):
            units.add(channel)
            units.merge(root, channel)
        return channels

    for module, layer in names.items():
        if not isinstance(module, LAYERS) or module not in graph.module2node:
            continue
        every = range(graph.get_out_channels(module))
        own = [(layer, number) for number in every]
        for channel in own:
            units.add(channel)
        affected = [*own]
        reasons: list[str] = []
        for item in pruning_group(found, module, every):
            target = item.dep.target
            gives = graph.is_out_channel_pruning_fn(item.dep.handler)
            if gives and not target.outputs:
                reasons.append("they are the model's outputs")
            reasons += _reasons(found, target, names, shared)
            if None in item.root_idxs:  # behind an expanded tensor, which is not followed
                continue
            roots = [own[root] for root in item.root_idxs]
            norm = isinstance(target.module, NORMS) and bool(target.module.affine)
            if gives and (isinstance(target.module, LAYERS) or norm):
                # Beyond the last channel only behind an operation that is not followed.
                width = graph.get_out_channels(target)
                pairs = [pair for pair in zip(roots, item.idxs, strict=True) if pair[1] < width]
                kept, numbers = [root for root, _ in pairs], [number for _, number in pairs]
                affected += coupled(kept, names[target.module], numbers)
            elif isinstance(target.module, CONVOLUTIONS) and target.module.groups > 1:
                width = target.module.in_channels // target.module.groups
                name = f"{names[target.module]}:in"
                coupled(roots, name, [one % width for one in item.idxs])
        groups = getattr(module, "groups", 1)
        if 1 < groups < len(every):
            width = len(every) // groups
            coupled(own, f"{layer}:out", [one % width for one in every])
        if reasons:
            fixed |= dict.fromkeys(affected, reasons[0])
    return [*_gathered(units, found.model, fixed)]


def _gathered(
    joined: DisjointSet, model: nn.Module, fixed: dict[Channel, str]
) -> Iterator[ChannelGroup]:
    """Yield a group for all units that have the same number of channels in the same layers."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    reasons: dict[Channel, str] = {}
    for channel in joined:
        if channel in fixed:
            reasons.setdefault(joined[channel], fixed[channel])
    units: dict[Channel, dict[str, list[int]]] = {}
    channels = [channel for channel in joined if channel[0] in order]
    for name, number in sorted(channels, key=lambda channel: (order[channel[0]], channel[1])):
        units.setdefault(joined[name, number], {}).setdefault(name, []).append(number)
    alike: dict[Any, list[dict[str, list[int]]]] = {}
    for root, unit in units.items():
        widths = tuple((name, len(numbers)) for name, numbers in unit.items())
        alike.setdefault((widths, reasons.get(root)), []).append(unit)
    for (_, reason), members in alike.items():
        at = {name: torch.tensor([unit[name] for unit in members]) for name in members[0]}
        layers = {name for name in at if isinstance(model.get_submodule(name), LAYERS)}
        norms = {name: at.pop(name) for name in [*at] if name not in layers}
        yield ChannelGroup(len(members), at, norms, reason)


def _reasons(
    found: Traced, node: Any, names: dict[nn.Module, str], shared: set[nn.Module]
) -> Iterator[str]:
    """Yield the reasons why channels that reach a node of the graph cannot be removed."""
    module = node.module
    name = names.get(module)
    if node.grad_fn is found.entry:
        yield "they are joined with the model's inputs"
    elif isinstance(module, nn.Parameter):
        yield "a parameter outside of all layers goes with them"
    elif name is None:
        if not _followed(found, node):
            yield f"{node.grad_fn.name()} changes the channels in a way that cannot be followed"
    elif isinstance(module, LAYERS):
        grouped = getattr(module, "groups", 1) > 1
        if module in shared:
            yield f"layer {name!r} shares its weights with another layer"
        elif "weight" not in module._parameters:
            yield f"the weights of layer {name!r} are computed by a parametrization"
        elif grouped and isinstance(module, TRANSPOSED):
            yield f"layer {name!r} is a grouped transposed convolution"
        elif grouped and module.groups == module.out_channels != module.in_channels:
            yield f"each channel of layer {name!r} reads several"
    elif isinstance(module, NORMS):
        if not module.affine and module.track_running_stats:
            yield f"norm {name!r} has no scale and shift that could switch them off"
    elif not isinstance(module, nn.PReLU):
        yield f"{name!r} ({type(module).__name__}) mixes the channels or keeps values for each"


def _followed(found: Traced, node: Any) -> bool:
    """Return whether Torch-Pruning follows the channels through an operation correctly."""
    if node.grad_fn.name() in ("AddmmBackward0", "MmBackward0", "CatBackward0"):
        return True  # the product inside of a linear layer, and what Torch-Pruning does follow
    after = found.shapes.get(node.grad_fn, ())
    if node.grad_fn.name() == "PermuteBackward0" and len(after) == 4:
        # By the axes, as sizes may be equal; negative ones are stored modulo 2**64.
        return bool(node.grad_fn._saved_dims[1] % 2**64 % 4 == 1)
    return all(_same_channels(found.shapes.get(of.grad_fn, ()), after) for of in node.inputs)


def _same_channels(before: Shape, after: Shape) -> bool:
    """Return whether two shapes have the same channels; () is an unknown shape."""
    if not before or not after:
        return False
    if min(len(before), len(after)) < 2 or len(before) == len(after):
        return before[1:2] == after[1:2]
    if before[:2] == after[:2]:  # a mean over positions, or positions added
        return True
    if len(after) == 2 and math.prod(before[1:]) == after[1]:  # flattened
        return True
    return min(len(before), len(after)) == 2 and before[-1] == after[-1]  # positions as samples
