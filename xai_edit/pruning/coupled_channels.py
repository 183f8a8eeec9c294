"""Coupled channels: which channels of which layers stand and fall together."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from xai_edit.core.data import model_device
from xai_edit.core.guard import copied
from xai_edit.core.layers import CONVOLUTIONS, TRANSPOSED, run

LAYERS = (nn.Linear, *CONVOLUTIONS)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be removed together, unit by unit.

    Attributes
    ----------
    units : int
        How many units the group has.
    layers : dict of Tensor
        Per linear or convolution layer that gives out channels of the group: which of its channels
        are those of each unit, int64, shape (units, channels of a unit).
    norms : dict of Tensor
        The same for batch and instance norms with a scale and shift that the channels pass.
    fixed : str or None
        Why the units have to stay; None where they can go.
    """

    units: int
    layers: dict[str, Tensor]
    norms: dict[str, Tensor]
    fixed: str | None = None


def channel_groups(model: nn.Module, inputs: Tensor) -> list[ChannelGroup]:
    """Find which channels of a network are coupled, by Torch-Pruning's dependency graph.

    Fang et al. 2023, *DepGraph: Towards any structural pruning*. Layers whose outputs are added or
    multiplied share their units; a depthwise convolution has those of the layer before it; a
    grouped convolution ties one channel of each of its groups into a unit, so that an equal number
    goes from each. Every channel of every layer that takes part is in exactly one group.

    Parameters
    ----------
    model : nn.Module
        Only read.
    inputs : Tensor, shape (samples, ...)
        Inputs to trace the model with; the first sample is enough.

    Returns
    -------
    list of ChannelGroup
        In the order of the layers. Groups that cannot be removed, such as the model's outputs, say
        why in ``fixed``.

    Raises
    ------
    ValueError
        If the inputs do not fit the model, it cannot be copied, or Torch-Pruning cannot trace it.
    """
    with torch.inference_mode(False):
        return groups_of(traced(copied(model), inputs))


@dataclass(frozen=True, eq=False)
class Traced:
    """A model with its dependency graph.

    Attributes
    ----------
    model : nn.Module
        The traced model, in evaluation mode.
    graph : torch_pruning.DependencyGraph
        Refers to the model's modules.
    entry : torch.autograd.graph.Node
        The operation that stands for the model's input.
    shapes : dict
        The shape of what each operation of the graph puts out.
    """

    model: nn.Module
    graph: Any
    entry: Any
    shapes: dict[Any, tuple[int, ...]]


def traced(model: nn.Module, inputs: Tensor) -> Traced:
    """Trace a model that may be changed: evaluation mode, gradients for all parameters.

    Raises
    ------
    ValueError
        See `channel_groups`.
    """
    model.eval()
    sample = inputs[:1].detach().to(model_device(model))
    with torch.no_grad():
        run(model, sample)  # so that inputs that do not fit are not taken for a failed trace
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    leaves: list[Tensor] = [one for one in model.parameters() if one.requires_grad]
    entry: list[Any] = []
    outputs: list[Tensor] = []

    def forward(traced_model: nn.Module, given: Tensor) -> Any:
        if given.is_floating_point():
            # As a node of the graph the input shows which channels are added to it.
            leaves.append(given.clone().requires_grad_())
            given = leaves[-1].clone()
            entry.append(given.grad_fn)
        output = traced_model(given)
        outputs.extend(value for value in tree_leaves(output) if isinstance(value, Tensor))
        return output

    import torch_pruning  # only here: slow to import

    graph = torch_pruning.DependencyGraph()
    with _tracing(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers; see `_reasons`
        graph.build_dependency(model, sample.clone(), forward_fn=forward, verbose=False)
        shapes = _shapes(graph, outputs, leaves)
    return Traced(model, graph, entry[0] if entry else None, shapes)


def _shapes(
    graph: Any, outputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> dict[Any, tuple[int, ...]]:
    """Return the shape of what each operation puts out: that of its gradient in a backward pass."""
    shapes: dict[Any, tuple[int, ...]] = {}
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
            "DenseNet, MobileNet and EfficientNet, those that shuffle channels cannot"
        ) from problem


def pruning_group(found: Traced, module: nn.Module, channels: Sequence[int]) -> Any:
    """Return Torch-Pruning's group of some output channels of a layer, with all they couple."""
    pruner = found.graph.get_pruner_of_module(module)
    with _tracing(found.model):
        return found.graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))


