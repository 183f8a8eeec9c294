"""Relevance pruning and concept-aware pruning: the edits."""

from xai_edit.pruning.fine_tuning import FineTuning
from xai_edit.pruning.operators import ConceptAwarePruning, RelevancePruning
from xai_edit.pruning.to_smaller import to_smaller
from xai_edit.pruning.torch_pruning_importance import TorchPruningImportance

__all__ = [
    "ConceptAwarePruning",
    "FineTuning",
    "RelevancePruning",
    "TorchPruningImportance",
    "to_smaller",
]
