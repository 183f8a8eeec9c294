"""Class unlearning: neuronal path perturbation (Chang et al.), and subspaces of a class."""

from xai_edit.forgetting.class_subspace import ClassSubspaceRemoval
from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.forgetting.share_sweep import ShareSweep

__all__ = ["ClassSubspaceRemoval", "PathPerturbation", "ShareSweep"]
