"""Coupled channels: groups of channels that can only be removed together."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from xai_edit.core.data import model_device
from xai_edit.core.guard import copied
from xai_edit.core.inputs import Inputs, called, input_tensors
from xai_edit.core.layers import WEIGHTED, run
from xai_edit.pruning.following import following
from xai_edit.pruning.unit_flow import NORMS, UnitFlow


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units, each of which is some channels that can only be removed together.

    ``layers`` has by linear or convolution layer the output channels of each unit, int64, shape
    (``units``, channels of a unit), and ``norms`` those of batch and instance norms with a scale
    and shift. ``fixed`` is the reason why the units have to stay, if they do.

    Examples
    --------
    >>> from xai_edit.pruning.coupled_channels import channel_groups
    >>> group = channel_groups(model, images[:1])[0]
    >>> group.units, group.layers["conv"].shape, group.norms
    (32, torch.Size([32, 1]), {})
    """

    units: int
    layers: dict[str, Tensor]
    norms: dict[str, Tensor]
    fixed: str | None = None


@dataclass(frozen=True, eq=False)
class Coupling:
    """The coupled channels of a network.

    ``gates`` are the layers that reach the output only as a factor of a product, ``positions`` the
    linear layers that are applied at each position. ``flow`` has the units of all channels.
    """

    groups: list[ChannelGroup]
    gates: frozenset[str]
    positions: frozenset[str]
    flow: UnitFlow


def channel_groups(model: nn.Module, inputs: Inputs) -> list[ChannelGroup]:
    """Return the coupled channels of a network.

    Each output channel of a linear or convolution layer is a unit, which is followed through all
    operations of a forward pass of the first sample. Channels that are added or multiplied are one
    unit, as are those that a depthwise convolution reads and writes; a unit of a grouped
    convolution has one channel in each of its groups. Channels that an operation mixes (a layer
    norm, attention) have to stay. Each channel of the layers in the forward pass is in exactly one
    group. ValueError if the inputs do not fit, or the model cannot be copied.

    Examples
    --------
    >>> from xai_edit.pruning.coupled_channels import channel_groups
    >>> for group in channel_groups(model, images[:1]):
    ...     print([*group.layers], group.units, group.fixed)
    ['conv'] 32 None
    ['fc1'] 32 None
    ['fc2'] 3 they are the model's outputs
    """
    return coupling(copied(model), inputs).groups


def coupling(model: nn.Module, inputs: Inputs) -> Coupling:
    """Return the coupled channels as `channel_groups`; sets the model to evaluation mode."""
    model.eval()
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = inputs[:1].detach().to(model_device(model)).clone()
        run(model, sample)
        flow = UnitFlow(model)
        full = torch.autocast(sample.device.type, enabled=False)
        try:
            with full, following(flow, [*input_tensors(sample).values()]):
                output = called(model, sample)
        except Exception as problem:
            raise ValueError(
                f"model: the channels of {type(model).__name__} cannot be followed through its "
                f"forward pass ({type(problem).__name__}: {problem}), so none can be removed"
            ) from problem
        for value in tree_leaves(output):
            units = flow.of(value)
            if units is not None:
                flow.stay(units, "they are the model's outputs")
        flow.behind = flow.behind_of(tree_leaves(output))
    _shared_or_computed(model, flow)
    numbered = enumerate(flow.layers)
    gates = {name for at, name in numbered if name in flow.reads and not flow.behind >> at & 1}
    groups = [*_gathered(model, flow)]
    return Coupling(groups, frozenset(gates), frozenset(flow.positions), flow)


def _shared_or_computed(model: nn.Module, flow: UnitFlow) -> None:
    """Keep the channels of layers whose weights are not theirs alone."""
    modules = {
        name: module for name, module in flow.modules.items() if isinstance(module, WEIGHTED)
    }
    owned = [own for module in model.modules() for own in module.parameters(recurse=False)]
    times = Counter(owned)
    for name, module in modules.items():
        if name in flow.called and name not in flow.layers:
            width = module.weight.shape[0]
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                width = module.out_channels
            flow.layers[name] = flow.new(width), width
            first = flow.layers[name][0]
            flow.stay(
                range(first, first + width),
                f"the weights of layer {name!r} are computed, by a parametrization or the model",
            )
        if name not in flow.layers:
            continue
        if any(times[parameter] > 1 for parameter in module.parameters(recurse=False)):
            first, width = flow.layers[name]
            reason = f"layer {name!r} shares its weights with another layer"
            flow.stay(range(first, first + width), reason)
            if name in flow.reads:
                flow.stay(flow.reads[name], reason)


def _gathered(model: nn.Module, flow: UnitFlow) -> Iterator[ChannelGroup]:
    """Yield a group for all units that have the same number of channels in the same layers."""
    reasons: dict[int, str] = {}
    for unit, reason in flow.fixed.items():
        reasons.setdefault(flow.root(unit), reason)
    units: dict[int, dict[str, list[int]]] = {}
    for name, module in model.named_modules():
        if name in flow.layers:
            first, width = flow.layers[name]
            roots = map(flow.root, range(first, first + width))
        elif isinstance(module, NORMS) and module.affine and name in flow.reads:
            roots = map(flow.root, flow.reads[name].tolist())
        else:
            continue
        for number, root in enumerate(roots):
            units.setdefault(root, {}).setdefault(name, []).append(number)
    alike: dict[Any, list[dict[str, list[int]]]] = {}
    for root, channels in units.items():
        if all(name not in flow.layers for name in channels):
            continue  # of a norm that reads what is no layer's
        widths = tuple((name, len(numbers)) for name, numbers in channels.items())
        alike.setdefault((widths, reasons.get(root)), []).append(channels)
    for (_, why), members in alike.items():
        at = {name: torch.tensor([one[name] for one in members]) for name in members[0]}
        layers = {name: index for name, index in at.items() if name in flow.layers}
        norms = {name: index for name, index in at.items() if name not in flow.layers}
        whole = [name for name, index in layers.items() if index.numel() == flow.layers[name][1]]
        if len(members) == 1 and why is None and whole:
            why = f"all channels of {whole[0]!r} can only go together"
        yield ChannelGroup(len(members), layers, norms, why)
