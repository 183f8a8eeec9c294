"""Features that a model's classes depend on, found without labels of a feature."""

from xai_edit.discovery.discover import discover
from xai_edit.discovery.evidence import Evidence, Figure
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.discovery.marks import Mark, Marks

__all__ = ["Evidence", "Figure", "Finding", "Findings", "Mark", "Marks", "discover"]
