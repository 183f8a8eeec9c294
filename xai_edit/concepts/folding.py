"""An ablation that stays: folded into the weights of the layer that reads the activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xai_edit.attribution.layers import TRANSPOSED, WEIGHTED
from xai_edit.attribution.trace import trace
from xai_edit.concepts.ablation import ablated
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.guard import preserved

# Of the largest logit: what rounding in another order may cost.
ROUNDING = 1e-4


def fold_ablation(
    model: nn.Module, layer: str, subspaces: Subspaces, indices: Sequence[int], inputs: Tensor
) -> dict[str, Tensor]:
    """Return parameters with which the model computes what it computes under `ablated`.

    With P = I − U Uᵀ the ablated activations are P a + U Uᵀμ, so a layer W a + b that reads them
    becomes (W P) a + (b + W U Uᵀμ). The model is only read.

    Parameters
    ----------
    model : nn.Module
    layer, subspaces, indices
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
    if (
        reader.bias is None
        or getattr(reader, "groups", 1) > 1
        or reader.weight.shape[1] != len(subspaces.mean)
    ):
        raise ValueError(
            f"layer {layer!r}: its ablation cannot be folded into {name!r}, which is grouped, has "
            "no bias or reads other channels"
        )
    U = subspaces.directions(indices)
    weight = reader.weight.detach().to(U)
    W = weight.movedim(1, -1)
    folded = (W - W @ U @ U.T).movedim(-1, 1)
    constant = (W @ (U @ (U.T @ subspaces.mean))).reshape(len(W), -1).sum(1)
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
