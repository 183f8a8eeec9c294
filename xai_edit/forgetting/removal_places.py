"""Where a removed subspace is written: behind a layer, into its weights or the last layer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.concepts.ablation import ROUNDING, identity_behind, with_identity
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import TRANSPOSED, WEIGHTED, layer_module, predict
from xai_edit.core.outputs import relative_error
from xai_edit.core.precision import in_float32
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.last_layer.head import HeadFeatures, collect_head_features


@dataclass(frozen=True, eq=False)
class Removal:
    """The map a ↦ a − U Vᵀ(a − μ); float64, shapes (channels, directions) and (channels,)."""

    directions: Tensor
    readers: Tensor
    mean: Tensor

    @property
    def matrix(self) -> Tensor:
        """U Vᵀ."""
        return self.directions @ self.readers.T


@dataclass(frozen=True, eq=False)
class Place:
    """What writes a removal as an edit, and how it is kept, in words."""

    kept: str
    write: Callable[[Removal], ModelEdit]


def in_head(model: nn.Module, head: HeadFeatures) -> Place:
    """Return the place in the last layer, W a + b → (W − W U Vᵀ) a + (b + W U Vᵀμ)."""
    W, bias = head.weight.double(), head.bias

    def write(removal: Removal) -> ModelEdit:
        if W.shape[1] != len(removal.mean):
            raise ValueError(f"it reads {W.shape[1]} values, not {len(removal.mean)} channels")
        removed = W @ removal.matrix
        new = {"weight": W - removed}
        if bias is not None:
            new["bias"] = bias.double() + removed @ removal.mean
        elif removal.mean.any():
            head.require_bias()
        return head.edit(model, {}, **new)

    return Place(f"folded into {head.layer!r}", write)


def place_at(model: nn.Module, layer: str, inputs: Inputs) -> Place:
    """Return the place for a layer: the identity behind it, or weights where that is exact.

    These are the layer's own, of a linear layer or an ungrouped convolution, else the last
    layer's, if only averages and reshapes are between. What is folded is compared with the removal
    as a layer on ``inputs``. ValueError where neither can be.
    """
    place = identity_behind(model, layer)
    if place is not None:
        return _behind(model, layer, place)
    module: Any = layer_module(model, layer)
    weighted = isinstance(module, WEIGHTED) and not isinstance(module, TRANSPOSED)
    in_layer = weighted and getattr(module, "groups", 1) == 1

    def folded(network: nn.Module) -> Place:
        if in_layer:
            return _in_layer(network, layer, layer_module(network, layer))
        return in_head(network, collect_head_features(network, [inputs]))

    found = folded(model)
    # Compared in float32, where no rounding of half precision passes for a difference.
    wide = in_float32(model)
    in_wide = found if wide is model else folded(wide)
    reference = with_identity(wide, layer, inputs)
    as_layer = place_at(reference, layer, inputs)
    compared = False

    def write(removal: Removal) -> ModelEdit:
        nonlocal compared
        works = f"works: xai_edit.with_identity(model, {layer!r}, inputs), a copy to plan on"
        try:
            edit = found.write(removal)
        except ValueError as problem:
            raise ValueError(
                f"layer: {layer!r} cannot be {found.kept} ({problem}); {works}"
            ) from None
        if not compared:
            expected = _logits(reference, as_layer.write(removal), inputs)
            found_logits = _logits(wide, in_wide.write(removal), inputs)
            if not relative_error(found_logits, expected) <= ROUNDING:
                raise ValueError(
                    f"layer: {layer!r} cannot be {found.kept} exactly, since more than averages "
                    f"and reshapes lies between, or its weights are used elsewhere; {works}"
                )
            compared = True
        return edit

    return Place(found.kept, write)


def _behind(model: nn.Module, layer: str, place: nn.Module) -> Place:
    """Return the place in the identity that `with_identity` has put behind a layer."""
    held: dict[str, Tensor] = dict(place.named_buffers())
    if held["directions"].any():
        raise ValueError(
            f"layer: {layer!r} holds a removal already; undo it, or remove the classes in one plan"
        )

    def write(removal: Removal) -> ModelEdit:
        values = {"mean": removal.mean}
        for name in ("directions", "readers"):
            part = getattr(removal, name)
            values[name] = nn.functional.pad(part, (0, len(part) - part.shape[1]))
        return _whole(model, {f"{layer}.ablation.{name}": one for name, one in values.items()})

    return Place("a layer", write)


def _in_layer(model: nn.Module, layer: str, module: Any) -> Place:
    """Return the place in the layer's own weights, W x + b → (I − U Vᵀ)(W x + b) + U Vᵀμ."""

    def write(removal: Removal) -> ModelEdit:
        M, W = removal.matrix, module.weight.detach().cpu().double()
        values = {f"{layer}.weight": W - (M @ W.flatten(1)).view_as(W)}
        if module.bias is not None:
            b = module.bias.detach().cpu().double()
            values[f"{layer}.bias"] = b - M @ (b - removal.mean)
        elif (M @ removal.mean).any():
            raise ValueError("it has no bias")
        return _whole(model, values)

    return Place(f"folded into {layer!r}", write)


def _whole(model: nn.Module, values: dict[str, Tensor]) -> ModelEdit:
    entries = {name: (torch.arange(new.numel()), new.flatten()) for name, new in values.items()}
    return ModelEdit.between(model, entries, {})


def _logits(model: nn.Module, edit: ModelEdit, inputs: Inputs) -> Tensor:
    with preserved(model, weights=True), torch.no_grad():
        return predict(edit.apply(model), inputs).double()
