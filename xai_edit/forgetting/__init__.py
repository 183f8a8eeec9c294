"""Zero-shot class unlearning by neuronal path perturbation (Chang et al.)."""

from xai_edit.forgetting.path_perturbation import PathPerturbation
from xai_edit.forgetting.share_sweep import ShareSweep

__all__ = ["PathPerturbation", "ShareSweep"]
