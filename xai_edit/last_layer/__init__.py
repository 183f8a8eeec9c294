"""Single-weight fictitious class removal (Hakemi et al.): edits of the last layer."""

from xai_edit.last_layer.counterfactual import CounterfactualRetraining
from xai_edit.last_layer.counterfactual_tuning import CounterfactualTuning
from xai_edit.last_layer.fictitious_class import FictitiousClass
from xai_edit.last_layer.head import HeadFeatures, collect_head_features
from xai_edit.last_layer.rate_sweep import RateSweep
from xai_edit.last_layer.sca_scores import EdgeScores, edge_scores
from xai_edit.last_layer.single_weight import SingleWeight

__all__ = [
    "CounterfactualRetraining",
    "CounterfactualTuning",
    "EdgeScores",
    "FictitiousClass",
    "HeadFeatures",
    "RateSweep",
    "SingleWeight",
    "collect_head_features",
    "edge_scores",
]
