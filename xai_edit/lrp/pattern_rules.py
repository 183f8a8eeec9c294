"""PatternNet and PatternAttribution as Zennit composites (Kindermans et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import BasicHook, Composite, ParamMod

from xai_edit.core.layers import CONVOLUTIONS
from xai_edit.lrp.patterns import Patterns, require_weight

Weights = Callable[[str, Tensor, Tensor], Tensor]  # of a layer by name, from w and a


def patternnet(patterns: Patterns, *, canonizers: Sequence[Canonizer] = ()) -> Composite:
    """PatternNet S(x), w → a: the signal that a neuron detects, projected back to the input.

    Parameters
    ----------
    patterns : Patterns
        From `fit_patterns` on the same network.
    canonizers : sequence of zennit.canonizers.Canonizer
        To merge batch norms; not needed with `xai_edit.LRP`.

    Notes
    -----
    Patterns are longer than weights and overlap more, so signals would overflow in a ResNet-50.
    Each layer's a is therefore multiplied by one number that makes its gain about that of w. In a
    chain of layers this changes the scale of the signals at a layer and nothing else. Where
    branches are added it also changes the share of each; the paper has no such networks.
    """
    return _composite(patterns.linear, _scaled_signal(), canonizers)


def patternnet_two_component(
    patterns: Patterns, *, canonizers: Sequence[Canonizer] = ()
) -> Composite:
    """PatternNet S(x)₊₋, w → a₊: like `patternnet`, with w → a where no ReLU follows.

    a₋ belongs to inactive neurons, and a ReLU lets nothing back to them.
    """
    return _composite(_two_component(patterns), _scaled_signal(), canonizers)


def patternattribution(patterns: Patterns, *, canonizers: Sequence[Canonizer] = ()) -> Composite:
    """PatternAttribution S(x), w → w ⊙ a: how much each part of the signal contributes.

    Parameters as for `patternnet`; nothing is scaled. As wᵀa = 1, a neuron propagates all of its
    relevance, except for the part on a convolution's padding.
    """
    return _composite(patterns.linear, _attribution, canonizers)


def patternattribution_two_component(
    patterns: Patterns, *, canonizers: Sequence[Canonizer] = ()
) -> Composite:
    """PatternAttribution S(x)₊₋, w → w ⊙ a₊: with w → w ⊙ a where no ReLU follows."""
    return _composite(_two_component(patterns), _attribution, canonizers)


def _scaled_signal() -> Weights:
    scales: dict[str, Tensor] = {}  # per layer, computed once

    def scaled_signal(name: str, w: Tensor, a: Tensor) -> Tensor:
        if name not in scales:
            scales[name] = _scale(w.flatten(1), a.flatten(1))
        return a * scales[name].to(a)

    return scaled_signal


def _attribution(_: str, w: Tensor, a: Tensor) -> Tensor:
    return w * a


def _scale(w: Tensor, a: Tensor) -> Tensor:
    """Return the factor that gives a, shape (neurons, weights), about the gain of w.

    It is a product of two ratios: of the lengths, with the median over neurons, since some barely
    active neurons have huge patterns; and of the largest singular values at unit lengths.
    """
    lengths = w.norm(dim=1) / a.norm(dim=1)
    overlaps = _gain(nn.functional.normalize(w)) / _gain(nn.functional.normalize(a))
    return torch.nan_to_num(lengths.nanmedian() * overlaps)  # NaN: neurons without weights


def _gain(w: Tensor, steps: int = 20) -> Tensor:
    """Return an estimate of the largest singular value by power iteration."""
    v = w[w.norm(dim=1).argmax()]
    for _ in range(steps):
        v = nn.functional.normalize(w.T @ (w @ v), dim=0)
    gain: Tensor = (w @ v).norm()
    return gain


def _two_component(patterns: Patterns) -> dict[str, Tensor]:
    return {
        name: patterns.positive[name] if name in patterns.rectified else a
        for name, a in patterns.linear.items()
    }


def _composite(
    chosen: Mapping[str, Tensor], weights: Weights, canonizers: Sequence[Canonizer]
) -> Composite:
    # ReLUs and max-pooling need no rule: their gradient is the gate and the switch.
    def module_map(_: dict[str, Any], name: str, module: nn.Module) -> BasicHook | None:
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            return None
        require_weight(name, module)
        shape, fitted = tuple(module.weight.shape), name in chosen and tuple(chosen[name].shape)
        if fitted != shape:
            raise ValueError(
                f"patterns: layer {name!r} needs some of shape {shape}, the shape of its weight; "
                f"there are {fitted or 'none'}; fit them on this model"
            )

        def modified(w: Tensor, _: str) -> Tensor:
            a = chosen[name].to(w)
            _require_unit(name, w, a)
            return weights(name, w, a)

        return BasicHook(
            param_modifiers=[ParamMod(modified, zero_params=["bias"])],
            gradient_mapper=lambda gradient, outputs: [gradient],
            reducer=lambda inputs, gradients: gradients[0],
        )

    return Composite(module_map=module_map, canonizers=list(canonizers))


def _require_unit(name: str, w: Tensor, a: Tensor) -> None:
    """Raise ValueError unless wᵀa = 1, which holds for the weights of the fit."""
    parts, tolerance = (w * a).flatten(1), max(1e-3, 16 * torch.finfo(w.dtype).eps)
    off = (parts.sum(1) - 1).abs() > tolerance * parts.abs().sum(1).clamp(min=1)
    if (off & w.flatten(1).any(1)).any():  # a neuron without weights has a pattern of zeros
        raise ValueError(
            f"patterns: those of layer {name!r} are of other weights (wᵀa is not 1); fit them on "
            "the model as it is now, and give the composite the canonizers of its batch norms"
        )
