"""Zennit composites by the published names of their rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from zennit import composites as zc
from zennit import rules as zr
from zennit.core import Composite
from zennit.types import Convolution

from xai_edit.lrp import pattern_rules


def epsilon(*, epsilon: float = 1e-6) -> Composite:
    """Epsilon rule on every convolution and linear layer (Bach et al. 2015, Eq. 58).

    Examples
    --------
    >>> from xai_edit.lrp.presets import epsilon
    >>> xe.score_units(model, data, xe.LRP(epsilon(epsilon=0.01)), target=1).top("fc1", count=1)
    tensor([1])
    """
    rule = zr.Epsilon(epsilon=epsilon)
    return _composite([(Convolution, rule), (nn.Linear, rule)], epsilon)


def gamma_epsilon(*, gamma: float = 0.25, epsilon: float = 1e-6) -> Composite:
    """Gamma rule on convolutions, epsilon on linear layers (Montavon et al. 2019, Table 10.1).

    Examples
    --------
    >>> from xai_edit.lrp.presets import gamma_epsilon
    >>> xe.score_units(model, data, xe.LRP(gamma_epsilon(gamma=0.1)), target=1).top("fc1", count=1)
    tensor([1])
    """
    return _composite(
        [(Convolution, zr.Gamma(gamma, epsilon)), (nn.Linear, zr.Epsilon(epsilon))], epsilon
    )


def alpha1_beta0(*, epsilon: float = 1e-6) -> Composite:
    """α=1, β=0 on convolutions, epsilon on linear layers (Bach et al. 2015, Eq. 60).

    Examples
    --------
    >>> from xai_edit.lrp.presets import alpha1_beta0
    >>> xe.LRP(alpha1_beta0()).heatmap(model, images[:8], labels[:8]).min()
    tensor(0.)
    """
    return _composite(
        [(Convolution, zr.AlphaBeta(1.0, 0.0, epsilon)), (nn.Linear, zr.Epsilon(epsilon))], epsilon
    )


def _composite(rules: list[tuple[Any, Any]], epsilon: float) -> Composite:
    return zc.LayerMapComposite(layer_map=zc.layer_map_base(stabilizer=epsilon) + rules)


PRESETS: dict[str, Callable[..., Composite]] = {
    "epsilon": epsilon,
    "gamma+epsilon": gamma_epsilon,
    "alpha1beta0": alpha1_beta0,
    "alpha2beta1": zc.EpsilonAlpha2Beta1,
    "epsilon-plus": zc.EpsilonPlus,
    "epsilon-gamma-box": zc.EpsilonGammaBox,
    "patternnet": pattern_rules.patternnet,
    "patternnet+-": pattern_rules.patternnet_two_component,
    "patternattribution": pattern_rules.patternattribution,
    "patternattribution+-": pattern_rules.patternattribution_two_component,
}
"""Functions that return a Zennit composite, by preset name."""


def preset(name: str, **parameters: Any) -> Composite:
    """Return a new Zennit composite for one of the names in `PRESETS`.

    ``epsilon-gamma-box`` needs ``low`` and ``high``, the bounds of the normalised input (numbers,
    or tensors that broadcast to a batch), and the pattern rules need ``patterns`` from
    `xai_edit.fit_patterns`. An unknown name is a ValueError, a wrong or missing parameter a
    TypeError.

    Examples
    --------
    >>> from xai_edit.lrp.presets import preset
    >>> composite = preset("epsilon-gamma-box", low=0.0, high=1.0)
    >>> xe.LRP(composite).heatmap(model, images[:8], labels[:8]).shape
    torch.Size([8, 3, 4, 4])
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
