"""Removing subspaces: in the forward pass with an LRP rule, in a copy, or in the next weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Epsilon

from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import known_axes, unit_axes
from xai_edit.core.data import model_device
from xai_edit.core.guard import copied, preserved
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    TRANSPOSED,
    WEIGHTED,
    first_tensor,
    layer_module,
    resolve_layers,
    unit_axis_of,
)
from xai_edit.core.trace import trace

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
    channel_axis : int or None
        None until it is found in the model's first forward pass.
    """

    directions: Tensor
    mean: Tensor

    def __init__(
        self, subspaces: Subspaces, indices: Sequence[int], channel_axis: int | None
    ) -> None:
        super().__init__()
        self.axis = _Axis(channel_axis)
        self.register_buffer("directions", subspaces.directions(indices))
        self.register_buffer("mean", subspaces.mean.clone())  # `load_state_dict` writes into it
        self.lrp_rule = Epsilon()

    def forward(self, activations: Tensor) -> Tensor:
        """Return the activations without the subspaces, same shape."""
        if self.axis.number is None:
            return activations
        U = self.directions.to(activations)
        axis = unit_axis_of(activations, self.axis.number)
        a = activations.movedim(axis, -1)
        if a.shape[-1] != len(U):
            raise ValueError(f"subspaces: of {len(U)} channels, but the layer has {a.shape[-1]}")
        ablated = a - (a - self.mean.to(a)) @ U @ U.T
        # Not a view, so that an in-place activation may follow.
        return ablated.movedim(-1, axis).clone()


@dataclass
class _Axis:
    """The axis of the channels; not an attribute of a module, which the guard would restore."""

    number: int | None


@contextmanager
def ablated(
    model: nn.Module,
    layer: str,
    subspaces: Subspaces,
    indices: Sequence[int],
    *,
    unit_axis: int | Mapping[str, int] | None = None,
) -> Iterator[str]:
    """Remove subspaces behind a layer inside a ``with`` block.

    The layer is replaced by a module that holds it and the ablation, so every scorer, Zennit's and
    Captum's alike, sees an ordinary module. A Zennit name map finds the layer by the name yielded.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode while inside; afterwards exactly as it was.
    layer : str
        A module that passes on one tensor.
    subspaces : Subspaces
    indices : sequence of int
        The subspaces to remove.
    unit_axis : int, optional
        The axis of the channels. When left out, it is found in the first forward pass inside, which
        raises ValueError where it cannot be; see `xai_edit.core.axes.unit_axes`.

    Yields
    ------
    str
        The name of the layer itself while inside.

    Raises
    ------
    UnknownLayerError, ValueError
        If the layer or an index does not exist.
    """
    behind = _ablation(model, layer, subspaces, indices, unit_axis)
    with preserved(model):
        _insert(model, layer, behind)
        yield f"{layer}.layer"


def with_ablation(
    model: nn.Module,
    layer: str,
    subspaces: Subspaces,
    indices: Sequence[int],
    *,
    unit_axis: int | Mapping[str, int] | None = None,
) -> nn.Module:
    """Return a copy of a model with the ablation as a layer.

    For networks into which `fold_ablation` cannot fold it exactly. ``state_dict`` and
    ``torch.export`` hold the layer. Pruning and `to_smaller` take the copy as any network; the
    channels that the ablation mixes stay.

    Parameters
    ----------
    model : nn.Module
        Only read.
    layer, subspaces, indices, unit_axis
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
    behind = _ablation(model, layer, subspaces, indices, unit_axis)
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

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that the module around it looks at; not its weights."""
        if name in (*self._parameters, *self._buffers, *self._modules):
            return super().__getattr__(name)
        value = getattr(super().__getattr__("layer"), name)
        if isinstance(value, Tensor) or name == "lrp_rule":
            raise AttributeError(
                f"a layer with an ablation behind it has no {name!r}; the module around it reads "
                "the layer's weights instead of calling it, so name that module"
            )
        return value


class _FindAxis:
    """A pre-hook of the model: before the first forward pass, finds the axis of the channels."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        axis: _Axis = model.get_submodule(f"{self.layer}.ablation").axis  # type: ignore[assignment]
        if axis.number is not None:
            return
        name = f"{self.layer}.layer"
        with preserved(model):
            for module in model.modules():  # this hook, and those that gather values
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            axis.number = unit_axes(model, first_tensor(inputs, named), [name])[name]


def _ablation(
    model: nn.Module,
    layer: str,
    subspaces: Subspaces,
    indices: Sequence[int],
    unit_axis: int | Mapping[str, int] | None,
) -> SubspaceAblation:
    resolve_layers(model, [layer])
    if layer.endswith(INPUT_SUFFIX):
        raise ValueError(f"layer: {layer!r} given; name the layer whose outputs are ablated")
    axis = known_axes(model, [layer], unit_axis).get(layer)
    return SubspaceAblation(subspaces, indices, axis).to(model_device(model))


def _insert(model: nn.Module, layer: str, ablation: SubspaceAblation) -> None:
    """Put a layer and its ablation where the layer was."""
    parent, _, name = layer.rpartition(".")
    module = layer_module(model, layer)
    for path, outer in model.named_modules():
        around = not path or f"{layer}.".startswith(f"{path}.")
        if around and isinstance(outer, nn.TransformerEncoderLayer):
            outer.activation_relu_or_gelu = 0  # else its fast path reads weights, calls no layer
    model.get_submodule(parent)._modules[name] = _Ablated(module, ablation)
    if ablation.axis.number is None:
        model.register_forward_pre_hook(_FindAxis(layer), with_kwargs=True)


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
    """Return the one linear or convolution layer that gets the layer's output as it is."""
    readers = [
        name
        for name in trace(model, inputs).readers(layer)
        if isinstance(model.get_submodule(name), WEIGHTED)
    ]
    if len(readers) != 1 or isinstance(model.get_submodule(readers[0]), TRANSPOSED):
        raise ValueError(
            f"layer {layer!r}: its output goes to {readers or 'no linear or convolution layer'} "
            "directly; to keep the ablation, one such layer has to read it as it is"
        )
    return readers[0], model.get_submodule(readers[0])  # type: ignore[return-value]
