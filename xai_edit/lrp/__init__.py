"""Layer-wise relevance propagation: rules, composites, canonizers for Zennit."""

from xai_edit.lrp.accelerated import accelerated
from xai_edit.lrp.check_lrp import LRPCheck, check_lrp
from xai_edit.lrp.functional_canonizer import FunctionalCanonizer
from xai_edit.lrp.lrp import LRP, Scorer
from xai_edit.lrp.patterns import Patterns, fit_patterns

__all__ = [
    "LRP",
    "FunctionalCanonizer",
    "LRPCheck",
    "Patterns",
    "Scorer",
    "accelerated",
    "check_lrp",
    "fit_patterns",
]
