"""Layer-wise relevance propagation: rules, composites, canonizers for Zennit."""

from xai_edit.lrp.accelerated import accelerated
from xai_edit.lrp.check_model import ModelCheck, check_model
from xai_edit.lrp.functional_canonizer import FunctionalCanonizer
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.lrp.patterns import Patterns, fit_patterns

__all__ = [
    "LRP",
    "FunctionalCanonizer",
    "ModelCheck",
    "Patterns",
    "Scorer",
    "accelerated",
    "check_model",
    "fit_patterns",
]