def groups_of(found: Traced) -> list[ChannelGroup]:
    """Return the groups of a traced model; see `channel_groups`."""
    nodes = _Nodes()
    graph = found.graph
    names = {module: name for name, module in found.model.named_modules()}
    shared = _shared(found.model)
    fixed: dict[int, str] = {}
    for module, layer in names.items():
        if not isinstance(module, LAYERS) or module not in graph.module2node:
            continue
        every = range(graph.get_out_channels(module))
        channels = [nodes.of(layer, every)]
        reasons: list[str] = []
        for item in pruning_group(found, module, every):
            target = item.dep.target
            gives = graph.is_out_channel_pruning_fn(item.dep.handler)
            if gives and not target.outputs:
                reasons.append("they are the model's outputs")
            reasons += _reasons(found, target, names, shared)
            if None in item.root_idxs:  # behind an expanded tensor, which is not followed
                continue
            roots, at = np.array(item.root_idxs, dtype=int), np.array(item.idxs, dtype=int)
            if gives and (isinstance(target.module, LAYERS) or _shifts(target.module)):
                # Beyond the last channel only behind an operation that is not followed.
                there = at < graph.get_out_channels(target)
                channels.append(nodes.of(names[target.module], at[there]))
                nodes.join(nodes.of(layer, roots[there]), channels[-1])
            elif isinstance(target.module, CONVOLUTIONS) and target.module.groups > 1:
                width = target.module.in_channels // target.module.groups
                nodes.join(
                    nodes.of(layer, roots), nodes.of(f"{names[target.module]}:in", at % width)
                )
        groups = getattr(module, "groups", 1)
        if 1 < groups < len(every):
            width = len(every) // groups
            nodes.join(channels[0], nodes.of(f"{layer}:out", np.array(every) % width))
        if reasons:
            fixed.update((int(at), reasons[0]) for at in np.concatenate(channels))
    return [*_gathered(nodes, found.model, fixed)]


def _gathered(nodes: _Nodes, model: nn.Module, fixed: dict[int, str]) -> Iterator[ChannelGroup]:
    """Yield one group for all units that have the same number of channels in the same layers."""
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    units: dict[int, dict[str, list[int]]] = {}
    reasons: dict[int, str] = {}
    labels = nodes.components()
    for (name, channel), node in nodes.numbers.items():
        label = int(labels[node])
        if name in order:
            units.setdefault(label, {}).setdefault(name, []).append(channel)
        if node in fixed:
            reasons.setdefault(label, fixed[node])
    alike: dict[Any, list[dict[str, list[int]]]] = {}
    for label, unit in units.items():
        ordered = {name: sorted(unit[name]) for name in sorted(unit, key=order.__getitem__)}
        widths = tuple((name, len(channels)) for name, channels in ordered.items())
        alike.setdefault((widths, reasons.get(label)), []).append(ordered)

    def first(unit: dict[str, list[int]]) -> tuple[int, list[int]]:
        name = next(iter(unit))
        return order[name], unit[name]

    for members in alike.values():
        members.sort(key=first)
    for (_, reason), members in sorted(alike.items(), key=lambda item: first(item[1][0])):
        index = {name: torch.tensor([unit[name] for unit in members]) for name in members[0]}
        weighted = {name for name in index if isinstance(model.get_submodule(name), LAYERS)}
        yield ChannelGroup(
            len(members),
            {name: at for name, at in index.items() if name in weighted},
            {name: at for name, at in index.items() if name not in weighted},
            reason,
        )


class _Nodes:
    """Numbers for the channels of named layers, and which of them are joined."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, int], int] = {}
        self.joined: list[np.ndarray[Any, Any]] = []

    def of(self, name: str, channels: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the number of each channel."""
        numbers = self.numbers
        listed = [numbers.setdefault((name, int(at)), len(numbers)) for at in channels]
        return np.array(listed, dtype=int)

    def join(self, left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
        """Couple channels pairwise."""
        self.joined.append(np.stack([left, right]))

    def components(self) -> np.ndarray[Any, Any]:
        """Return the number of the connected component of each channel."""
        size = len(self.numbers)
        rows, columns = np.concatenate([np.zeros((2, 0), dtype=int), *self.joined], axis=1)
        matrix = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(size, size))
        labels: np.ndarray[Any, Any] = connected_components(matrix, directed=False)[1]
        return labels


def _shared(model: nn.Module) -> set[nn.Module]:
    """Return the modules that share a parameter with another module."""
    owned = [
        (module, id(p)) for module in model.modules() for p in module.parameters(recurse=False)
    ]
    times = Counter(number for _, number in owned)
    return {module for module, number in owned if times[number] > 1}


def _reasons(
    found: Traced, node: Any, names: dict[nn.Module, str], shared: set[nn.Module]
) -> Iterator[str]:
    """Yield why channels that reach a node of the graph cannot be removed, or not by zeros."""
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


def _shifts(module: nn.Module) -> bool:
    """Tell whether a module has a scale and a shift for each channel."""
    return isinstance(module, NORMS) and bool(module.affine)


def _followed(found: Traced, node: Any) -> bool:
    """Tell whether an operation leaves the channels as Torch-Pruning takes them to be."""
    if node.grad_fn.name() in ("AddmmBackward0", "MmBackward0", "CatBackward0"):
        return True  # the product inside of a linear layer, and what Torch-Pruning does follow
    after = found.shapes.get(node.grad_fn, ())
    if node.grad_fn.name() == "PermuteBackward0" and len(after) == 4:
        # By the axes, as sizes may be equal; negative ones are stored modulo 2**64.
        return bool(node.grad_fn._saved_dims[1] % 2**64 % 4 == 1)
    return all(_same_channels(found.shapes.get(of.grad_fn, ()), after) for of in node.inputs)


def _same_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Tell by two shapes whether the channels are the same; () stands for an unknown one."""
    if not before or not after:
        return False
    if min(len(before), len(after)) < 2 or len(before) == len(after):
        return before[1:2] == after[1:2]
    if before[:2] == after[:2]:  # a mean over positions, or positions added
        return True
    if len(after) == 2 and int(np.prod(before[1:])) == after[1]:  # flattened
        return True
    return min(len(before), len(after)) == 2 and before[-1] == after[-1]  # positions as samples
