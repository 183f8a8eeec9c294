"""Switching units off: the entries of parameters that make a unit's output zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import CONVOLUTIONS, INPUT_SUFFIX, layer_module
from xai_edit.guard import preserved


def silencing_entries(
    model: nn.Module, layer: str, units: Tensor, batch_norm: str | None = None
) -> dict[str, Tensor]:
    """Return the entries to set to zero so that some units of a layer give nothing on.

    Parameters
    ----------
    model : nn.Module
    layer : str
        A linear or convolution layer: the incoming weights and the bias of the units. With
        ``:input``: the weights that read the units.
    units : Tensor, int64, shape (n,)
    batch_norm : str, optional
        A batch norm that follows the layer directly; its scale and shift for the units go too, or
        it would pass its shift on.

    Returns
    -------
    dict of Tensor
        Parameter name → flat positions, int64.

    Raises
    ------
    ValueError
        If the layer has no units that can be switched off.
    """
    module = layer_module(model, layer)
    name = layer.removesuffix(INPUT_SUFFIX)
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        raise ValueError(
            f"layer {layer!r} is a {type(module).__name__}; units of linear and convolution "
            "layers can be switched off"
        )
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    reads = layer.endswith(INPUT_SUFFIX)
    if getattr(module, "groups", 1) > 1 and transposed != reads:
        raise ValueError(f"layer {layer!r} is grouped; its units cannot be switched off one by one")
    positions = torch.arange(module.weight.numel()).view(module.weight.shape)
    axis = 1 if transposed != reads else 0
    entries = {f"{name}.weight": positions.index_select(axis, units).flatten()}
    if not reads and module.bias is not None:
        entries[f"{name}.bias"] = units
    if batch_norm is not None:
        entries |= {f"{batch_norm}.weight": units, f"{batch_norm}.bias": units}
    return entries


def following_batch_norms(
    model: nn.Module, inputs: Tensor, layers: Sequence[str]
) -> dict[str, str]:
    """Return, for the layers whose output goes straight into an affine batch norm, its name."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # an id is only good while its tensor lives
    found: dict[str, str] = {}
    with preserved(model), torch.no_grad():
        for name, module in model.named_modules():
            if name in layers:

                def made_by(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                    made[id(output)] = name
                    kept.append(output)

                module.register_forward_hook(made_by)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:

                def read_by(_: nn.Module, read: tuple[Tensor, ...], name: str = name) -> None:
                    if id(read[0]) in made:
                        found[made[id(read[0])]] = name

                module.register_forward_pre_hook(read_by)
        model(inputs)
    return found
