# The public names, each imported from its module when it is first used; see __init__.py.
from . import testing
from ._version import __version__
from .comparisons.amnesiac import AmnesiacLog, amnesiac
from .comparisons.dampening import SelectiveSynapticDampening
from .comparisons.fine_tuned import (
    boundary_expanding,
    boundary_shrink,
    negative_gradient,
    random_labels,
    retrain,
)
from .comparisons.last_layer_retraining import LastLayerRetraining
from .comparisons.leace import LEACE
from .comparisons.logit_mask import LogitMask
from .concepts.ablation import ablated, fold_ablation, with_ablation
from .concepts.choose import Choice, choose_spurious
from .concepts.collect import collect_features
from .concepts.drsa import DRSA
from .concepts.explanations import strongest_samples, subspace_maps
from .concepts.features import Features
from .concepts.finders import CAV, PCA, PRCA, ContrastivePCA
from .concepts.predictiveness import Predictiveness, predictiveness
from .concepts.subspaces import Subspaces
from .core.cost import Cost, measured
from .core.errors import EditFileError, EditMismatchError, NonFiniteError, UnknownLayerError
from .datasets.shortcuts import Colours, Mark, Shortcut
from .edits.model_edit import Change, ModelEdit
from .evaluation.accuracy import Accuracy, Demographics, GroupIntervals
from .evaluation.compare import Comparison, compare_scorers
from .evaluation.deletion_curve import DeletionCurve, deletion_curve
from .evaluation.evaluate_groups import evaluate_groups, evaluate_head
from .evaluation.evaluate_unlearning import evaluate_unlearning
from .evaluation.sizes import Size, SizeComparison, compare_sizes
from .evaluation.unlearning_figures import Unlearning
from .forgetting.path_perturbation import PathPerturbation
from .forgetting.share_sweep import ShareSweep
from .last_layer.fictitious_class import FictitiousClass
from .last_layer.head import HeadFeatures, collect_head_features
from .last_layer.rate_sweep import RateSweep
from .last_layer.sca_scores import EdgeScores, edge_scores
from .last_layer.single_weight import SingleWeight
from .lrp.accelerated import accelerated
from .lrp.check_model import ModelCheck, check_model
from .lrp.functional_canonizer import FunctionalCanonizer
from .lrp.lrp import LRP, Scorer
from .lrp.patterns import Patterns, fit_patterns
from .pruning.fine_tuning import FineTuning
from .pruning.operators import ConceptAwarePruning, RelevancePruning
from .pruning.to_smaller import to_smaller
from .pruning.torch_pruning_importance import TorchPruningImportance
from .report.before_after import BeforeAfter, before_after_maps
from .scoring.captum_layer import CaptumLayer
from .scoring.criteria import Activation, Random, Taylor, WeightMagnitude
from .scoring.edge_relevance import EdgeRelevance, edge_relevance
from .scoring.unit_scores import UnitScores, score_units

__all__ = [
    "CAV",
    "DRSA",
    "LEACE",
    "LRP",
    "PCA",
    "PRCA",
    "Accuracy",
    "Activation",
    "AmnesiacLog",
    "BeforeAfter",
    "CaptumLayer",
    "Change",
    "Choice",
    "Colours",
    "Comparison",
    "ConceptAwarePruning",
    "ContrastivePCA",
    "Cost",
    "DeletionCurve",
    "Demographics",
    "EdgeRelevance",
    "EdgeScores",
    "EditFileError",
    "EditMismatchError",
    "Features",
    "FictitiousClass",
    "FineTuning",
    "FunctionalCanonizer",
    "GroupIntervals",
    "HeadFeatures",
    "LastLayerRetraining",
    "LogitMask",
    "Mark",
    "ModelCheck",
    "ModelEdit",
    "NonFiniteError",
    "PathPerturbation",
    "Patterns",
    "Predictiveness",
    "Random",
    "RateSweep",
    "RelevancePruning",
    "Scorer",
    "SelectiveSynapticDampening",
    "ShareSweep",
    "Shortcut",
    "SingleWeight",
    "Size",
    "SizeComparison",
    "Subspaces",
    "Taylor",
    "TorchPruningImportance",
    "UnitScores",
    "UnknownLayerError",
    "Unlearning",
    "WeightMagnitude",
    "__version__",
    "ablated",
    "accelerated",
    "amnesiac",
    "before_after_maps",
    "boundary_expanding",
    "boundary_shrink",
    "check_model",
    "choose_spurious",
    "collect_features",
    "collect_head_features",
    "compare_scorers",
    "compare_sizes",
    "deletion_curve",
    "edge_relevance",
    "edge_scores",
    "evaluate_groups",
    "evaluate_head",
    "evaluate_unlearning",
    "fit_patterns",
    "fold_ablation",
    "measured",
    "negative_gradient",
    "predictiveness",
    "random_labels",
    "retrain",
    "score_units",
    "strongest_samples",
    "subspace_maps",
    "testing",
    "to_smaller",
    "with_ablation",
]
