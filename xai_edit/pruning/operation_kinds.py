"""Operations of ATen by what they do with the channels of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRODUCTS = frozenset(["mul"])
_ALIKE_NAMES = """
    clone detach alias lift_fresh _to_copy dropout native_dropout contiguous zeros_like ones_like
    empty_like full_like rand_like randn_like tril triu hardtanh hardswish leaky_relu elu celu
    log_sigmoid_forward softplus nan_to_num
"""
ALIKE = frozenset(_ALIKE_NAMES.split())
"""Operations on one tensor that leave its shape as it is."""
_MOVING_NAMES = """
    view _unsafe_view _reshape_alias permute transpose t select slice unsqueeze squeeze expand split
    split_with_sizes unbind cat stack roll flip index index_select gather repeat unfold diagonal
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle repeat_interleave
    movedim narrow
"""
MOVING = frozenset(_MOVING_NAMES.split())
"""Operations that move values or take some of them."""
NUMBERED = frozenset(["index", "index_select", "gather"])
"""Operations that take values by number."""
CUTTING = frozenset(
    ["view", "_unsafe_view", "slice", "narrow", "select", "split", "split_with_sizes", *NUMBERED]
)
_REDUCTION_NAMES = """
    sum mean amax amin max min var std var_mean std_mean linalg_vector_norm norm logsumexp prod any
    all _softmax _log_softmax softmax log_softmax cumsum sort topk argmax argmin median
"""
REDUCTIONS = frozenset(_REDUCTION_NAMES.split())
_AVERAGING_NAMES = """
    mean var std var_mean std_mean native_layer_norm native_group_norm
"""
AVERAGING = frozenset(_AVERAGING_NAMES.split())
"""Operations that divide by the number of channels if they run along them."""
PER_CHANNEL = {
    f"{name}{n}d{more}": n
    for n in (1, 2, 3)
    for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool")
    for more in ("", "_with_indices")
} | {
    **{f"adaptive_max_pool{n}d": n for n in (1, 2, 3)},
    **{f"upsample_{kind}1d": 1 for kind in ("nearest", "linear", "nearest_exact")},
    **{f"upsample_{kind}2d": 2 for kind in ("nearest", "bilinear", "bicubic", "nearest_exact")},
    **{f"_upsample_{kind}2d_aa": 2 for kind in ("bilinear", "bicubic")},
    **{f"upsample_{kind}3d": 3 for kind in ("nearest", "trilinear")},
    **{f"{kind}_pad{n}d": n for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "mkldnn_max_pool2d": 2,
}
"""Operations on the positions of each channel, with the number of axes of positions."""


def reduced_axes(arguments: Mapping[str, Any], ndim: int) -> list[int]:
    """Return the axes that a reduction runs along, all where it names none."""
    axes = arguments.get("dim")
    if axes is None or axes == []:
        return [*range(ndim)]
    return [axis % ndim for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
