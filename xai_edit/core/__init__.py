"""Data, layers, traces, the guard, files, checks and errors, used by every room."""

from xai_edit.core.errors import EditFileError, EditMismatchError, NonFiniteError, UnknownLayerError

__all__ = [
    "EditFileError",
    "EditMismatchError",
    "NonFiniteError",
    "UnknownLayerError",
]
