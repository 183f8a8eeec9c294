"""LRP rule presets by their published names, and the canonizers a network needs for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from zennit import composites as zc
from zennit import rules as zr
from zennit.canonizers import Canonizer, NamedMergeBatchNorm
from zennit.core import Composite
from zennit.torchvision import ResNetBasicBlock, ResNetBottleneck, ResNetCanonizer
from zennit.types import BatchNorm, Convolution

from xai_edit.attribution.layers import CONVOLUTIONS, following_batch_norms


def epsilon(*, epsilon: float = 1e-6) -> Composite:
    """Epsilon rule on every convolution and linear layer (Bach et al. 2015, Eq. 58)."""
    rule = zr.Epsilon(epsilon=epsilon)
    return _composite([(Convolution, rule), (nn.Linear, rule)])


def gamma_epsilon(*, gamma: float = 0.25, epsilon: float = 1e-6) -> Composite:
    """Gamma rule on convolutions, epsilon on linear layers (Montavon et al. 2019, Table 10.1)."""
    return _composite(
        [(Convolution, zr.Gamma(gamma=gamma)), (nn.Linear, zr.Epsilon(epsilon=epsilon))]
    )


def alpha1_beta0(*, epsilon: float = 1e-6) -> Composite:
    """α=1, β=0 on convolutions, epsilon on linear layers (Bach et al. 2015, Eq. 60)."""
    return _composite(
        [(Convolution, zr.AlphaBeta(alpha=1.0, beta=0.0)), (nn.Linear, zr.Epsilon(epsilon=epsilon))]
    )


def _composite(rules: list[tuple[Any, Any]]) -> Composite:
    return zc.LayerMapComposite(layer_map=zc.layer_map_base() + rules)


PRESETS: dict[str, Callable[..., Composite]] = {
    "epsilon": epsilon,
    "gamma+epsilon": gamma_epsilon,
    "alpha1beta0": alpha1_beta0,
    "alpha2beta1": zc.EpsilonAlpha2Beta1,
    "epsilon-plus": zc.EpsilonPlus,
    "epsilon-gamma-box": zc.EpsilonGammaBox,
}
"""Preset name → a function of the rule's own parameters that returns a Zennit composite."""


def preset(name: str, **parameters: Any) -> Composite:
    """Return a new Zennit composite for a published rule name.

    Parameters
    ----------
    name : str
        One of `PRESETS`.
    **parameters
        The rule's own, e.g. ``gamma=0.1``; ``epsilon-gamma-box`` needs ``low`` and ``high``, the
        bounds of the normalised input (numbers, or tensors that broadcast to a batch).

    Raises
    ------
    ValueError
        If the name is not a preset.
    TypeError
        If a parameter is not one of the rule's, or a needed one is missing.
    """
    if name not in PRESETS:
        raise ValueError(
            f"composite: {name!r} is not a preset; give a Zennit composite or one of {[*PRESETS]}"
        )
    try:
        inspect.signature(PRESETS[name]).bind(**parameters)
    except TypeError as problem:
        raise TypeError(f"composite: preset {name!r}: {problem}") from None
    return PRESETS[name](**parameters)


def choose_canonizers(model: nn.Module, inputs: Tensor) -> list[Canonizer]:
    """Return the Zennit canonizers that LRP needs on ``model``.

    Residual blocks of torchvision need their sum as a module of its own: without it a resnet18
    hands out 2⁸ times the logit. Batch norms are merged into the layer whose output they read,
    found by one forward pass of a sample: in a model's own order of modules the neighbour before a
    batch norm may be another layer, and the merge would explain another network.
    """
    if has_residual_blocks(model):
        return [ResNetCanonizer()]
    if not any(isinstance(module, BatchNorm) for module in model.modules()):
        return []
    weighted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
    ]
    # Without running statistics there is nothing fixed that could be merged.
    pairs = [
        ([name], norm)
        for name, norm in following_batch_norms(model, inputs[:1], weighted).items()
        if model.get_submodule(norm).running_mean is not None
    ]
    return [NamedMergeBatchNorm(pairs)] if pairs else []


def has_residual_blocks(model: nn.Module) -> bool:
    """Tell whether the model has torchvision's residual blocks."""
    return any(
        isinstance(module, (ResNetBasicBlock, ResNetBottleneck)) for module in model.modules()
    )
