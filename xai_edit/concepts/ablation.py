"""Removing subspaces: in the forward pass with an LRP rule, in a copy, or in the next weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Epsilon

from xai_edit.attribution.layers import (
    CHANNELS_LAST,
    CONVOLUTIONS,
    INPUT_SUFFIX,
    TRANSPOSED,
    layer_module,
    resolve_layers,
)
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import model_device
from xai_edit.guard import copied, preserved

ROUNDING = 1e-4  # of the largest logit, by which a folded model may differ


class SubspaceAblation(nn.Module):
    """The linear map a ↦ a − U Uᵀ(a − μ) over the channels.

    Relevance passes through it by the epsilon rule of this map, R_a = a ⊙ P(R / a′) with
    P = I − U Uᵀ: conserved but for what the constant U Uᵀμ takes.

    Parameters
    ----------
    subspaces : Subspaces
    indices : sequence of int
        The subspaces to remove.
    channel_axis : int
        1 for convolutions, −1 for linear layers and layer norms.
    """

    directions: Tensor
    mean: Tensor

    def __init__(self, subspaces: Subspaces, indices: Sequence[int], channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("directions", subspaces.directions(indices))
        self.register_buffer("mean", subspaces.mean.clone())  # `load_state_dict` writes into it
        self.lrp_rule = Epsilon()

    def forward(self, activations: Tensor) -> Tensor:
        """Return the activations without the subspaces, same shape."""
        U = self.directions.to(activations)
        a = activations.movedim(self.channel_axis, -1)
        if a.shape[-1] != len(U):
            raise ValueError(f"subspaces: of {len(U)} channels, but the layer has {a.shape[-1]}")
        ablated = a - (a - self.mean.to(a)) @ U @ U.T
        # Not a view, so that an in-place activation may follow.
        return ablated.movedim(-1, self.channel_axis).clone()


@contextmanager
def ablated(
    model: nn.Module, layer: str, subspaces: Subspaces, indices: Sequence[int]
) -> Iterator[str]:
    """Remove subspaces behind a layer inside a ``with`` block.

    The layer is replaced by a module that holds it and the ablation, so every scorer, Zennit's and
    Captum's alike, sees an ordinary module. A Zennit name map finds the layer by the name yielded.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode while inside; afterwards exactly as it was.
    layer : str
        A module whose output has channels second, or a linear layer or layer norm.
    subspaces : Subspaces
    indices : sequence of int
        The subspaces to remove.

    Yields
    ------
    str
        The name of the layer itself while inside.

    Raises
    ------
    UnknownLayerError, ValueError
        If the layer or an index does not exist.
    """
    behind = _ablation(model, layer, subspaces, indices)
    with preserved(model):
        _insert(model, layer, behind)
        yield f"{layer}.layer"


def with_ablation(
    model: nn.Module, layer: str, subspaces: Subspaces, indices: Sequence[int]
) -> nn.Module:
    """Return a copy of a model with the ablation as a layer.

    For networks into which `fold_ablation` cannot fold it exactly. ``state_dict`` and
    ``torch.export`` hold the layer. Pruning and `to_smaller` take the copy as any network; the
    channels that the ablation mixes stay.

    Parameters
    ----------
    model : nn.Module
        Only read.
    layer, subspaces, indices
        See `ablated`.

    Returns
    -------
    nn.Module
        With the layer's parameters under ``{layer}.layer`` and the buffers ``directions``, float64,
        shape (channels, directions), and ``mean``, (channels,), under ``{layer}.ablation``.

    Raises
    ------
    UnknownLayerError, ValueError
        If the layer or an index does not exist, or the model cannot be copied.
    """
    behind = _ablation(model, layer, subspaces, indices)
    kept = copied(model)
    _insert(kept, layer, behind)
    return kept


class _Ablated(nn.Module):
    """A layer and the ablation behind it, called as the layer alone."""

    def __init__(self, layer: nn.Module, ablation: SubspaceAblation) -> None:
        super().__init__()
        self.layer, self.ablation = layer, ablation
        self.training = ablation.training = layer.training

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        ablated: Tensor = self.ablation(self.layer(*inputs, **named))
        return ablated


def _ablation(
    model: nn.Module, layer: str, subspaces: Subspaces, indices: Sequence[int]
) -> SubspaceAblation:
    resolve_layers(model, [layer])
    if layer.endswith(INPUT_SUFFIX):
        raise ValueError(f"layer: {layer!r} given; name the layer whose outputs are ablated")
    axis = -1 if isinstance(layer_module(model, layer), CHANNELS_LAST) else 1
    return SubspaceAblation(subspaces, indices, axis).to(model_device(model))


def _insert(model: nn.Module, layer: str, ablation: SubspaceAblation) -> None:
    """Put a layer and its ablation where the layer was."""
    parent, _, name = layer.rpartition(".")
    module = layer_module(model, layer)
    model.get_submodule(parent)._modules[name] = _Ablated(module, ablation)


def fold_ablation(
    model: nn.Module, layer: str, subspaces: Subspaces, indices: Sequence[int], inputs: Tensor
) -> dict[str, Tensor]:
    """Return parameters with which the model computes what it computes under `ablated`.

    With P = I − U Uᵀ the ablated activations are P a + U Uᵀμ, so a layer W a + b that reads them
    becomes (W P) a + (b + W U Uᵀμ). The model is only read.

    Parameters
    ----------
    model, layer, subspaces, indices
        See `ablated`.
    inputs : Tensor, shape (samples, ...)
        A batch on which the folded model is compared with the ablated one.

    Returns
    -------
    dict of Tensor
        Names and new values of the reader's weight and bias.

    Raises
    ------
    ValueError
        If no single linear or ungrouped convolution layer reads the activations as they are, it
        has no bias, or the outputs differ (zero padding lacks the constant, another branch reads).
    """
    name, reader = _reader(model, layer, inputs)
    grouped = getattr(reader, "groups", 1) > 1
    if grouped or reader.bias is None or reader.weight.shape[1] != len(subspaces.mean):
        raise ValueError(
            f"layer {layer!r}: its ablation cannot be folded into {name!r}, which is grouped, has "
            "no bias or reads other channels"
        )
    U = subspaces.directions(indices)
    weight = reader.weight.detach().to(U)
    W = weight.movedim(1, -1)
    folded = (W - W @ U @ U.T).movedim(-1, 1)  # W P
    constant = (W @ (U @ (U.T @ subspaces.mean))).reshape(len(W), -1).sum(1)  # W U Uᵀμ
    values = {
        f"{name}.weight": folded.to(reader.weight),
        f"{name}.bias": (reader.bias.detach().to(U) + constant).to(reader.bias),
    }
    with torch.no_grad():
        with ablated(model, layer, subspaces, indices):
            expected = model(inputs)
        with preserved(model):
            found = torch.func.functional_call(model, values, (inputs,))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= ROUNDING:
        raise ValueError(
            f"layer {layer!r}: folding its ablation into {name!r} is not exact, the outputs differ "
            f"by {difference:.2g} of the largest; does the layer pad with zeros, or does another "
            "branch read the activations?"
        )
    return values


def _reader(model: nn.Module, layer: str, inputs: Tensor) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the one linear or convolution layer that reads the layer's output as it is."""
    made: list[Tensor] = []
    readers: list[str] = []
    with preserved(model), torch.no_grad():
        layer_module(model, layer).register_forward_hook(lambda *call: made.append(call[2]))
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)):

                def read(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                    if any(given[0] is tensor for tensor in made):
                        readers.append(name)

                module.register_forward_pre_hook(read)
        model(inputs)
    if len(readers) != 1 or isinstance(model.get_submodule(readers[0]), TRANSPOSED):
        raise ValueError(
            f"layer {layer!r}: its output goes to {readers or 'no linear or convolution layer'} "
            "directly; to keep the ablation, one such layer has to read it as it is"
        )
    return readers[0], model.get_submodule(readers[0])  # type: ignore[return-value]
