"""Figures about a model or an edit; nothing here edits."""

from xai_edit.core.cost import Cost, measured
from xai_edit.evaluation.accuracy import Accuracy, Demographics, GroupIntervals
from xai_edit.evaluation.check_model import check_model
from xai_edit.evaluation.compare import Comparison, compare_scorers
from xai_edit.evaluation.deletion_curve import DeletionCurve, deletion_curve
from xai_edit.evaluation.evaluate_groups import evaluate_groups, evaluate_head
from xai_edit.evaluation.evaluate_unlearning import evaluate_unlearning
from xai_edit.evaluation.model_check import Figure, ModelCheck, Part
from xai_edit.evaluation.sizes import Size, SizeComparison, compare_sizes
from xai_edit.evaluation.unlearning_figures import Unlearning, unlearning_table

__all__ = [
    "Accuracy",
    "Comparison",
    "Cost",
    "DeletionCurve",
    "Demographics",
    "Figure",
    "GroupIntervals",
    "ModelCheck",
    "Part",
    "Size",
    "SizeComparison",
    "Unlearning",
    "check_model",
    "compare_scorers",
    "compare_sizes",
    "deletion_curve",
    "evaluate_groups",
    "evaluate_head",
    "evaluate_unlearning",
    "measured",
    "unlearning_table",
]
