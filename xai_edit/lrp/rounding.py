"""Distinguish float32 rounding from canonizers that change the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from xai_edit.core.errors import out_of_memory
from xai_edit.core.outputs import relative_error

SAME_IN_DOUBLE = 1e-5
"""Tolerance for float64 logits under canonizers, as a share of the largest."""
TOLERATED = 0.05
"""The rounding of float32 logits, as a share of the largest, beyond which relevance is refused.

On networks of timm with random weights: at 0.8 % (inception_v3) heat maps by the epsilon rule are
9 % off those in float64, at 26 % (inception_v4) 95 %.
"""


def rounding(
    plain: Tensor, canonized: Tensor, in_double: Callable[[], tuple[Tensor, Tensor]]
) -> float | None:
    """Return the error of float32 logits as a share of the largest, or None if it is no rounding.

    Parameters
    ----------
    plain, canonized : Tensor, shape (1, classes)
        Logits without and with canonizers, which differ.
    in_double : callable
        Computes both in float64.
    """
    if plain.dtype != torch.float32:
        return None
    try:
        exact, again = in_double()
    except (RuntimeError, TypeError, ValueError) as problem:  # the model cannot run in float64
        if out_of_memory(problem):
            raise
        return None
    if not relative_error(again, exact) <= SAME_IN_DOUBLE:
        return None
    return max(relative_error(one.to(exact), exact) for one in (plain, canonized))


def report_rounding(error: float) -> None:
    """Raise ValueError about an error of rounding beyond `TOLERATED`, else warn."""
    message = (
        f"model: rounding in float32 changes its logits by {error:.1%} of the largest, and "
        "relevance by more; score copy.deepcopy(model).double() with inputs in float64"
    )
    if error > TOLERATED:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)
