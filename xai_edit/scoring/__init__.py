"""Relevance of units and edges: scorers and their sums over a data set."""

from xai_edit.scoring.captum_layer import CaptumLayer
from xai_edit.scoring.criteria import Activation, Random, Taylor, WeightMagnitude
from xai_edit.scoring.edge_relevance import EdgeRelevance, edge_relevance
from xai_edit.scoring.unit_scores import UnitScores, score_units

__all__ = [
    "Activation",
    "CaptumLayer",
    "EdgeRelevance",
    "Random",
    "Taylor",
    "UnitScores",
    "WeightMagnitude",
    "edge_relevance",
    "score_units",
]
