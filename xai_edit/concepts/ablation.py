"""Removing subspaces in the forward pass, with an LRP rule for the removal itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from zennit.rules import Epsilon

from xai_edit.attribution.axes import known_axes, unit_axes
from xai_edit.attribution.layers import (
    INPUT_SUFFIX,
    first_tensor,
    layer_module,
    resolve_layers,
    unit_axis_of,
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
    """Remove subspaces behind a layer for the length of a ``with`` block.

    The layer stands inside a module of two meanwhile, so every scorer, Zennit's and Captum's
    alike, sees an ordinary module. A Zennit name map that names this very layer does not find it.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode while inside, and exactly as before afterwards.
    layer : str
        A module that passes on one tensor.
    subspaces : Subspaces
    indices : sequence of int
        The subspaces to remove.
    unit_axis : int, optional
        The axis of the channels. When left out, it is found in the first forward pass inside, which
        raises ValueError where it cannot be; see `xai_edit.attribution.axes.unit_axes`.

    Yields
    ------
    str
        The name under which the layer itself is found while inside.

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
    """Return a copy of a model that removes the subspaces for good, as a layer of its own.

    For networks into which `fold_ablation` cannot fold it exactly. ``state_dict`` and
    ``torch.export`` carry the layer. Pruning and `to_smaller` take the copy as any network; the
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
        With the layer's own parameters under ``{layer}.layer`` and the buffers ``directions``,
        float64, shape (channels, directions), and ``mean``, (channels,), under
        ``{layer}.ablation``.

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
