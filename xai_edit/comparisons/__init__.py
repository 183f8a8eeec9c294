"""Comparison methods, which use no relevance."""

from xai_edit.comparisons.amnesiac import AmnesiacLog, amnesiac
from xai_edit.comparisons.dampening import SelectiveSynapticDampening
from xai_edit.comparisons.fine_tuned import (
    boundary_expanding,
    boundary_shrink,
    negative_gradient,
    random_labels,
    retrain,
)
from xai_edit.comparisons.last_layer_retraining import LastLayerRetraining
from xai_edit.comparisons.leace import LEACE
from xai_edit.comparisons.logit_mask import LogitMask

__all__ = [
    "LEACE",
    "AmnesiacLog",
    "LastLayerRetraining",
    "LogitMask",
    "SelectiveSynapticDampening",
    "amnesiac",
    "boundary_expanding",
    "boundary_shrink",
    "negative_gradient",
    "random_labels",
    "retrain",
]
