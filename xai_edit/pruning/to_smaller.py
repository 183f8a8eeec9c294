"""Removal of units that are switched off, by Torch-Pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xai_edit.core.data import model_device
from xai_edit.core.guard import copied
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import TRANSPOSED, predict
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.pruning.coupled_channels import ChannelGroup, Traced, groups_of, pruning_group, traced

TOLERANCE = 1e-5  # of the largest logit, by which logits may differ


def to_smaller(model: nn.Module, edit: ModelEdit | None, example_input: Tensor) -> nn.Module:
    """Return a copy of a model without the units that are switched off.

    A unit is switched off when its weights and biases in all layers that share it and the scale and
    shift of its norms are zero. One unit of each group stays. The logits for the example input are
    checked in float64 against the masked network's. EditMismatchError if the edit is not one of
    this model; ValueError if the input does not fit, the model cannot be traced, no unit can be
    removed, or the outputs differ afterwards.

    Parameters
    ----------
    model : nn.Module
        A classifier, logits of shape (samples, classes). Not changed.
    edit : ModelEdit or None
        An edit of the model; None where units are already switched off.
    example_input : Tensor, shape (samples, ...)
        Inputs to trace the network with and to compare outputs on.
    """
    with torch.inference_mode(False):
        masked = copied(model)
        if edit is not None:
            edit.apply(masked)
        smaller = copied(masked)
        found = traced(smaller, example_input)
        _remove(found, _switched_off(found))
        for name, parameter in model.named_parameters():
            smaller.get_parameter(name).requires_grad_(parameter.requires_grad)
        _require_same_outputs(masked, smaller, example_input.to(model_device(model)))
    for name, module in model.named_modules():
        smaller.get_submodule(name).training = module.training
    return smaller


def _switched_off(found: Traced) -> list[tuple[ChannelGroup, Tensor]]:
    """Return the groups with units to remove, and these units, bool, shape (units,)."""
    lost, also = [], ""
    for group in groups_of(found):
        silent = silent_units(found.model, group)
        if group.fixed is not None:
            if silent.any() and not also:
                layer = next(iter(group.layers))
                also = f"; those of layer {layer!r} are, but have to stay: {group.fixed}"
            continue
        if silent.all():
            silent[0] = False
        if silent.any():
            lost.append((group, silent))
    if not lost:
        raise ValueError(
            f"edit: no unit that can be removed is switched off{also}; a unit is, where its "
            "weights and biases in all coupled layers and its norms' scale and shift are zero, as "
            "RelevancePruning plans it"
        )
    return lost


def silent_units(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return which units of a group are switched off, bool, shape (units,)."""
    silent = torch.ones(group.units, dtype=torch.bool)
    for name, channels in (group.layers | group.norms).items():
        module = model.get_submodule(name)
        for parameter in (module.weight, module.bias):
            if isinstance(parameter, Tensor):
                values = parameter.detach().cpu()
                if isinstance(module, TRANSPOSED) and values.ndim > 1:
                    values = values.transpose(0, 1)
                zero = (values == 0).reshape(len(values), -1).all(1)  # of each output channel
                silent &= zero[channels].all(1)
    return silent


def _remove(found: Traced, lost: list[tuple[ChannelGroup, Tensor]]) -> None:
    """Remove the silent units of each group."""
    left: dict[str, Tensor] = {}  # per layer, which of its first channels are still there
    for group, silent in lost:
        layer, channels = next(iter(group.layers.items()))
        for name in group.layers:
            width = found.graph.get_out_channels(found.model.get_submodule(name))
            left.setdefault(name, torch.ones(width, dtype=torch.bool))
        now = (left[layer].cumsum(0) - 1)[channels[silent].flatten()]
        removal = pruning_group(found, found.model.get_submodule(layer), now.tolist())
        if not found.graph.check_pruning_group(removal):
            raise ValueError(f"model: Torch-Pruning would leave no channel behind layer {layer!r}")
        removal.prune(record_history=False)
        for name, at in group.layers.items():
            left[name][at[silent].flatten()] = False


def _require_same_outputs(masked: nn.Module, smaller: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError unless both give the same logits; the masked network is changed."""
    # In float64, where neither half precision nor TensorFloat-32 blurs the difference.
    masked, smaller = masked.eval().double(), copied(smaller).eval().double()
    inputs = inputs.to(torch.float64) if inputs.is_floating_point() else inputs
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        expected = predict(masked, inputs)
        try:
            found = predict(smaller, inputs)
        except ValueError as problem:
            raise ValueError(
                f"model: without the units the network cannot be run ({problem}); does its "
                "forward pass rely on a number of channels?"
            ) from problem
    largest = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"model: without the units its logits differ by {difference:.3g} from the masked "
            f"network's, the largest of which is {largest:.3g}; an activation such as the sigmoid, "
            "or a constant that is added, gives a unit that is switched off a value"
        )
