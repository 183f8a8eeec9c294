"""The file of an edit on the command line: told in words, applied to weights, taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from xai_edit.edits.edit import ModelEdit
from xai_edit.files import require_folder, write_safetensors

KIND = "xai_edit.weights"


def told(edit: ModelEdit) -> dict[str, Any]:
    """Return what an edit changes and where it came from, as JSON values.

    Parameters
    ----------
    edit : ModelEdit

    Returns
    -------
    dict
        ``weights`` changed in all; by parameter the ``shape``, the number of ``entries`` changed,
        how many of them become ``zero``, and the ``largest`` change; the ``origin``.
    """
    changes = {
        name: {
            "shape": [*change.shape],
            "entries": len(change),
            "zero": int((change.new == 0).sum()),
            "largest": float((change.new.double() - change.old.double()).abs().max()),
        }
        for name, change in edit.changes.items()
    }
    return {"weights": edit.size, "changes": changes, "origin": edit.origin}


def require_new(out: Path) -> None:
    """Raise where weights cannot be written: there is a file, or no folder.

    Raises
    ------
    FileExistsError, FileNotFoundError, ValueError
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out: {str(out)!r} given; weights are written as NAME.safetensors")
    if require_folder(out).exists():
        raise FileExistsError(f"out: {out} is there already; give another name")


def write_edited(model: nn.Module, edit: ModelEdit, out: Path, *, undo: bool) -> None:
    """Apply an edit to a model, or take it back, and write the weights to a new file, atomically.

    Raises
    ------
    EditMismatchError
        If the edit is not one of this model, or is in it already (or not yet); nothing is written.
    """
    if undo:
        edit.undo(model)
    else:
        edit.apply(model)
    header = json.dumps({"undone" if undo else "applied": edit.origin.get("operator", "edit")})
    write_safetensors(out, model.state_dict(), KIND, header)
