"""Ablation of subspaces in the forward pass, in a copy of the model, or folded into weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Epsilon

from xai_edit.concepts.presence import Presence, pooled_square
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.core.axes import known_axes, unit_axes
from xai_edit.core.checks import require_type
from xai_edit.core.data import model_device
from xai_edit.core.guard import copied, preserved
from xai_edit.core.inputs import Inputs, as_inputs
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    TRANSPOSED,
    WEIGHTED,
    first_tensor,
    layer_module,
    resolve_layers,
    run,
    tapped,
    unit_axis_of,
    values_at,
)
from xai_edit.core.outputs import relative_error
from xai_edit.core.trace import trace
from xai_edit.core.wrapped import unwrapped

UnitAxis = int | Mapping[str, int] | None
ROUNDING = 1e-4  # of the largest logit, by which a folded model may differ


class SubspaceAblation(nn.Module):
    """The map a ↦ a − U Uᵀ(a − μ) over the channels, with the epsilon rule for relevance.

    With ``when`` it is the identity for samples in which the subspaces are not present. With
    ``readers`` V, of the shape of U, it is the oblique a ↦ a − U Vᵀ(a − μ).
    """

    directions: Tensor
    mean: Tensor
    readers: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        directions: Tensor,
        mean: Tensor,
        axis: int | None,
        when: Presence | None = None,
        readers: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.pooling = None if when is None else when.pooling
        # None before the first forward pass; an object, so that `preserved` keeps what it holds.
        self.axis = SimpleNamespace(number=axis)
        self.register_buffer("directions", directions)
        self.register_buffer("mean", mean.clone())  # `load_state_dict` writes into it
        self.register_buffer("readers", readers)
        threshold = None if when is None else self.directions.new_tensor(when.threshold)
        self.register_buffer("threshold", threshold)
        self.lrp_rule = Epsilon()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubspaceAblation:
        """Move the buffers but keep their precision: a square or threshold may overflow in half."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def forward(self, activations: Tensor) -> Tensor:
        """Return the activations without the subspaces, of the same shape."""
        if self.axis.number is None:
            return activations
        U = self.directions.to(activations)
        axis = unit_axis_of(activations, self.axis.number)
        a = activations.movedim(axis, -1)
        if a.shape[-1] != len(U):
            raise ValueError(f"subspaces: of {len(U)} channels, but the layer has {a.shape[-1]}")
        V = U if self.readers is None else self.readers.to(activations)
        ablated = (a - (a - self.mean.to(a)) @ V @ U.T).movedim(-1, axis)
        if self.readers is not None:
            return torch.empty_like(activations).copy_(ablated)  # in their memory layout, as below
        # Not a view, so that an in-place activation may follow.
        ablated = ablated.clone()
        if self.threshold is None or self.pooling is None:
            return ablated
        # `shape[0]`, which an exported program keeps open, where `len` would fix the batch size.
        positions = a.reshape(a.shape[0], -1, a.shape[-1])
        score = pooled_square(positions, self.directions, self.mean, self.pooling)
        present = (score > self.threshold).reshape(-1, *[1] * (a.ndim - 1))
        # In the memory layout of the activations, so that later layers compute the same bits.
        return torch.empty_like(activations).copy_(torch.where(present, ablated, activations))


@contextmanager
def ablated(
    model: nn.Module,
    layer: str,
    subspaces: Subspaces,
    indices: Sequence[int],
    *,
    when: Presence | None = None,
    unit_axis: UnitAxis = None,
) -> Iterator[str]:
    """Remove subspaces from a layer's output inside a ``with`` block.

    UnknownLayerError or ValueError if the layer or an index does not exist.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode inside the block; restored afterwards.
    layer : str
        A module that returns one tensor.
    subspaces, indices : Subspaces, sequence of int
        The subspaces to remove.
    when : Presence, optional
        Remove them only in samples in which they are present; outputs of the others, of a model
        that treats its samples one by one, are the same bits as without the ablation.
    unit_axis : int, optional
        The axis of the channels; when left out, the first forward pass determines it or raises
        ValueError (`xai_edit.core.axes.unit_axes`).

    Yields
    ------
    str
        The name of the original layer inside the block, such as for a Zennit name map.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> with xe.ablated(model, "relu1", subspaces, [0]):
    ...     xe.evaluate_groups(model, data, groups=attribute).worst
    1.0
    >>> xe.evaluate_groups(model, data, groups=attribute).worst
    0.0
    """
    with preserved(model):
        _insert_subspaces(unwrapped(model), layer, subspaces, indices, when, unit_axis)
        yield f"{layer}.layer"


