"""What pages are made of: tables, pictures, curves, map sliders."""

from xai_edit.report.before_after import BeforeAfter, before_after_maps

__all__ = [
    "BeforeAfter",
    "before_after_maps",
]
