"""Image sets, planted shortcuts, a small network."""

from xai_edit.datasets.shortcuts import Colours, Mark, Shortcut

__all__ = [
    "Colours",
    "Mark",
    "Shortcut",
]