def with_ablation(
    model: nn.Module,
    layer: str,
    subspaces: Subspaces,
    indices: Sequence[int],
    *,
    when: Presence | None = None,
    unit_axis: UnitAxis = None,
) -> nn.Module:
    """Return a copy of a model with the ablation as a layer, which can be pruned and exported.

    Arguments and errors are those of `ablated`. Pruning keeps the channels that the ablation mixes.
    It is a copy of the model inside a wrapper, such as a compiled one.
    The copy has the layer's parameters under ``{layer}.layer``, and under ``{layer}.ablation`` the
    buffers ``directions``, float64, shape (channels, directions), and ``mean``, (channels,); with
    ``when`` also ``threshold``, a single number; they stay so in a copy made half precision.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="relu1", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> without = xe.with_ablation(model, "relu1", subspaces, [0])
    >>> xe.evaluate_groups(without, data, groups=attribute).worst
    1.0
    """
    copy = copied(unwrapped(model))
    _insert_subspaces(copy, layer, subspaces, indices, when, unit_axis)
    return copy


def with_identity(
    model: nn.Module, layer: str, inputs: Inputs, *, unit_axis: UnitAxis = None
) -> nn.Module:
    """Return a copy of a model with a place behind a layer that an edit can write an ablation to.

    The copy gives the same outputs, bit for bit, until an edit such as that of
    `xai_edit.ClassSubspaceRemoval` writes to its buffers ``directions`` U, ``readers`` V, both
    float64, shape (channels, channels), and ``mean`` μ, (channels,), of
    ``{layer}.ablation``: a ↦ a − U Vᵀ(a − μ). All are zero.

    ``inputs`` are one or more samples: a tensor, or a tuple or mapping of tensors. Other arguments,
    names of parameters and errors are those of `with_ablation`.

    Examples
    --------
    >>> open_to_edits = xe.with_identity(model, "relu1", images)
    >>> edit = xe.ClassSubspaceRemoval("relu1").plan(open_to_edits, data, target=1)
    >>> sorted(edit.changes)
    ['relu1.ablation.directions', 'relu1.ablation.mean', 'relu1.ablation.readers']
    """
    copy = copied(unwrapped(model))
    _require_outputs(copy, layer)
    one = as_inputs(inputs, "inputs")[:1].to(model_device(copy))
    with preserved(copy), torch.no_grad():
        axis = unit_axes(copy, one, [layer], unit_axis)[layer]
        values = values_at(copy, layer, one)
    channels = values.shape[unit_axis_of(values, axis)]
    zeros = torch.zeros(channels, channels, dtype=torch.double)
    _insert(copy, layer, SubspaceAblation(zeros, zeros[0], axis, readers=zeros.clone()))
    with preserved(copy), torch.no_grad(), tapped(copy, [f"{layer}.ablation"]) as tap:
        run(copy, one)
    if not tap.values:
        raise ValueError(
            f"layer: {layer!r} given, which the model calls by another reference, such as in a "
            "list, so that nothing put behind it would be called; name a module around it"
        )
    return copy


def identity_behind(model: nn.Module, layer: str) -> SubspaceAblation | None:
    """Return the ablation that `with_identity` has put behind a layer, or None."""
    module = layer_module(model, layer)
    place = module.ablation if isinstance(module, _Ablated) else None
    return place if isinstance(place, SubspaceAblation) and place.readers is not None else None


