"""Removing subspaces in the forward pass, with an LRP rule for the removal itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from zennit.rules import Epsilon

from xai_edit.attribution.layers import (
    CHANNELS_LAST,
    INPUT_SUFFIX,
    layer_module,
    resolve_layers,
)
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.data import model_device
from xai_edit.guard import copied, preserved


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
    """Remove subspaces behind a layer for the length of a ``with`` block.

    The layer stands inside a module of two meanwhile, so every scorer, Zennit's and Captum's
    alike, sees an ordinary module. A Zennit name map that names this very layer does not find it.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode while inside, and exactly as before afterwards.
    layer : str
        A module whose output has channels second, or a linear layer or layer norm.
    subspaces : Subspaces
    indices : sequence of int
        The subspaces to remove.

    Yields
    ------
    str
        The name under which the layer itself is found while inside.

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
    """Return a copy of a model that removes the subspaces for good, as a layer of its own.

    For networks into which `fold_ablation` cannot fold it exactly. ``state_dict`` and
    ``torch.export`` carry the layer. Pruning and `to_smaller` take the copy as any network; the
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
        With the layer's own parameters under ``{layer}.layer`` and the buffers ``directions``,
        float64, shape (channels, directions), and ``mean``, (channels,), under
        ``{layer}.ablation``.

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
