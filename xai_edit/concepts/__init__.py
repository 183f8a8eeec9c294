"""Concept subspaces of a layer: features, finders, ablation."""

from xai_edit.concepts.ablation import ablated, fold_ablation, with_ablation, with_identity
from xai_edit.concepts.choose import Candidate, Choice, choose_spurious
from xai_edit.concepts.collect import collect_features
from xai_edit.concepts.drsa import DRSA
from xai_edit.concepts.explanations import strongest_samples, subspace_maps
from xai_edit.concepts.features import Features
from xai_edit.concepts.finders import CAV, PCA, PRCA, ContrastivePCA
from xai_edit.concepts.predictiveness import Predictiveness, predictiveness
from xai_edit.concepts.presence import Presence, presence
from xai_edit.concepts.subspaces import Subspaces

__all__ = [
    "CAV",
    "DRSA",
    "PCA",
    "PRCA",
    "Candidate",
    "Choice",
    "ContrastivePCA",
    "Features",
    "Predictiveness",
    "Presence",
    "Subspaces",
    "ablated",
    "choose_spurious",
    "collect_features",
    "fold_ablation",
    "predictiveness",
    "presence",
    "strongest_samples",
    "subspace_maps",
    "with_ablation",
    "with_identity",
]
