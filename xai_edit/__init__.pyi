# The public names, each imported from its module when it is first used; see __init__.py.
from . import testing
from ._version import __version__
from .attribution.captum_layer import CaptumLayer
from .attribution.check import ModelCheck, check_model
from .attribution.criteria import Activation, Random, Taylor, WeightMagnitude
from .attribution.edge_relevance import EdgeRelevance, edge_relevance
from .attribution.edges import EdgeScores, edge_scores
from .attribution.fast import accelerated
from .attribution.functional import FunctionalCanonizer
from .attribution.importance import TorchPruningImportance
from .attribution.patterns import Patterns, fit_patterns
from .attribution.scorers import LRP, Scorer
from .attribution.units import UnitScores, score_units
from .baselines.amnesiac import amnesiac
from .baselines.boundary import boundary_expanding, boundary_shrink
from .baselines.dampening import SelectiveSynapticDampening
from .baselines.directions import DirectionRemoval
from .baselines.finetuning import negative_gradient, random_labels, retrain
from .baselines.groups import erm, group_dro, jtt
from .baselines.masktune import masktune
from .baselines.recorder import AmnesiacLog
from .baselines.recovery import FineTuning
from .baselines.robustness import LastLayerRetraining
from .baselines.training import Trained, Unlearned
from .baselines.unlearning import LogitMask
from .concepts.ablation import ablated, with_ablation
from .concepts.cav import CAV
from .concepts.choosing import Choice, choose_spurious
from .concepts.collect import collect_features
from .concepts.contrast import ContrastivePCA
from .concepts.drsa import DRSA
from .concepts.explanations import strongest_samples, subspace_maps
from .concepts.features import Features
from .concepts.folding import fold_ablation
from .concepts.pca import PCA
from .concepts.prca import PRCA
from .concepts.predictiveness import Predictiveness, predictiveness
from .concepts.subspaces import Subspaces
from .datasets.planting import Colours, Mark, Shortcut
from .edits.edit import Change, ModelEdit
from .edits.fictitious import FictitiousClass
from .edits.head import HeadFeatures, collect_head_features
from .edits.leace import LEACE
from .edits.path import PathPerturbation
from .edits.pruning import ConceptAwarePruning, RelevancePruning
from .edits.rate_sweep import RateSweep
from .edits.share_sweep import ShareSweep
from .edits.single_weight import SingleWeight
from .edits.structural import to_smaller
from .errors import EditFileError, EditMismatchError, NonFiniteError, UnknownLayerError
from .evaluation.comparison import Comparison, compare_scorers
from .evaluation.deletion import DeletionCurve, deletion_curve
from .evaluation.demographics import Demographics
from .evaluation.group_figures import Accuracy, GroupIntervals
from .evaluation.groups import evaluate_groups, evaluate_head
from .evaluation.sizes import Size, SizeComparison, compare_sizes
from .evaluation.unlearning import evaluate_unlearning
from .evaluation.unlearning_figures import Unlearning
from .report.before_after import BeforeAfter, before_after_maps
from .resources import Cost, measured

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
    "DirectionRemoval",
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
    "Trained",
    "UnitScores",
    "UnknownLayerError",
    "Unlearned",
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
    "erm",
    "evaluate_groups",
    "evaluate_head",
    "evaluate_unlearning",
    "fit_patterns",
    "fold_ablation",
    "group_dro",
    "jtt",
    "masktune",
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
