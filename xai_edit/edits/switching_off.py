"""The entries of weights and biases that switch units of a layer off, or make them noisy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from xai_edit.core.data import model_device
from xai_edit.core.layers import INPUT_SUFFIX, TRANSPOSED, WEIGHTED, layer_module
from xai_edit.edits.model_edit import plain, tensors_of

Noise = Literal["gaussian", "laplacian"]


def silencing_entries(
    model: nn.Module, layer: str, units: Tensor, batch_norm: str | None = None
) -> dict[str, Tensor]:
    """Return the entries to set to zero to switch off units of a layer: name → flat positions.

    Of a linear or convolution layer, the incoming weights and the bias of the ``units``, int64,
    shape (n,); of ``"fc:input"``, the weights that read them; of a ``batch_norm`` that follows the
    layer directly, the scale and shift. ValueError for other layers.
    """
    entries, tensors = {}, tensors_of(model)
    for name, axis in _axes(model, layer, batch_norm).items():
        positions = torch.zeros(1, dtype=torch.long)  # flat, of the units along their axis
        for at, length in enumerate(plain(tensors, name).shape):
            along = units.cpu() if at == axis else torch.arange(length)
            positions = (positions[:, None] * length + along).flatten()
        entries[name] = positions
    return entries


@contextmanager
def switched_off(
    model: nn.Module, units: Mapping[str, Tensor], batch_norms: Mapping[str, str]
) -> Iterator[None]:
    """Set the `all_silencing_entries` to zero for a ``with`` block, then restore every bit.

    Whole rows at once, which is quick enough to be done for each batch.
    """
    tensors = tensors_of(model)
    kept: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        for layer, off in units.items():
            for name, axis in _axes(model, layer, batch_norms.get(layer)).items():
                tensor = plain(tensors, name).detach()
                rows = off.to(tensor.device)
                kept.append((tensor, axis, rows, tensor.index_select(axis, rows)))
                tensor.index_fill_(axis, rows, 0)
        yield
    finally:
        for tensor, axis, rows, values in reversed(kept):  # two layers may share a weight
            tensor.index_copy_(axis, rows, values)


@contextmanager
def kept_off(model: nn.Module, units: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Set units of layers to zero by hooks for a ``with`` block; no weight is touched.

    In training so no incoming weight of theirs changes.
    """
    with ExitStack() as hooks:
        for name, off in units.items():
            module = model.get_submodule(name)
            gone = torch.tensor(off, dtype=torch.long, device=model_device(module))
            axis = -1 if isinstance(module, nn.Linear) else 1
            hook = module.register_forward_hook(
                lambda _, __, output, at=(axis, gone): output.index_fill(*at, 0)
            )
            hooks.enter_context(hook)
        yield


def _axes(model: nn.Module, layer: str, batch_norm: str | None) -> dict[str, int]:
    """Return the axis of a layer's units in each tensor that `silencing_entries` names."""
    module = layer_module(model, layer)
    name = layer.removesuffix(INPUT_SUFFIX)
    if not isinstance(module, WEIGHTED):
        raise ValueError(
            f"layer {layer!r} is a {type(module).__name__}; units of linear and convolution "
            "layers can be switched off"
        )
    transposed = isinstance(module, TRANSPOSED)
    reads = layer.endswith(INPUT_SUFFIX)
    if getattr(module, "groups", 1) > 1 and transposed != reads:
        raise ValueError(f"layer {layer!r} is grouped; its units cannot be switched off one by one")
    prefix = f"{name}." if name else ""  # the model itself may be the layer
    axes = {f"{prefix}weight": 1 if transposed != reads else 0}
    if not reads and module.bias is not None:
        axes[f"{prefix}bias"] = 0
    if batch_norm is not None:
        axes |= {f"{batch_norm}.weight": 0, f"{batch_norm}.bias": 0}
    return axes


def all_silencing_entries(
    model: nn.Module, units: Mapping[str, Tensor], batch_norms: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the `silencing_entries` of units of several layers, each entry once and ascending."""
    entries: dict[str, list[Tensor]] = {}
    for layer, off in units.items():
        for name, at in silencing_entries(model, layer, off, batch_norms.get(layer)).items():
            entries.setdefault(name, []).append(at)
    # Two named layers may share a weight, as "fc" and "fc:input" do.
    return {name: torch.cat(parts).unique() for name, parts in entries.items()}


def noisy_values(
    model: nn.Module, entries: Mapping[str, Tensor], noise: Noise, scale: float, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return entries and their values plus noise of ``scale`` standard deviations of the layer."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, at in entries.items():
        layer = name.rpartition(".")[0]
        deviation = model.get_parameter(f"{layer}.weight".removeprefix(".")).std().item()
        old = torch.take(model.get_parameter(name).detach().cpu(), at)
        drawn = _drawn(noise, len(at), generator) * scale * deviation
        values[name] = at, old + drawn.to(old)
    return values


def _drawn(noise: Noise, count: int, generator: torch.Generator) -> Tensor:
    """Return noise of standard deviation 1."""
    if noise == "gaussian":
        return torch.randn(count, generator=generator, dtype=torch.float64)
    u = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / 2**0.5