class _Ablated(nn.Module):
    """A layer followed by an ablation, with the layer's call signature."""

    def __init__(self, layer: nn.Module, ablation: SubspaceAblation) -> None:
        super().__init__()
        self.layer, self.ablation = layer, ablation
        self.training = ablation.training = layer.training

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        ablated: Tensor = self.ablation(self.layer(*inputs, **named))
        return ablated

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer, but not its weights."""
        if name in (*self._parameters, *self._buffers, *self._modules):
            return super().__getattr__(name)
        value = getattr(super().__getattr__("layer"), name)
        if isinstance(value, Tensor) or name == "lrp_rule":
            raise AttributeError(
                f"a layer with an ablation behind it has no {name!r}; the module around it reads "
                "the layer's weights instead of calling it, so name that module"
            )
        return value


def _insert_subspaces(
    model: nn.Module,
    layer: str,
    subspaces: Subspaces,
    indices: Sequence[int],
    when: Presence | None,
    unit_axis: UnitAxis,
) -> None:
    _require_outputs(model, layer)
    if when is not None:
        works = "give xai_edit.Presence(threshold), or leave it out to ablate every sample"
        require_type(when, Presence, "when", works)
    axis = known_axes(model, [layer], unit_axis).get(layer)
    directions = subspaces.directions(indices)
    _insert(model, layer, SubspaceAblation(directions, subspaces.mean, axis, when))


def _require_outputs(model: nn.Module, layer: str) -> None:
    """Raise UnknownLayerError or ValueError unless an ablation can be put behind the layer."""
    resolve_layers(model, [layer])
    if layer.endswith(INPUT_SUFFIX):
        raise ValueError(f"layer: {layer!r} given; name the layer whose outputs are ablated")


def _insert(model: nn.Module, layer: str, ablation: SubspaceAblation) -> None:
    """Replace a layer by the layer followed by an ablation."""
    ablation.to(model_device(model))
    parent, _, name = layer.rpartition(".")
    module = layer_module(model, layer)
    for path, outer in model.named_modules():
        around = not path or f"{layer}.".startswith(f"{path}.")
        if around and isinstance(outer, nn.TransformerEncoderLayer):
            outer.activation_relu_or_gelu = 0  # else its fast path reads weights, calls no layer
    model.get_submodule(parent)._modules[name] = _Ablated(module, ablation)
    if ablation.axis.number is None:
        model.register_forward_pre_hook(partial(_find_axis, layer), with_kwargs=True)


def _find_axis(
    layer: str, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Find the axis of the channels before the first forward pass; a pre-hook of the model."""
    axis: Any = model.get_submodule(f"{layer}.ablation").axis
    if axis.number is not None:
        return
    name = f"{layer}.layer"
    with preserved(model):
        for module in model.modules():  # this hook, and those that gather values
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        axis.number = unit_axes(model, first_tensor(inputs, named), [name])[name]


def fold_ablation(
    model: nn.Module, layer: str, subspaces: Subspaces, indices: Sequence[int], inputs: Inputs
) -> dict[str, Tensor]:
    """Return parameters that give the model the outputs it has under `ablated`.

    With P = I − U Uᵀ the ablated activations are P a + U Uᵀμ, so a layer W a + b that reads them
    becomes (W P) a + (b + W U Uᵀμ). Returns its weight and bias by name.

    Arguments as of `ablated`; the folded model is compared with the ablated one on ``inputs``,
    shape (samples, ...). ValueError if no single linear or ungrouped convolution layer with a bias
    reads the activations directly, or the outputs differ, as with zero padding.

    Examples
    --------
    >>> features = xe.collect_features(model, data, layer="flatten", attribute=attribute)
    >>> subspaces = xe.ContrastivePCA(size=1).fit(features)
    >>> [*xe.fold_ablation(model, "flatten", subspaces, [0], images)]
    ['fc1.weight', 'fc1.bias']
    """
    read_by = trace(model, inputs).readers(layer)
    readers = [name for name in read_by if isinstance(model.get_submodule(name), WEIGHTED)]
    if len(readers) != 1 or isinstance(model.get_submodule(readers[0]), TRANSPOSED):
        raise ValueError(
            f"layer {layer!r}: its output goes to {readers or 'no linear or convolution layer'} "
            "directly; to fold the ablation, exactly one such layer has to read it"
        )
    (name,) = readers
    reader: Any = model.get_submodule(name)
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
            outputs = torch.func.functional_call(model, values, (inputs,))
    difference = relative_error(outputs, expected)
    if not difference <= ROUNDING:
        raise ValueError(
            f"layer {layer!r}: folding its ablation into {name!r} is not exact, the outputs differ "
            f"by {difference:.2g} of the largest; does the layer pad with zeros, or does another "
            "branch read the activations?"
        )
    return values
