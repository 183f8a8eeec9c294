# The public names, each imported when it is first used; see __init__.py.
from . import (
    comparisons,
    concepts,
    core,
    datasets,
    discovery,
    edits,
    evaluation,
    forgetting,
    last_layer,
    lrp,
    pruning,
    report,
    scoring,
    testing,
)
from ._version import __version__
from .comparisons.last_layer_retraining import LastLayerRetraining
from .comparisons.logit_mask import LogitMask
from .concepts.ablation import ablated, fold_ablation, with_ablation, with_identity
from .concepts.choose import choose_spurious
from .concepts.collect import collect_features
from .concepts.drsa import DRSA
from .concepts.finders import CAV, PCA, PRCA, ContrastivePCA
from .concepts.predictiveness import predictiveness
from .concepts.presence import Presence
from .concepts.subspaces import Subspaces
from .core.outputs import one_label, outputs_as
from .discovery.discover import discover
from .discovery.findings import Findings
from .discovery.marks import Marks
from .edits.model_edit import ModelEdit
from .evaluation.check_model import check_model
from .evaluation.compare import compare_scorers
from .evaluation.deletion_curve import deletion_curve
from .evaluation.evaluate_groups import evaluate_groups, evaluate_head
from .evaluation.evaluate_unlearning import evaluate_unlearning
from .evaluation.sizes import compare_sizes
from .forgetting.class_subspace import ClassSubspaceRemoval
from .forgetting.path_perturbation import PathPerturbation
from .last_layer.counterfactual import CounterfactualRetraining
from .last_layer.counterfactual_tuning import CounterfactualTuning
from .last_layer.fictitious_class import FictitiousClass
from .last_layer.head import collect_head_features
from .last_layer.single_weight import SingleWeight
from .lrp.functional_canonizer import FunctionalCanonizer
from .lrp.lrp import LRP
from .lrp.patterns import fit_patterns
from .pruning.fine_tuning import FineTuning
from .pruning.operators import ConceptAwarePruning, RelevancePruning
from .pruning.to_smaller import to_smaller
from .report.before_after import before_after_maps
from .scoring.captum_layer import CaptumLayer
from .scoring.criteria import Activation, Random, Taylor, WeightMagnitude
from .scoring.edge_relevance import edge_relevance
from .scoring.unit_scores import UnitScores, score_units

__all__ = [
    "CAV",
    "DRSA",
    "LRP",
    "PCA",
    "PRCA",
    "Activation",
    "CaptumLayer",
    "ClassSubspaceRemoval",
    "ConceptAwarePruning",
    "ContrastivePCA",
    "CounterfactualRetraining",
    "CounterfactualTuning",
    "FictitiousClass",
    "Findings",
    "FineTuning",
    "FunctionalCanonizer",
    "LastLayerRetraining",
    "LogitMask",
    "Marks",
    "ModelEdit",
    "PathPerturbation",
    "Presence",
    "Random",
    "RelevancePruning",
    "SingleWeight",
    "Subspaces",
    "Taylor",
    "UnitScores",
    "WeightMagnitude",
    "__version__",
    "ablated",
    "before_after_maps",
    "check_model",
    "choose_spurious",
    "collect_features",
    "collect_head_features",
    "compare_scorers",
    "compare_sizes",
    "comparisons",
    "concepts",
    "core",
    "datasets",
    "deletion_curve",
    "discover",
    "discovery",
    "edge_relevance",
    "edits",
    "evaluate_groups",
    "evaluate_head",
    "evaluate_unlearning",
    "evaluation",
    "fit_patterns",
    "fold_ablation",
    "forgetting",
    "last_layer",
    "lrp",
    "one_label",
    "outputs_as",
    "predictiveness",
    "pruning",
    "report",
    "score_units",
    "scoring",
    "testing",
    "to_smaller",
    "with_ablation",
    "with_identity",
]
