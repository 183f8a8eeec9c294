"""Removal of units that are switched off."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.data import model_device
from xai_edit.core.guard import copied
from xai_edit.core.inputs import Inputs, as_inputs
from xai_edit.core.layers import TRANSPOSED, WEIGHTED, predict, run
from xai_edit.core.outputs import relative_error
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.pruning.coupled_channels import ChannelGroup, Coupling, coupling

TOLERANCE = 1e-5  # of the largest logit, by which logits may differ


def to_smaller(model: nn.Module, edit: ModelEdit | None, example_input: Inputs) -> nn.Module:
    """Return a copy of a model without the units that are switched off, of that inside a wrapper.

    A unit is switched off when its weights and biases in all layers that share it and the scale and
    shift of its norms are zero. One unit of each group stays, and with a warning those that an
    activation such as the sigmoid gives a value nevertheless. The logits for the example input are
    checked in float64 against the masked network's. EditMismatchError if the edit is not one of
    this model; ValueError if the input does not fit, no unit can be removed, or the outputs differ
    afterwards.

    Parameters
    ----------
    model : nn.Module
        A classifier, logits of shape (samples, classes). Not changed.
    edit : ModelEdit or None
        An edit of the model; None where units are already switched off.
    example_input : Tensor, shape (samples, ...), or several
        Inputs to trace the network with and to compare outputs on.

    Examples
    --------
    >>> edit = xe.RelevancePruning(share=0.875).plan(model, data)
    >>> smaller = xe.to_smaller(model, edit, images[:8])
    >>> smaller.conv
    Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
    """
    model = unwrapped(model)
    inputs = as_inputs(example_input, "example_input").to(model_device(model))
    with torch.inference_mode(False):
        masked = copied(model)
        if edit is not None:
            edit.apply(masked)
        smaller = copied(masked)
        found = coupling(smaller, inputs)
        _remove(smaller, found, _switched_off(smaller, found, inputs))
        _require_same_outputs(masked, smaller, inputs)
    for name, module in model.named_modules():
        smaller.get_submodule(name).training = module.training
    return smaller


def _switched_off(
    model: nn.Module, found: Coupling, inputs: Inputs
) -> list[tuple[ChannelGroup, Tensor]]:
    """Return the groups with units to remove, and these units, bool, shape (units,)."""
    silent = [silent_units(model, group) for group in found.groups]
    gone = {
        unit
        for group, off in zip(found.groups, silent, strict=True)
        for unit in _roots(found, group)[off].tolist()
    }
    read = _still_read(model, found, gone, inputs)
    lost, also = [], ""
    for group, off in zip(found.groups, silent, strict=True):
        roots = _roots(found, group)
        noisy = torch.tensor([unit in read for unit in roots.tolist()]) & off
        reason = group.fixed
        if reason is None and noisy.any():
            reason = next(read[unit] for unit in roots[noisy].tolist())
            off = off & ~noisy
        if reason is not None and (off | noisy).any() and not also:
            layer = next(iter(group.layers))
            also = f"; those of layer {layer!r} are, but have to stay: {reason}"
        if group.fixed is not None:
            continue
        if off.all():
            off[0] = False
        if off.any():
            lost.append((group, off))
    if not lost:
        raise ValueError(
            f"edit: no unit that can be removed is switched off{also}; a unit is, where its "
            "weights and biases in all coupled layers and its norms' scale and shift are zero, as "
            "RelevancePruning plans it"
        )
    if read and also:
        warnings.warn(f"edit: some units that are switched off are not removed{also}", stacklevel=3)
    return lost


def _roots(found: Coupling, group: ChannelGroup) -> Tensor:
    """Return the number of each unit of a group, int64, shape (units,)."""
    layer, channels = next(iter(group.layers.items()))
    return found.flow.roots(found.flow.layers[layer][0] + channels[:, 0])


def _still_read(
    model: nn.Module, found: Coupling, units: set[int], inputs: Inputs
) -> dict[int, str]:
    """Return which switched-off units still have a value where another unit's layer reads them."""
    flow, read = found.flow, dict[int, str]()
    off = torch.tensor(sorted(units))

    def note(name: str, axis: int, roots: Tensor) -> Any:
        gone = torch.isin(roots, off)

        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and given[0].shape[axis] == len(gone):
                values = given[0].detach().movedim(axis, 0).reshape(len(gone), -1)
                for unit in roots[gone & (values != 0).any(1).cpu()].tolist():
                    read.setdefault(
                        unit,
                        f"an activation such as the sigmoid, or a constant that is added, gives "
                        f"them a value where layer {name!r} reads them",
                    )

        return look

    with ExitStack() as hooks, torch.no_grad():
        for name, numbers in flow.reads.items():
            module = flow.modules[name]
            groups = getattr(module, "groups", 1)
            widths = [len(numbers) // groups, flow.layers.get(name, (0, 0))[1] // groups]
            if isinstance(module, WEIGHTED) and (groups == 1 or min(widths) > 1):
                axis = -1 if isinstance(module, nn.Linear) else 1
                look = note(name, axis, flow.roots(numbers))
                hooks.enter_context(module.register_forward_pre_hook(look))
        run(model, inputs)
    return read


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


def _remove(model: nn.Module, found: Coupling, lost: list[tuple[ChannelGroup, Tensor]]) -> None:
    """Remove the silent units of each group from all that writes or reads them."""
    flow = found.flow
    dead = torch.cat([_roots(found, group)[silent] for group, silent in lost])
    for name, module in model.named_modules():
        if name not in flow.reads:
            continue
        read = ~torch.isin(flow.roots(flow.reads[name]), dead)
        if isinstance(module, WEIGHTED):
            first, width = flow.layers[name]
            made = ~torch.isin(flow.roots(torch.arange(first, first + width)), dead)
            _narrow_layer(module, read, made)
        elif not read.all():
            for own in ("weight", "bias", "running_mean", "running_var"):
                _narrow(module, own, 0, read)
            size = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
            setattr(module, size, int(read.sum()))


def _narrow_layer(module: nn.Module, read: Tensor, made: Tensor) -> None:
    """Keep some input and output channels of a linear or convolution layer."""
    if read.all() and made.all():
        return
    transposed = isinstance(module, TRANSPOSED)
    groups = int(getattr(module, "groups", 1))
    of_group = read.view(groups, -1)  # each group of channels has lost the same, or all
    left = of_group[of_group.any(1)]
    _narrow(module, "weight", 0 if not transposed else 1, made)
    _narrow(module, "weight", 1 if not transposed else 0, left[0])
    _narrow(module, "bias", 0, made)
    sizes = int(read.sum()), int(made.sum())
    names = ("in_features", "out_features")
    if not isinstance(module, nn.Linear):
        names = ("in_channels", "out_channels")
        module.groups = len(left)  # type: ignore[assignment]
    for name, size in zip(names, sizes, strict=True):
        setattr(module, name, size)


def _narrow(module: nn.Module, name: str, axis: int, keep: Tensor) -> None:
    """Keep some entries of a parameter or buffer along an axis."""
    old = getattr(module, name, None)
    if not isinstance(old, Tensor):
        return
    kept = old.detach().index_select(axis, keep.nonzero().flatten().to(old.device))
    if isinstance(old, nn.Parameter):
        module.register_parameter(name, nn.Parameter(kept, old.requires_grad))
    else:
        module.register_buffer(name, kept, name not in module._non_persistent_buffers_set)


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
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        raise ValueError(
            f"model: without the units its logits differ by {error:.3g} of the largest from the "
            "masked network's; does its forward pass rely on a number of channels?"
        )
