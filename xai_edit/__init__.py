"""Turn attributions of Zennit and Captum into edits of a model, and prove what each edit did."""

try:
    import torchvision as _torchvision  # noqa: F401  # Zennit imports it
except (ImportError, RuntimeError, OSError, AttributeError) as _problem:
    raise ImportError(
        "xai_edit needs a torchvision that matches the installed torch, and this one cannot be "
        f"imported ({type(_problem).__name__}: {_problem}); install both anew together, for "
        "example with: pip install --upgrade --force-reinstall torch torchvision"
    ) from None

from xai_edit._version import __version__
from xai_edit.attribution.captum_layer import CaptumLayer
from xai_edit.attribution.check import ModelCheck, check_model
from xai_edit.attribution.criteria import Activation, Random, Taylor, WeightMagnitude
from xai_edit.attribution.edge_relevance import EdgeRelevance, edge_relevance
from xai_edit.attribution.edges import EdgeScores, edge_scores
from xai_edit.attribution.fast import accelerated
from xai_edit.attribution.functional import FunctionalCanonizer
from xai_edit.attribution.importance import TorchPruningImportance
from xai_edit.attribution.patterns import Patterns, fit_patterns
from xai_edit.attribution.scorers import LRP, Scorer
from xai_edit.attribution.units import UnitScores, score_units
from xai_edit.baselines.amnesiac import amnesiac
from xai_edit.baselines.boundary import boundary_expanding, boundary_shrink
from xai_edit.baselines.dampening import SelectiveSynapticDampening
from xai_edit.baselines.directions import DirectionRemoval
from xai_edit.baselines.finetuning import negative_gradient, random_labels, retrain
from xai_edit.baselines.groups import erm, group_dro, jtt
from xai_edit.baselines.masktune import masktune
from xai_edit.baselines.recorder import AmnesiacLog
from xai_edit.baselines.recovery import FineTuning
from xai_edit.baselines.robustness import LastLayerRetraining
from xai_edit.baselines.training import Trained, Unlearned
from xai_edit.baselines.unlearning import LogitMask
from xai_edit.concepts.ablation import ablated, with_ablation
from xai_edit.concepts.cav import CAV
from xai_edit.concepts.choosing import Choice, choose_spurious
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.contrast import ContrastivePCA
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.explanations import strongest_samples, subspace_maps
from xai_edit.concepts.features import Features
from xai_edit.concepts.folding import fold_ablation
from xai_edit.concepts.pca import PCA
from xai_edit.concepts.prca import PRCA
from xai_edit.concepts.predictiveness import Predictiveness, predictiveness
from xai_edit.concepts.subspaces import Subspaces
from xai_edit.datasets.planting import Colours, Mark, Shortcut
from xai_edit.edits.edit import Change, ModelEdit
from xai_edit.edits.fictitious import FictitiousClass
from xai_edit.edits.head import HeadFeatures, collect_head_features
from xai_edit.edits.leace import LEACE
from xai_edit.edits.path import PathPerturbation
from xai_edit.edits.pruning import ConceptAwarePruning, RelevancePruning
from xai_edit.edits.rate_sweep import RateSweep
from xai_edit.edits.share_sweep import ShareSweep
from xai_edit.edits.single_weight import SingleWeight
from xai_edit.edits.structural import to_smaller
from xai_edit.errors import EditFileError, EditMismatchError, NonFiniteError, UnknownLayerError
from xai_edit.evaluation.comparison import Comparison, compare_scorers
from xai_edit.evaluation.deletion import DeletionCurve, deletion_curve
from xai_edit.evaluation.demographics import Demographics
from xai_edit.evaluation.group_figures import Accuracy, GroupIntervals
from xai_edit.evaluation.groups import evaluate_groups, evaluate_head
from xai_edit.evaluation.sizes import Size, SizeComparison, compare_sizes
from xai_edit.evaluation.unlearning import evaluate_unlearning
from xai_edit.evaluation.unlearning_figures import Unlearning
from xai_edit.report.before_after import BeforeAfter, before_after_maps
from xai_edit.resources import Cost, measured

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
    "to_smaller",
    "with_ablation",
]
