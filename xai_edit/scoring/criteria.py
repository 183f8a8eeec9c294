"""Scorers that users compare with: Taylor, activation, weight magnitude, random."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import whole_number
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import (
    INPUT_SUFFIX,
    TRANSPOSED,
    differentiable,
    gradients_at,
    layer_module,
    run,
    sum_positions,
    tapped,
)
from xai_edit.core.outputs import as_logits, outputs_of
from xai_edit.core.targets import Targets, classes_of, weights_of


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor criterion: activation times gradient of the log-likelihood.

    Positive where the unit is evidence for the class. The published criterion (Molchanov et al.
    2017, Eq. 8) takes the absolute value of each sample's sum over positions: ``aggregate="abs"``.

    Examples
    --------
    >>> scores = xe.score_units(model, data, xe.Taylor(), layers=["conv"], aggregate="abs")
    >>> scores.top("conv", count=1)
    tensor([3])
    """

    behind_norm = True

    def __call__(
        self, model: nn.Module, inputs: Inputs, targets: Targets, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return −activation × loss gradient of each unit, shape (samples, units) per layer."""
        axes = unit_axes(model, inputs, layers)
        with preserved(model), torch.enable_grad(), tapped(model, layers) as tap:
            outputs = outputs_of(run(model, differentiable(inputs)), inputs)
            classes = classes_of(targets, outputs)
            likelihood = -nn.functional.cross_entropy(as_logits(outputs), classes, reduction="sum")
            gradients = gradients_at(tap, layers, likelihood, torch.ones_like(likelihood))
        return {
            name: sum_positions(tap.values[name] * gradients[name], axes[name]) for name in layers
        }


@dataclass(frozen=True)
class Activation:
    """Mean rectified activation of each unit over its positions (Molchanov et al. 2017, §2.2).

    Examples
    --------
    >>> scores = xe.score_units(model, data, xe.Activation(), layers=["conv"])
    >>> scores.top("conv", count=4).sort().values
    tensor([0, 1, 2, 3])
    """

    behind_norm = True

    def __call__(
        self, model: nn.Module, inputs: Inputs, targets: Targets, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the mean activation of each unit, shape (samples, units) per layer."""
        axes = unit_axes(model, inputs, layers)
        with preserved(model), torch.no_grad(), tapped(model, layers) as tap:
            weights_of(targets, outputs_of(run(model, inputs), inputs))  # raises for a wrong class
        tap.require(layers)
        values = {name: tap.values[name].clamp(min=0) for name in layers}
        summed = {name: sum_positions(values[name], axes[name]) for name in layers}
        return {n: sums * (sums.numel() / values[n].numel()) for n, sums in summed.items()}


@dataclass(frozen=True)
class WeightMagnitude:
    """L1 norm of each unit's incoming weights (Li et al. 2017). Needs no data.

    Examples
    --------
    >>> xe.score_units(model, None, xe.WeightMagnitude(), layers=["conv"])["conv"][:5]
    tensor([ 1.,  1.,  1., 48.,  3.], dtype=torch.float64)
    """

    needs_data = False

    def __call__(
        self, model: nn.Module, inputs: Any, targets: Any, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return one norm a unit, shape (1, units) per layer."""
        weights = {name: unit_weights(model, name).detach() for name in layers}
        return {name: values.abs().flatten(1).sum(1)[None] for name, values in weights.items()}


@dataclass(frozen=True)
class Random:
    """A uniform random number a unit, which depends only on the seed and the layer's name.

    Examples
    --------
    >>> one, again = (xe.score_units(model, None, xe.Random(seed=1)) for _ in range(2))
    >>> one["conv"].equal(again["conv"])
    True
    """

    seed: int = 0
    needs_data = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number(self.seed, "seed", least=None))

    def __call__(
        self, model: nn.Module, inputs: Any, targets: Any, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return one number a unit, shape (1, units) per layer."""
        scores = {}
        for name in layers:
            generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
            weights = unit_weights(model, name)
            numbers = torch.rand(1, len(weights), generator=generator)
            dtype = torch.promote_types(numbers.dtype, weights.dtype)
            scores[name] = numbers.to(weights.device, dtype)
        return scores


def unit_weights(model: nn.Module, name: str) -> Tensor:
    """Return a layer's weight with its outgoing units first, or the incoming for ``:input``."""
    module = layer_module(model, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"layer {name!r} ({type(module).__name__}) has no weights of its units")
    if isinstance(module, TRANSPOSED) == name.endswith(INPUT_SUFFIX):
        return weight
    # Each group has its own block of the second axis.
    groups = getattr(module, "groups", 1)
    by_group: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return by_group.flatten(0, 1)
