"""What every room uses: data, layers, guard, files, checks, errors."""

from xai_edit.core.errors import EditFileError, EditMismatchError, NonFiniteError, UnknownLayerError

__all__ = [
    "EditFileError",
    "EditMismatchError",
    "NonFiniteError",
    "UnknownLayerError",
]
