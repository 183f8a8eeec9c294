"""Edits down to the weight: which entries of which tensors, and their values before and after."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import torch

from xai_edit.edits.edit import ModelEdit
from xai_edit.report.html import table

TENSORS, ENTRIES = 8, 3  # shown of an edit, and of each tensor
COLUMNS = ["tensor", "weights changed", "entry", "before", "after"]


def weights(folder: Path, edits: Mapping[str, str]) -> str:
    """Return the first weights that each edit changes.

    Parameters
    ----------
    folder : Path
        Of the run.
    edits : mapping
        Name of a method → path of its edit in ``folder``.

    Raises
    ------
    EditFileError
        If a file is there and is no whole edit.
    """
    told = "".join(_edit(folder, name, file) for name, file in edits.items())
    return (
        "<h2>Weight by weight</h2><p>An edit is a list of weights with their old and new values, "
        f"in a file. Here are the first {ENTRIES} of each tensor; all can be applied and taken "
        f"back with <code>xai-edit apply</code> and <code>undo</code>.</p>{told or '<p>none</p>'}"
    )


def _edit(folder: Path, name: str, file: str) -> str:
    if not (folder / file).is_file():
        return f"<p>{escape(name)}: <code>{escape(file)}</code> is not beside this page</p>"
    edit = ModelEdit.load(folder / file)
    rows = []
    for tensor, change in [*edit.changes.items()][:TENSORS]:
        of = f"{len(change):,} of {torch.Size(change.shape).numel():,}"
        for index, old, new in zip(
            change.index[:ENTRIES], change.old[:ENTRIES], change.new[:ENTRIES], strict=True
        ):
            entry = [int(axis) for axis in torch.unravel_index(index, change.shape)]
            rows.append([tensor, of, entry, f"{old.item():.6g}", f"{new.item():.6g}"])
    count = len(edit.changes)
    summary = (
        f"{name}: {edit.size:,} {'weight' if edit.size == 1 else 'weights'} of "
        f"{count} {'tensor' if count == 1 else 'tensors'}"
    )
    return (
        f"<details><summary>{escape(summary)}</summary>"
        + table(f"{len(rows)} of {edit.size:,}: {file}", COLUMNS, rows)
        + "</details>"
    )
